"""Triton kernels of swiglu: the gated product before the matmul, and its gradients between the two of backward.

Shapes: M tokens (all leading dimensions), F width of the network, D width of the stream; a and b of a token are 2 F
numbers in a row.
"""

import torch.nn.functional as functional
import triton
import triton.language as tl
from torch import Tensor

from mdit.kernels.launch import launch
from mdit.kernels.registered import registered


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
    a_ptrs, da_ptrs, u_ptrs = (
        ab_ptr + row * ab_stride + column,
        dab_ptr + row * 2 * F + column,
        u_ptr + row * F + column,
    )
    a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(a_ptrs + F, mask=inside, other=0.0).to(tl.float32)
    du = tl.load(u_ptrs, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    silu = a * sigmoid
    da = du * b * (sigmoid + silu * (1 - sigmoid))
    tl.store(da_ptrs, da.to(dab_ptr.dtype.element_ty), mask=inside)
    tl.store(da_ptrs + F, (du * silu).to(dab_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # no thread overwrites what another has yet to read
    tl.store(u_ptrs, (silu * b).to(u_ptr.dtype.element_ty), mask=inside)


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


def gated(ab_MX: Tensor) -> Tensor:
    """(M, 2 F) -> silu(a) * b (M, F)"""
    m, width = len(ab_MX), ab_MX.shape[1] // 2
    u_MF = ab_MX.new_empty(m, width)
    _launch(_swiglu, 4096, ab_MX, u_MF, ab_MX.stride(0), num_rows=m, width=width)
    return u_MF


def gated_gradient(ab_MX: Tensor, du_MF: Tensor) -> tuple[Tensor, Tensor]:
    """-> the gradient of ab, and u = silu(a) * b, which takes the place of its gradient."""
    (m, width), dab_MX = du_MF.shape, ab_MX.new_empty(ab_MX.shape)
    _launch(_swiglu_backward, 2048, ab_MX, du_MF, dab_MX, ab_MX.stride(0), num_rows=m, width=width)
    return dab_MX, du_MF


@registered("mdit::swiglu_linear")
def _swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None) -> Tensor:
    return functional.linear(gated(_rows(ab)), weight_DF, bias_D).view(*ab.shape[:-1], -1)


@_swiglu_linear.register_fake
def _(ab, weight_DF, bias_D):
    return ab.new_empty(*ab.shape[:-1], weight_DF.shape[0])


@registered("mdit::swiglu_linear_backward")
def _swiglu_linear_backward(d_out: Tensor, ab: Tensor, weight_DF: Tensor) -> tuple[Tensor, Tensor]:
    """-> dab, dweight"""
    d_out_MD = _rows(d_out)
    dab_MX, u_MF = gated_gradient(_rows(ab), d_out_MD @ weight_DF)
    return dab_MX.view(ab.shape), d_out_MD.t() @ u_MF


@_swiglu_linear_backward.register_fake
def _(d_out, ab, weight_DF):
    return ab.new_empty(ab.shape), weight_DF.new_empty(weight_DF.shape)


def _save(ctx, inputs, output) -> None:
    ab, weight_DF, bias_D = inputs
    ctx.has_bias = bias_D is not None
    ctx.save_for_backward(ab, weight_DF)


def _differentiate(ctx, d_out):
    dbias_D = d_out.reshape(-1, d_out.shape[-1]).sum(0) if ctx.has_bias else None
    return *_swiglu_linear_backward(d_out, *ctx.saved_tensors), dbias_D


_swiglu_linear.register_autograd(_differentiate, setup_context=_save)


def swiglu_linear(ab: Tensor, weight_DF: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return _swiglu_linear(ab, weight_DF, bias_D)


def _rows(t: Tensor) -> Tensor:
    """(M, F), the last dimension dense; a view where strides allow it."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()
