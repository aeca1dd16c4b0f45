"""Expert choice in plain PyTorch, for any floating dtype up to float64: what CPU training runs, and the definition.

The textbook form of the whole layer is mdit.models.moe.ExpertChoiceMoE.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routing(NamedTuple):
    """Which expert takes which tokens.

    weights_NEK  router weights in at least float32, in descending order; the only part that has a gradient
    tokens_NEK   int64, the k-th best token of every (image, expert)
    slots_NTE    int32, its inverse: tokens_NEK[n, e, slots_NTE[n, t, e]] = t, or -1 where expert e does not take t
    """

    weights_NEK: Tensor
    tokens_NEK: Tensor
    slots_NTE: Tensor


def route(logits_NTE: Tensor, tokens_per_expert: int) -> Routing:
    probabilities = logits_NTE.softmax(dim=-1, dtype=torch.promote_types(logits_NTE.dtype, torch.float32))
    weights_NEK, tokens_NEK = probabilities.transpose(1, 2).topk(tokens_per_expert, dim=-1)
    ranks = torch.arange(tokens_per_expert, dtype=torch.int32, device=logits_NTE.device).unsqueeze(-1)
    nobody = torch.full_like(logits_NTE, -1, dtype=torch.int32)
    slots_NTE = nobody.scatter(1, tokens_NEK.transpose(1, 2), ranks.expand(len(logits_NTE), -1, logits_NTE.shape[2]))
    return Routing(weights_NEK, tokens_NEK, slots_NTE)


def gather_tokens(x_NTD: Tensor, routing: Routing) -> Tensor:
    return _Move.apply(x_NTD, routing.tokens_NEK, routing.slots_NTE, True)


def gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Tensor:
    weights_EM1 = weights_NEK.transpose(0, 1).reshape(len(h_EMF), -1, 1)
    return torch.bmm(F.gelu(h_EMF), w2_EFD) * weights_EM1.to(h_EMF.dtype)


def scatter_tokens(y_EMD: Tensor, routing: Routing) -> Tensor:
    return _Move.apply(y_EMD, routing.tokens_NEK, routing.slots_NTE, False)


class _Move(torch.autograd.Function):
    """Rows of tokens `to_experts`, or back and added up. Each is the other's gradient: index_select's own adds row by
    row, which takes ten times as long on a CPU and falls out otherwise every time on a GPU."""

    @staticmethod
    def forward(ctx, x: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor, to_experts: bool) -> Tensor:
        ctx.save_for_backward(tokens_NEK, slots_NTE)
        ctx.to_experts = to_experts
        return (_take_rows if to_experts else _sum_rows)(x, tokens_NEK, slots_NTE)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return (_sum_rows if ctx.to_experts else _take_rows)(gradient, *ctx.saved_tensors), None, None, None


def _take_rows(x_NTD: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor) -> Tensor:
    rows = _rows(tokens_NEK, x_NTD.shape[1])
    return x_NTD.flatten(0, 1).index_select(0, rows).unflatten(0, (tokens_NEK.shape[1], -1))


def _sum_rows(y_EMD: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor) -> Tensor:
    """Each token's rows of y, in the order of the experts, added up -> (N, T, D): one bag a token."""
    n, num_tokens, _ = slots_NTE.shape
    by_token = _rows(tokens_NEK, num_tokens).argsort(stable=True)
    rows_NT = (slots_NTE >= 0).sum(dim=-1)
    first_row = rows_NT.flatten().cumsum(0) - rows_NT.flatten()
    return F.embedding_bag(by_token, y_EMD.flatten(0, 1), first_row, mode="sum").unflatten(0, (n, num_tokens))


def _rows(tokens_NEK: Tensor, num_tokens: int) -> Tensor:
    """(E * N * K,): where in x_NTD.flatten(0, 1) each expert's tokens are."""
    first_N = torch.arange(len(tokens_NEK), device=tokens_NEK.device) * num_tokens
    return (tokens_NEK + first_N.view(-1, 1, 1)).transpose(0, 1).flatten()
