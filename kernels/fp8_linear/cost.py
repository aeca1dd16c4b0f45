"""Backward reads what forward read and kept and the result's gradient, and writes gradients of what forward read."""

from functools import wraps

from torch import Tensor

from mdit.kernels.cost import Cost, size
from mdit.kernels.expert_choice import Routing
from mdit.kernels.patch_mixing import cost as patch_mixing


@wraps(patch_mixing.add_norm_modulate)
def fp8_add_norm_modulate(x_NTD: Tensor, *arguments) -> Cost:
    found, keep_NK = patch_mixing.add_norm_modulate(x_NTD, *arguments), arguments[-1]
    n, tokens, width = x_NTD.shape
    rows = n * (tokens if keep_NK is None else keep_NK.shape[1])
    return found._replace(forward_bytes=found.forward_bytes + rows * (width + 4))  # values, and a scale for each row


def fp8_linear(x: Tensor, weight_OK: Tensor, bias_O: Tensor | None = None) -> Cost:
    rows, read = x.numel() // x.shape[-1], size(x, weight_OK, bias_O)
    out = rows * len(weight_OK) * x.itemsize
    return Cost(read + out, 2 * read + out, 2 * rows * weight_OK.numel())


def fp8_swiglu(
    x: Tensor, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Cost:
    rows, read = x.numel() // x.shape[-1], size(x, weight_XD, bias_X, weight_DF, bias_D)
    hidden = rows * len(weight_XD) * x.itemsize
    return Cost(read + size(x), 2 * read + size(x) + hidden, 2 * rows * (weight_XD.numel() + weight_DF.numel()))


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Cost:
    read, chosen = size(x_NTD, w1_EDF, w2_EFD), routing.tokens_NEK.numel()
    dim, width = w1_EDF.shape[1:]
    moved = read + size(x_NTD, *routing)
    return Cost(moved, moved + read + chosen * width * x_NTD.itemsize, 4 * chosen * dim * width)
