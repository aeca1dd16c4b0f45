"""Triton kernels of swiglu: the gated product before the matmul, and its gradients between the two of backward.

Shapes: M tokens (all leading dimensions), F width of the network, D width of the stream.
"""

import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.launch import launch
from mdit.kernels.registered import registered


@triton.jit
def _swiglu(
    a_ptr, b_ptr, u_ptr, a_stride, b_stride, M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """u = silu(a) * b, (M, F)"""
    row, column, inside = _tile(M, F, ROWS, COLUMNS)
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(u_ptr + row * F + column, (a * tl.sigmoid(a) * b).to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(
    a_ptr, b_ptr, u_ptr, da_ptr, db_ptr, a_stride, b_stride, M,
    F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """da and db (M, F) from the gradient of u, which is in u_ptr; u itself takes its place."""
    row, column, inside = _tile(M, F, ROWS, COLUMNS)
    here = row * F + column
    a = tl.load(a_ptr + row * a_stride + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride + column, mask=inside, other=0.0).to(tl.float32)
    du = tl.load(u_ptr + here, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    da = du * b * (sigmoid + silu * (1 - sigmoid))
    tl.store(da_ptr + here, da.to(da_ptr.dtype.element_ty), mask=inside)
    tl.store(db_ptr + here, (du * silu).to(db_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    tl.store(u_ptr + here, (silu * b).to(u_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tile(M, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64), columns and which elements exist of the program's tile; neighbours work side by side in memory."""
    blocks = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < M) & (column < F)


def _launch(kernel, elements: int, *arguments: Tensor | int, num_rows: int, width: int) -> None:
    """Tiles of 256 columns: they divide every width that the model has, and a warp reads 512 bytes of a row."""
    columns = min(1 << (width - 1).bit_length(), 256)
    rows = elements // columns
    grid = (-(-num_rows // rows) * -(-width // columns),)  # triton.cdiv on the host takes 10 us
    launch(kernel, grid, *arguments, num_rows, F=width, ROWS=rows, COLUMNS=columns, num_warps=4, num_stages=1)


@registered("mdit::swiglu_linear")
def _swiglu_linear(a: Tensor, b: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    a_MF, b_MF = _rows(a), _rows(b)
    u_MF = a.new_empty(a_MF.shape)
    m, width = u_MF.shape
    _launch(_swiglu, 4096, a_MF, b_MF, u_MF, a_MF.stride(0), b_MF.stride(0), num_rows=m, width=width)
    return functional.linear(u_MF, weight_DF, bias_D).view(*a.shape[:-1], -1)


@_swiglu_linear.register_fake
def _(a, b, weight_DF, bias_D):
    return a.new_empty(*a.shape[:-1], weight_DF.shape[0])


@registered("mdit::swiglu_linear_backward")
def _swiglu_linear_backward(
    d_out: Tensor, a: Tensor, b: Tensor, weight_DF: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> da, db, dweight"""
    a_MF, b_MF, d_out_MD = _rows(a), _rows(b), _rows(d_out)
    da, db, u_MF = a.new_empty(a.shape), b.new_empty(b.shape), d_out_MD @ weight_DF  # u: the gradient of u, so far
    m, width = u_MF.shape
    strides = a_MF.stride(0), b_MF.stride(0)
    _launch(_swiglu_backward, 2048, a_MF, b_MF, u_MF, da, db, *strides, num_rows=m, width=width)
    return da, db, d_out_MD.t() @ u_MF


@_swiglu_linear_backward.register_fake
def _(d_out, a, b, weight_DF):
    return a.new_empty(a.shape), b.new_empty(b.shape), weight_DF.new_empty(weight_DF.shape)


def _save(ctx, inputs, output) -> None:
    a, b, weight_DF, bias_D = inputs
    ctx.has_bias = bias_D is not None
    ctx.save_for_backward(a, b, weight_DF)


def _differentiate(ctx, d_out):
    dbias_D = d_out.reshape(-1, d_out.shape[-1]).sum(0) if ctx.has_bias else None
    return *_swiglu_linear_backward(d_out, *ctx.saved_tensors), dbias_D


_swiglu_linear.register_autograd(_differentiate, setup_context=_save)


def swiglu_linear(a: Tensor, b: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return _swiglu_linear(a, b, weight_DF, bias_D)


def _rows(t: Tensor) -> Tensor:
    """(M, F), the last dimension dense; a view where strides allow it."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()
