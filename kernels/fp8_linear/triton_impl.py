"""Triton kernels that quantise for fp8_linear, by rows and by columns, around torch._scaled_mm (cuBLAS).

torch._scaled_mm with scales by row: A (M, K) row-major, B (K, O) column-major, both float8_e4m3fn; scales float32 and
contiguous, (M, 1) and (1, O); K and O multiples of 16; the result in any wider dtype. Needs compute capability 8.9; on
9.0 with CUDA 12.9 or newer it is cuBLAS that multiplies, before a CUTLASS kernel. It runs on a CPU as well.

Shapes: M tokens, K inputs, O outputs, E experts; a kernel's own matrix has R rows and C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mdit.kernels.expert_choice import triton_impl as expert_choice
from mdit.kernels.expert_choice.triton_impl import _normal
from mdit.kernels.fp8_linear.reference import InFloat8, Quantised
from mdit.kernels.fp8_linear.rounding import float8, magnitude, quantised, scales
from mdit.kernels.launch import launch
from mdit.kernels.patch_mixing import triton_impl as mixing
from mdit.kernels.registered import registered
from mdit.kernels.swiglu import triton_impl as swiglu

FAST_ACCUMULATION = True  # see this folder's docstring
ELEMENTS = 4096  # of a program's tile


@triton.jit
def _quantise_rows(
    x_ptr, out_ptr, scale_ptr, x_stride, R,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x (R, C) -> float8 (R, C) and scales (R,); a program has whole rows."""
    row, column, inside = _whole_rows(R, C, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    _write_rows(x, out_ptr, scale_ptr, row, column, R, C, INTERPRETED)


@triton.jit
def _quantise_gated(
    ab_ptr, out_ptr, scale_ptr, ab_stride, R,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same of silu(a) * b, rounded to their dtype as if it had been written."""
    row, column, inside = _whole_rows(R, C, BLOCK_R, BLOCK_C)
    a_ptrs = ab_ptr + row * ab_stride + column
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + C, mask=inside, other=0.0).to(tl.float32)
    u = (a * tl.sigmoid(a) * b).to(ab_ptr.dtype.element_ty).to(tl.float32)
    _write_rows(u, out_ptr, scale_ptr, row, column, R, C, INTERPRETED)


@triton.jit
def _quantise_gelu(
    h_ptr, weights_ptr, out_ptr, scale_ptr, M, R,
    C: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The same of weight * gelu(h), rounded so. h (E * M, C); row n * K + k of expert e has weight n, e, k."""
    row, column, inside = _whole_rows(R, C, BLOCK_R, BLOCK_C)
    expert, m = row // M, row % M
    weight = tl.load(weights_ptr + (m // K * E + expert) * K + m % K, mask=row < R, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    p, _ = _normal(h)
    a = (weight * (h * p)).to(h_ptr.dtype.element_ty).to(tl.float32)
    _write_rows(a, out_ptr, scale_ptr, row, column, R, C, INTERPRETED)


@triton.jit
def _whole_rows(R, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows (int64, a column of them), columns and which elements exist of the program's tile."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    return row, column, (row < R) & (column < C)


@triton.jit
def _write_rows(x, out_ptr, scale_ptr, row, column, R, C: tl.constexpr, INTERPRETED: tl.constexpr):
    """Quantises x, float32 and 0 where no element is."""
    values, scale = quantised(x, INTERPRETED)
    tl.store(out_ptr + row * C + column, values, mask=(row < R) & (column < C))
    tl.store(scale_ptr + row, scale, mask=row < R)


@triton.jit
def _quantise_columns(
    x_ptr, out_ptr, scale_ptr, C,
    R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """(E, R, C) -> float8 (E, C, R) and scales (E, C). A program has whole columns, and reads them twice: the second
    time they come from the L2 cache."""
    matrix = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += matrix * R * C
    out_ptr += matrix * R * C
    largest = tl.zeros((BLOCK_C,), tl.int32)
    for start in range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < R) & (column[None, :] < C)
        x = tl.load(x_ptr + row * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(magnitude(x), axis=0))
    scale, inverse = scales(largest)
    tl.store(scale_ptr + matrix * C + column, scale, mask=column < C)
    for start in range(0, R, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)[:, None]
        inside = (row < R) & (column[None, :] < C)
        x = tl.load(x_ptr + row * C + column[None, :], mask=inside, other=0.0).to(tl.float32)
        turned = tl.trans(float8(x * inverse[None, :], INTERPRETED))
        here = column[:, None] * R + start + tl.arange(0, BLOCK_R)[None, :]
        tl.store(out_ptr + here, turned, mask=tl.trans(inside))


def _by_rows(x: Tensor) -> Quantised:
    """(..., R, C), each row over C."""
    x_RC = _matrix(x)
    return _launch_rows(_quantise_rows, x, x_RC, strides=(x_RC.stride(0),))


def _launch_rows(kernel, like: Tensor, *sources: Tensor, strides: tuple[int, ...], **constants: int) -> Quantised:
    """A kernel that makes whole rows of the shape of `like`, from `sources` and what else it wants."""
    width = like.shape[-1]
    rows = like.numel() // width
    out = new_quantised(like)
    block_c = triton.next_power_of_2(width)
    block_r = max(1, ELEMENTS // block_c)
    launch(
        kernel, (-(-rows // block_r),), *sources, *out, *strides, rows,
        C=width, BLOCK_R=block_r, BLOCK_C=block_c, INTERPRETED=knobs.runtime.interpret, **constants,
        num_warps=4 if block_c <= ELEMENTS else 8, num_stages=1,
    )  # fmt: skip
    return out


def _by_columns(x: Tensor) -> Quantised:
    """(..., R, C) -> (..., C, R), each column over R."""
    *matrices, rows, width = x.shape
    out = x.new_empty(*matrices, width, rows, dtype=torch.float8_e4m3fn)
    scale = x.new_empty(*matrices, width, 1, dtype=torch.float32)
    block_c = 16  # few columns, that there be programs for all of the GPU
    block_r = min(triton.next_power_of_2(rows), ELEMENTS // block_c)
    launch(
        _quantise_columns, (-(-width // block_c), matrices[0] if matrices else 1), x.contiguous(), out, scale, width,
        R=rows, BLOCK_R=block_r, BLOCK_C=block_c, INTERPRETED=knobs.runtime.interpret, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Quantised(out, scale)


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


def gelu_gradients(h_EMF: Tensor, da_EMF: Tensor, weights_NEK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, which takes the place of da, a = weight * gelu(h) and dweights"""
    (experts, m, width), h_EMF = h_EMF.shape, h_EMF.contiguous()
    a_EMF, dweights_NEK = h_EMF.new_empty(h_EMF.shape), weights_NEK.new_empty(weights_NEK.shape)
    block_m, block_f = expert_choice._row_blocks(width, 8)
    launch(
        expert_choice._gelu_backward, (triton.cdiv(m, block_m), experts),
        h_EMF, da_EMF, weights_NEK.contiguous(), da_EMF, a_EMF, dweights_NEK, m, width,
        E=experts, K=weights_NEK.shape[2], BLOCK_M=block_m, BLOCK_F=block_f,
    )  # fmt: skip
    return da_EMF, a_EMF, dweights_NEK


@registered("mdit::fp8_quantise")
def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_by_rows(x))


@_quantise.register_fake
def new_quantised(x):
    return Quantised(
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    )


@registered("mdit::fp8_add_norm_modulate")
def _add_norm_modulate(
    x_NTD: Tensor, y_NTD: Tensor | None, gate_ND: Tensor | None, weight_D: Tensor,
    shift_ND: Tensor | None, scale_ND: Tensor | None, eps: float, keep_NK: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """mdit::add_norm_modulate, and h in float8 with its scales"""
    new = _new_outputs(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK)
    mixing._launch_forward(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK, new)
    return new


@_add_norm_modulate.register_fake
def _new_outputs(*inputs):
    new = mixing._new_outputs(*inputs)
    return *new, *new_quantised(new[1])


@registered("mdit::fp8_norm_modulate")
def _norm_modulate(
    x_NTD: Tensor, weight_D: Tensor, shift_ND: Tensor | None, scale_ND: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = _new_norm(x_NTD, weight_D, shift_ND, scale_ND, eps)
    mixing._launch_forward(x_NTD, None, None, weight_D, shift_ND, scale_ND, eps, None, (None, *new))
    return new


@_norm_modulate.register_fake
def _new_norm(*inputs):
    new = mixing._new_norm(*inputs)
    return *new, *new_quantised(new[0])


_add_norm_modulate.register_autograd(mixing._differentiate, setup_context=mixing._save)
_norm_modulate.register_autograd(mixing._differentiate_norm, setup_context=mixing._save_norm)


@registered("mdit::fp8_linear")
def _linear(x: Tensor, weight_OK: Tensor, values: Tensor | None, scale: Tensor | None) -> Tensor:
    """`values`, `scale`: x in float8, where somebody has written it."""
    x_MK = _by_rows(x) if values is None else Quantised(values, scale)
    x_MK = Quantised(*(part.view(-1, part.shape[-1]) for part in x_MK))
    out_MO = x.new_empty(len(x_MK.values), len(weight_OK))
    return _product(x_MK, _by_rows(weight_OK), out_MO).view(*x.shape[:-1], -1)


@_linear.register_fake
def _(x, weight_OK, values, scale):
    return x.new_empty(*x.shape[:-1], weight_OK.shape[0])


@registered("mdit::fp8_linear_backward")
def _linear_backward(d_out: Tensor, x: Tensor, weight_OK: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx, dweight"""
    d_out_MO, dx = d_out.reshape(-1, d_out.shape[-1]), x.new_empty(x.shape)
    _product(_by_rows(d_out_MO), _by_columns(weight_OK), dx.view(-1, x.shape[-1]))
    return dx, d_out_MO.t() @ x.reshape(-1, x.shape[-1])


@_linear_backward.register_fake
def _(d_out, x, weight_OK):
    return x.new_empty(x.shape), weight_OK.new_empty(weight_OK.shape)


@registered("mdit::fp8_bmm")
def _bmm(x_EMK: Tensor, w_EKO: Tensor) -> Tensor:
    return _products(_by_rows(x_EMK), _by_columns(w_EKO), x_EMK.new_empty(*x_EMK.shape[:2], w_EKO.shape[2]))


@_bmm.register_fake
def _(x_EMK, w_EKO):
    return x_EMK.new_empty(*x_EMK.shape[:2], w_EKO.shape[2])


@registered("mdit::fp8_bmm_backward")
def _bmm_backward(d_out_EMO: Tensor, x_EMK: Tensor, w_EKO: Tensor) -> tuple[Tensor, Tensor]:
    """-> dx, dw"""
    dx_EMK = _products(_by_rows(d_out_EMO), _by_rows(w_EKO), x_EMK.new_empty(x_EMK.shape))
    return dx_EMK, torch.bmm(x_EMK.transpose(1, 2), d_out_EMO)


@_bmm_backward.register_fake
def _(d_out_EMO, x_EMK, w_EKO):
    return x_EMK.new_empty(x_EMK.shape), w_EKO.new_empty(w_EKO.shape)


@registered("mdit::fp8_swiglu_linear")
def _swiglu_linear(ab: Tensor, weight_DF: Tensor) -> Tensor:
    ab_MX = _matrix(ab)
    a_MF, _ = ab_MX.chunk(2, dim=1)
    u_MF = _launch_rows(_quantise_gated, a_MF, ab_MX, strides=(ab_MX.stride(0),))
    return _product(u_MF, _by_rows(weight_DF), ab.new_empty(len(ab_MX), len(weight_DF))).view(*ab.shape[:-1], -1)


@_swiglu_linear.register_fake
def _(ab, weight_DF):
    return ab.new_empty(*ab.shape[:-1], weight_DF.shape[0])


@registered("mdit::fp8_swiglu_linear_backward")
def _swiglu_linear_backward(d_out: Tensor, ab: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    """-> dab, dweight"""
    d_out_MD = _matrix(d_out)
    du_MF = d_out_MD.new_empty(len(d_out_MD), weight_DF.shape[1])
    _product(_by_rows(d_out_MD), _by_columns(weight_DF), du_MF)
    dab_MX, u_MF = swiglu.gated_gradient(_matrix(ab), du_MF)
    return dab_MX.view(ab.shape), d_out_MD.t() @ u_MF


@_swiglu_linear_backward.register_fake
def _(d_out, ab, weight_DF):
    return ab.new_empty(ab.shape), weight_DF.new_empty(weight_DF.shape)


@registered("mdit::fp8_gelu_bmm")
def _gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Tensor:
    _, experts, k = weights_NEK.shape
    sources = h_EMF.contiguous(), weights_NEK.contiguous()
    a = _launch_rows(_quantise_gelu, h_EMF, *sources, strides=(h_EMF.shape[1],), E=experts, K=k)
    return _products(a, _by_columns(w2_EFD), h_EMF.new_empty(*h_EMF.shape[:2], w2_EFD.shape[2]))


@_gelu_bmm.register_fake
def _(h_EMF, w2_EFD, weights_NEK):
    return h_EMF.new_empty(*h_EMF.shape[:2], w2_EFD.shape[2])


@registered("mdit::fp8_gelu_bmm_backward")
def _gelu_bmm_backward(
    dy_EMD: Tensor, h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dw2, dweights"""
    da_EMF = _products(_by_rows(dy_EMD), _by_rows(w2_EFD), h_EMF.new_empty(h_EMF.shape))
    dh_EMF, a_EMF, dweights_NEK = gelu_gradients(h_EMF, da_EMF, weights_NEK)
    return dh_EMF, torch.bmm(a_EMF.transpose(1, 2), dy_EMD), dweights_NEK


@_gelu_bmm_backward.register_fake
def _(dy_EMD, h_EMF, w2_EFD, weights_NEK):
    return h_EMF.new_empty(h_EMF.shape), w2_EFD.new_empty(w2_EFD.shape), weights_NEK.new_empty(weights_NEK.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _save_linear(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


_linear.register_autograd(
    lambda ctx, d_out: (*_linear_backward(d_out, *ctx.saved_tensors), None, None), setup_context=_save_linear
)
for _forward, _backward in (
    (_bmm, _bmm_backward),
    (_swiglu_linear, _swiglu_linear_backward),
    (_gelu_bmm, _gelu_bmm_backward),
):
    _forward.register_autograd(
        lambda ctx, d_out, backward=_backward: backward(d_out, *ctx.saved_tensors), setup_context=_save
    )


def quantise(x: Tensor) -> InFloat8:
    return InFloat8(x, *_quantise(x.detach()))


def fp8_add_norm_modulate(
    x_NTD: Tensor, y_NTD: Tensor | None, gate_ND: Tensor | None, weight_D: Tensor,
    shift_ND: Tensor | None, scale_ND: Tensor | None, eps: float, keep_NK: Tensor | None = None,
) -> tuple[Tensor, InFloat8]:  # fmt: skip
    if y_NTD is None and keep_NK is None:
        h, _, *float8 = _norm_modulate(x_NTD, weight_D, shift_ND, scale_ND, eps)
        return x_NTD, InFloat8(h, *float8)
    arguments = x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK
    out, h, _, *float8 = _add_norm_modulate(*arguments)
    return out, InFloat8(h, *float8)


def fp8_linear(x: Tensor | InFloat8, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    x, *known = x if isinstance(x, InFloat8) else (x, None, None)
    return _plus(_linear(x, weight_OK, *known), bias_O)


def fp8_swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return _plus(_swiglu_linear(ab, weight_DF), bias_D)


def fp8_bmm(x_EMK: Tensor, w_EKO: Tensor) -> Tensor:
    return _bmm(x_EMK, w_EKO)


def fp8_gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Tensor:
    return _gelu_bmm(h_EMF, w2_EFD, weights_NEK)


def _plus(out: Tensor, bias_O: Tensor | None) -> Tensor:
    return out if bias_O is None else out + bias_O


def _matrix(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), the last dimension dense; a view where strides allow it."""
    x_MC = x.reshape(-1, x.shape[-1])
    return x_MC if x_MC.stride(-1) == 1 else x_MC.contiguous()
