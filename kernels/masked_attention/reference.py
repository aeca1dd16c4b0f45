"""LayerNorm of q and k, then attention, as PyTorch spells them: the definition, and what the CPU runs."""

import torch.nn.functional as F
from torch import Tensor


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _attend(*qkv_NTX.chunk(3, dim=-1), num_heads, eps)


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _attend(q_NTA, *kv_NLX.chunk(2, dim=-1), num_heads, eps)


def _attend(q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, eps: float) -> Tensor:
    q, k = F.layer_norm(q_NTA, q_NTA.shape[-1:], eps=eps), F.layer_norm(k_NLA, k_NLA.shape[-1:], eps=eps)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v_NLA))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
