"""Triton kernels of masked_attention, forward: statistics of rows, and attention with all keys on chip or in a loop.

Shapes: N batch, T queries, L keys, A width of the attention (H heads x head_dim). Rows have any stride, their elements
lie side by side. A program of the attention kernels works for one head of one image; consecutive programs take the
heads of the same tokens, which share rows of memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.launch import cdiv, launch, power_of_2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _statistics(
    q_ptr, k_ptr, q_stats_ptr, k_stats_ptr, q_stride_n, q_stride_t, k_stride_n, k_stride_t,
    N, T, L, eps, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Mean and rstd over A of the rows of q (2, N, T) and of k (2, N, L); even programs take q, odd ones k."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // 2
    if tl.program_id(0) % 2 == 0:
        _row_statistics(q_ptr, q_stride_n, q_stride_t, q_stats_ptr, block, N, T, eps, A, ROWS, BLOCK_A)
    else:
        _row_statistics(k_ptr, k_stride_n, k_stride_t, k_stats_ptr, block, N, L, eps, A, ROWS, BLOCK_A)


@triton.jit
def _row_statistics(
    x_ptr, stride_n, stride_t, stats_ptr, block, N, T, eps, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    row, image, token, valid = rows_of(block, N, T, ROWS)
    column = tl.arange(0, BLOCK_A)[None, :]
    offset = (image.to(tl.int64) * stride_n + token * stride_t)[:, None] + column
    inside = valid[:, None] & (column < A)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / A
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / A + eps)
    tl.store(stats_ptr + row, mean, mask=row < N * T)
    tl.store(stats_ptr + N * T + row, rstd, mask=row < N * T)


@triton.jit
def rows_of(block, N, T, ROWS: tl.constexpr):
    """Numbers of a block of the N * T rows, their images and tokens, and which of them exist."""
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < N * T
    return row, row // T, row % T, valid


@triton.jit
def load_tile(ptr, stride, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(BLOCK, HEAD_DIM) of rows `first`..; zeros from row `limit` on."""
    row = first + tl.arange(0, BLOCK)
    offset = row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offset, mask=(row < limit)[:, None], other=0.0)


@triton.jit
def store_tile(ptr, stride, first, limit, value, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes the rows of `value` before row `limit`."""
    row = first + tl.arange(0, BLOCK)
    offset = row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(row < limit)[:, None])


@triton.jit
def normalised(
    x, ptr, stride, mean_ptr, rstd_ptr, rotary_ptr, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """LayerNorm of a tile that was read from `ptr`, then turned, where there is a table for it; rounded to its dtype.
    Rows from `limit` on stay zero."""
    row = first + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + row, mask=row < limit, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < limit, other=0.0)
    y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    if rotary_ptr is not None:
        column, inside = tl.arange(0, HEAD_DIM)[None, :], (row < limit)[:, None]
        other = tl.load(ptr + row[:, None] * stride + other_half(column, HEAD_DIM), mask=inside, other=0.0)
        other = (other.to(tl.float32) - mean[:, None]) * rstd[:, None]
        y = rotated(y, other, rotary_ptr + row[:, None] * HEAD_DIM, inside, column, HEAD_DIM, False)
    return y.to(x.dtype)


@triton.jit
def other_half(column, HEAD_DIM: tl.constexpr):
    """The columns that are turned with these: i and i + HEAD_DIM / 2 of every head."""
    return column - column % HEAD_DIM + (column + HEAD_DIM // 2) % HEAD_DIM


@triton.jit
def rotated(y, other, rotary_ptr, inside, column, HEAD_DIM: tl.constexpr, BACK: tl.constexpr):
    """The points (y, `other`) turned by the angles of their rows, or BACK, which is the gradient."""
    angle = column % (HEAD_DIM // 2)
    cos = tl.load(rotary_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(rotary_ptr + HEAD_DIM // 2 + angle, mask=inside, other=0.0)
    if BACK:
        sin = -sin
    return y * cos + tl.where(column % HEAD_DIM < HEAD_DIM // 2, -other, other) * sin


@triton.jit
def dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _masked(scores_TL, first, limit, BLOCK: tl.constexpr):
    """-inf for the keys from `limit` on."""
    return tl.where((first + tl.arange(0, BLOCK) < limit)[None, :], scores_TL, float("-inf"))


@triton.jit
def _attend_held(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, rotary_ptr, rotary_stride_n,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t, N, T, L, H, scale, queries_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, ONE_BLOCK: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, MASK_MAIN: tl.constexpr,
):  # fmt: skip
    """All keys held on chip, normalised once, in a block of MAIN and one of TAIL; loops over its share of queries."""
    shares = tl.cdiv(T, queries_per_program)
    head, image = tl.program_id(0) % H, tl.program_id(0) // H // shares
    first = tl.program_id(0) // H % shares * queries_per_program
    n = image.to(tl.int64)
    q_ptr += n * q_stride_n + head * HEAD_DIM
    k_ptr += n * kv_stride_n + head * HEAD_DIM
    v_ptr += n * kv_stride_n + head * HEAD_DIM
    out_ptr += (n * T * H + head) * HEAD_DIM
    lse_ptr += (n * H + head) * T
    q_stats_ptr += n * T
    k_stats_ptr += n * L
    if rotary_ptr is not None:
        rotary_ptr += n * rotary_stride_n

    k1 = load_tile(k_ptr, kv_stride_t, 0, L, MAIN, HEAD_DIM)
    v1 = load_tile(v_ptr, kv_stride_t, 0, L, MAIN, HEAD_DIM)
    if ONE_BLOCK:  # nothing waits for memory before every load is on its way
        raw_q = load_tile(q_ptr, q_stride_t, 0, T, BLOCK_T, HEAD_DIM)
    if TAIL > 0:
        k2 = load_tile(k_ptr, kv_stride_t, MAIN, L, TAIL, HEAD_DIM)
        v2 = load_tile(v_ptr, kv_stride_t, MAIN, L, TAIL, HEAD_DIM)
        k2 = normalised(
            k2, k_ptr, kv_stride_t, k_stats_ptr, k_stats_ptr + N * L, rotary_ptr, MAIN, L, TAIL, HEAD_DIM
        )  # fmt: skip
    k1 = normalised(k1, k_ptr, kv_stride_t, k_stats_ptr, k_stats_ptr + N * L, rotary_ptr, 0, L, MAIN, HEAD_DIM)
    last = BLOCK_T if ONE_BLOCK else tl.minimum(first + queries_per_program, T)
    for start in range(0 if ONE_BLOCK else first, last, BLOCK_T):
        if not ONE_BLOCK:
            raw_q = load_tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
        q = normalised(
            raw_q, q_ptr, q_stride_t, q_stats_ptr, q_stats_ptr + N * T, rotary_ptr, start, T, BLOCK_T, HEAD_DIM
        )  # fmt: skip
        s1 = dot(q, tl.trans(k1))
        if MASK_MAIN:
            s1 = _masked(s1, 0, L, MAIN)
        highest = tl.max(s1, axis=1)
        if TAIL > 0:
            s2 = _masked(dot(q, tl.trans(k2)), MAIN, L, TAIL)
            highest = tl.maximum(highest, tl.max(s2, axis=1))
        highest *= scale * LOG2_E
        p1 = tl.exp2(s1 * (scale * LOG2_E) - highest[:, None])
        total = tl.sum(p1, axis=1)
        out = dot(p1.to(v1.dtype), v1)
        if TAIL > 0:
            p2 = tl.exp2(s2 * (scale * LOG2_E) - highest[:, None])
            total += tl.sum(p2, axis=1)
            out = tl.dot(p2.to(v2.dtype), v2, out, input_precision="ieee")
        store_tile(out_ptr, H * HEAD_DIM, start, T, out / total[:, None], BLOCK_T, HEAD_DIM)
        row = start + tl.arange(0, BLOCK_T)
        tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < T)


@triton.jit
def _attend_online(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, rotary_ptr, rotary_stride_n,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t, N, T, L, H, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of queries, with a running maximum over blocks of keys."""
    blocks = tl.cdiv(T, BLOCK_T)
    head, image = tl.program_id(0) % H, tl.program_id(0) // H // blocks
    start = tl.program_id(0) // H % blocks * BLOCK_T
    n = image.to(tl.int64)
    q_ptr += n * q_stride_n + head * HEAD_DIM
    k_ptr += n * kv_stride_n + head * HEAD_DIM
    v_ptr += n * kv_stride_n + head * HEAD_DIM
    out_ptr += (n * T * H + head) * HEAD_DIM
    lse_ptr += (n * H + head) * T
    q_stats_ptr += n * T
    k_stats_ptr += n * L
    if rotary_ptr is not None:
        rotary_ptr += n * rotary_stride_n

    q = load_tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
    q = normalised(q, q_ptr, q_stride_t, q_stats_ptr, q_stats_ptr + N * T, rotary_ptr, start, T, BLOCK_T, HEAD_DIM)
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    out = tl.zeros((BLOCK_T, HEAD_DIM), tl.float32)
    for key in range(0, L, BLOCK_L):
        k = load_tile(k_ptr, kv_stride_t, key, L, BLOCK_L, HEAD_DIM)
        v = load_tile(v_ptr, kv_stride_t, key, L, BLOCK_L, HEAD_DIM)
        k = normalised(k, k_ptr, kv_stride_t, k_stats_ptr, k_stats_ptr + N * L, rotary_ptr, key, L, BLOCK_L, HEAD_DIM)
        s = dot(q, tl.trans(k))
        if MASK:
            s = _masked(s, key, L, BLOCK_L)
        before = highest
        highest = tl.maximum(before, tl.max(s, axis=1) * (scale * LOG2_E))
        p = tl.exp2(s * (scale * LOG2_E) - highest[:, None])
        shrink = tl.exp2(before - highest)
        total = total * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    store_tile(out_ptr, H * HEAD_DIM, start, T, out / total[:, None], BLOCK_T, HEAD_DIM)
    row = start + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < T)


def _held_keys(L: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """MAIN and TAIL of the kernel that holds all keys; None: the one that loops over keys must do.

    A tail of 16 makes 77 captions cost 80 columns instead of 128. In float32, which the tensor cores do not know, the
    held keys would not fit into registers.
    """
    if dtype == torch.float32 or L > 80:
        return None
    return (64, 16) if L > 64 else (block_of(L, 64), 0)


def block_of(size: int, largest: int) -> int:
    """tl.dot takes blocks of 16 or more, all powers of two."""
    return min(max(power_of_2(size), 16), largest)


def row_block(a: int, elements: int) -> dict[str, int]:
    """The tile of a kernel over rows: about `elements` elements."""
    block_a = power_of_2(a)
    return {"A": a, "ROWS": max(1, elements // block_a), "BLOCK_A": block_a, "num_warps": 4, "num_stages": 1}


def new_outputs(q_NTA: Tensor, k_NLA: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out (N, T, A), mean and rstd of q (2, N, T) and of k (2, N, L), log2 of the softmax's sum (N, H, T)."""
    q_stats, k_stats = (x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in (q_NTA, k_NLA))
    lse_NHT = q_NTA.new_empty(len(q_NTA), num_heads, q_NTA.shape[1], dtype=torch.float32)
    return q_NTA.new_empty(q_NTA.shape), q_stats, k_stats, lse_NHT


def rotary_stride(rotary_NTC: Tensor | None) -> int:
    """Elements from the table of one image to the next; all images may share one."""
    return 0 if rotary_NTC is None or len(rotary_NTC) == 1 else rotary_NTC.stride(0)


def forward(
    q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, t, a), length, fp32 = q_NTA.shape, k_NLA.shape[1], q_NTA.dtype == torch.float32
    head_dim, strides = a // num_heads, (*q_NTA.stride()[:2], *k_NLA.stride()[:2])
    out_NTA, q_stats, k_stats, lse_NHT = new_outputs(q_NTA, k_NLA, num_heads)
    tile = row_block(a, 4096)
    grid = (2 * cdiv(n * max(t, length), tile["ROWS"]),)
    launch(_statistics, grid, q_NTA, k_NLA, q_stats, k_stats, *strides, n, t, length, eps, **tile)
    arguments = q_NTA, k_NLA, v_NLA, out_NTA, lse_NHT, q_stats, k_stats, rotary_NTC, rotary_stride(rotary_NTC)
    arguments += *strides, n, t, length, num_heads
    block_t, held = block_of(t, 32 if fp32 else 64), _held_keys(length, q_NTA.dtype)
    if held:
        share, one_block = block_t * min(4, cdiv(t, block_t)), t <= block_t  # the keys serve 256 queries
        launch(
            _attend_held, (n * cdiv(t, share) * num_heads,), *arguments, head_dim**-0.5, share,
            HEAD_DIM=head_dim, BLOCK_T=block_t, ONE_BLOCK=one_block, MAIN=held[0], TAIL=held[1],
            MASK_MAIN=length < held[0], num_warps=4, num_stages=1 if one_block else 2,
        )  # fmt: skip
    else:
        block_l = block_of(length, 64)
        launch(
            _attend_online, (n * cdiv(t, block_t) * num_heads,), *arguments, head_dim**-0.5,
            HEAD_DIM=head_dim, BLOCK_T=block_t, BLOCK_L=block_l, MASK=length % block_l > 0,
            num_warps=8 if fp32 else 4, num_stages=1 if fp32 else 2,
        )  # fmt: skip
    return out_NTA, q_stats, k_stats, lse_NHT
