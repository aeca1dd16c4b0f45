"""Triton kernels of masked_attention: statistics of rows, attention forward and backward, LayerNorm backward.

Shapes: N batch, T queries, L keys, A width of the attention (H heads x head_dim), X a packed width. Rows have any
stride, their elements lie side by side. Nothing is added up by several programs: equal inputs give equal bits.

A program of the attention kernels works for one head of one image; consecutive programs take the heads of the same
tokens, which share rows of memory. Kernels over rows walk backwards: they start with what the kernel before them wrote
or read last, and end where the next one starts, so that a part of it is still in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.launch import launch
from mdit.kernels.registered import registered

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _statistics(
    q_ptr, k_ptr, q_stats_ptr, k_stats_ptr, lengths_ptr,
    q_stride_n, q_stride_t, k_stride_n, k_stride_t,
    N, T, L, eps, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Mean and rstd over A of the rows of q (2, N, T) and of k (2, N, L); even programs take q, odd ones k."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // 2
    if tl.program_id(0) % 2 == 0:
        _row_statistics(q_ptr, q_stride_n, q_stride_t, q_stats_ptr, None, block, N, T, eps, A, ROWS, BLOCK_A)
    else:
        _row_statistics(k_ptr, k_stride_n, k_stride_t, k_stats_ptr, lengths_ptr, block, N, L, eps, A, ROWS, BLOCK_A)


@triton.jit
def _row_statistics(
    x_ptr, stride_n, stride_t, stats_ptr, lengths_ptr, block, N, T, eps,
    A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row, image, token, valid = _rows(block, N, T, lengths_ptr, ROWS)
    column = tl.arange(0, BLOCK_A)[None, :]
    offset = (image.to(tl.int64) * stride_n + token * stride_t)[:, None] + column
    inside = valid[:, None] & (column < A)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=1) / A
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / A + eps)
    tl.store(stats_ptr + row, mean, mask=row < N * T)  # rows that are not attended to have a mean of zero
    tl.store(stats_ptr + N * T + row, rstd, mask=row < N * T)


@triton.jit
def _rows(block, N, T, lengths_ptr, ROWS: tl.constexpr):
    """Numbers of a block of the N * T rows, their images and tokens, and which of them exist and are attended to."""
    row = block * ROWS + tl.arange(0, ROWS)
    valid = row < N * T
    image, token = row // T, row % T
    if lengths_ptr is not None:
        valid = valid & (token < tl.load(lengths_ptr + image, mask=valid, other=0).to(tl.int32))
    return row, image, token, valid


@triton.jit
def _tile(ptr, stride, first, limit, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """(BLOCK, HEAD_DIM) of rows `first`..; zeros from row `limit` on."""
    row = first + tl.arange(0, BLOCK)
    offset = row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    return tl.load(ptr + offset, mask=(row < limit)[:, None], other=0.0)


@triton.jit
def _store_tile(ptr, stride, first, limit, value, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Writes the rows of `value` before row `limit`."""
    row = first + tl.arange(0, BLOCK)
    offset = row[:, None] * stride + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=(row < limit)[:, None])


@triton.jit
def _normalised(x, mean_ptr, rstd_ptr, first, limit, BLOCK: tl.constexpr):
    """LayerNorm of a tile, rounded to its dtype as PyTorch rounds it; rows from `limit` on stay zero."""
    row = first + tl.arange(0, BLOCK)
    mean = tl.load(mean_ptr + row, mask=row < limit, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=row < limit, other=0.0)
    return ((x.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(x.dtype)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _length(lengths_ptr, image, L):
    """The number of keys that queries of an image attend to."""
    length = L
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + image).to(tl.int32), L)
    return length


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _masked(scores_TL, first, limit, BLOCK: tl.constexpr):
    """-inf for the keys from `limit` on."""
    return tl.where((first + tl.arange(0, BLOCK) < limit)[None, :], scores_TL, float("-inf"))


@triton.jit
def _attend_held(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, lengths_ptr,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t,
    N, T, L, H, scale, queries_per_program,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, ONE_BLOCK: tl.constexpr,
    MAIN: tl.constexpr, TAIL: tl.constexpr, MASK_MAIN: tl.constexpr,
):  # fmt: skip
    """All keys held on chip, normalised once, in a block of MAIN and one of TAIL; loops over its share of queries."""
    shares = tl.cdiv(T, queries_per_program)
    head, image = tl.program_id(0) % H, tl.program_id(0) // H // shares
    first = tl.program_id(0) // H % shares * queries_per_program
    n = image.to(tl.int64)
    length = _length(lengths_ptr, n, L)
    q_ptr += n * q_stride_n + head * HEAD_DIM
    k_ptr += n * kv_stride_n + head * HEAD_DIM
    v_ptr += n * kv_stride_n + head * HEAD_DIM
    out_ptr += (n * T * H + head) * HEAD_DIM
    lse_ptr += (n * H + head) * T
    q_stats_ptr += n * T
    k_stats_ptr += n * L

    k1 = _tile(k_ptr, kv_stride_t, 0, length, MAIN, HEAD_DIM)
    v1 = _tile(v_ptr, kv_stride_t, 0, length, MAIN, HEAD_DIM)
    if ONE_BLOCK:  # nothing waits for memory before every load is on its way
        raw_q = _tile(q_ptr, q_stride_t, 0, T, BLOCK_T, HEAD_DIM)
    if TAIL > 0:
        k2 = _tile(k_ptr, kv_stride_t, MAIN, length, TAIL, HEAD_DIM)
        v2 = _tile(v_ptr, kv_stride_t, MAIN, length, TAIL, HEAD_DIM)
        k2 = _normalised(k2, k_stats_ptr, k_stats_ptr + N * L, MAIN, length, TAIL)
    k1 = _normalised(k1, k_stats_ptr, k_stats_ptr + N * L, 0, length, MAIN)
    last = BLOCK_T if ONE_BLOCK else tl.minimum(first + queries_per_program, T)
    for start in range(0 if ONE_BLOCK else first, last, BLOCK_T):
        if not ONE_BLOCK:
            raw_q = _tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
        q = _normalised(raw_q, q_stats_ptr, q_stats_ptr + N * T, start, T, BLOCK_T)
        s1 = _dot(q, tl.trans(k1))
        if MASK_MAIN:
            s1 = _masked(s1, 0, length, MAIN)
        highest = tl.max(s1, axis=1)
        if TAIL > 0:
            s2 = _masked(_dot(q, tl.trans(k2)), MAIN, length, TAIL)
            highest = tl.maximum(highest, tl.max(s2, axis=1))
        highest *= scale * LOG2_E
        p1 = tl.exp2(s1 * (scale * LOG2_E) - highest[:, None])
        total = tl.sum(p1, axis=1)
        out = _dot(p1.to(v1.dtype), v1)
        if TAIL > 0:
            p2 = tl.exp2(s2 * (scale * LOG2_E) - highest[:, None])
            total += tl.sum(p2, axis=1)
            out = tl.dot(p2.to(v2.dtype), v2, out, input_precision="ieee")
        _store_tile(out_ptr, H * HEAD_DIM, start, T, out / total[:, None], BLOCK_T, HEAD_DIM)
        row = start + tl.arange(0, BLOCK_T)
        tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < T)


@triton.jit
def _attend_online(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, lengths_ptr,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t,
    N, T, L, H, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One block of queries, with a running maximum over blocks of keys; blocks beyond the length are not visited."""
    blocks = tl.cdiv(T, BLOCK_T)
    head, image = tl.program_id(0) % H, tl.program_id(0) // H // blocks
    start = tl.program_id(0) // H % blocks * BLOCK_T
    n = image.to(tl.int64)
    length = _length(lengths_ptr, n, L)
    q_ptr += n * q_stride_n + head * HEAD_DIM
    k_ptr += n * kv_stride_n + head * HEAD_DIM
    v_ptr += n * kv_stride_n + head * HEAD_DIM
    out_ptr += (n * T * H + head) * HEAD_DIM
    lse_ptr += (n * H + head) * T
    q_stats_ptr += n * T
    k_stats_ptr += n * L

    q = _tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
    q = _normalised(q, q_stats_ptr, q_stats_ptr + N * T, start, T, BLOCK_T)
    highest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    out = tl.zeros((BLOCK_T, HEAD_DIM), tl.float32)
    for key in range(0, length, BLOCK_L):
        k = _tile(k_ptr, kv_stride_t, key, length, BLOCK_L, HEAD_DIM)
        v = _tile(v_ptr, kv_stride_t, key, length, BLOCK_L, HEAD_DIM)
        k = _normalised(k, k_stats_ptr, k_stats_ptr + N * L, key, length, BLOCK_L)
        s = _dot(q, tl.trans(k))
        if MASK:
            s = _masked(s, key, length, BLOCK_L)
        before = highest
        highest = tl.maximum(before, tl.max(s, axis=1) * (scale * LOG2_E))
        p = tl.exp2(s * (scale * LOG2_E) - highest[:, None])
        shrink = tl.exp2(before - highest)
        total = total * shrink + tl.sum(p, axis=1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    _store_tile(out_ptr, H * HEAD_DIM, start, T, out / total[:, None], BLOCK_T, HEAD_DIM)
    row = start + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + row, highest + tl.log2(total), mask=row < T)


@triton.jit
def _attend_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, lengths_ptr,
    dq_ptr, dk_ptr, dv_ptr,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t, d_out_stride_n, d_out_stride_t,
    dq_stride_part, dq_stride_n, dq_stride_t, dkv_stride_n, dkv_stride_t,
    N, T, L, H, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCKS: tl.constexpr,
    MASK: tl.constexpr, ALL_KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised k and of v for some blocks of keys, and their part of those of the normalised q.

    Loops over the queries, for one block of keys after the other. Tiles of scores are transposed (keys by queries), so
    that p and ds are operands of the products for dv and dk as they leave the product before. A block of keys adds what
    it has of q's gradient to what the program has written for the blocks before. ALL_KEYS: one block is all the keys,
    and the sum over keys of p * dp is at hand; otherwise it is had from the output, as it equals the sum over the head
    of out * d_out. ONE_BLOCK: so is one block of queries.
    """
    parts = tl.cdiv(L, BLOCKS * BLOCK_L)
    head, part, image = tl.program_id(0) % H, tl.program_id(0) // H % parts, tl.program_id(0) // H // parts
    n = image.to(tl.int64)
    length = _length(lengths_ptr, n, L)
    q_ptr += n * q_stride_n + head * HEAD_DIM
    k_ptr += n * kv_stride_n + head * HEAD_DIM
    v_ptr += n * kv_stride_n + head * HEAD_DIM
    d_out_ptr += n * d_out_stride_n + head * HEAD_DIM
    dq_ptr += part.to(tl.int64) * dq_stride_part + n * dq_stride_n + head * HEAD_DIM
    dk_ptr += n * dkv_stride_n + head * HEAD_DIM
    dv_ptr += n * dkv_stride_n + head * HEAD_DIM
    lse_ptr += (n * H + head) * T
    q_stats_ptr += n * T
    k_stats_ptr += n * L
    if not ALL_KEYS:
        out_ptr += (n * T * H + head) * HEAD_DIM

    first = part * (BLOCKS * BLOCK_L)
    blocks = 1 if BLOCKS == 1 else tl.minimum(tl.cdiv(L - first, BLOCK_L), BLOCKS)
    for block in range(0, blocks):
        key = first + block * BLOCK_L
        k = _tile(k_ptr, kv_stride_t, key, length, BLOCK_L, HEAD_DIM)
        v = _tile(v_ptr, kv_stride_t, key, length, BLOCK_L, HEAD_DIM)
        last = BLOCK_T if ONE_BLOCK else T
        if ONE_BLOCK:  # nothing waits for memory before every load is on its way
            raw_q = _tile(q_ptr, q_stride_t, 0, T, BLOCK_T, HEAD_DIM)
            d_out = _tile(d_out_ptr, d_out_stride_t, 0, T, BLOCK_T, HEAD_DIM)
        elif lengths_ptr is not None:
            last = T if key < length else 0
        k = _normalised(k, k_stats_ptr, k_stats_ptr + N * L, key, length, BLOCK_L)
        dk = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
        if BLOCKS > 1:
            tl.debug_barrier()  # the gradients of q that the block before wrote are there
        for start in range(0, last, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            if not ONE_BLOCK:
                raw_q = _tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
                d_out = _tile(d_out_ptr, d_out_stride_t, start, T, BLOCK_T, HEAD_DIM)
            lse = tl.load(lse_ptr + row, mask=row < T, other=0.0)
            q = _normalised(raw_q, q_stats_ptr, q_stats_ptr + N * T, start, T, BLOCK_T)
            p = tl.exp2(_dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])
            if MASK:
                p = tl.where((key + tl.arange(0, BLOCK_L) < length)[:, None], p, 0.0)
            dv = tl.dot(p.to(q.dtype), d_out, dv, input_precision="ieee")
            if ONE_BLOCK:  # stored at once: fewer registers, more programs at a time
                _store_tile(dv_ptr, dkv_stride_t, key, L, dv, BLOCK_L, HEAD_DIM)
            dp = _dot(v, tl.trans(d_out))
            if ALL_KEYS:
                delta = tl.sum(p * dp, axis=0)
            else:
                out = _tile(out_ptr, H * HEAD_DIM, start, T, BLOCK_T, HEAD_DIM)
                delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            if ONE_BLOCK:
                _store_tile(dk_ptr, dkv_stride_t, key, L, dk * scale, BLOCK_L, HEAD_DIM)
            dq = _dot(tl.trans(ds), k) * scale
            if BLOCKS > 1:
                before = _tile(dq_ptr, dq_stride_t, start, T if block > 0 else 0, BLOCK_T, HEAD_DIM)
                dq += before.to(tl.float32)
            _store_tile(dq_ptr, dq_stride_t, start, T, dq, BLOCK_T, HEAD_DIM)
        if not ONE_BLOCK:
            _store_tile(dk_ptr, dkv_stride_t, key, L, dk * scale, BLOCK_L, HEAD_DIM)
            _store_tile(dv_ptr, dkv_stride_t, key, L, dv, BLOCK_L, HEAD_DIM)


@triton.jit
def _norm_backward(
    q_ptr, k_ptr, q_stats_ptr, k_stats_ptr, lengths_ptr, parts_ptr, dq_ptr, dk_ptr,
    q_stride_n, q_stride_t, k_stride_n, k_stride_t,
    part_stride_part, part_stride_n, part_stride_t, dq_stride_n, dq_stride_t, dk_stride_n, dk_stride_t,
    N, T, L, A: tl.constexpr, PART_L: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k from those of the normalised q (in parts, one for PART_L keys) and k (in place)."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // 2
    if tl.program_id(0) % 2 == 0:
        _query_rows(
            q_ptr, q_stride_n, q_stride_t, q_stats_ptr, parts_ptr, part_stride_part, part_stride_n, part_stride_t,
            dq_ptr, dq_stride_n, dq_stride_t, lengths_ptr, block, N, T, L, A, PART_L, ROWS, BLOCK_A,
        )  # fmt: skip
    else:
        _key_rows(
            k_ptr, k_stride_n, k_stride_t, k_stats_ptr, dk_ptr, dk_stride_n, dk_stride_t, lengths_ptr,
            block, N, L, A, ROWS, BLOCK_A,
        )  # fmt: skip


@triton.jit
def _query_rows(
    q_ptr, q_stride_n, q_stride_t, stats_ptr, parts_ptr, part_stride_part, part_stride_n, part_stride_t,
    dq_ptr, dq_stride_n, dq_stride_t, lengths_ptr, block, N, T, L,
    A: tl.constexpr, PART_L: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row, image, token, valid = _rows(block, N, T, None, ROWS)
    n, column = image.to(tl.int64), tl.arange(0, BLOCK_A)[None, :]
    inside = valid[:, None] & (column < A)
    offset = (n * part_stride_n + token * part_stride_t)[:, None] + column
    g = tl.load(parts_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, tl.cdiv(L, PART_L)):
        parts_ptr += part_stride_part
        written = inside
        if lengths_ptr is not None:  # a part beyond the length has written nothing
            length = tl.load(lengths_ptr + image, mask=valid, other=0).to(tl.int32)
            written = inside & (part * PART_L < length)[:, None]
        g += tl.load(parts_ptr + offset, mask=written, other=0.0).to(tl.float32)
    x = tl.load(q_ptr + (n * q_stride_n + token * q_stride_t)[:, None] + column, mask=inside, other=0.0)
    g = _norm_gradient(x, g, stats_ptr, N * T, row, valid, A)
    tl.store(dq_ptr + (n * dq_stride_n + token * dq_stride_t)[:, None] + column, g, mask=inside)


@triton.jit
def _key_rows(
    k_ptr, k_stride_n, k_stride_t, stats_ptr, dk_ptr, dk_stride_n, dk_stride_t, lengths_ptr, block, N, L,
    A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row, image, token, valid = _rows(block, N, L, lengths_ptr, ROWS)
    n, column = image.to(tl.int64), tl.arange(0, BLOCK_A)[None, :]
    inside = valid[:, None] & (column < A)
    pointer = dk_ptr + (n * dk_stride_n + token * dk_stride_t)[:, None] + column
    g = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(k_ptr + (n * k_stride_n + token * k_stride_t)[:, None] + column, mask=inside, other=0.0)
    tl.store(pointer, _norm_gradient(x, g, stats_ptr, N * L, row, valid, A), mask=inside)


@triton.jit
def _norm_gradient(x, g, stats_ptr, rows, row, valid, A: tl.constexpr):
    """rstd * (g - mean(g) - y * mean(g * y)) for y = (x - mean) * rstd. x and g are zero outside the row."""
    mean = tl.load(stats_ptr + row, mask=valid, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + rows + row, mask=valid, other=0.0)[:, None]
    y = (x.to(tl.float32) - mean) * rstd
    by_mean = tl.sum(g, axis=1)[:, None] / A
    by_scale = tl.sum(g * y, axis=1)[:, None] / A
    return (rstd * (g - by_mean - y * by_scale)).to(x.dtype)


def _held_keys(L: int, dtype: torch.dtype, has_lengths: bool) -> tuple[int, int] | None:
    """MAIN and TAIL of the forward kernel that holds all keys; None: the one that loops over keys must do.

    A tail of 16 makes 77 captions cost 80 columns instead of 128. Where lengths are given, a loop can stop early. In
    float32, which the tensor cores do not know, the held keys would not fit into registers.
    """
    if dtype == torch.float32 or L > (64 if has_lengths else 80):
        return None
    return (64, 16) if L > 64 else (_block(L, 64), 0)


def _backward_blocks(T: int, L: int, head_dim: int, dtype: torch.dtype, has_lengths: bool) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_L, BLOCKS and warps. What decides is that nothing spills: dk and dv stay in registers.

    To 128 keys one block is all of them. More, or where lengths let some be skipped, are blocks of 64: programs of 4
    warps, two at a time on an SM, and each of several blocks, so that q's gradient has fewer parts.
    """
    fp32, wide = dtype == torch.float32, head_dim > 64
    if fp32:
        block_l = 128 if L > 64 and not has_lengths and not wide and head_dim > 32 else _block(L, 64)
        return 16, block_l, 1, 8 if block_l * head_dim == 4096 else 16
    block_t = _block(T, 32 if wide else 64)
    if 64 < L <= 128 and not has_lengths and not wide:
        return block_t, 128, 1, 8
    block_l = _block(L, 64)
    return block_t, block_l, 1 if wide else min(_blocks(L, block_l), 4), 8 if wide and T > block_t else 4


def _block(size: int, largest: int) -> int:
    """tl.dot takes blocks of 16 or more, all powers of two."""
    return min(max(_power_of_two(size), 16), largest)


def _row_block(a: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a program of the kernels over rows: about `elements` elements."""
    block_a = _power_of_two(a)
    return max(1, elements // block_a), block_a


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)  # triton.cdiv on the host takes 10 us


def _forward(
    q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, eps: float, lengths_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out (N, T, A), mean and rstd of q (2, N, T) and of k (2, N, L), log2 of the softmax's sum (N, H, T)."""
    (n, t, a), length, dtype = q_NTA.shape, k_NLA.shape[1], q_NTA.dtype
    head_dim, has_lengths, fp32 = a // num_heads, lengths_N is not None, dtype == torch.float32
    out_NTA = q_NTA.new_empty(n, t, a)
    q_stats, k_stats = (x.new_empty(2, *x.shape[:2], dtype=torch.float32) for x in (q_NTA, k_NLA))
    lse_NHT = q_NTA.new_empty(n, num_heads, t, dtype=torch.float32)
    rows, block_a = _row_block(a, 4096)
    launch(
        _statistics, (2 * _blocks(n * max(t, length), rows),), q_NTA, k_NLA, q_stats, k_stats, lengths_N,
        *q_NTA.stride()[:2], *k_NLA.stride()[:2], n, t, length, eps,
        A=a, ROWS=rows, BLOCK_A=block_a, num_warps=4, num_stages=1,
    )  # fmt: skip
    arguments = (
        q_NTA, k_NLA, v_NLA, out_NTA, lse_NHT, q_stats, k_stats, lengths_N,
        *q_NTA.stride()[:2], *k_NLA.stride()[:2], n, t, length, num_heads, head_dim**-0.5,
    )  # fmt: skip
    block_t, held = _block(t, 32 if fp32 else 64), _held_keys(length, dtype, has_lengths)
    if held:
        share, one_block = block_t * min(4, _blocks(t, block_t)), t <= block_t  # the keys serve 256 queries
        launch(
            _attend_held, (n * _blocks(t, share) * num_heads,), *arguments, share,
            HEAD_DIM=head_dim, BLOCK_T=block_t, ONE_BLOCK=one_block, MAIN=held[0], TAIL=held[1],
            MASK_MAIN=length < held[0] or has_lengths, num_warps=4, num_stages=1 if one_block else 2,
        )  # fmt: skip
    else:
        block_l = _block(length, 64)
        launch(
            _attend_online, (n * _blocks(t, block_t) * num_heads,), *arguments,
            HEAD_DIM=head_dim, BLOCK_T=block_t, BLOCK_L=block_l, MASK=length % block_l > 0 or has_lengths,
            num_warps=8 if fp32 else 4, num_stages=1 if fp32 else 2,
        )  # fmt: skip
    return out_NTA, q_stats, k_stats, lse_NHT


def _needs_output(q_NTA: Tensor, L: int, num_heads: int, lengths_N: Tensor | None) -> bool:
    head_dim = q_NTA.shape[-1] // num_heads
    return L > _backward_blocks(q_NTA.shape[1], L, head_dim, q_NTA.dtype, lengths_N is not None)[1]


def _backward(
    d_out_NTA: Tensor, q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, dq_NTA: Tensor, dk_NLA: Tensor, dv_NLA: Tensor,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor], num_heads: int, lengths_N: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq, dk and dv. `saved`: what `_forward` returned, the output where `_needs_output`."""
    (n, t, a), length, dtype = q_NTA.shape, k_NLA.shape[1], q_NTA.dtype
    head_dim, has_lengths = a // num_heads, lengths_N is not None
    out_NTA, q_stats, k_stats, lse_NHT = saved
    d_out_NTA = _dense_rows(d_out_NTA)
    block_t, block_l, blocks, num_warps = _backward_blocks(t, length, head_dim, dtype, has_lengths)
    parts, one_block = _blocks(length, blocks * block_l), t <= block_t
    dq_parts = dq_NTA.unsqueeze(0) if parts == 1 else q_NTA.new_empty(parts, n, t, a)
    launch(
        _attend_backward, (n * parts * num_heads,), q_NTA, k_NLA, v_NLA, out_NTA, d_out_NTA, lse_NHT, q_stats, k_stats,
        lengths_N, dq_parts, dk_NLA, dv_NLA, *q_NTA.stride()[:2], *k_NLA.stride()[:2], *d_out_NTA.stride()[:2],
        *dq_parts.stride()[:3], *dk_NLA.stride()[:2], n, t, length, num_heads, head_dim**-0.5,
        HEAD_DIM=head_dim, BLOCK_T=block_t, BLOCK_L=block_l, BLOCKS=blocks,
        MASK=length % block_l > 0 or has_lengths, ALL_KEYS=length <= block_l, ONE_BLOCK=one_block,
        num_warps=num_warps, num_stages=1 if dtype == torch.float32 or one_block or blocks > 1 else 2,
    )  # fmt: skip
    rows, block_a = _row_block(a, 2048)
    launch(
        _norm_backward, (2 * _blocks(n * max(t, length), rows),), q_NTA, k_NLA, q_stats, k_stats, lengths_N,
        dq_parts, dq_NTA, dk_NLA, *q_NTA.stride()[:2], *k_NLA.stride()[:2], *dq_parts.stride()[:3],
        *dq_NTA.stride()[:2], *dk_NLA.stride()[:2], n, t, length,
        A=a, PART_L=blocks * block_l, ROWS=rows, BLOCK_A=block_a, num_warps=4, num_stages=1,
    )  # fmt: skip


@registered("mdit::masked_self_attention")
def _self(qkv_NTX: Tensor, num_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(*qkv_NTX.chunk(3, dim=-1), num_heads, eps, None)


@registered("mdit::masked_self_attention_backward")
def _self_backward(
    d_out_NTA: Tensor, qkv_NTX: Tensor, out_NTA: Tensor | None, q_stats: Tensor, k_stats: Tensor, lse_NHT: Tensor,
    num_heads: int,
) -> Tensor:  # fmt: skip
    gradient_NTX = torch.empty_like(qkv_NTX, memory_format=torch.contiguous_format)
    inputs, gradients = qkv_NTX.chunk(3, dim=-1), gradient_NTX.chunk(3, dim=-1)
    _backward(d_out_NTA, *inputs, *gradients, (out_NTA, q_stats, k_stats, lse_NHT), num_heads, None)
    return gradient_NTX


@registered("mdit::masked_cross_attention")
def _cross(
    q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float, key_lengths_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward(q_NTA, *kv_NLX.chunk(2, dim=-1), num_heads, eps, key_lengths_N)


@registered("mdit::masked_cross_attention_backward")
def _cross_backward(
    d_out_NTA: Tensor, q_NTA: Tensor, kv_NLX: Tensor, out_NTA: Tensor | None, q_stats: Tensor, k_stats: Tensor,
    lse_NHT: Tensor, num_heads: int, key_lengths_N: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NTA, kv_NLX)]
    k_v, dk_dv = kv_NLX.chunk(2, dim=-1), gradients[1].chunk(2, dim=-1)
    saved = (out_NTA, q_stats, k_stats, lse_NHT)
    _backward(d_out_NTA, q_NTA, *k_v, gradients[0], *dk_dv, saved, num_heads, key_lengths_N)
    return gradients[0], gradients[1]


def _fake_outputs(q_NTA: Tensor, L: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, t, _ = q_NTA.shape
    shapes = (2, n, t), (2, n, L), (n, num_heads, t)
    return torch.empty_like(q_NTA, memory_format=torch.contiguous_format), *(
        q_NTA.new_empty(shape, dtype=torch.float32) for shape in shapes
    )


@_self.register_fake
def _(qkv_NTX, num_heads, eps):
    return _fake_outputs(qkv_NTX.chunk(3, dim=-1)[0], qkv_NTX.shape[1], num_heads)


@_cross.register_fake
def _(q_NTA, kv_NLX, num_heads, eps, key_lengths_N):
    return _fake_outputs(q_NTA, kv_NLX.shape[1], num_heads)


@_self_backward.register_fake
def _(d_out_NTA, qkv_NTX, *_):
    return torch.empty_like(qkv_NTX, memory_format=torch.contiguous_format)


@_cross_backward.register_fake
def _(d_out_NTA, q_NTA, kv_NLX, *_):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_NTA, kv_NLX))


def _save_self(ctx, inputs, output) -> None:
    qkv_NTX, ctx.num_heads, _ = inputs
    out_NTA, *saved = output
    needed = _needs_output(out_NTA, qkv_NTX.shape[1], ctx.num_heads, None)
    ctx.save_for_backward(qkv_NTX, out_NTA if needed else None, *saved)


def _differentiate_self(ctx, d_out_NTA, *_):
    return _self_backward(d_out_NTA, *ctx.saved_tensors, ctx.num_heads), None, None


def _save_cross(ctx, inputs, output) -> None:
    q_NTA, kv_NLX, ctx.num_heads, _, key_lengths_N = inputs
    out_NTA, *saved = output
    needed = _needs_output(q_NTA, kv_NLX.shape[1], ctx.num_heads, key_lengths_N)
    ctx.save_for_backward(key_lengths_N, q_NTA, kv_NLX, out_NTA if needed else None, *saved)


def _differentiate_cross(ctx, d_out_NTA, *_):
    key_lengths_N, *saved = ctx.saved_tensors
    return *_cross_backward(d_out_NTA, *saved, ctx.num_heads, key_lengths_N), None, None, None


_self.register_autograd(_differentiate_self, setup_context=_save_self)
_cross.register_autograd(_differentiate_cross, setup_context=_save_cross)


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _self(_dense_rows(qkv_NTX), num_heads, eps)[0]


def cross_attention(
    q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float, key_lengths_N: Tensor | None = None
) -> Tensor:
    lengths_N = None if key_lengths_N is None else key_lengths_N.contiguous()
    return _cross(_dense_rows(q_NTA), _dense_rows(kv_NLX), num_heads, eps, lengths_N)[0]


def _dense_rows(x: Tensor) -> Tensor:
    """Such that kernels can read it: rows of neighbouring elements, offsets within an image below 2^31."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()
