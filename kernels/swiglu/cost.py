"""Backward reads what forward read and the result's gradient, and writes gradients of what forward read."""

from torch import Tensor

from mdit.kernels.cost import Cost, size


def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Cost:
    rows, read = ab.numel() // ab.shape[-1], size(ab, weight_DF, bias_D)
    out = rows * len(weight_DF) * ab.itemsize
    return Cost(read + out, 2 * read + out, 2 * rows * weight_DF.numel())
