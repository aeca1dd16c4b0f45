"""Ops of torch.library, which torch.compile and selective recomputation pass through, with a short way for all others.

The dispatcher's way to a custom op written in Python and to its gradient costs the host 30 to 80 microseconds a call,
as long as many a kernel runs. Where nobody watches the dispatcher, the same functions are called by an
autograd.Function, which costs a third of that.
"""

from collections.abc import Callable
from typing import Any

import torch

FUNCTIONS: dict[str, Callable] = {}  # of every op, by name


class Registered:
    """A function of tensors, which changes none of them, as the op `name`, "mdit::...". `op` is torch.library's."""

    def __init__(self, name: str, function: Callable) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=())
        FUNCTIONS[name] = function
        self._function = self._short = function

    def register_fake(self, fake: Callable) -> Callable:
        """As torch.library's."""
        return self.op.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library's, whose contexts are those of autograd.Function, but for outputs that nobody used: no
        memory is filled with zeros to be their gradients. `backward` gets None for them, and is called for some only.
        """

        def save(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)

        def differentiate(ctx, *gradients):
            if all(gradient is None for gradient in gradients):
                return (None,) * len(ctx.needs_input_grad)
            return backward(ctx, *gradients)

        def forward(ctx, *args):  # setup_context as a method of its own would cost a look at the signature every time
            output = self._function(*args)
            save(ctx, args, output)
            return output

        self.op.register_autograd(differentiate, setup_context=save)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._short = type(self._function.__name__, (torch.autograd.Function,), methods).apply

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if is_watched() else self._short(*args)


def registered(name: str) -> Callable[[Callable], Registered]:
    """@registered("mdit::name") in place of @torch.library.custom_op("mdit::name", mutates_args=())"""
    return lambda function: Registered(name, function)


def is_watched() -> bool:
    """Does somebody look at what the dispatcher sees: a compiler, recomputation by policy, a trace?"""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
