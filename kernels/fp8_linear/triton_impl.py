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

from mdit.kernels.expert_choice import Routing
from mdit.kernels.expert_choice import triton_impl as expert_choice
from mdit.kernels.expert_choice.triton_impl import _normal
from mdit.kernels.fp8_linear.reference import InFloat8, Quantised
from mdit.kernels.fp8_linear.rounding import float8, magnitude, quantised, scales
from mdit.kernels.launch import launch
from mdit.kernels.patch_mixing import triton_impl as mixing
from mdit.kernels.registered import registered

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
def _quantise_gathered(
    x_ptr, tokens_ptr, plain_ptr, out_ptr, scale_ptr, x_stride_n, x_stride_t, K,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Rows of x to the experts' blocks (E, N * K, C), in float8 and, for `plain_ptr`, as they are. Images are
    outermost: what several experts take is read from L2 again."""
    expert, image, images = tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    k = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = tl.arange(0, BLOCK_C)[None, :]
    inside = (k < K) & (column < C)
    token = tl.load(tokens_ptr + (image * tl.num_programs(1) + expert) * K + k, mask=k < K, other=0)
    x = tl.load(x_ptr + image * x_stride_n + token * x_stride_t + column, mask=inside, other=0.0)
    row = (expert * images + image) * K + k
    if plain_ptr is not None:
        tl.store(plain_ptr + row * C + column, x, mask=inside)
    values, scale = quantised(x.to(tl.float32), INTERPRETED)
    tl.store(out_ptr + row * C + column, values, mask=inside)
    tl.store(scale_ptr + row, scale, mask=k < K)


@triton.jit
def _gelu_gradient(
    h_ptr, da_ptr, weights_ptr, a_ptr, dweights_ptr, out_ptr, scale_ptr, M, R,
    C: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """expert_choice's _gelu_backward for whole rows: dh, which takes the place of da, in float8 as well."""
    row, column, inside = _whole_rows(R, C, BLOCK_R, BLOCK_C)
    expert, m = row // M, row % M
    place = (m // K * E + expert) * K + m % K
    weight = tl.load(weights_ptr + place, mask=row < R, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(da_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
    p, bell = _normal(h)
    tl.store(a_ptr + row * C + column, (weight * (h * p)).to(a_ptr.dtype.element_ty), mask=inside)
    dweight = tl.sum(h * p * g, axis=1, keep_dims=True)
    tl.store(dweights_ptr + place, dweight.to(dweights_ptr.dtype.element_ty), mask=row < R)
    dh = (weight * g * (p + h * (0.3989422804014327 * bell))).to(da_ptr.dtype.element_ty)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    tl.store(da_ptr + row * C + column, dh, mask=inside)
    _write_rows(dh.to(tl.float32), out_ptr, scale_ptr, row, column, R, C, INTERPRETED)


@triton.jit
def _gated_gradient(
    ab_ptr, u_ptr, dab_ptr, out_ptr, scale_ptr, ab_stride, R,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """swiglu's _swiglu_backward for whole rows: da and db, (R, 2 C), in float8 as well, a row's two with one scale."""
    row, column, inside = _whole_rows(R, C, BLOCK_R, BLOCK_C)
    a_ptrs, u_ptrs, here = ab_ptr + row * ab_stride + column, u_ptr + row * C + column, row * 2 * C + column
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + C, mask=inside, other=0.0).to(tl.float32)
    du = tl.load(u_ptrs, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    da = (du * b * (sigmoid + silu * (1 - sigmoid))).to(dab_ptr.dtype.element_ty)
    db = (du * silu).to(dab_ptr.dtype.element_ty)
    tl.store(dab_ptr + here, da, mask=inside)
    tl.store(dab_ptr + here + C, db, mask=inside)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    tl.store(u_ptrs, (silu * b).to(u_ptr.dtype.element_ty), mask=inside)
    da, db = da.to(tl.float32), db.to(tl.float32)
    largest = tl.maximum(magnitude(da), magnitude(db))
    scale, inverse = scales(tl.max(largest, axis=1, keep_dims=True))
    tl.store(out_ptr + here, float8(da * inverse, INTERPRETED), mask=inside)
    tl.store(out_ptr + here + C, float8(db * inverse, INTERPRETED), mask=inside)
    tl.store(scale_ptr + row, scale, mask=row < R)


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
    out, width = _new(like, *like.shape), like.shape[-1]
    rows, tile = like.numel() // width, _tile(width, 4)
    launch(kernel, (-(-rows // tile["BLOCK_R"]),), *sources, *out, *strides, rows, **tile, **constants)
    return out


def _new(like: Tensor, *shape: int) -> Quantised:
    values = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    return Quantised(values, like.new_empty(*shape[:-1], 1, dtype=torch.float32))


def _tile(width: int, num_warps: int) -> dict[str, int]:
    """Whole rows of `width`, as many as fit."""
    block_c = triton.next_power_of_2(width)
    sizes = {"C": width, "BLOCK_R": max(1, ELEMENTS // block_c), "BLOCK_C": block_c}
    warps = num_warps if block_c <= ELEMENTS else 2 * num_warps
    return {**sizes, "INTERPRETED": knobs.runtime.interpret, "num_warps": warps, "num_stages": 1}


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


def _gathered(x_NTD: Tensor, tokens_NEK: Tensor, plain_EMD: Tensor | None = None) -> Quantised:
    """-> (E, N * K, D) in float8; into `plain_EMD` the same rows as they are"""
    n, experts, k = tokens_NEK.shape
    x_NTD, tile = expert_choice._dense(x_NTD), _tile(x_NTD.shape[2], 4)
    out = _new(x_NTD, experts, n * k, x_NTD.shape[2])
    grid = -(-k // tile["BLOCK_R"]), experts, n
    strides = x_NTD.stride()[:2]
    launch(_quantise_gathered, grid, x_NTD, tokens_NEK.contiguous(), plain_EMD, *out, *strides, k, **tile)
    return out


@registered("mdit::fp8_quantise")
def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(_by_rows(x))


@_quantise.register_fake
def _(x):
    return tuple(_new(x, *x.shape))


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
    return *new, *_new(new[1], *new[1].shape)


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
    return *new, *_new(new[0], *new[0].shape)


_add_norm_modulate.register_autograd(mixing._differentiate, setup_context=mixing._save)
_norm_modulate.register_autograd(mixing._differentiate_norm, setup_context=mixing._save_norm)


@registered("mdit::fp8_linear")
def _linear(x: Tensor, weight_OK: Tensor, values: Tensor | None, scale: Tensor | None) -> Tensor:
    """`values`, `scale`: x in float8, where somebody has written it."""
    x_MK = _known_rows(x, values, scale)
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


@registered("mdit::fp8_swiglu")
def _swiglu(
    x: Tensor, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, values: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> the result without w3's bias, and a and b (M, 2 F)"""
    x_MD = _known_rows(x, values, scale)
    ab_MX = _product(x_MD, _by_rows(weight_XD), x.new_empty(len(x_MD.values), len(weight_XD)))
    if bias_X is not None:
        ab_MX += bias_X
    u_MF = _launch_rows(_quantise_gated, ab_MX.chunk(2, dim=1)[0], ab_MX, strides=(ab_MX.stride(0),))
    return _product(u_MF, _by_rows(weight_DF), x.new_empty(len(ab_MX), len(weight_DF))).view(x.shape), ab_MX


@_swiglu.register_fake
def _(x, weight_XD, bias_X, weight_DF, values, scale):
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1], weight_XD.shape[0])


@registered("mdit::fp8_swiglu_backward")
def _swiglu_backward(
    d_out: Tensor, x: Tensor, weight_XD: Tensor, weight_DF: Tensor, ab_MX: Tensor, has_bias: bool
) -> list[Tensor]:
    """-> dx, dweight_XD, dweight_DF and, where there is one, dbias_X"""
    d_out_MD, (m, width) = _matrix(d_out), (len(ab_MX), weight_DF.shape[1])
    u_MF, dab_MX, dx = d_out_MD.new_empty(m, width), ab_MX.new_empty(ab_MX.shape), x.new_empty(x.shape)
    _product(_by_rows(d_out_MD), _by_columns(weight_DF), u_MF)  # its gradient, until the kernel puts it there
    dab8_MX = _new(dab_MX, *dab_MX.shape)
    tile = _tile(width, 8)
    grid = (-(-m // tile["BLOCK_R"]),)
    launch(_gated_gradient, grid, ab_MX, u_MF, dab_MX, *dab8_MX, ab_MX.stride(0), m, **tile)
    _product(dab8_MX, _by_columns(weight_XD), dx.view(m, -1))
    gradients = [dx, dab_MX.t() @ _matrix(x), d_out_MD.t() @ u_MF]
    return [*gradients, dab_MX.sum(0)] if has_bias else gradients


@_swiglu_backward.register_fake
def _(d_out, x, weight_XD, weight_DF, ab_MX, has_bias):
    shapes = [x.shape, weight_XD.shape, weight_DF.shape, *([weight_XD.shape[:1]] if has_bias else [])]
    return [x.new_empty(shape) for shape in shapes]


@registered("mdit::fp8_experts")
def _experts(
    x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor
) -> tuple[Tensor, Tensor]:
    """-> the result, and the hidden layer before its GELU (E, M, F)"""
    n, experts, k = weights_NEK.shape
    hidden_EMF = x_NTD.new_empty(experts, n * k, w1_EDF.shape[2])
    _products(_gathered(x_NTD, tokens_NEK), _by_columns(w1_EDF), hidden_EMF)
    sources = hidden_EMF, weights_NEK.contiguous()
    active = _launch_rows(_quantise_gelu, hidden_EMF, *sources, strides=(n * k,), E=experts, K=k)
    out_EMD = _products(active, _by_columns(w2_EFD), x_NTD.new_empty(experts, n * k, x_NTD.shape[2]))
    return expert_choice.scattered(out_EMD, tokens_NEK, slots_NTE), hidden_EMF


@_experts.register_fake
def _(x_NTD, w1_EDF, w2_EFD, weights_NEK, tokens_NEK, slots_NTE):
    n, experts, k = weights_NEK.shape
    return x_NTD.new_empty(x_NTD.shape), x_NTD.new_empty(experts, n * k, w1_EDF.shape[2])


@registered("mdit::fp8_experts_backward")
def _experts_backward(
    d_out_NTD: Tensor, x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor, tokens_NEK: Tensor,
    slots_NTE: Tensor, hidden_EMF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dw1, dw2, dweights"""
    _, experts, k = weights_NEK.shape
    (_, m, width), dim = hidden_EMF.shape, x_NTD.shape[2]
    dy_EMD, dweights_NEK = x_NTD.new_empty(experts, m, dim), weights_NEK.new_empty(weights_NEK.shape)
    dhidden_EMF, active_EMF = (hidden_EMF.new_empty(hidden_EMF.shape) for _ in range(2))
    dy8_EMD = _gathered(d_out_NTD, tokens_NEK, dy_EMD)
    _products(dy8_EMD, _by_rows(w2_EFD), dhidden_EMF)  # the active one's, until the kernel puts the hidden one's there
    dhidden8_EMF, tile = _new(x_NTD, experts, m, width), _tile(width, 8)
    launch(
        _gelu_gradient, (-(-experts * m // tile["BLOCK_R"]),), hidden_EMF, dhidden_EMF, weights_NEK.contiguous(),
        active_EMF, dweights_NEK, *dhidden8_EMF, m, experts * m, E=experts, K=k, **tile,
    )  # fmt: skip
    dw2_EFD = torch.bmm(active_EMF.transpose(1, 2), dy_EMD)
    x_EMD = expert_choice.gathered(x_NTD, tokens_NEK, slots_NTE)
    dw1_EDF = torch.bmm(x_EMD.transpose(1, 2), dhidden_EMF)
    dx_EMD = _products(dhidden8_EMF, _by_rows(w1_EDF), dy_EMD)  # which nobody needs any more
    return expert_choice.scattered(dx_EMD, tokens_NEK, slots_NTE), dw1_EDF, dw2_EFD, dweights_NEK


@_experts_backward.register_fake
def _(d_out_NTD, x_NTD, w1_EDF, w2_EFD, weights_NEK, *_):
    return tuple(t.new_empty(t.shape) for t in (x_NTD, w1_EDF, w2_EFD, weights_NEK))


def _save_linear(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _save_swiglu(ctx, inputs, output) -> None:
    x, weight_XD, bias_X, weight_DF, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_bias = bias_X is not None
    ctx.save_for_backward(x, weight_XD, weight_DF, output[1])


def _differentiate_swiglu(ctx, d_out, _):
    if d_out is None:
        return (None,) * 6
    dx, dweight_XD, dweight_DF, *dbias = _swiglu_backward(d_out, *ctx.saved_tensors, ctx.has_bias)
    return dx, dweight_XD, *(dbias or [None]), dweight_DF, None, None


def _save_experts(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _differentiate_experts(ctx, d_out_NTD, _):
    if d_out_NTD is None:
        return (None,) * 6
    return *_experts_backward(d_out_NTD, *ctx.saved_tensors), None, None


_linear.register_autograd(
    lambda ctx, d_out: (*_linear_backward(d_out, *ctx.saved_tensors), None, None), setup_context=_save_linear
)
_swiglu.register_autograd(_differentiate_swiglu, setup_context=_save_swiglu)
_experts.register_autograd(_differentiate_experts, setup_context=_save_experts)


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


def fp8_swiglu(
    x: Tensor | InFloat8, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    x, *known = x if isinstance(x, InFloat8) else (x, None, None)
    return _plus(_swiglu(x, weight_XD, bias_X, weight_DF, *known)[0], bias_D)


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Tensor:
    return _experts(x_NTD, w1_EDF, w2_EFD, *routing)[0]


def _known_rows(x: Tensor, values: Tensor | None, scale: Tensor | None) -> Quantised:
    """(..., K) -> (M, K)"""
    known = _by_rows(x) if values is None else Quantised(values, scale)
    return Quantised(*(part.view(-1, part.shape[-1]) for part in known))


def _plus(out: Tensor, bias_O: Tensor | None) -> Tensor:
    return out if bias_O is None else out + bias_O


def _matrix(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), the last dimension dense; a view where strides allow it."""
    x_MC = x.reshape(-1, x.shape[-1])
    return x_MC if x_MC.stride(-1) == 1 else x_MC.contiguous()
