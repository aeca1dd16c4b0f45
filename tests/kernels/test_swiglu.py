"""(silu(a) * b) @ weight^T + bias: in PyTorch against the formula, in Triton against PyTorch."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mdit.kernels import swiglu
from mdit.kernels.swiglu import reference
from tests.kernels.accuracy import (
    DTYPES,
    assert_as_accurate,
    assert_compiles,
    assert_same_bits_twice,
    in_dtype,
    in_triton,
    kept_for_backward,
    leaves,
)

triton = in_triton("swiglu")

SHAPES = [(2, 1, 8), (1, 63, 72), (2, 77, 256), (40, 300), (3, 2, 2, 1152), (72,)]  # (..., F)


def inputs(shape: tuple[int, ...], bias: bool = True, width: int = 24) -> list[Tensor | None]:
    """a and b side by side, weight and bias, in float64."""
    a, b = 3 * torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(width, shape[-1], dtype=torch.float64) / shape[-1] ** 0.5
    return [torch.cat([a, b], dim=-1), weight, torch.randn(width, dtype=torch.float64) if bias else None]


def test_reference_is_the_formula():
    ab, weight, bias = inputs((2, 3, 5), width=4)
    out, (a, b) = reference.swiglu_linear(ab, weight, bias), (ab[..., :5], ab[..., 5:])
    for n in range(2):
        for t in range(3):
            u = a[n, t] / (1 + (-a[n, t]).exp()) * b[n, t]
            for d in range(4):
                torch.testing.assert_close(out[n, t, d], sum(u * weight[d]) + bias[d])


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_reference(bias):
    assert torch.autograd.gradcheck(reference.swiglu_linear, leaves(inputs((2, 3, 5), bias, width=4)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_is_as_accurate_as_pytorch(triton, shape, bias, dtype):
    assert_as_accurate(swiglu.swiglu_linear, reference.swiglu_linear, inputs(shape, bias), dtype)


@pytest.mark.filterwarnings("ignore:overflow")
def test_triton_at_the_ends_of_silu(triton):
    ab, weight, _ = inputs((5, 16), bias=False)
    ab[:, 0], ab[:, 1], ab[:, 2] = 0, 80, -80
    ab[:, 3], ab[:, 4] = 1e4, -1e4
    assert_as_accurate(swiglu.swiglu_linear, reference.swiglu_linear, [ab, weight], torch.float32)


def strided(function, abc_NTX, weight_FD):
    """a and b beside something else, a weight that is transposed; cotangents that are, and of stride zero."""
    ab_NTX = abc_NTX[..., : 2 * len(weight_FD)]
    out = function(ab_NTX, weight_FD.t())
    by_tokens = function(ab_NTX.transpose(0, 1), weight_FD.t())
    return out.transpose(1, 2), out.sum(1), by_tokens


def by_columns(function, ab_XNT, ab_NTX, weight_DF):
    """The last dimension not dense; every other column."""
    return function(ab_XNT.permute(1, 2, 0), weight_DF), function(ab_NTX[..., ::2], weight_DF)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view, shapes", [(strided, [(2, 9, 150), (72, 24)]), (by_columns, [(144, 2, 9), (2, 9, 288), (24, 72)])]
)
def test_triton_takes_strided_inputs_and_cotangents(triton, view, shapes, dtype):
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    assert_as_accurate(partial(view, swiglu.swiglu_linear), partial(view, reference.swiglu_linear), arguments, dtype)


def test_triton_gives_the_same_bits_twice(triton):
    assert_same_bits_twice(swiglu.swiglu_linear, in_dtype(inputs((2, 21, 264))))


def test_triton_keeps_a_and_b_alone(triton):
    """Half of what PyTorch does, which keeps silu(a) and the product too."""
    arguments = in_dtype(inputs((2, 16, 72)))
    for function, values in ((swiglu.swiglu_linear, 2), (reference.swiglu_linear, 4)):
        kept = kept_for_backward(function, arguments)
        assert sum(kept.values()) - arguments[1].nbytes == values * (2 * 16 * 72) * 4


@pytest.mark.parametrize("bias", [True, False])
def test_triton_compiles_without_a_graph_break(triton, bias):
    assert_compiles(swiglu.swiglu_linear, in_dtype(inputs((2, 9, 72), bias)))


@pytest.mark.parametrize("bias", [True, False])
def test_custom_ops_are_registered_as_torch_expects(triton, bias):
    from mdit.kernels.swiglu import triton_impl

    torch.library.opcheck(triton_impl.swiglu_linear.op, leaves(in_dtype(inputs((2, 5, 16), bias))))


def test_misuse_is_an_assertion():
    weight = torch.randn(4, 3)
    for width in (3, 4, 8):
        with pytest.raises(AssertionError):
            swiglu.swiglu_linear(torch.randn(2, width), weight)
