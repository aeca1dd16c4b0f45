"""Expert choice: every expert takes its K best tokens of an image (Zhou et al. 2022; MicroDiT section 2).

    p_NTE = softmax over experts of the router's logits
    weights_NEK, tokens_NEK = the K largest p_NTE of every (image, expert), K = int(capacity_factor * T / E)
    out_NTD = sum over (e, k) with tokens_NEK[n, e, k] = t of weights_NEK[n, e, k] * gelu(x_NTD[n, t] @ w1_e) @ w2_e

in four calls, between which the first matmul is a plain bmm (M = N * K):

    routing = route(logits_NTE, K)
    hidden_EMF = bmm(gather_tokens(x_NTD, routing), w1_EDF)
    out_NTD = scatter_tokens(gelu_bmm(hidden_EMF, w2_EFD, routing.weights_NEK), routing)

Tokens move by index, never through an (N, E, K, T) one-hot product, which costs O(T^2) memory and 2 to 13 % of the
model's FLOPs. `slots_NTE`, the inverse of `tokens_NEK`, makes every sum over experts a gather too: each token collects
its rows in the order of the experts and is written once. An index_add would use atomics on a GPU, so that a
token chosen by three experts got other bits on every run. Moving tokens there and back are each other's transpose, so
one pair of kernels is both, forward and backward.

The router weight is a factor of the GELU's output instead of the expert's (w * (a @ w2) = (w * a) @ w2): there it costs
no pass of its own, its gradient <gelu(h), da> falls out of GELU's backward, and the experts' outputs need not be kept.
"""

from torch import Tensor

from mdit.kernels.dispatch import run
from mdit.kernels.expert_choice import reference
from mdit.kernels.expert_choice.reference import Routing

__all__ = ["Routing", "gather_tokens", "gelu_bmm", "route", "scatter_tokens"]


def route(logits_NTE: Tensor, tokens_per_expert: int) -> Routing:
    """Softmax in float32 (float64 for float64), then the K largest of every (image, expert), in descending order.

    Among equal probabilities Triton takes the lower token first; in PyTorch the order is arbitrary. NaN counts as the
    largest number. Differentiable through the weights alone. Saves logits and slots.
    """
    assert 0 <= tokens_per_expert <= logits_NTE.shape[1], (tokens_per_expert, logits_NTE.shape)
    return run("expert_choice", reference.route, logits_NTE, tokens_per_expert)


def gather_tokens(x_NTD: Tensor, routing: Routing) -> Tensor:
    """-> (E, N * K, D): each expert's tokens in one block, as a batched matmul over experts wants them. Saves no x."""
    assert x_NTD.shape[:2] == routing.slots_NTE.shape[:2], (x_NTD.shape, routing.slots_NTE.shape)
    return run("expert_choice", reference.gather_tokens, x_NTD, routing)


def gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Tensor:
    """bmm(gelu(h), w2), each row times its router weight -> (E, M, D), with the exact (erf) GELU.

    Row m = n * K + k of expert e has weights_NEK[n, e, k]. Triton saves its inputs; gelu(h), which w2's gradient needs,
    is computed again in the same pass over h and da that gives h's gradient and the weights'.
    """
    (n, experts, k), (_, m, _) = weights_NEK.shape, h_EMF.shape
    assert experts == len(h_EMF) == len(w2_EFD) and m == n * k, (h_EMF.shape, w2_EFD.shape, weights_NEK.shape)
    return run("expert_choice", reference.gelu_bmm, h_EMF, w2_EFD, weights_NEK)


def scatter_tokens(y_EMD: Tensor, routing: Routing) -> Tensor:
    """-> (N, T, D): sum of the rows that the experts have for each token, zero where no expert chose it. Saves no y.

    Triton adds in float32 and rounds once.
    """
    n, experts, k = routing.tokens_NEK.shape
    assert y_EMD.shape[:2] == (experts, n * k), (y_EMD.shape, routing.tokens_NEK.shape)
    return run("expert_choice", reference.scatter_tokens, y_EMD, routing)
