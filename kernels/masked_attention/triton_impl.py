"""masked_attention in Triton. Nothing is added up by several programs: equal inputs give equal bits.

Self- and cross-attention are one op: of q, k and v side by side, or of q and of k and v side by side.
"""

import torch
from torch import Tensor

from mdit.kernels.custom_op import custom_op
from mdit.kernels.masked_attention.triton_backward import backward, backward_blocks
from mdit.kernels.masked_attention.triton_forward import forward, new_outputs


def _q_k_v(first_NTX: Tensor, kv_NLX: Tensor | None = None) -> tuple[Tensor, ...]:
    return first_NTX.chunk(3, dim=-1) if kv_NLX is None else (first_NTX, *kv_NLX.chunk(2, dim=-1))


def _new(*packed: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in packed if x is not None]


def _save(
    first_NTX: Tensor, kv_NLX: Tensor | None, num_heads: int, eps: float, rotary_NTC: Tensor | None,
    found: tuple[Tensor, ...],
) -> tuple:  # fmt: skip
    """The output too, where backward needs it: where one block is not all the keys."""
    out_NTA, q_stats, k_stats, _ = found
    (_, t, a), length = out_NTA.shape, k_stats.shape[2]
    keeps_out = length > backward_blocks(t, length, a // num_heads, out_NTA.dtype)[1]
    return first_NTX, kv_NLX, out_NTA if keeps_out else None, *found[1:], num_heads, rotary_NTC


@custom_op("mdit::masked_attention_backward", fake=lambda d_out_NTA, first_NTX, kv_NLX, *_: _new(first_NTX, kv_NLX))
def _backward(
    d_out_NTA: Tensor, first_NTX: Tensor, kv_NLX: Tensor | None, out_NTA: Tensor | None, q_stats: Tensor,
    k_stats: Tensor, lse_NHT: Tensor, num_heads: int, rotary_NTC: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    new, saved = _new(first_NTX, kv_NLX), (out_NTA, q_stats, k_stats, lse_NHT)
    backward(_dense_rows(d_out_NTA), *_q_k_v(first_NTX, kv_NLX), *_q_k_v(*new), saved, num_heads, rotary_NTC)
    return new


@custom_op(
    "mdit::masked_attention",
    fake=lambda first_NTX, kv_NLX, heads, eps, rotary_NTC: new_outputs(*_q_k_v(first_NTX, kv_NLX)[:2], heads),
    save=_save,
    backward=lambda d_out_NTA, _, __, ___, *saved: _backward(d_out_NTA, *saved),
)
def _attention(
    first_NTX: Tensor, kv_NLX: Tensor | None, num_heads: int, eps: float, rotary_NTC: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return forward(*_q_k_v(first_NTX, kv_NLX), num_heads, eps, rotary_NTC)


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None = None) -> Tensor:
    table = None if rotary_NTC is None else rotary_NTC.float().contiguous()
    return _attention(_dense_rows(qkv_NTX), None, num_heads, eps, table)[0]


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _attention(_dense_rows(q_NTA), _dense_rows(kv_NLX), num_heads, eps, None)[0]


def _dense_rows(x: Tensor) -> Tensor:
    """Such that kernels can read it: rows of neighbouring elements, offsets within an image below 2^31."""
    return x if x.stride(-1) == 1 and x.shape[1] * x.stride(1) < 2**31 else x.contiguous()
