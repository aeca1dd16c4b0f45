"""Backward reads what forward read, its result and the result's gradient, and writes gradients of what forward read."""

from torch import Tensor

from mdit.kernels.cost import Cost, size


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float) -> Cost:
    q_NTA, *_ = qkv_NTX.chunk(3, dim=-1)
    return _attention(size(qkv_NTX), q_NTA, qkv_NTX.shape[1])


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Cost:
    return _attention(size(q_NTA, kv_NLX), q_NTA, kv_NLX.shape[1])


def _attention(read: int, q_NTA: Tensor, keys: int) -> Cost:
    out = size(q_NTA)
    return Cost(read + out, 2 * read + 2 * out, 4 * q_NTA.numel() * keys)
