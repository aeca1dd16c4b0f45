"""Triton kernels of swiglu: the gated product before the matmul, and its gradients between the two of backward.

Shapes: M tokens (all leading dimensions), F width of the network, D width of the stream; a and b of a token are 2 F
numbers in a row.
"""

import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.custom_op import custom_op, like
from mdit.kernels.launch import cdiv, launch, matrix, power_of_2
from mdit.kernels.triton_functions import swiglu_gradients


@triton.jit
def _swiglu(ab_ptr, u_ptr, ab_stride, M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """u = silu(a) * b, (M, F)"""
    row, column, inside = _tile(M, F, ROWS, COLUMNS)
    a_ptrs = ab_ptr + row * ab_stride + column
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    tl.store(u_ptr + row * F + column, (a * tl.sigmoid(a) * b).to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    ab_ptr, u_ptr, dab_ptr, ab_stride, M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """da and db, (M, 2 F), from the gradient of u, which is in u_ptr; u itself takes its place."""
    row, column, inside = _tile(M, F, ROWS, COLUMNS)
    a_ptrs, da_ptrs = ab_ptr + row * ab_stride + column, dab_ptr + row * 2 * F + column
    u_ptrs = u_ptr + row * F + column
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    da, db, silu = swiglu_gradients(a, b, tl.load(u_ptrs, mask=inside, other=0.0).to(tl.float32))
    u = silu * b  # here: behind the stores it would cost 18 registers more
    tl.store(da_ptrs, da.to(dab_ptr.dtype.element_ty), mask=inside)
    tl.store(da_ptrs + F, db.to(dab_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    tl.store(u_ptrs, u.to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64), columns and which elements exist of the program's tile; neighbours work side by side in memory."""
    blocks = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < M) & (column < F)


def _launch(kernel, elements: int, *arguments: Tensor | int, num_rows: int, width: int) -> None:
    """Tiles of 256 columns: they divide every width that the model has, and a warp reads 512 bytes of a row."""
    columns = min(power_of_2(width), 256)
    rows = elements // columns
    grid = (cdiv(num_rows, rows) * cdiv(width, columns),)
    launch(kernel, grid, *arguments, num_rows, F=width, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=1)


@custom_op("mdit::swiglu_linear_backward", fake=like(1, 2))
def _swiglu_linear_backward(d_out: Tensor, ab: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    """-> dab, dweight"""
    d_out_MD, ab_MX = matrix(d_out), matrix(ab)
    u_MF, dab_MX = d_out_MD @ weight_DF, ab_MX.new_empty(ab_MX.shape)  # u's gradient, until the kernel overwrites it
    (m, width), stride = u_MF.shape, ab_MX.stride(0)
    _launch(_swiglu_backward, 2048, ab_MX, u_MF, dab_MX, stride, num_rows=m, width=width)
    return dab_MX.view(ab.shape), d_out_MD.t() @ u_MF


def _gradients(d_out: Tensor, ab: Tensor, weight_DF: Tensor, has_bias: bool):
    dbias_D = d_out.reshape(-1, d_out.shape[-1]).sum(0) if has_bias else None
    return *_swiglu_linear_backward(d_out, ab, weight_DF), dbias_D


@custom_op(
    "mdit::swiglu_linear",
    fake=lambda ab, weight_DF, bias_D: ab.new_empty(*ab.shape[:-1], weight_DF.shape[0]),
    save=lambda ab, weight_DF, bias_D, out: (ab, weight_DF, bias_D is not None),
    backward=_gradients,
)
def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    ab_MX, width = matrix(ab), weight_DF.shape[1]
    u_MF = ab_MX.new_empty(len(ab_MX), width)
    _launch(_swiglu, 4096, ab_MX, u_MF, ab_MX.stride(0), num_rows=len(ab_MX), width=width)
    return functional.linear(u_MF, weight_DF, bias_D).view(*ab.shape[:-1], -1)
