"""Plain PyTorch, any floating dtype: the definition, and what runs without Triton (slower than no float8 at all).

Operands are quantised, multiplied by their scales again and put through an ordinary matmul in float32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mdit.kernels import expert_choice, patch_mixing
from mdit.kernels.expert_choice import Routing
from mdit.kernels.swiglu.reference import gated

MANTISSA, EXPONENT = 0.875, 9  # 448 = 0.875 * 2 ** 9 is the largest number of float8_e4m3fn
LEAST = 448 * 2.0**-126  # what gives the least scale that is a normal float32


class Quantised(NamedTuple):
    """values * scale is what this stands for."""

    values: Tensor  # (..., M, K) float8_e4m3fn
    scale: Tensor  # (..., M, 1) float32, powers of two


class InFloat8(NamedTuple):
    """A tensor that several matmuls read, quantised once; `plain` is the same as it was, and has the gradient."""

    plain: Tensor
    values: Tensor
    scale: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.plain.shape


def quantise(x: Tensor) -> Quantised:
    """Rows in float8 and their scales, the least powers of two that bring them into float8's range."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp_min(LEAST)
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa * 2 ** exponent, mantissa in [0.5, 1)
    scale = power_of_two(exponent - EXPONENT + (mantissa > MANTISSA))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return Quantised((x / scale).to(torch.float8_e4m3fn), scale)


def in_float8(x: Tensor) -> InFloat8:
    return InFloat8(x, *quantise(x.detach()))


def power_of_two(exponent: Tensor) -> Tensor:
    """Exact on every device, which torch.ldexp need not be: float32 from its bits."""
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def product(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """(..., M, K), (..., O, K) -> a @ b^T (..., M, O), computed in float32 (in float64 for float64)."""
    wide = torch.promote_types(dtype, torch.float32)
    a_wide, b_wide = (operand.values.to(wide) * operand.scale.to(wide) for operand in (a, b))
    return (a_wide @ b_wide.transpose(-1, -2)).to(dtype)


class _Product(torch.autograd.Function):
    """x (..., M, K) @ weight^T, weight (..., O, K)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, values: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        known = quantise(x) if values is None else Quantised(values, scale)
        return product(known, quantise(weight), x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        dx = product(quantise(d_out), quantise(weight.transpose(-1, -2)), x.dtype)
        return dx, d_out.transpose(-1, -2) @ x, None, None


def fp8_add_norm_modulate(*arguments: Tensor | float | None) -> tuple[Tensor, InFloat8]:
    x_NTD, h_NTD = patch_mixing.add_norm_modulate(*arguments)
    return x_NTD, in_float8(h_NTD)


def fp8_linear(x: Tensor | InFloat8, weight_OK: Tensor, bias_O: Tensor | None = None) -> Tensor:
    shape = x.shape
    x, *known = (part.reshape(-1, part.shape[-1]) for part in (x if isinstance(x, InFloat8) else (x,)))
    out_MO = _Product.apply(x, weight_OK, *known)
    out_MO = out_MO if bias_O is None else out_MO + bias_O
    return out_MO.view(*shape[:-1], -1)


def fp8_swiglu(
    x: Tensor | InFloat8, weight_XD: Tensor, bias_X: Tensor | None, weight_DF: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    return fp8_linear(gated(fp8_linear(x, weight_XD, bias_X)), weight_DF, bias_D)


def fp8_experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: Routing) -> Tensor:
    hidden_EMF = _Product.apply(expert_choice.gather_tokens(x_NTD, routing), w1_EDF.transpose(1, 2))
    weights_EM1 = routing.weights_NEK.transpose(0, 1).reshape(len(w1_EDF), -1, 1)
    active_EMF = F.gelu(hidden_EMF) * weights_EM1.to(hidden_EMF.dtype)
    return expert_choice.scatter_tokens(_Product.apply(active_EMF, w2_EFD.transpose(1, 2)), routing)
