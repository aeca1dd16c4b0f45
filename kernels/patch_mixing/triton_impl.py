"""Triton kernels of patch_mixing: one pass forward, one pass backward, and a small one that finishes the sums.

A program works on several rows of one image, so that gate, shift, scale and weight are loaded once for all of them and
sums over tokens grow in registers. A thread holds the same 8 columns of every row of a tile: sums over rows need no
exchange between threads. A row is a token; where `keep` is given, a kept one.

Shapes: N batch, T tokens (K kept), D width, P programs of the backward pass (P / N of them for each image).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mdit.kernels.custom_op import custom_op
from mdit.kernels.launch import cdiv, dense, launch, power_of_2, strides
from mdit.kernels.triton_functions import quantised


@triton.jit
def _mix(
    x_ptr, y_ptr, gate_ptr, weight_ptr, shift_ptr, scale_ptr, keep_ptr, out_ptr, h_ptr, stats_ptr, h8_ptr, h8_scale_ptr,
    x_stride_n, x_stride_t, y_stride_n, y_stride_t, gate_stride, shift_stride, scale_stride, keep_stride,
    N, K, rows_per_program, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x' and h (N, K, D); mean and rstd of the rows of x' (2, N, K). x' is not written where it is x itself.

    h8 and its scales (N, K): h as it was stored, in float8.
    """
    n, first = _share(K, rows_per_program)
    d = tl.arange(0, BLOCK_D)
    factor = _vector(weight_ptr, d, D)
    if scale_ptr is not None:
        factor *= 1 + _vector(scale_ptr + n * scale_stride, d, D)
        shift = _vector(shift_ptr + n * shift_stride, d, D)
    if gate_ptr is not None:
        gate = _vector(gate_ptr + n * gate_stride, d, D)
    for start in tl.range(first, tl.minimum(first + rows_per_program, K), ROWS, num_stages=STAGES):
        row, valid, inside, token = _rows(start, K, d, keep_ptr, n * keep_stride, D, ROWS)
        x = _load(x_ptr + n * x_stride_n, token, x_stride_t, d, inside)
        if y_ptr is not None:
            y = _load(y_ptr + n * y_stride_n, token, y_stride_t, d, inside)
            if gate_ptr is not None:
                y *= gate[None, :]
            x = (x + y).to(out_ptr.dtype.element_ty).to(tl.float32)  # h is the norm of what is stored
        if out_ptr is not None:
            _store(out_ptr, n * K + row, d, x, inside, D)
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(inside, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
        h = centred * rstd[:, None] * factor[None, :]
        if scale_ptr is not None:
            h += shift[None, :]
        _store(h_ptr, n * K + row, d, h, inside, D)
        if h8_ptr is not None:
            h = tl.where(inside, h, 0.0).to(h_ptr.dtype.element_ty).to(tl.float32)
            h8, h8_scale = quantised(h, INTERPRETED)
            _store(h8_ptr, n * K + row, d, h8, inside, D)
            tl.store(h8_scale_ptr + n * K + row, tl.reshape(h8_scale, (ROWS,)), mask=valid)
        tl.store(stats_ptr + n * K + row, mean, mask=valid)
        tl.store(stats_ptr + (N + n) * K + row, rstd, mask=valid)


@triton.jit
def _mix_backward(
    x_ptr, y_ptr, gate_ptr, weight_ptr, scale_ptr, keep_ptr, stats_ptr, d_out_ptr, dh_ptr, dx_ptr, dy_ptr, sums_ptr,
    x_stride_n, x_stride_t, y_stride_n, y_stride_t, gate_stride, scale_stride, keep_stride,
    d_out_stride_n, d_out_stride_t, dh_stride_n, dh_stride_t,
    N, T, K, rows_per_program, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and dy (N, T, D) from the gradients of x' and of h (either may be None); x_ptr is x'.

    sums (3, P, D), over the program's rows: of dh * xhat, of dh (with a scale), of dx * y (with a gate).
    """
    n, first = _share(K, rows_per_program)
    d = tl.arange(0, BLOCK_D)
    factor = _vector(weight_ptr, d, D)
    if scale_ptr is not None:
        factor *= 1 + _vector(scale_ptr + n * scale_stride, d, D)
    if gate_ptr is not None:
        gate = _vector(gate_ptr + n * gate_stride, d, D)
    by_xhat = tl.zeros((BLOCK_D,), tl.float32)
    by_one = tl.zeros((BLOCK_D,), tl.float32)
    by_y = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(first, tl.minimum(first + rows_per_program, K), ROWS, num_stages=STAGES):
        row, valid, inside, token = _rows(start, K, d, keep_ptr, n * keep_stride, D, ROWS)
        dx = tl.zeros((ROWS, BLOCK_D), tl.float32)
        if d_out_ptr is not None:
            dx = _load(d_out_ptr + n * d_out_stride_n, row.to(tl.int64), d_out_stride_t, d, inside)
        if dh_ptr is not None:
            dh = _load(dh_ptr + n * dh_stride_n, row.to(tl.int64), dh_stride_t, d, inside)
            x = _load(x_ptr + n * x_stride_n, row.to(tl.int64), x_stride_t, d, inside)
            mean = tl.load(stats_ptr + n * K + row, mask=valid, other=0.0)
            rstd = tl.load(stats_ptr + (N + n) * K + row, mask=valid, other=0.0)
            xhat = (x - mean[:, None]) * rstd[:, None]
            dxhat = dh * factor[None, :]  # zero outside the row
            along_one = tl.sum(dxhat, axis=1) / D
            along_xhat = tl.sum(dxhat * xhat, axis=1) / D
            dx += rstd[:, None] * (dxhat - along_one[:, None] - xhat * along_xhat[:, None])
            by_xhat += tl.sum(dh * xhat, axis=0)
            by_one += tl.sum(dh, axis=0)
        _store(dx_ptr, n * T + token, d, dx, inside, D)
        if gate_ptr is not None:
            y = _load(y_ptr + n * y_stride_n, token, y_stride_t, d, inside)
            by_y += tl.sum(dx * y, axis=0)
            _store(dy_ptr, n * T + token, d, dx * gate[None, :], inside, D)
    sums_ptr += tl.program_id(0) * D
    stride = tl.num_programs(0) * D
    if dh_ptr is not None:
        tl.store(sums_ptr + d, by_xhat, mask=d < D)
        if scale_ptr is not None:
            tl.store(sums_ptr + stride + d, by_one, mask=d < D)
    if gate_ptr is not None:
        tl.store(sums_ptr + 2 * stride + d, by_y, mask=d < D)


@triton.jit
def _mix_sums(
    sums_ptr, weight_ptr, scale_ptr, dgate_ptr, dweight_ptr, dshift_ptr, dscale_ptr, scale_stride,
    P, programs_per_image, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    IMAGE_ROWS: tl.constexpr, IMAGE_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds up the programs' sums: the first D / COLUMNS programs for the weight, the others for an image's columns."""
    image_program = tl.program_id(0) - tl.cdiv(D, COLUMNS)
    if image_program < 0:
        if dweight_ptr is not None:
            d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
            total = tl.zeros((COLUMNS,), tl.float32)
            for start in range(0, P, ROWS):
                row = start + tl.arange(0, ROWS)
                inside = (row < P)[:, None] & (d < D)[None, :]
                value = tl.load(sums_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
                if scale_ptr is not None:
                    offset = (row // programs_per_image).to(tl.int64) * scale_stride
                    value *= 1 + tl.load(scale_ptr + offset[:, None] + d[None, :], mask=inside, other=0.0).to(
                        tl.float32
                    )
                total += tl.sum(value, axis=0)
            tl.store(dweight_ptr + d, total.to(dweight_ptr.dtype.element_ty), mask=d < D)
    else:
        blocks = tl.cdiv(D, IMAGE_COLUMNS)
        n = image_program // blocks
        column = image_program % blocks * IMAGE_COLUMNS + tl.arange(0, IMAGE_COLUMNS)
        sums_ptr += n * programs_per_image * D
        if dscale_ptr is not None:
            found = _column_sum(sums_ptr, programs_per_image, column, D, IMAGE_ROWS) * _vector(weight_ptr, column, D)
            tl.store(dscale_ptr + n * D + column, found.to(dscale_ptr.dtype.element_ty), mask=column < D)
            found = _column_sum(sums_ptr + P * D, programs_per_image, column, D, IMAGE_ROWS)
            tl.store(dshift_ptr + n * D + column, found.to(dshift_ptr.dtype.element_ty), mask=column < D)
        if dgate_ptr is not None:
            found = _column_sum(sums_ptr + 2 * P * D, programs_per_image, column, D, IMAGE_ROWS)
            tl.store(dgate_ptr + n * D + column, found.to(dgate_ptr.dtype.element_ty), mask=column < D)


@triton.jit
def _share(K, rows_per_program):
    """The program's image and the first of its rows."""
    programs = tl.cdiv(K, rows_per_program)
    return (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs * rows_per_program


@triton.jit
def _rows(start, K, d, keep_ptr, keep_offset, D: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows from `start` on: their numbers, which exist, the tile's elements that exist, their tokens (int64)."""
    row = start + tl.arange(0, ROWS)
    valid = row < K
    token = row.to(tl.int64)
    if keep_ptr is not None:
        token = tl.load(keep_ptr + keep_offset + row, mask=valid, other=0)
    return row, valid, valid[:, None] & (d < D)[None, :], token


@triton.jit
def _load(ptr, row, stride, d, inside):
    return tl.load(ptr + (row * stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, d, value, inside, D: tl.constexpr):
    tl.store(ptr + (row * D)[:, None] + d[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vector(ptr, d, D: tl.constexpr):
    return tl.load(ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _column_sum(ptr, rows, d, D: tl.constexpr, ROWS: tl.constexpr):
    total = tl.zeros((d.shape[0],), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        total += tl.sum(tl.load(ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0), axis=0)
    return total


FORWARD_TILE, BACKWARD_TILE = 2, 1  # rows; two and three tiles are on their way while one is worked on
# What one program adds up of the programs' sums, of which there are some 528: for the weight 16 columns of all, 32 KB,
# and for an image all its rows of as many columns as make 24 KB of the three sums. Together they are some 300 programs,
# all at work at once on 132 SMs.
WEIGHT_TILE = {"ROWS": 512, "COLUMNS": 16}
IMAGE_TILE, IMAGE_ROWS = 2048, 64  # elements of one sum, and rows that are added at a time


def _tile(width: int, rows: int) -> dict[str, int]:
    """8 columns a thread, so 128 threads at widths 768 (where a fourth of them idle) and 1024."""
    block = power_of_2(width)
    return {"D": width, "BLOCK_D": block, "ROWS": rows, "num_warps": min(max(block // 256, 1), 16)}


def _rows_per_program(images: int, num_rows: int, tile: int) -> int:
    """As many rows of an image as leave 4 programs for each of 132 SMs, all of them at work at once; at least 8.

    A program reads 4 vectors beside its rows, and backward writes 3 sums in float32. The rule asks no GPU, so that
    sums are split alike, and are the same bits, on all of them.
    """
    programs = min(max(4 * 132 // images, 1), cdiv(num_rows, 8))
    return tile * cdiv(cdiv(num_rows, programs), tile)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else dense(t) for t in tensors]


@custom_op("mdit::add_norm_modulate_backward", fake=lambda *inputs: _new_gradients(*inputs))
def _add_norm_modulate_backward(
    x_NKD: Tensor, y_NTD: Tensor | None, gate_ND: Tensor | None, weight_D: Tensor, scale_ND: Tensor | None,
    keep_NK: Tensor | None, stats_2NK: Tensor, num_tokens: int, d_out_NKD: Tensor | None, dh_NKD: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """x is x'. -> those of dx, dy, dgate, dweight, dshift and dscale that there are"""
    new = _new_gradients(x_NKD, y_NTD, gate_ND, weight_D, scale_ND, keep_NK, stats_2NK, num_tokens, d_out_NKD, dh_NKD)
    dx, dy, dgate, dweight, dshift, dscale = _all_six(new, gate_ND, scale_ND, dh_NKD)
    x, y, gate, weight, scale, keep = _dense(x_NKD, y_NTD, gate_ND, weight_D, scale_ND, keep_NK)
    d_out, dh = _dense(d_out_NKD, dh_NKD)
    n, k, width = x.shape
    rows = _rows_per_program(n, k, BACKWARD_TILE)
    programs_per_image = cdiv(k, rows)
    programs = n * programs_per_image
    sums_3PD = x.new_empty(3, programs, width, dtype=torch.float32)
    launch(
        _mix_backward, (programs,), x, y, gate, weight, scale, keep, stats_2NK, d_out, dh, dx, dy, sums_3PD,
        *strides(x, 2), *strides(y, 2), *strides(gate), *strides(scale), *strides(keep), *strides(d_out, 2),
        *strides(dh, 2), n, num_tokens, k, rows, **_tile(width, BACKWARD_TILE), STAGES=4, num_stages=4,
    )  # fmt: skip
    image_rows = min(power_of_2(programs_per_image), IMAGE_ROWS)
    image_columns = min(IMAGE_TILE // image_rows, power_of_2(width))
    of_images = 0 if dgate is None and dscale is None else n * cdiv(width, image_columns)
    launch(
        _mix_sums, (cdiv(width, WEIGHT_TILE["COLUMNS"]) + of_images,),
        sums_3PD, weight, scale, dgate, dweight, dshift, dscale, *strides(scale), programs, programs_per_image,
        D=width, **WEIGHT_TILE, IMAGE_ROWS=image_rows, IMAGE_COLUMNS=image_columns, num_warps=4,
    )  # fmt: skip
    return new


def _exist(gate, scale, dh) -> tuple[bool, ...]:
    """Which of dx, dy, dgate, dweight, dshift, dscale there are. (Without a gate, dy is dx.)"""
    gated, normed = gate is not None, dh is not None
    modulated = normed and scale is not None
    return True, gated, gated, normed, modulated, modulated


def _new_gradients(x_NKD, y_NTD, gate_ND, weight_D, scale_ND, keep_NK, stats_2NK, num_tokens, d_out_NKD, dh_NKD):
    n, _, width = x_NKD.shape
    tokens, vector = (n, num_tokens, width), (n, width)
    shapes = zip((tokens, tokens, vector, (width,), vector, vector), _exist(gate_ND, scale_ND, dh_NKD))
    new = x_NKD.new_empty if keep_NK is None else x_NKD.new_zeros  # nothing is written of dropped tokens
    return [(new if len(shape) == 3 else x_NKD.new_empty)(shape) for shape, exists in shapes if exists]


def _all_six(gradients: list[Tensor], gate, scale, dh) -> list[Tensor | None]:
    remaining = iter(gradients)
    return [next(remaining) if exists else None for exists in _exist(gate, scale, dh)]


def _writes_sum(y_NTD, keep_NK) -> bool:
    """Whether x' is written: not where it is x itself."""
    return y_NTD is not None or keep_NK is not None


def _new_outputs(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK, fp8):
    (n, k), width = (x_NTD if keep_NK is None else keep_NK).shape[:2], x_NTD.shape[2]
    new = [x_NTD.new_empty(n, k, width), x_NTD.new_empty(2, n, k, dtype=torch.float32)]
    if fp8:
        new += [x_NTD.new_empty(n, k, width, dtype=torch.float8_e4m3fn), x_NTD.new_empty(n, k, 1, dtype=torch.float32)]
    return [*new, x_NTD.new_empty(n, k, width)] if _writes_sum(y_NTD, keep_NK) else new


def _save(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK, fp8, outputs) -> tuple:
    adds, writes_sum = y_NTD is not None, _writes_sum(y_NTD, keep_NK)
    x, y = outputs[-1] if writes_sum else x_NTD, None if gate_ND is None else y_NTD
    return x, y, gate_ND, weight_D, scale_ND, keep_NK, outputs[1], x_NTD.shape[1], adds, writes_sum


def _gradients(dh_NKD, *more):
    """`more`: gradients of the other outputs, then what `_save` kept."""
    *others, x, y, gate, weight, scale, keep, stats, num_tokens, adds, writes_sum = more
    d_out = others[-1] if writes_sum else None
    found = _add_norm_modulate_backward(x, y, gate, weight, scale, keep, stats, num_tokens, d_out, dh_NKD)
    dx, dy, dgate, dweight, dshift, dscale = _all_six(found, gate, scale, dh_NKD)
    return dx, dx if adds and dy is None else dy, dgate, dweight, dshift, dscale


@custom_op("mdit::add_norm_modulate", fake=_new_outputs, save=_save, backward=_gradients)
def _add_norm_modulate(
    x_NTD: Tensor, y_NTD: Tensor | None, gate_ND: Tensor | None, weight_D: Tensor,
    shift_ND: Tensor | None, scale_ND: Tensor | None, eps: float, keep_NK: Tensor | None, fp8: bool,
) -> list[Tensor]:  # fmt: skip
    """-> h (N, K, D); mean and rstd of the rows of x' (2, N, K) float32; for `fp8` h in float8 and its scales; x'
    (N, K, D), where it is not x itself"""
    new = _new_outputs(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, eps, keep_NK, fp8)
    h_NKD, stats_2NK, *_ = new
    in_float8 = new[2:4] if fp8 else (None, None)
    out_NKD = new[-1] if _writes_sum(y_NTD, keep_NK) else None
    x, y, gate, weight, shift, scale, keep = _dense(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, keep_NK)
    n, k, width = h_NKD.shape
    rows = _rows_per_program(n, k, FORWARD_TILE)
    launch(
        _mix, (n * cdiv(k, rows),), x, y, gate, weight, shift, scale, keep, out_NKD, h_NKD, stats_2NK, *in_float8,
        *strides(x, 2), *strides(y, 2), *strides(gate), *strides(shift), *strides(scale), *strides(keep),
        n, k, rows, eps, **_tile(width, FORWARD_TILE), STAGES=3, INTERPRETED=knobs.runtime.interpret, num_stages=3,
    )  # fmt: skip
    return new


def add_norm_modulate(*inputs, fp8: bool = False) -> tuple[Tensor, ...]:
    """-> x', h and, for `fp8`, h in float8 and its scales"""
    x_NTD, y_NTD, *_, keep_NK = inputs
    h_NKD, _, *others = _add_norm_modulate(*inputs, fp8)
    return others.pop() if _writes_sum(y_NTD, keep_NK) else x_NTD, h_NKD, *others
