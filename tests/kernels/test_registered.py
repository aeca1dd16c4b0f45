"""Ops take the short way unless somebody watches the dispatcher, and both ways give the same."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mdit.kernels.registered import registered


@registered("mdit_test::scaled")
def scaled(x: torch.Tensor, factor: float) -> torch.Tensor:
    return x * factor


scaled.register_fake(lambda x, factor: torch.empty_like(x))
scaled.register_autograd(
    lambda ctx, d_out: (d_out * ctx.factor, None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
)


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


def test_nobody_watches(monkeypatch):
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


@registered("mdit_test::split")
def split(x: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x * factor, x + 1, x.argsort()


def _differentiate(ctx, *gradients):
    given.append(gradients)
    return sum(gradient for gradient in gradients if gradient is not None), None


split.register_fake(lambda x, factor: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape).long()))
split.register_autograd(_differentiate, setup_context=lambda ctx, inputs, output: None)


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
def test_without_any_gradient_no_backward_runs(watched):
    x = torch.arange(3.0, requires_grad=True)
    given.clear()
    with Seen() if watched else nullcontext():
        out = Undefined.apply(split(x, 2.5)[0]).sum()
        assert torch.autograd.grad(out, x, allow_unused=True) == (None,)
    assert given == []
