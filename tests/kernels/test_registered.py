"""Ops take the short way unless somebody watches the dispatcher, and both ways give the same."""

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
