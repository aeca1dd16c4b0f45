"""The second half of a SwiGLU network, (silu(a) * b) @ weight^T + bias, which keeps only a and b for backward.

    forward     u = silu(a) * b (computed in float32, rounded once), then a matmul
    backward    du = dout @ weight, then one kernel (a, b, du) -> (da, db, u), then dweight = dout^T @ u

a and b are the halves of one tensor, as one matmul writes them, and so are their gradients: the matmuls before see one
tensor of 2 F values a token, in both directions.

PyTorch keeps silu(a) and u beside a and b, torch.compile u: in bfloat16 with F = 2048 8 and 4 KiB a token more, 512 and
256 MiB a block of the patch-mixer at 65,536 tokens.
"""

from torch import Tensor

from mdit.kernels.dispatch import run
from mdit.kernels.swiglu import reference


def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """(..., 2 F), a and b side by side -> (..., D)"""
    assert ab.shape[-1] == 2 * weight_DF.shape[1], (ab.shape, weight_DF.shape)
    return run("swiglu", reference.swiglu_linear, ab, weight_DF, bias_D)
