"""Plain PyTorch, any floating dtype: the definition, and what runs without Triton."""

import torch.nn.functional as F
from torch import Tensor


def swiglu_linear(a: Tensor, b: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return F.linear(F.silu(a) * b, weight_DF, bias_D)
