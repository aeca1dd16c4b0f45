"""Matmuls of float8 operands: x @ weight^T and its input's gradient; the weight's gradient stays in x's dtype.

    q(x), s(x) of a row    s = the least power of two with max|x| / s <= 448,  q = float8_e4m3(x / s), ties to even
    forward                out[m, o] = s_m s_o sum_k q(x)[m, k] q(weight)[o, k]      scales by token and output channel
    input's gradient       dx[m, k] = s_m s_k sum_o q(dout)[m, o] q(weight^T)[k, o]  by token and input channel
    weight's gradient      dweight = dout^T @ x, of what was not quantised

This is the scheme that torchao calls "rowwise_with_gw_hp", where however the weight of the input's gradient has one
scale in all. Scales come from the values at hand: there is no state, and a resumed run goes on with the same bits.

Why powers of two: dividing by one is exact. So rounding to four bits is the only error, 3.7 % of every product; Triton
and PyTorch agree in every bit; and what float8 holds already stays as it is. What they cost is half a binade on
average of the 17 that e4m3 has. A row with inf or NaN in it makes its results NaN: a cast that saturates would hide it.

Sums are taken in the tensor cores' fast mode, about 14 bits of precision on Hopper (DeepSeek-V3, arXiv 2412.19437,
section 3.3), at most 2 % of a sum of 4,096 products and so less than what quantisation costs.

An operand is read once and written once at half its size, 3 bytes a value. What a kernel of ours writes for a matmul it
writes in float8 besides, or in float8 only: 1 byte a value. With P16 and P8 the FLOP/s of both kinds of product and B
the bytes/s of memory, a layer of M tokens, K inputs and O outputs gains 4 M K O (1 / P16 - 1 / P8) and loses
3 (M K + M O + 2 K O) / B seconds, forward and backward. At 650 T, 1,100 T and 2.8 T it comes out even where
1 / K + 1 / O + 2 / M = 1 / 425: for M = 16,384 at K = O = 900; 3 % of a layer's time is gained at 1,024 and 12 % at
1,024 x 4,096. Backward keeps the inputs, as without float8.
"""

from torch import Tensor

from mdit.kernels.dispatch import run
from mdit.kernels.expert_choice import Routing
from mdit.kernels.fp8_linear import reference
from mdit.kernels.fp8_linear.reference import InFloat8

__all__ = [
    "MULTIPLE",
    "InFloat8",
    "fp8_add_norm_modulate",
    "fp8_experts",
    "fp8_linear",
    "fp8_swiglu",
    "quantise",
]

MULTIPLE = 16  # torch._scaled_mm wants K and O to be multiples of it


def quantise(x: Tensor) -> InFloat8:
    """x with its rows in float8 beside it, in one pass, for the matmuls that read it."""
    return run("fp8_linear", reference.in_float8, x)


def fp8_add_norm_modulate(x_NTD: Tensor, *arguments: Tensor | float | None) -> tuple[Tensor, InFloat8]:
    """patch_mixing.add_norm_modulate, and h, as it is written, in float8 from the same pass: 1 byte a value, not 3."""
    return run("fp8_linear", reference.fp8_add_norm_modulate, x_NTD, *arguments)


def fp8_linear(x: Tensor | InFloat8, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., O) in x's dtype. Saves x and the weight. An InFloat8 is not quantised again."""
    assert x.shape[-1] == weight_OK.shape[1] and not any(size % MULTIPLE for size in weight_OK.shape), weight_OK.shape
    return run("fp8_linear", reference.fp8_linear, x, weight_OK, bias_O)


def fp8_swiglu(
    x: Tensor | InFloat8, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    """A SwiGLU network, (..., D) -> (..., D): fp8_linear to a and b side by side (X = 2 F), then of silu(a) * b, which
    is written in float8 only. Saves x, a and b and the weights; the gradient of a and b is written in both forms."""
    assert weight_XD.shape == (2 * weight_DF.shape[1], x.shape[-1]), (weight_XD.shape, weight_DF.shape, x.shape)
    assert weight_DF.shape[0] == x.shape[-1] and not any(size % MULTIPLE for size in weight_DF.shape), weight_DF.shape
    return run("fp8_linear", reference.fp8_swiglu, x, weight_XD, bias_X, weight_DF, bias_D)


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Tensor:
    """An expert layer behind its router (mdit.kernels.expert_choice), (N, T, D) -> (N, T, D), both products in float8.

    Rows are quantised as they are gathered, gelu(h) and the hidden layer's gradient as they are computed. Weights stand
    the other way round than in fp8_linear: their scales are by output channel, and by input channel in backward. Saves
    its inputs and h; x is gathered once more in backward.
    """
    experts, (_, dim, width) = routing.weights_NEK.shape[1], w1_EDF.shape
    assert x_NTD.shape[2] == dim and w2_EFD.shape == (experts, width, dim), (x_NTD.shape, w1_EDF.shape, w2_EFD.shape)
    assert x_NTD.shape[:2] == routing.slots_NTE.shape[:2] and len(w1_EDF) == experts, (x_NTD.shape, w1_EDF.shape)
    assert not any(size % MULTIPLE for size in (dim, width)), w1_EDF.shape
    return run("fp8_linear", reference.fp8_experts, x_NTD, w1_EDF, w2_EFD, routing)
