"""Caption embeddings and patch features in 8 bits, `i8b64`: int8 values, and one fp16 scale for every 64 of them.

Stored as the L x C values, row by row, followed by the L x C / 64 scales. A value is read as int8 * scale, computed in
float32 and rounded to fp16 once: exact in float32 (7 + 11 bits), so every engine and device reads the same bits.
"""

import numpy as np
import torch
from torch import Tensor

BLOCK = 64
LARGEST = 127
LARGEST_SCALE = np.float16(515.5)  # 127 times it is still finite in fp16
PIECE = 512  # blocks


def stored_bytes(length: int, channels: int) -> int:
    """Bytes of one embedding of `length` tokens of `channels`, a multiple of BLOCK values in all."""
    return length * channels + 2 * (length * channels // BLOCK)


def quantise(embedding_LC: np.ndarray) -> bytes:
    """(L, C) finite fp16 -> its stored bytes. A value is at most half its block's scale off before it is rounded to
    fp16; the scale is the least fp16 number that is not below the block's largest magnitude / 127."""
    blocks = embedding_LC.astype(np.float32).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    scales = (largest / LARGEST).astype("<f2")
    too_small = scales.astype(np.float32) * LARGEST < largest
    scales[too_small] = np.nextafter(scales[too_small], np.float16(np.inf))
    scales = np.minimum(scales, LARGEST_SCALE)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    values = np.rint(blocks / divisors).clip(-LARGEST, LARGEST).astype(np.int8)
    return values.tobytes() + scales.tobytes()


def dequantise(stored: Tensor, length: int, channels: int) -> Tensor:
    """(N, stored_bytes) uint8 -> (N, L, C) fp16, on the same device."""
    values, scales = stored.split([length * channels, 2 * (length * channels // BLOCK)], dim=1)
    values = values.view(torch.int8).unflatten(1, (-1, BLOCK))
    scales = scales.view(torch.float16).unsqueeze(-1)
    read = torch.empty(values.shape, dtype=torch.float16, device=stored.device)
    for value, scale, out in zip(_pieces(values), _pieces(scales), _pieces(read)):
        out.copy_(value.float() * scale.float())
    return read.view(-1, length, channels)


def _pieces(blocks: Tensor) -> list[Tensor]:
    """Parts of (N, blocks, ...) done at once: all on a GPU. On a CPU, what stays in its cache and below the size
    that torch spreads over threads, which would wait for one another more than they work."""
    return [piece for row in blocks for piece in row.split(PIECE)] if blocks.device.type == "cpu" else [blocks]
