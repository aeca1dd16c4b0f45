"""Backward of moving tokens is moving them back; of the routing only the weights have a gradient."""

from torch import Tensor

from mdit.kernels.cost import Cost, size
from mdit.kernels.expert_choice import Routing

WEIGHT, TOKEN, SLOT = 4, 8, 4  # bytes of a routing's numbers


def route(logits_NTE: Tensor, tokens_per_expert: int) -> Cost:
    n, tokens, experts = logits_NTE.shape
    routing = n * experts * (tokens_per_expert * (WEIGHT + TOKEN) + tokens * SLOT)
    return Cost(size(logits_NTE) + routing, 2 * size(logits_NTE) + routing)


def gather_tokens(x_NTD: Tensor, routing: Routing) -> Cost:
    moved = size(x_NTD, routing.tokens_NEK) + routing.tokens_NEK.numel() * x_NTD.shape[2] * x_NTD.itemsize
    return Cost(moved, moved)


def scatter_tokens(y_EMD: Tensor, routing: Routing) -> Cost:
    n, tokens, _ = routing.slots_NTE.shape
    moved = size(y_EMD, routing.slots_NTE) + n * tokens * y_EMD.shape[2] * y_EMD.itemsize
    return Cost(moved, moved)


def gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Cost:
    read, numbers = size(h_EMF, w2_EFD), h_EMF.shape[0] * h_EMF.shape[1] * w2_EFD.shape[2]
    out = numbers * h_EMF.itemsize + size(weights_NEK)
    return Cost(read + out, 2 * read + out, 2 * numbers * h_EMF.shape[2])
