"""Functions of numbers on chip, compiled into the kernels that call them; none reads or writes memory."""

import triton
import triton.language as tl

# ---------------------------------------------------------------- activations, in float32


@triton.jit
def swiglu_gradients(a, b, du):
    """u = silu(a) * b: da, db and silu(a)."""
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    return du * b * (sigmoid + silu * (1 - sigmoid)), du * silu, silu


@triton.jit
def normal_cdf(h):
    """P(X <= h) and exp(-h^2 / 2) for a standard normal X, so that gelu(h) = h * P(X <= h).

    P(X <= -|h|) = exp(-h^2 / 2) * t * polynomial(t), t = 1 / (1 + 0.28 |h|), fitted so that gelu is off by at most
    6e-9 (before rounding). It takes two thirds of the instructions of libdevice's erf, whose 38 an element would keep
    the forward pass from running at the speed of memory, and has no cancellation where h is negative.
    """
    bell = tl.exp2(h * h * -0.7213475204444817)
    t = 1.0 / (1.0 + 0.28 * tl.abs(h))
    tail = 0.3949251411285014 - 0.10703225664142893 * t
    tail = 0.27565747564446036 + t * (-0.24527743202289856 + t * tail)
    tail = bell * t * (0.11695900015377553 + t * (0.06476805379794276 + t * tail))
    return tl.where(h < 0, tail, 1.0 - tail), bell


@triton.jit
def gelu_and_slope(h):
    p, bell = normal_cdf(h)
    return h * p, p + h * (0.3989422804014327 * bell)


# ---------------------------------------------------------------- rounding to float8, as fp8_linear.reference.quantise


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
