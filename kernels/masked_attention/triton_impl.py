"""The ops of masked_attention in Triton. Nothing is added up by several programs: equal inputs give equal bits."""

import torch
from torch import Tensor

from mdit.kernels.custom_op import custom_op
from mdit.kernels.masked_attention.triton_backward import backward, backward_blocks
from mdit.kernels.masked_attention.triton_forward import forward


def _new(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_outputs(q_NTA: Tensor, L: int, num_heads: int) -> tuple[Tensor, ...]:
    n, t, _ = q_NTA.shape
    shapes = (2, n, t), (2, n, L), (n, num_heads, t)
    return _new(q_NTA), *(q_NTA.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _kept(out_NTA: Tensor, L: int, num_heads: int) -> Tensor | None:
    """The output, where backward needs it: where one block is not all the keys."""
    _, t, a = out_NTA.shape
    return out_NTA if L > backward_blocks(t, L, a // num_heads, out_NTA.dtype)[1] else None


@custom_op("mdit::masked_self_attention_backward", fake=lambda d_out_NTA, qkv_NTX, *_: _new(qkv_NTX))
def _self_backward(
    d_out_NTA: Tensor, qkv_NTX: Tensor, out_NTA: Tensor | None, q_stats: Tensor, k_stats: Tensor, lse_NHT: Tensor,
    num_heads: int,
) -> Tensor:  # fmt: skip
    gradient_NTX, saved = _new(qkv_NTX), (out_NTA, q_stats, k_stats, lse_NHT)
    backward(_dense_rows(d_out_NTA), *qkv_NTX.chunk(3, dim=-1), *gradient_NTX.chunk(3, dim=-1), saved, num_heads)
    return gradient_NTX


@custom_op(
    "mdit::masked_self_attention",
    fake=lambda qkv_NTX, num_heads, eps: _new_outputs(qkv_NTX.chunk(3, dim=-1)[0], qkv_NTX.shape[1], num_heads),
    save=lambda qkv, heads, eps, found: (qkv, _kept(found[0], qkv.shape[1], heads), *found[1:], heads),
    backward=lambda d_out_NTA, _, __, ___, *saved: _self_backward(d_out_NTA, *saved),
)
def _self(qkv_NTX: Tensor, num_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(*qkv_NTX.chunk(3, dim=-1), num_heads, eps)


@custom_op("mdit::masked_cross_attention_backward", fake=lambda d_out, q_NTA, kv_NLX, *_: (_new(q_NTA), _new(kv_NLX)))
def _cross_backward(
    d_out_NTA: Tensor, q_NTA: Tensor, kv_NLX: Tensor, out_NTA: Tensor | None, q_stats: Tensor, k_stats: Tensor,
    lse_NHT: Tensor, num_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq_NTA, dkv_NLX, saved = _new(q_NTA), _new(kv_NLX), (out_NTA, q_stats, k_stats, lse_NHT)
    k_v, dk_dv = kv_NLX.chunk(2, dim=-1), dkv_NLX.chunk(2, dim=-1)
    backward(_dense_rows(d_out_NTA), q_NTA, *k_v, dq_NTA, *dk_dv, saved, num_heads)
    return dq_NTA, dkv_NLX


@custom_op(
    "mdit::masked_cross_attention",
    fake=lambda q_NTA, kv_NLX, num_heads, eps: _new_outputs(q_NTA, kv_NLX.shape[1], num_heads),
    save=lambda q, kv, heads, eps, found: (q, kv, _kept(found[0], kv.shape[1], heads), *found[1:], heads),
    backward=lambda d_out_NTA, _, __, ___, *saved: _cross_backward(d_out_NTA, *saved),
)
def _cross(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(q_NTA, *kv_NLX.chunk(2, dim=-1), num_heads, eps)


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _self(_dense_rows(qkv_NTX), num_heads, eps)[0]


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _cross(_dense_rows(q_NTA), _dense_rows(kv_NLX), num_heads, eps)[0]


def _dense_rows(x: Tensor) -> Tensor:
    """Such that kernels can read it: rows of neighbouring elements, offsets within an image below 2^31."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()
