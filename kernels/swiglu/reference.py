"""Plain PyTorch, any floating dtype: the definition, and what runs without Triton."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gated(ab: Tensor) -> Tensor:
    """(..., 2 F), a and b side by side -> silu(a) * b (..., F)"""
    if not torch.compiler.is_compiling():
        return _Gated.apply(ab)
    a, b = ab.chunk(2, dim=-1)
    return F.silu(a) * b  # a compiler fuses what autograd makes of it


class _Gated(torch.autograd.Function):
    """Backward writes the gradients of a and b where they belong; autograd would copy them together."""

    @staticmethod
    def forward(ctx, ab: Tensor) -> Tensor:
        a, b = ab.chunk(2, dim=-1)
        silu = F.silu(a)
        ctx.save_for_backward(ab, silu)
        return silu * b

    @staticmethod
    @once_differentiable
    def backward(ctx, du: Tensor) -> Tensor:
        ab, silu = ctx.saved_tensors
        dab = torch.empty_like(ab)
        (a, b), (da, db) = ab.chunk(2, dim=-1), dab.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(du * b, a, grad_input=da)
        torch.mul(du, silu, out=db)
        return dab


def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return F.linear(gated(ab), weight_DF, bias_D)
