"""The second half of a SwiGLU network, (silu(a) * b) @ weight^T + bias, which keeps only a and b for backward.

    forward     u = silu(a) * b (computed in float32, rounded once), then a matmul
    backward    du = dout @ weight, then one kernel (a, b, du) -> (da, db, u), then dweight = dout^T @ u

PyTorch keeps silu(a) and u beside a and b, torch.compile u: 4 and 3 values of width F a token instead of 2. In bfloat16
with F = 2048 that is 8 and 4 KiB a token, 512 and 256 MiB a block of the patch-mixer at 65,536 tokens. Between the
matmuls, F values are read or written 5 + 9 times for a token (forward + backward) in PyTorch, here 3 + 6 times.
"""

from torch import Tensor

from mdit.kernels import dispatch
from mdit.kernels.swiglu import reference


def swiglu_linear(a: Tensor, b: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """(..., F), (..., F) -> (..., D). a and b may be strided views, such as halves of one matmul's output."""
    assert a.shape == b.shape and a.shape[-1] == weight_DF.shape[1]
    if dispatch.takes_triton("swiglu", a):
        from mdit.kernels.swiglu import triton_impl

        return triton_impl.swiglu_linear(a, b, weight_DF, bias_D)
    return reference.swiglu_linear(a, b, weight_DF, bias_D)
