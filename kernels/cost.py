"""The least that a call of an op must do: for every public function of `mdit.kernels` that models call one of the same
name and arguments, whose tensors need not hold anything."""

from functools import wraps
from typing import NamedTuple

from torch import Tensor

from mdit.kernels.expert_choice import Routing

WEIGHT, TOKEN, SLOT = 4, 8, 4  # bytes of a routing's numbers


class Cost(NamedTuple):
    """Bytes that forward and backward cannot help moving, each tensor once, and FLOPs of forward's products; backward
    has twice as many."""

    forward_bytes: int
    backward_bytes: int
    flops: int = 0


def size(*tensors: Tensor | None) -> int:
    """Bytes of these together."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _cost(read: int, out: int, flops: int = 0, kept: int = 0) -> Cost:
    """Backward reads what forward read and kept besides and the result's gradient, and writes gradients of what forward
    read."""
    return Cost(read + out, 2 * read + out + kept, flops)


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None = None) -> Cost:
    """The table has no gradient."""
    found, table = _attention(size(qkv_NTX), qkv_NTX.chunk(3, dim=-1)[0], qkv_NTX.shape[1]), size(rotary_NTC)
    return found._replace(forward_bytes=found.forward_bytes + table, backward_bytes=found.backward_bytes + table)


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Cost:
    return _attention(size(q_NTA, kv_NLX), q_NTA, kv_NLX.shape[1])


def _attention(read: int, q_NTA: Tensor, keys: int) -> Cost:
    return _cost(read, size(q_NTA), 4 * q_NTA.numel() * keys, kept=size(q_NTA))


def add_norm_modulate(
    x_NTD: Tensor,
    y_NTD: Tensor | None,
    gate_ND: Tensor | None,
    weight_D: Tensor,
    shift_ND: Tensor | None,
    scale_ND: Tensor | None,
    eps: float,
    keep_NK: Tensor | None = None,
) -> Cost:
    """Backward starts from the sum x' that forward wrote. Where it is x itself, only its gradient is written."""
    x, index = size(x_NTD), size(keep_NK)
    rows = x if keep_NK is None else x * keep_NK.shape[1] // x_NTD.shape[1]
    streams, written = 1 + (y_NTD is not None), 1 + (y_NTD is not None or keep_NK is not None)
    vectors, gated = size(gate_ND, shift_ND, scale_ND, weight_D), gate_ND is not None
    forward = (streams + written) * rows + vectors + index
    saved = (1 + gated) * rows + size(gate_ND, scale_ND, weight_D)  # x' and, for the gate's gradient, y
    return Cost(forward, saved + 2 * rows + (1 + gated) * x + vectors + index)


def route(logits_NTE: Tensor, tokens_per_expert: int) -> Cost:
    """The weights alone have a gradient."""
    n, tokens, experts = logits_NTE.shape
    return _cost(size(logits_NTE), n * experts * (tokens_per_expert * (WEIGHT + TOKEN) + tokens * SLOT))


def gather_tokens(x_NTD: Tensor, routing: Routing) -> Cost:
    """Backward moves them back."""
    moved = size(x_NTD, routing.tokens_NEK) + routing.tokens_NEK.numel() * x_NTD.shape[2] * x_NTD.itemsize
    return Cost(moved, moved)


def scatter_tokens(y_EMD: Tensor, routing: Routing) -> Cost:
    n, tokens, _ = routing.slots_NTE.shape
    moved = size(y_EMD, routing.slots_NTE) + n * tokens * y_EMD.shape[2] * y_EMD.itemsize
    return Cost(moved, moved)


def gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Cost:
    numbers = h_EMF.shape[0] * h_EMF.shape[1] * w2_EFD.shape[2]
    out = numbers * h_EMF.itemsize + size(weights_NEK)
    return _cost(size(h_EMF, w2_EFD), out, 2 * numbers * h_EMF.shape[2])


def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Cost:
    rows = ab.numel() // ab.shape[-1]
    out = rows * len(weight_DF) * ab.itemsize
    return _cost(size(ab, weight_DF, bias_D), out, 2 * rows * weight_DF.numel())


def fp8_linear(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Cost:
    return swiglu_linear(x, weight_OK, bias_O)


def fp8_swiglu(
    x: Tensor, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Cost:
    rows, read = x.numel() // x.shape[-1], size(x, weight_XD, bias_X, weight_DF, bias_D)
    hidden = rows * len(weight_XD) * x.itemsize
    return _cost(read, size(x), 2 * rows * (weight_XD.numel() + weight_DF.numel()), kept=hidden)


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Cost:
    chosen, (_, dim, width) = routing.tokens_NEK.numel(), w1_EDF.shape
    hidden = chosen * width * x_NTD.itemsize
    return _cost(size(x_NTD, w1_EDF, w2_EFD), size(x_NTD, *routing), 4 * chosen * dim * width, kept=hidden)


@wraps(add_norm_modulate)
def fp8_add_norm_modulate(x_NTD: Tensor, *arguments) -> Cost:
    found, keep_NK = add_norm_modulate(x_NTD, *arguments), arguments[-1]
    n, tokens, width = x_NTD.shape
    rows = n * (tokens if keep_NK is None else keep_NK.shape[1])
    return found._replace(forward_bytes=found.forward_bytes + rows * (width + 4))  # values, and a scale for each row
