"""Attention of the kept tokens: LayerNorm of q and k over the whole width, then softmax attention by heads.

    q, k = (q - mean(q)) * rstd(q), (k - mean(k)) * rstd(k)             over A, no affine, rounded to the dtype of q
    q, k = turned by the angles of their tokens, head by head           where self-attention is given a table of them
    out_h = softmax(q_h k_h^T / sqrt(head_dim)) v_h                     head by head, A = heads * head_dim

Shapes: N batch, T image tokens, L caption tokens, A width. q, k and v come side by side, as one matmul gives them, and
so do their gradients go back to it, with no copy between. float16, bfloat16 and float32 in Triton, head_dim 16, 32, 64
or 128; the sums in float32. Any strides; a tensor whose last dimension is not dense is copied.

Triton reads every row of q and k once for its mean and rstd, and normalises tiles as the attention kernels load them:
the normalised q and k are never written. Backward computes the scores again, writes gradients of the normalised q and k
and turns them into those of q and k in place, since LayerNorm's need sums over all heads. It saves the inputs, 8 bytes
a row (mean, rstd), 4 bytes a row and head (the softmax's sum), and where there are several blocks of keys the output,
which the projection keeps anyway; PyTorch saves the normalised q and k besides. A block is 64 keys, 128 up to L = 128.

A program of backward takes up to four blocks of keys, one after the other, and adds what each has of q's gradient to
what it wrote for those before. The last kernel adds the programs' parts up in a fixed order: no atomics, equal bits in
every run, and 5 products as in FlashAttention; a second loop over the keys would make it 7. While backward runs the
parts take L / 256 times the memory of q: 128 MiB for 16,384 tokens of 1024 at L = 1024.
"""

from torch import Tensor

from mdit.kernels.dispatch import run
from mdit.kernels.masked_attention import reference


def self_attention(qkv_NTX: Tensor, num_heads: int, eps: float, rotary_NTC: Tensor | None = None) -> Tensor:
    """q, k and v side by side, X = 3A. -> (N, T, A)

    rotary_NTC: cosines, then sines, of the C / 2 angles by which elements i and i + C / 2 of each head of C are turned;
    float32, of every image or one (1, T, C) of all. It has no gradient.
    """
    assert qkv_NTX.dim() == 3 and qkv_NTX.shape[-1] % (3 * num_heads) == 0, (qkv_NTX.shape, num_heads)
    if rotary_NTC is not None:
        (n, t, width), images = qkv_NTX.shape, len(rotary_NTC)
        assert images in (1, n) and rotary_NTC.shape[1:] == (t, width // 3 // num_heads), (rotary_NTC.shape, num_heads)
    return run("masked_attention", reference.self_attention, qkv_NTX, num_heads, eps, rotary_NTC)


def cross_attention(q_NTA: Tensor, kv_NLX: Tensor, num_heads: int, eps: float) -> Tensor:
    """k and v side by side, X = 2A. -> (N, T, A)"""
    (n, _, width), (kv_n, length, kv_width) = q_NTA.shape, kv_NLX.shape
    assert n == kv_n and kv_width == 2 * width and width % num_heads == 0, (q_NTA.shape, kv_NLX.shape, num_heads)
    assert q_NTA.dtype == kv_NLX.dtype and length > 0, (q_NTA.dtype, kv_NLX.dtype, length)
    return run("masked_attention", reference.cross_attention, q_NTA, kv_NLX, num_heads, eps)
