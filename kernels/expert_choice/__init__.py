"""Expert choice: every expert takes its K best tokens of an image (Zhou et al. 2022; MicroDiT section 2).

    p_NTE  = softmax over experts of the router's logits
    g_NEK, index_NEK = the K largest p_NTE of every (image, expert), K = int(capacity_factor * T / E)
    out_NTD = sum over (e, k) with index_NEK[n, e, k] = t of g_NEK[n, e, k] * expert_e(x_NTD[n, t])

Tokens are moved by index (gather, then add), never through an (N, E, K, T) one-hot product: that costs O(T^2) memory
and 2 to 13 % of the model's FLOPs. `reference.py` keeps the one-hot form as the definition that tests compare with.
"""

import torch
from torch import Tensor


def route(logits_NTE: Tensor, tokens_per_expert: int) -> tuple[Tensor, Tensor]:
    """-> (g_NEK router weights in at least float32, index_NEK int64 tokens), in descending order of weight."""
    probabilities = logits_NTE.softmax(dim=-1, dtype=torch.promote_types(logits_NTE.dtype, torch.float32))
    weights_NEK, index_NEK = probabilities.transpose(1, 2).topk(tokens_per_expert, dim=-1)
    return weights_NEK, index_NEK


def gather_tokens(x_NTD: Tensor, index_NEK: Tensor) -> Tensor:
    """-> (E, N * K, D): each expert's tokens in one block, as a batched matmul over experts wants them."""
    return (
        x_NTD.flatten(0, 1)
        .index_select(0, _flat_index(index_NEK, x_NTD.shape[1]))
        .unflatten(0, (index_NEK.shape[1], -1))
    )


def scatter_tokens(y_EMD: Tensor, weights_NEK: Tensor, index_NEK: Tensor, num_tokens: int) -> Tensor:
    """-> (N, T, D): weighted sum of the experts' outputs (M = N * K) at each token, zero where no expert chose it."""
    n, experts, _ = index_NEK.shape
    weighted = y_EMD * weights_NEK.transpose(0, 1).reshape(experts, -1, 1).to(y_EMD.dtype)
    out = y_EMD.new_zeros(n * num_tokens, y_EMD.shape[-1])
    out = out.index_add(0, _flat_index(index_NEK, num_tokens), weighted.flatten(0, 1))
    return out.unflatten(0, (n, num_tokens))


def _flat_index(index_NEK: Tensor, num_tokens: int) -> Tensor:
    """Rows of x.flatten(0, 1), experts outermost."""
    offset = torch.arange(index_NEK.shape[0], device=index_NEK.device) * num_tokens
    return (index_NEK + offset.view(-1, 1, 1)).transpose(0, 1).flatten()
