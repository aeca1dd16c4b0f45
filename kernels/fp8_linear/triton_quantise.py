"""Triton kernels that write float8, by rows and by columns, from what memory holds or from what they compute.

Shapes: M tokens, K inputs, O outputs, E experts; a kernel's own matrix has R rows and C columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mdit.kernels.fp8_linear.reference import Quantised
from mdit.kernels.launch import cdiv, dense, launch, matrix, power_of_2
from mdit.kernels.triton_functions import (
    float8,
    gelu_and_slope,
    magnitude,
    normal_cdf,
    quantised,
    scales,
    swiglu_gradients,
)

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
    p, _ = normal_cdf(h)
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
    gelu, slope = gelu_and_slope(h)
    tl.store(a_ptr + row * C + column, (weight * gelu).to(a_ptr.dtype.element_ty), mask=inside)
    dweight = tl.sum(gelu * g, axis=1, keep_dims=True)
    tl.store(dweights_ptr + place, dweight.to(dweights_ptr.dtype.element_ty), mask=row < R)
    dh = (weight * g * slope).to(da_ptr.dtype.element_ty)
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
    da, db, silu = swiglu_gradients(a, b, tl.load(u_ptrs, mask=inside, other=0.0).to(tl.float32))
    da, db = da.to(dab_ptr.dtype.element_ty), db.to(dab_ptr.dtype.element_ty)
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


def by_rows(x: Tensor) -> Quantised:
    """(..., R, C), each row over C."""
    x_RC = matrix(x)
    return _launch_rows(_quantise_rows, x, x_RC, number=x_RC.stride(0))


def gated_by_rows(ab_MX: Tensor) -> Quantised:
    """(M, 2 F), a and b side by side -> silu(a) * b (M, F)"""
    return _launch_rows(_quantise_gated, ab_MX.chunk(2, dim=1)[0], ab_MX, number=ab_MX.stride(0))


def gated_gradient(ab_MX: Tensor, du_MF: Tensor) -> tuple[Tensor, Quantised]:
    """-> the gradient of a and b (M, 2 F), as it is and in float8; u = silu(a) * b takes the place of its gradient"""
    dab_MX, number = ab_MX.new_empty(ab_MX.shape), ab_MX.stride(0)
    out = new_quantised(dab_MX, *dab_MX.shape)
    return dab_MX, _launch_rows(_gated_gradient, du_MF, ab_MX, du_MF, dab_MX, number=number, out=out, num_warps=8)


def gelu_by_rows(hidden_EMF: Tensor, weights_NEK: Tensor) -> Quantised:
    """-> weight * gelu(h) (E, M, F)"""
    (_, m, _), (_, experts, k) = hidden_EMF.shape, weights_NEK.shape
    return _launch_rows(_quantise_gelu, hidden_EMF, hidden_EMF, weights_NEK.contiguous(), number=m, E=experts, K=k)


def gelu_gradient(hidden_EMF: Tensor, da_EMF: Tensor, weights_NEK: Tensor) -> tuple[Tensor, Tensor, Quantised]:
    """-> weight * gelu(h), the gradient of the weights, and that of h in float8; as it is, it takes the place of da"""
    (_, m, _), (_, experts, k) = hidden_EMF.shape, weights_NEK.shape
    active_EMF, dweights_NEK = hidden_EMF.new_empty(hidden_EMF.shape), weights_NEK.new_empty(weights_NEK.shape)
    tensors = hidden_EMF, da_EMF, weights_NEK.contiguous(), active_EMF, dweights_NEK
    dhidden8_EMF = _launch_rows(_gelu_gradient, hidden_EMF, *tensors, number=m, num_warps=8, E=experts, K=k)
    return active_EMF, dweights_NEK, dhidden8_EMF


def _launch_rows(
    kernel, like: Tensor, *tensors: Tensor, number: int, out: Quantised | None = None, num_warps: int = 4, **constants
) -> Quantised:
    """Start a kernel over whole rows of the shape of `like` -> `out`, by default of this shape as well. `number`: the
    stride of its first tensor, or M."""
    out, width = out or new_quantised(like, *like.shape), like.shape[-1]
    rows, tile = like.numel() // width, _tile(width, num_warps)
    launch(kernel, (cdiv(rows, tile["BLOCK_R"]),), *tensors, *out, number, rows, **tile, **constants)
    return out


def new_quantised(like: Tensor, *shape: int) -> Quantised:
    values = like.new_empty(shape, dtype=torch.float8_e4m3fn)
    return Quantised(values, like.new_empty(*shape[:-1], 1, dtype=torch.float32))


def _tile(width: int, num_warps: int) -> dict[str, int]:
    """Whole rows of `width`, as many as fit."""
    block_c = power_of_2(width)
    sizes = {"C": width, "BLOCK_R": max(1, ELEMENTS // block_c), "BLOCK_C": block_c}
    warps = num_warps if block_c <= ELEMENTS else 2 * num_warps
    return {**sizes, "INTERPRETED": knobs.runtime.interpret, "num_warps": warps, "num_stages": 1}


def by_columns(x: Tensor) -> Quantised:
    """(..., R, C) -> (..., C, R), each column over R."""
    *matrices, rows, width = x.shape
    out = new_quantised(x, *matrices, width, rows)
    block_c = 16  # few columns, that there be programs for all of the GPU
    block_r = min(power_of_2(rows), ELEMENTS // block_c)
    launch(
        _quantise_columns, (cdiv(width, block_c), matrices[0] if matrices else 1), x.contiguous(), *out, width,
        R=rows, BLOCK_R=block_r, BLOCK_C=block_c, INTERPRETED=knobs.runtime.interpret, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def gathered_by_rows(x_NTD: Tensor, tokens_NEK: Tensor, plain_EMD: Tensor | None = None) -> Quantised:
    """-> (E, N * K, D) in float8; into `plain_EMD` the same rows as they are"""
    n, experts, k = tokens_NEK.shape
    x_NTD, tile = dense(x_NTD), _tile(x_NTD.shape[2], 4)
    out = new_quantised(x_NTD, experts, n * k, x_NTD.shape[2])
    grid = cdiv(k, tile["BLOCK_R"]), experts, n
    strides = x_NTD.stride()[:2]
    launch(_quantise_gathered, grid, x_NTD, tokens_NEK.contiguous(), plain_EMD, *out, *strides, k, **tile)
    return out
