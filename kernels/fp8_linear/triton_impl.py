"""The ops of fp8_linear: kernels that quantise, around torch._scaled_mm (cuBLAS).

torch._scaled_mm with scales by row: A (M, K) row-major, B (K, O) column-major, both float8_e4m3fn; scales float32 and
contiguous, (M, 1) and (1, O); K and O multiples of 16; the result in any wider dtype. Needs compute capability 8.9; on
9.0 with CUDA 12.9 or newer it is cuBLAS that multiplies, before a CUTLASS kernel. It runs on a CPU as well.

Shapes: M tokens, K inputs, O outputs, E experts.
"""

import torch
from torch import Tensor

from mdit.kernels.custom_op import custom_op, like
from mdit.kernels.expert_choice import Routing
from mdit.kernels.expert_choice.triton_impl import gathered, scattered
from mdit.kernels.fp8_linear.reference import InFloat8, Quantised
from mdit.kernels.fp8_linear.triton_quantise import (
    by_columns,
    by_rows,
    gated_by_rows,
    gated_gradient,
    gathered_by_rows,
    gelu_by_rows,
    gelu_gradient,
    new_quantised,
)
from mdit.kernels.launch import matrix
from mdit.kernels.patch_mixing.triton_impl import add_norm_modulate

FAST_ACCUMULATION = True  # see this folder's docstring


def _product(a: Quantised, b: Quantised, out: Tensor) -> Tensor:
    """(M, K), (O, K) -> a @ b^T (M, O), into `out`."""
    return torch._scaled_mm(
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale.t(),
        out_dtype=out.dtype,
        use_fast_accum=FAST_ACCUMULATION,
        out=out,
    )


def _products(a: Quantised, b: Quantised, out_EMO: Tensor) -> Tensor:
    """One after the other: there are few experts, and each has thousands of tokens."""
    for a_values, a_scale, b_values, b_scale, out in zip(*a, *b, out_EMO):
        _product(Quantised(a_values, a_scale), Quantised(b_values, b_scale), out)
    return out_EMO


def _known_rows(x: Tensor, values: Tensor | None, scale: Tensor | None) -> Quantised:
    """(..., K) -> (M, K)"""
    known = by_rows(x) if values is None or scale is None else Quantised(values, scale)
    return Quantised(*(part.view(-1, part.shape[-1]) for part in known))


@custom_op("mdit::fp8_quantise", fake=lambda x: tuple(new_quantised(x, *x.shape)))
def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(by_rows(x))


@custom_op("mdit::fp8_linear_backward", fake=like(1, 2))
def _linear_backward(d_out: Tensor, x: Tensor, weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx, dweight"""
    d_out_MO, dx = d_out.reshape(-1, d_out.shape[-1]), x.new_empty(x.shape)
    _product(by_rows(d_out_MO), by_columns(weight_OK), dx.view(-1, x.shape[-1]))
    return dx, d_out_MO.t() @ x.reshape(-1, x.shape[-1])


@custom_op(
    "mdit::fp8_linear",
    fake=lambda x, weight_OK, values, scale: x.new_empty(*x.shape[:-1], weight_OK.shape[0]),
    save=lambda x, weight_OK, values, scale, out: (x, weight_OK),
    backward=_linear_backward,
)
def _linear(x: Tensor, weight_OK: Tensor, values: Tensor | None, scale: Tensor | None) -> Tensor:
    """`values`, `scale`: x in float8, where somebody has written it."""
    x_MK = _known_rows(x, values, scale)
    out_MO = x.new_empty(len(x_MK.values), len(weight_OK))
    return _product(x_MK, by_rows(weight_OK), out_MO).view(*x.shape[:-1], -1)


def _new_gradients(d_out, x, weight_XD, weight_DF, ab_MX, has_bias):
    shapes = [x.shape, weight_XD.shape, weight_DF.shape, *([weight_XD.shape[:1]] if has_bias else [])]
    return [x.new_empty(shape) for shape in shapes]


@custom_op("mdit::fp8_swiglu_backward", fake=_new_gradients)
def _swiglu_backward(
    d_out: Tensor, x: Tensor, weight_XD: Tensor, weight_DF: Tensor, ab_MX: Tensor, has_bias: bool
) -> list[Tensor]:
    """-> dx, dweight_XD, dweight_DF and, where there is one, dbias_X"""
    d_out_MD, m, dx = matrix(d_out), len(ab_MX), x.new_empty(x.shape)
    u_MF = d_out_MD.new_empty(m, weight_DF.shape[1])
    _product(by_rows(d_out_MD), by_columns(weight_DF), u_MF)  # its gradient, until the kernel overwrites it
    dab_MX, dab8_MX = gated_gradient(ab_MX, u_MF)
    _product(dab8_MX, by_columns(weight_XD), dx.view(m, -1))
    gradients = [dx, dab_MX.t() @ matrix(x), d_out_MD.t() @ u_MF]
    return [*gradients, dab_MX.sum(0)] if has_bias else gradients


def _swiglu_gradients(d_out, _, *saved):
    dx, dweight_XD, dweight_DF, *dbias_X = _swiglu_backward(d_out, *saved)
    return dx, dweight_XD, *(dbias_X or [None]), dweight_DF


@custom_op(
    "mdit::fp8_swiglu",
    fake=lambda x, weight_XD, *_: (x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], weight_XD.shape[0])),
    save=lambda x, w12, bias, w3, values, scale, found: (x, w12, w3, found[1], bias is not None),
    backward=_swiglu_gradients,
)
def _swiglu(
    x: Tensor, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, values: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> the result without w3's bias, and a and b (M, 2 F)"""
    x_MD = _known_rows(x, values, scale)
    ab_MX = _product(x_MD, by_rows(weight_XD), x.new_empty(len(x_MD.values), len(weight_XD)))
    if bias_X is not None:
        ab_MX += bias_X
    out_MD = x.new_empty(len(ab_MX), len(weight_DF))
    return _product(gated_by_rows(ab_MX), by_rows(weight_DF), out_MD).view(x.shape), ab_MX


@custom_op("mdit::fp8_experts_backward", fake=like(1, 2, 3, 4))
def _experts_backward(
    d_out_NTD: Tensor, x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor, tokens_NEK: Tensor,
    slots_NTE: Tensor, hidden_EMF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dw1, dw2, dweights"""
    (experts, m, _), dim = hidden_EMF.shape, x_NTD.shape[2]
    dy_EMD, dhidden_EMF = x_NTD.new_empty(experts, m, dim), hidden_EMF.new_empty(hidden_EMF.shape)
    dy8_EMD = gathered_by_rows(d_out_NTD, tokens_NEK, dy_EMD)
    _products(dy8_EMD, by_rows(w2_EFD), dhidden_EMF)  # the active one's, until the kernel puts the hidden one's there
    active_EMF, dweights_NEK, dhidden8_EMF = gelu_gradient(hidden_EMF, dhidden_EMF, weights_NEK)
    dw2_EFD = torch.bmm(active_EMF.transpose(1, 2), dy_EMD)
    x_EMD = gathered(x_NTD, tokens_NEK, slots_NTE)
    dw1_EDF = torch.bmm(x_EMD.transpose(1, 2), dhidden_EMF)
    dx_EMD = _products(dhidden8_EMF, by_rows(w1_EDF), dy_EMD)  # which nobody needs any more
    return scattered(dx_EMD, tokens_NEK, slots_NTE), dw1_EDF, dw2_EFD, dweights_NEK


def _new_experts(x_NTD, w1_EDF, w2_EFD, weights_NEK, tokens_NEK, slots_NTE):
    n, experts, k = weights_NEK.shape
    return x_NTD.new_empty(x_NTD.shape), x_NTD.new_empty(experts, n * k, w1_EDF.shape[2])


@custom_op(
    "mdit::fp8_experts",
    fake=_new_experts,
    save=lambda *inputs_and_found: (*inputs_and_found[:-1], inputs_and_found[-1][1]),
    backward=lambda d_out_NTD, _, *saved: _experts_backward(d_out_NTD, *saved),
)
def _experts(
    x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the result, and the hidden layer before its GELU (E, M, F)"""
    n, experts, k = weights_NEK.shape
    hidden_EMF = x_NTD.new_empty(experts, n * k, w1_EDF.shape[2])
    _products(gathered_by_rows(x_NTD, tokens_NEK), by_columns(w1_EDF), hidden_EMF)
    out_EMD = x_NTD.new_empty(experts, n * k, x_NTD.shape[2])
    _products(gelu_by_rows(hidden_EMF, weights_NEK), by_columns(w2_EFD), out_EMD)
    return scattered(out_EMD, tokens_NEK, slots_NTE), hidden_EMF


def in_float8(x: Tensor) -> InFloat8:
    return InFloat8(x, *_quantise(x.detach()))


def fp8_add_norm_modulate(*arguments) -> tuple[Tensor, InFloat8]:
    x_NTD, *in_float8 = add_norm_modulate(*arguments, fp8=True)
    return x_NTD, InFloat8(*in_float8)


def fp8_linear(x: Tensor | InFloat8, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    x, *known = x if isinstance(x, InFloat8) else (x, None, None)
    return _plus(_linear(x, weight_OK, *known), bias_O)


def fp8_swiglu(
    x: Tensor | InFloat8, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    x, *known = x if isinstance(x, InFloat8) else (x, None, None)
    return _plus(_swiglu(x, weight_XD, bias_X, weight_DF, *known)[0], bias_D)


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Tensor:
    return _experts(x_NTD, w1_EDF, w2_EFD, *routing)[0]


def _plus(out: Tensor, bias_O: Tensor | None) -> Tensor:
    return out if bias_O is None else out + bias_O
