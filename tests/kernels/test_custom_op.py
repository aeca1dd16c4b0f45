"""Ops are called directly unless something intercepts dispatch, and both ways give the same."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdit.kernels.custom_op import custom_op, like


@custom_op(
    "mdit_test::scaled",
    fake=like(0),
    save=lambda x, factor, out: (factor,),
    backward=lambda d_out, factor: d_out * factor,
)
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def with_gradient() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(3.0, requires_grad=True)
    out = scaled(x, 2.5)
    return out.detach(), torch.autograd.grad(out.sum(), x)[0]


def test_nothing_intercepts(monkeypatch):
    expected = torch.tensor([0.0, 2.5, 5.0]), torch.full((3,), 2.5)
    with Seen() as seen:
        watched = with_gradient()
    assert "mdit_test.scaled.default" in seen.names

    def refuse(*args):
        raise AssertionError("through the dispatcher")

    monkeypatch.setattr(scaled, "op", refuse)
    for found in (watched, with_gradient()):
        assert all(map(torch.equal, found, expected))


given: list[tuple] = []  # the gradients that `split`'s backward was called with


def _gradients(*gradients):
    given.append(gradients)
    return sum(gradient for gradient in gradients if gradient is not None)


@custom_op(
    "mdit_test::split",
    fake=lambda x, factor: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape).long()),
    save=lambda x, factor, found: (),
    backward=_gradients,
)
def split(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x * factor, x + 1, x.argsort()


@custom_op("mdit_test::several", fake=lambda x: [x, x], save=lambda x, found: (), backward=_gradients)
def several(x: torch.Tensor) -> list[torch.Tensor]:
    return [2 * x, 3 * x]


class Undefined(torch.autograd.Function):
    """Hands no gradient on, as a function may."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_out):
        return None


@pytest.mark.parametrize("watched", [False, True])
def test_outputs_that_nobody_used_cost_no_zeros(watched):
    """On a GPU each would be a kernel: 32 a micro-batch of xl_2 for the integers that routing gives alone."""
    x = torch.arange(3.0, requires_grad=True)
    given.clear()
    with Seen() if watched else nullcontext():
        torch.autograd.grad(split(x, 2.5)[1].sum(), x)
    assert [[gradient is None for gradient in gradients] for gradients in given] == [[True, False, True]]


@pytest.mark.parametrize("watched", [False, True])
def test_outputs_in_a_list_are_outputs_as_any(watched):
    x = torch.arange(3.0, requires_grad=True)
    given.clear()
    with Seen() if watched else nullcontext():
        second = several(x)[1]
        torch.autograd.grad(second.sum(), x)
    assert torch.equal(second, 3 * x) and [[g is None for g in gradients] for gradients in given] == [[True, False]]


@pytest.mark.parametrize("watched", [False, True])
def test_without_any_gradient_no_backward_runs(watched):
    x = torch.arange(3.0, requires_grad=True)
    given.clear()
    with Seen() if watched else nullcontext():
        out = Undefined.apply(split(x, 2.5)[0]).sum()
        assert torch.autograd.grad(out, x, allow_unused=True) == (None,)
    assert given == []
