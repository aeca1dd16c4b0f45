"""Expert choice in Triton. What each operation computes and saves stands in the package's docstring.

Nothing is added by atomics and every element is written by one program, once: the same bits on every run. Where a sum
runs over the experts that chose a token, it runs in the order of the experts, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.custom_op import CustomOp, custom_op, like
from mdit.kernels.expert_choice.reference import Routing
from mdit.kernels.launch import cdiv, dense, launch, power_of_2
from mdit.kernels.triton_functions import gelu_and_slope, normal_cdf

# ---------------------------------------------------------------- routing


@triton.jit
def _logits(rows, real, first, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """(tokens, BLOCK_E) logits of the experts from `first` on; -inf past the last one, 0 where no token is."""
    e = first + tl.arange(0, BLOCK_E)
    expert = (e < E)[None, :]
    values = tl.load(rows[:, None] + e[None, :], mask=real[:, None] & expert, other=0.0).to(tl.float32)
    return tl.where(expert, values, float("-inf"))


@triton.jit
def _route(
    logits, weights, tokens, slots, T, K, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """One image and expert: softmax of all tokens over the experts, then a sort of this expert's column.

    The key of a token is its probability's bits (which order like the number, NaN on top) over its index counted from
    the end. Keys are distinct, so that whatever the logits the sorted tokens are a permutation.
    """
    e = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    real = t < T
    rows = logits + (n * T + t) * E
    own = tl.load(rows + e, mask=real, other=0.0).to(tl.float32)
    largest = own
    for first in tl.static_range(0, E, BLOCK_E):
        largest = tl.maximum(largest, tl.max(_logits(rows, real, first, E, BLOCK_E), axis=1))
    total = tl.zeros((BLOCK_T,), tl.float32)
    for first in tl.static_range(0, E, BLOCK_E):
        others = _logits(rows, real, first, E, BLOCK_E)
        total += tl.sum(tl.exp(others - largest[:, None]), axis=1)
    probability = tl.exp(own - largest) / total

    bits = probability.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    key = (bits.to(tl.int64) << 32) | (BLOCK_T - 1 - t).to(tl.int64)
    key = tl.sort(tl.where(real, key, -1 - t), descending=True)
    rank = t  # from here on a lane holds the token of this rank
    token = BLOCK_T - 1 - key.to(tl.int32)
    chosen = rank < K
    place = (n * E + e) * K + rank
    tl.store(weights + place, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=chosen)
    tl.store(tokens + place, token.to(tl.int64), mask=chosen)
    tl.store(slots + (n * T + token) * E + e, tl.where(chosen, rank, -1), mask=rank < T)


@triton.jit
def _route_backward(
    dweights, logits, slots, dlogits, T, K, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Some tokens of an image: the softmax again, then p * (g - sum of p * g), g = 0 where an expert did not choose."""
    n = tl.program_id(1).to(tl.int64)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    real = (t < T)[:, None] & (e < E)[None, :]
    values = _logits(logits + (n * T + t) * E, t < T, 0, E, BLOCK_E)
    exps = tl.exp(values - tl.max(values, axis=1)[:, None])
    p = exps / tl.sum(exps, axis=1)[:, None]

    place = (n * T + t[:, None]) * E + e[None, :]
    slot = tl.load(slots + place, mask=real, other=-1)
    g = tl.load(dweights + n * E * K + e[None, :] * K + slot, mask=slot >= 0, other=0.0).to(tl.float32)
    dot = tl.sum(tl.where(real, p * g, 0.0), axis=1)
    tl.store(dlogits + place, (p * (g - dot[:, None])).to(dlogits.dtype.element_ty), mask=real)


# ---------------------------------------------------------------- moving tokens


@triton.jit
def _gather(
    x, tokens, out, N, K, D, stride_n, stride_t, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Rows of x to one expert's block. Images are outermost: what several experts take is read from L2 again."""
    k_blocks = tl.cdiv(K, BLOCK_K)
    e = tl.program_id(1) // k_blocks
    n = tl.program_id(2).to(tl.int64)
    E = tl.num_programs(1) // k_blocks
    k = tl.program_id(1) % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = (k < K)[:, None] & (d < D)[None, :]
    token = tl.load(tokens + (n * E + e) * K + k, mask=k < K, other=0)
    values = tl.load(x + n * stride_n + token[:, None] * stride_t + d[None, :], mask=real)
    first = (e.to(tl.int64) * N + n) * K
    tl.store(out + first * D + k[:, None] * D + d[None, :], values, mask=real)


@triton.jit
def _scatter(
    y, slots, out, T, K, D, stride_e, stride_m, E: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Sum of the rows that a token has in the experts' blocks; where it has none, no memory is touched."""
    n = tl.program_id(2).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    rows = y + n * K * stride_m
    for e in tl.static_range(E):
        slot = tl.load(slots + (n * T + t) * E + e, mask=t < T, other=-1)
        chosen = (slot >= 0)[:, None] & inside
        total += tl.load(rows + slot[:, None] * stride_m + d[None, :], mask=chosen, other=0.0).to(tl.float32)
        rows += stride_e
    place = n * T * D + t[:, None] * D + d[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=(t < T)[:, None] & inside)


# ---------------------------------------------------------------- GELU and router weights, around a matmul


@triton.jit
def _weights_of(weights, m, e, M, E: tl.constexpr, K: tl.constexpr):
    """(where in weights_NEK the rows m = n * K + k of expert e have theirs, are these rows real)"""
    return weights + (m // K) * (E * K) + e * K + m % K, m < M


@triton.jit
def _gelu(
    h, weights, a, M, F, E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """a = weight * gelu(h)"""
    e = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    where, real = _weights_of(weights, m, e, M, E, K)
    weight = tl.load(where, mask=real, other=0.0).to(tl.float32)[:, None]
    first = (e.to(tl.int64) * M + tl.program_id(1) * BLOCK_M) * F
    place = first + tl.arange(0, BLOCK_M)[:, None] * F + f[None, :]
    mask = real[:, None] & (f < F)[None, :]
    values = tl.load(h + place, mask=mask, other=0.0).to(tl.float32)
    p, _ = normal_cdf(values)
    tl.store(a + place, (weight * (values * p)).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward(
    h, da, weights, dh, a, dweights, M, F,
    E: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """a = weight * gelu(h) again, dh = weight * gelu'(h) * da (dh may be da itself), dweight = <gelu(h), da>."""
    e = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    m = tl.program_id(0) * BLOCK_M + rows
    where, real = _weights_of(weights, m, e, M, E, K)
    weight = tl.load(where, mask=real, other=0.0).to(tl.float32)[:, None]
    first = (e.to(tl.int64) * M + tl.program_id(0) * BLOCK_M) * F
    dot = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        place = first + rows[:, None] * F + f[None, :]
        mask = real[:, None] & (f < F)[None, :]
        values = tl.load(h + place, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(da + place, mask=mask, other=0.0).to(tl.float32)
        gelu, slope = gelu_and_slope(values)
        dot += gelu * g
        tl.store(a + place, (weight * gelu).to(a.dtype.element_ty), mask=mask)
        tl.debug_barrier()  # dh may be da: no thread overwrites what another has yet to read
        tl.store(dh + place, (weight * g * slope).to(dh.dtype.element_ty), mask=mask)
    where, real = _weights_of(dweights, m, e, M, E, K)
    tl.store(where, tl.sum(dot, axis=1).to(dweights.dtype.element_ty), mask=real)


# ---------------------------------------------------------------- launches and ops


def _row_blocks(width: int, rows: int) -> tuple[int, int]:
    """(rows, columns) of a block: 256 columns, which are 16 bytes a lane of a warp in bf16, and divide 768 and 1024."""
    return rows, min(256, power_of_2(width))


@custom_op("mdit::expert_route_backward", fake=like(1))
def _route_backward_op(dweights_NEK: Tensor, logits_NTE: Tensor, slots_NTE: Tensor) -> Tensor:
    n, num_tokens, experts = logits_NTE.shape
    dlogits_NTE = logits_NTE.new_empty(logits_NTE.shape)
    block_e = power_of_2(experts)
    block_t = max(1, min(1024 // block_e, power_of_2(num_tokens)))
    launch(
        _route_backward, (cdiv(num_tokens, block_t), n),
        dweights_NEK.contiguous(), logits_NTE.contiguous(), slots_NTE, dlogits_NTE,
        num_tokens, dweights_NEK.shape[2],
        E=experts, BLOCK_E=block_e, BLOCK_T=block_t,
    )  # fmt: skip
    return dlogits_NTE


def _empty_routing(logits_NTE: Tensor, tokens_per_expert: int) -> tuple[Tensor, Tensor, Tensor]:
    n, num_tokens, experts = logits_NTE.shape
    return (
        logits_NTE.new_empty(n, experts, tokens_per_expert, dtype=torch.float32),
        logits_NTE.new_empty(n, experts, tokens_per_expert, dtype=torch.int64),
        logits_NTE.new_empty(n, num_tokens, experts, dtype=torch.int32),
    )


@custom_op(
    "mdit::expert_route",
    fake=_empty_routing,
    save=lambda logits_NTE, tokens_per_expert, routing: (logits_NTE, routing[2]),
    backward=lambda dweights_NEK, _, __, logits_NTE, slots_NTE: _route_backward_op(dweights_NEK, logits_NTE, slots_NTE),
)
def _route_op(logits_NTE: Tensor, tokens_per_expert: int) -> tuple[Tensor, Tensor, Tensor]:
    n, num_tokens, experts = logits_NTE.shape
    weights_NEK, tokens_NEK, slots_NTE = _empty_routing(logits_NTE, tokens_per_expert)
    block = max(16, power_of_2(num_tokens))  # a sort wants all tokens of an image in one program
    launch(
        _route, (experts, n),
        logits_NTE.contiguous(), weights_NEK, tokens_NEK, slots_NTE, num_tokens, tokens_per_expert,
        E=experts, BLOCK_E=min(16, power_of_2(experts)), BLOCK_T=block,
        num_warps=min(max(block // 128, 1), 16),
    )  # fmt: skip
    return weights_NEK, tokens_NEK, slots_NTE


def gathered(x_NTD: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor) -> Tensor:
    (n, experts, k), width, x_NTD = tokens_NEK.shape, x_NTD.shape[2], dense(x_NTD)
    out_EMD = x_NTD.new_empty(experts, n * k, width)
    block_k, block_d = _row_blocks(width, 16)
    launch(
        _gather, (cdiv(width, block_d), experts * cdiv(k, block_k), n),
        x_NTD, tokens_NEK.contiguous(), out_EMD, n, k, width, x_NTD.stride(0), x_NTD.stride(1),
        BLOCK_K=block_k, BLOCK_D=block_d,
    )  # fmt: skip
    return out_EMD


def scattered(y_EMD: Tensor, tokens_NEK: Tensor, slots_NTE: Tensor) -> Tensor:
    (n, num_tokens, experts), width, y_EMD = slots_NTE.shape, y_EMD.shape[2], dense(y_EMD)
    out_NTD = y_EMD.new_empty(n, num_tokens, width)
    block_t, block_d = _row_blocks(width, 8)
    launch(
        _scatter, (cdiv(width, block_d), cdiv(num_tokens, block_t), n),
        y_EMD, slots_NTE.contiguous(), out_NTD,
        num_tokens, tokens_NEK.shape[2], width, y_EMD.stride(0), y_EMD.stride(1),
        E=experts, BLOCK_T=block_t, BLOCK_D=block_d,
    )  # fmt: skip
    return out_NTD


# Each is the transpose of the other.
_gather_op = CustomOp(
    "mdit::expert_gather",
    gathered,
    fake=lambda x_NTD, tokens_NEK, slots_NTE: x_NTD.new_empty(
        tokens_NEK.shape[1], tokens_NEK.shape[0] * tokens_NEK.shape[2], x_NTD.shape[2]
    ),
    save=lambda x_NTD, tokens_NEK, slots_NTE, out: (tokens_NEK, slots_NTE),
    backward=lambda dy_EMD, *indices: _scatter_op(dy_EMD, *indices),
)
_scatter_op = CustomOp(
    "mdit::expert_scatter",
    scattered,
    fake=lambda y_EMD, tokens_NEK, slots_NTE: y_EMD.new_empty(*slots_NTE.shape[:2], y_EMD.shape[2]),
    save=lambda y_EMD, tokens_NEK, slots_NTE, out: (tokens_NEK, slots_NTE),
    backward=lambda dx_NTD, *indices: _gather_op(dx_NTD, *indices),
)


@custom_op("mdit::expert_gelu_bmm_backward", fake=like(1, 2, 3))
def _gelu_bmm_backward_op(
    dy_EMD: Tensor, h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (experts, m, width), h_EMF, a_EMF = h_EMF.shape, h_EMF.contiguous(), h_EMF.new_empty(h_EMF.shape)
    dh_EMF = torch.bmm(dy_EMD, w2_EFD.transpose(1, 2))  # the gradient of a, until the kernel overwrites it
    dweights_NEK = weights_NEK.new_empty(weights_NEK.shape)
    block_m, block_f = _row_blocks(width, 8)
    launch(
        _gelu_backward, (cdiv(m, block_m), experts),
        h_EMF, dh_EMF, weights_NEK.contiguous(), dh_EMF, a_EMF, dweights_NEK, m, width,
        E=experts, K=weights_NEK.shape[2], BLOCK_M=block_m, BLOCK_F=block_f,
    )  # fmt: skip
    return dh_EMF, torch.bmm(a_EMF.transpose(1, 2), dy_EMD), dweights_NEK


@custom_op(
    "mdit::expert_gelu_bmm",
    fake=lambda h_EMF, w2_EFD, weights_NEK: h_EMF.new_empty(*h_EMF.shape[:2], w2_EFD.shape[2]),
    save=lambda h_EMF, w2_EFD, weights_NEK, out: (h_EMF, w2_EFD, weights_NEK),
    backward=_gelu_bmm_backward_op,
)
def gelu_bmm(h_EMF: Tensor, w2_EFD: Tensor, weights_NEK: Tensor) -> Tensor:
    (experts, m, width), h_EMF, a_EMF = h_EMF.shape, h_EMF.contiguous(), h_EMF.new_empty(h_EMF.shape)
    block_m, block_f = _row_blocks(width, 8)
    launch(
        _gelu, (cdiv(width, block_f), cdiv(m, block_m), experts),
        h_EMF, weights_NEK.contiguous(), a_EMF, m, width,
        E=experts, K=weights_NEK.shape[2], BLOCK_M=block_m, BLOCK_F=block_f,
    )  # fmt: skip
    return torch.bmm(a_EMF, w2_EFD)


def route(logits_NTE: Tensor, tokens_per_expert: int) -> Routing:
    return Routing(*_route_op(logits_NTE, tokens_per_expert))


def gather_tokens(x_NTD: Tensor, routing: Routing) -> Tensor:
    return _gather_op(x_NTD, routing.tokens_NEK, routing.slots_NTE)


def scatter_tokens(y_EMD: Tensor, routing: Routing) -> Tensor:
    return _scatter_op(y_EMD, routing.tokens_NEK, routing.slots_NTE)
