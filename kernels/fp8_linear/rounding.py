"""Rounding to float8 inside a kernel that holds whole rows, as reference.quantise defines it."""

import triton
import triton.language as tl


@triton.jit
def quantised(x, INTERPRETED: tl.constexpr):
    """x (R, C) float32, 0 where no element is -> its float8 values (R, C) and the rows' scales (R, 1)."""
    scale, inverse = scales(tl.max(magnitude(x), axis=1, keep_dims=True))
    return float8(x * inverse, INTERPRETED), scale


@triton.jit
def magnitude(x):
    """Bits of |x|, in whose order inf and NaN are above all numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scales(largest):
    """Bits of the largest magnitude -> the least power of two s with |x| / s <= 448 = 1.75 * 2 ** 8, and 1 / s."""
    exponent = tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1)  # a mantissa above 1.75 carries over
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest < 0x7F800000, scale, float("nan")), inverse


@triton.jit
def float8(x, INTERPRETED: tl.constexpr):
    """To the nearest, ties to even. The interpreter's cast loses carries, so that it gets what needs no rounding."""
    if INTERPRETED:
        power = tl.maximum((magnitude(x) & 0x7F800000).to(tl.float32, bitcast=True), 0.015625)  # 2 ** -6: the least
        shift = power * 1572864.0  # 1.5 * 2 ** 20: adding it leaves three bits behind the first
        x = (x + shift) - shift
    return x.to(tl.float8e4nv)
