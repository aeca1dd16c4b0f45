"""Backward starts from the sum x' that forward wrote. Where x' is x itself it is not written, but has a gradient."""

from torch import Tensor

from mdit.kernels.cost import Cost, size


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
    x, index = size(x_NTD), size(keep_NK)
    rows = x if keep_NK is None else x * keep_NK.shape[1] // x_NTD.shape[1]
    streams, written = 1 + (y_NTD is not None), 1 + (y_NTD is not None or keep_NK is not None)
    vectors, gated = size(gate_ND, shift_ND, scale_ND, weight_D), gate_ND is not None
    forward = (streams + written) * rows + vectors + index
    saved = (1 + gated) * rows + size(gate_ND, scale_ND, weight_D)  # x' and, for the gate's gradient, y
    return Cost(forward, saved + 2 * rows + (1 + gated) * x + vectors + index)
