"""LayerNorm of q and k, then attention, as PyTorch spells them: the definition, and what the CPU runs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None = None) -> Tensor:
    return _attend(*qkv_NTX.chunk(3, dim=-1), num_heads, eps, rotary_NTC)


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Tensor:
    return _attend(q_NTA, *kv_NLX.chunk(2, dim=-1), num_heads, eps)


def _attend(
    q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None = None
) -> Tensor:
    q, k = F.layer_norm(q_NTA, q_NTA.shape[-1:], eps=eps), F.layer_norm(k_NLA, k_NLA.shape[-1:], eps=eps)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v_NLA))
    if rotary_NTC is not None:
        q, k = _rotated(q, rotary_NTC), _rotated(k, rotary_NTC)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _rotated(x_NHTC: Tensor, rotary_NTC: Tensor) -> Tensor:
    """Pairs (i, i + C / 2) of every head turned, in the table's dtype or a finer one; rounded once."""
    cos, sin = rotary_NTC.unsqueeze(1).chunk(2, dim=-1)
    a, b = x_NHTC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_NHTC.dtype)
