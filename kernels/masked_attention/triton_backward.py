"""Triton kernels of masked_attention, backward: attention, then LayerNorm. Shapes as in triton_forward.

The kernel over rows walks backwards, as the one of forward does: it starts with what the kernel before it wrote or read
last, and ends where the next one starts, so that a part of it is still in the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.launch import cdiv, launch
from mdit.kernels.masked_attention.triton_forward import (
    LOG2_E,
    block_of,
    dot,
    load_tile,
    normalised,
    other_half,
    rotary_stride,
    rotated,
    row_block,
    rows_of,
    store_tile,
)


@triton.jit
def _attend_backward(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, q_stats_ptr, k_stats_ptr, dq_ptr, dk_ptr, dv_ptr,
    rotary_ptr, rotary_stride_n,
    q_stride_n, q_stride_t, kv_stride_n, kv_stride_t, d_out_stride_n, d_out_stride_t,
    dq_stride_part, dq_stride_n, dq_stride_t, dkv_stride_n, dkv_stride_t,
    N, T, L, H, scale,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_L: tl.constexpr, BLOCKS: tl.constexpr,
    MASK: tl.constexpr, ALL_KEYS: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the normalised (and turned) k and of v for some blocks of keys, and their part of those of q.

    Loops over the queries, for one block of keys after the other. Tiles of scores are transposed (keys by queries), so
    that p and ds are operands of the products for dv and dk as they leave the product before. A block of keys adds what
    it has of q's gradient to what the program has written for the blocks before. ALL_KEYS: one block is all the keys,
    and the sum over keys of p * dp is at hand; otherwise it is had from the output, as it equals the sum over the head
    of out * d_out. ONE_BLOCK: so is one block of queries.
    """
    parts = tl.cdiv(L, BLOCKS * BLOCK_L)
    head, part, image = tl.program_id(0) % H, tl.program_id(0) // H % parts, tl.program_id(0) // H // parts
    n = image.to(tl.int64)
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
    if rotary_ptr is not None:
        rotary_ptr += n * rotary_stride_n
    if not ALL_KEYS:
        out_ptr += (n * T * H + head) * HEAD_DIM

    first = part * (BLOCKS * BLOCK_L)
    blocks = 1 if BLOCKS == 1 else tl.minimum(tl.cdiv(L - first, BLOCK_L), BLOCKS)
    for block in range(0, blocks):
        key = first + block * BLOCK_L
        k = load_tile(k_ptr, kv_stride_t, key, L, BLOCK_L, HEAD_DIM)
        v = load_tile(v_ptr, kv_stride_t, key, L, BLOCK_L, HEAD_DIM)
        last = BLOCK_T if ONE_BLOCK else T
        if ONE_BLOCK:  # nothing waits for memory before every load is on its way
            raw_q = load_tile(q_ptr, q_stride_t, 0, T, BLOCK_T, HEAD_DIM)
            d_out = load_tile(d_out_ptr, d_out_stride_t, 0, T, BLOCK_T, HEAD_DIM)
        k = normalised(k, k_ptr, kv_stride_t, k_stats_ptr, k_stats_ptr + N * L, rotary_ptr, key, L, BLOCK_L, HEAD_DIM)
        dk = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
        dv = tl.zeros((BLOCK_L, HEAD_DIM), tl.float32)
        if BLOCKS > 1:
            tl.debug_barrier()  # the gradients of q that the block before wrote are there
        for start in range(0, last, BLOCK_T):
            row = start + tl.arange(0, BLOCK_T)
            if not ONE_BLOCK:
                raw_q = load_tile(q_ptr, q_stride_t, start, T, BLOCK_T, HEAD_DIM)
                d_out = load_tile(d_out_ptr, d_out_stride_t, start, T, BLOCK_T, HEAD_DIM)
            lse = tl.load(lse_ptr + row, mask=row < T, other=0.0)
            q = normalised(
                raw_q, q_ptr, q_stride_t, q_stats_ptr, q_stats_ptr + N * T, rotary_ptr, start, T, BLOCK_T, HEAD_DIM
            )  # fmt: skip
            p = tl.exp2(dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :])
            if MASK:
                p = tl.where((key + tl.arange(0, BLOCK_L) < L)[:, None], p, 0.0)
            dv = tl.dot(p.to(q.dtype), d_out, dv, input_precision="ieee")
            if ONE_BLOCK:  # stored at once: fewer registers, more programs at a time
                store_tile(dv_ptr, dkv_stride_t, key, L, dv, BLOCK_L, HEAD_DIM)
            dp = dot(v, tl.trans(d_out))
            if ALL_KEYS:
                delta = tl.sum(p * dp, axis=0)
            else:
                out = load_tile(out_ptr, H * HEAD_DIM, start, T, BLOCK_T, HEAD_DIM)
                delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
            ds = (p * (dp - delta[None, :])).to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision="ieee")
            if ONE_BLOCK:
                store_tile(dk_ptr, dkv_stride_t, key, L, dk * scale, BLOCK_L, HEAD_DIM)
            dq = dot(tl.trans(ds), k) * scale
            if BLOCKS > 1:
                before = load_tile(dq_ptr, dq_stride_t, start, T if block > 0 else 0, BLOCK_T, HEAD_DIM)
                dq += before.to(tl.float32)
            store_tile(dq_ptr, dq_stride_t, start, T, dq, BLOCK_T, HEAD_DIM)
        if not ONE_BLOCK:
            store_tile(dk_ptr, dkv_stride_t, key, L, dk * scale, BLOCK_L, HEAD_DIM)
            store_tile(dv_ptr, dkv_stride_t, key, L, dv, BLOCK_L, HEAD_DIM)


@triton.jit
def _norm_backward(
    q_ptr, k_ptr, q_stats_ptr, k_stats_ptr, parts_ptr, dq_ptr, dk_ptr, rotary_ptr, rotary_stride_n,
    q_stride_n, q_stride_t, k_stride_n, k_stride_t,
    part_stride_part, part_stride_n, part_stride_t, dq_stride_n, dq_stride_t, dk_stride_n, dk_stride_t,
    N, T, L, HEAD_DIM: tl.constexpr, A: tl.constexpr, PART_L: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Gradients of q and k from those of the normalised q (in parts, one for PART_L keys) and k (in place); where these
    were turned they are turned back first."""
    block = (tl.num_programs(0) - 1 - tl.program_id(0)) // 2
    if tl.program_id(0) % 2 == 0:
        _query_rows(
            q_ptr, q_stride_n, q_stride_t, q_stats_ptr, parts_ptr, part_stride_part, part_stride_n, part_stride_t,
            dq_ptr, dq_stride_n, dq_stride_t, rotary_ptr, rotary_stride_n,
            block, N, T, L, HEAD_DIM, A, PART_L, ROWS, BLOCK_A,
        )  # fmt: skip
    else:
        _key_rows(
            k_ptr, k_stride_n, k_stride_t, k_stats_ptr, dk_ptr, dk_stride_n, dk_stride_t, rotary_ptr, rotary_stride_n,
            block, N, L, HEAD_DIM, A, ROWS, BLOCK_A,
        )  # fmt: skip


@triton.jit
def _query_rows(
    q_ptr, q_stride_n, q_stride_t, stats_ptr, parts_ptr, part_stride_part, part_stride_n, part_stride_t,
    dq_ptr, dq_stride_n, dq_stride_t, rotary_ptr, rotary_stride_n, block, N, T, L,
    HEAD_DIM: tl.constexpr, A: tl.constexpr, PART_L: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row, image, token, valid = rows_of(block, N, T, ROWS)
    n, column = image.to(tl.int64), tl.arange(0, BLOCK_A)[None, :]
    inside = valid[:, None] & (column < A)
    parts_ptr += (n * part_stride_n + token * part_stride_t)[:, None]
    g = _sum_of_parts(parts_ptr + column, part_stride_part, inside, L, PART_L)
    if rotary_ptr is not None:
        other = _sum_of_parts(parts_ptr + other_half(column, HEAD_DIM), part_stride_part, inside, L, PART_L)
        rotary_ptr += (n * rotary_stride_n + token * HEAD_DIM)[:, None]
        g = rotated(g, other, rotary_ptr, inside, column, HEAD_DIM, True)
        tl.debug_barrier()  # where the only part is the gradient itself: read before it is overwritten
    x = tl.load(q_ptr + (n * q_stride_n + token * q_stride_t)[:, None] + column, mask=inside, other=0.0)
    g = _norm_gradient(x, g, stats_ptr, N * T, row, valid, A)
    tl.store(dq_ptr + (n * dq_stride_n + token * dq_stride_t)[:, None] + column, g, mask=inside)


@triton.jit
def _sum_of_parts(pointer, stride, inside, L, PART_L: tl.constexpr):
    g = tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    for _ in range(1, tl.cdiv(L, PART_L)):
        pointer += stride
        g += tl.load(pointer, mask=inside, other=0.0).to(tl.float32)
    return g


@triton.jit
def _key_rows(
    k_ptr, k_stride_n, k_stride_t, stats_ptr, dk_ptr, dk_stride_n, dk_stride_t, rotary_ptr, rotary_stride_n,
    block, N, L, HEAD_DIM: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """The same of one part, in place; as a call of `_query_rows` it takes 3 to 7 instructions more."""
    row, image, token, valid = rows_of(block, N, L, ROWS)
    n, column = image.to(tl.int64), tl.arange(0, BLOCK_A)[None, :]
    inside = valid[:, None] & (column < A)
    dk_ptr += (n * dk_stride_n + token * dk_stride_t)[:, None]
    g = tl.load(dk_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if rotary_ptr is not None:
        other = tl.load(dk_ptr + other_half(column, HEAD_DIM), mask=inside, other=0.0).to(tl.float32)
        rotary_ptr += (n * rotary_stride_n + token * HEAD_DIM)[:, None]
        g = rotated(g, other, rotary_ptr, inside, column, HEAD_DIM, True)
        tl.debug_barrier()  # all of it is read before it is overwritten
    x = tl.load(k_ptr + (n * k_stride_n + token * k_stride_t)[:, None] + column, mask=inside, other=0.0)
    tl.store(dk_ptr + column, _norm_gradient(x, g, stats_ptr, N * L, row, valid, A), mask=inside)


@triton.jit
def _norm_gradient(x, g, stats_ptr, rows, row, valid, A: tl.constexpr):
    """rstd * (g - mean(g) - y * mean(g * y)) for y = (x - mean) * rstd. x and g are zero outside the row."""
    mean = tl.load(stats_ptr + row, mask=valid, other=0.0)[:, None]
    rstd = tl.load(stats_ptr + rows + row, mask=valid, other=0.0)[:, None]
    y = (x.to(tl.float32) - mean) * rstd
    by_mean = tl.sum(g, axis=1)[:, None] / A
    by_scale = tl.sum(g * y, axis=1)[:, None] / A
    return (rstd * (g - by_mean - y * by_scale)).to(x.dtype)


def backward_blocks(
    T: int, L: int, head_dim: int, dtype: torch.dtype, rotary: bool = False
) -> tuple[int, int, int, int]:
    """BLOCK_T, BLOCK_L, BLOCKS and warps. What decides is that nothing spills: dk and dv stay in registers.

    To 128 keys one block is all of them. More are blocks of 64: programs of 4 warps, two at a time on an SM, and each
    of several blocks, so that q's gradient has fewer parts.
    """
    fp32, wide = dtype == torch.float32, head_dim > 64
    if fp32:
        block_l = 128 if L > 64 and not wide and head_dim > 32 else block_of(L, 64)
        return 16, block_l, 1, 8 if block_l * head_dim == 4096 else 16
    block_t = block_of(T, 32 if wide else 64)
    if 64 < L <= 128 and not wide:
        return block_t, 128, 1, 8
    block_l = block_of(L, 64)
    return block_t, block_l, 1 if wide else min(cdiv(L, block_l), 4), 8 if (wide or rotary) and T > block_t else 4


def backward(
    d_out_NTA: Tensor, q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, dq_NTA: Tensor, dk_NLA: Tensor, dv_NLA: Tensor,
    saved: tuple[Tensor | None, Tensor, Tensor, Tensor], num_heads: int, rotary_NTC: Tensor | None,
) -> None:  # fmt: skip
    """Writes dq, dk and dv. `saved`: what `forward` returned, the output where one block is not all the keys."""
    (n, t, a), length, dtype = q_NTA.shape, k_NLA.shape[1], q_NTA.dtype
    head_dim, strides = a // num_heads, (*q_NTA.stride()[:2], *k_NLA.stride()[:2])
    out_NTA, q_stats, k_stats, lse_NHT = saved
    block_t, block_l, blocks, num_warps = backward_blocks(t, length, head_dim, dtype, rotary_NTC is not None)
    parts, one_block = cdiv(length, blocks * block_l), t <= block_t
    dq_parts = dq_NTA.unsqueeze(0) if parts == 1 else q_NTA.new_empty(parts, n, t, a)
    launch(
        _attend_backward, (n * parts * num_heads,), q_NTA, k_NLA, v_NLA, out_NTA, d_out_NTA, lse_NHT, q_stats, k_stats,
        dq_parts, dk_NLA, dv_NLA, rotary_NTC, rotary_stride(rotary_NTC),
        *strides, *d_out_NTA.stride()[:2], *dq_parts.stride()[:3], *dk_NLA.stride()[:2],
        n, t, length, num_heads, head_dim**-0.5,
        HEAD_DIM=head_dim, BLOCK_T=block_t, BLOCK_L=block_l, BLOCKS=blocks,
        MASK=length % block_l > 0, ALL_KEYS=length <= block_l, ONE_BLOCK=one_block,
        num_warps=num_warps, num_stages=1 if dtype == torch.float32 or one_block or blocks > 1 else 2,
    )  # fmt: skip
    tile = row_block(a, 2048)
    launch(
        _norm_backward, (2 * cdiv(n * max(t, length), tile["ROWS"]),), q_NTA, k_NLA, q_stats, k_stats,
        dq_parts, dq_NTA, dk_NLA, rotary_NTC, rotary_stride(rotary_NTC), *strides, *dq_parts.stride()[:3],
        *dq_NTA.stride()[:2], *dk_NLA.stride()[:2], n, t, length, HEAD_DIM=head_dim, PART_L=blocks * block_l, **tile,
    )  # fmt: skip
