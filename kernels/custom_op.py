"""Ops of torch.library, which torch.compile and selective recomputation pass through, with a short way for all others.

The dispatcher's way to a custom op written in Python and to its gradient costs the host 30 to 80 microseconds a call,
as long as many a kernel runs. Where nothing intercepts dispatch, the same functions are called by an
autograd.Function, which costs a third of that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FUNCTIONS: dict[str, Callable] = {}  # of every op, by name


class CustomOp:
    """A function of tensors, which changes none of them, as the op `name`, "mdit::...". `op` is torch.library's.

    fake      as torch.library's: the outputs for these inputs, without values
    save      (*inputs, output) -> what backward needs, tensors and other things
    backward  (*gradients of the outputs, *saved) -> gradients of the inputs, of the first ones if not of all

    No memory is filled with zeros to be the gradient of an output that nothing used: `backward` gets None for it, and
    is not called where all are None.
    """

    def __init__(
        self,
        name: str,
        function: Callable,
        fake: Callable,
        save: Callable[..., tuple] | None = None,
        backward: Callable | None = None,
    ) -> None:
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.op.register_fake(fake)
        FUNCTIONS[name] = function
        self._direct = function
        if save is not None and backward is not None:
            self._differentiable(function, save, backward)

    def _differentiable(self, function: Callable, save: Callable[..., tuple], backward: Callable) -> None:
        def keep(ctx, inputs, output) -> None:
            ctx.set_materialize_grads(False)
            kept = save(*inputs, output)
            ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in kept))
            ctx.others = [None if isinstance(value, Tensor) else value for value in kept]

        def differentiate(ctx, *gradients):
            if isinstance(gradients[0], list):  # as torch.library has them of an output that is a list
                gradients = gradients[0]
            inputs = len(ctx.needs_input_grad)
            if all(gradient is None for gradient in gradients):
                return (None,) * inputs
            saved = ctx.saved_tensors  # looked at once: activation checkpointing allows no second time
            found = backward(*gradients, *(other if t is None else t for t, other in zip(saved, ctx.others)))
            found = (found,) if isinstance(found, Tensor) else tuple(found)
            return found + (None,) * (inputs - len(found))

        def forward(ctx, *inputs):  # with a setup_context of its own, every call would inspect the signature
            output = function(*inputs)
            output = tuple(output) if isinstance(output, list) else output
            keep(ctx, inputs, output)
            return output

        self.op.register_autograd(differentiate, setup_context=keep)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        self._direct = type(function.__name__, (torch.autograd.Function,), methods).apply

    def __call__(self, *inputs: Any) -> Any:
        return self.op(*inputs) if is_intercepted() else self._direct(*inputs)


def custom_op(name: str, **parts: Callable) -> Callable[[Callable], CustomOp]:
    """@custom_op("mdit::name", fake=..., save=..., backward=...): the CustomOp of the function below."""
    return lambda function: CustomOp(name, function, **parts)


def like(*positions: int) -> Callable:
    """The `fake` of an op whose outputs have the shapes and dtypes of these inputs, as gradients have."""

    def fake(*inputs):
        outputs = tuple(inputs[i].new_empty(inputs[i].shape) for i in positions)
        return outputs[0] if len(outputs) == 1 else outputs

    return fake


def is_intercepted() -> bool:
    """Whether something looks at what the dispatcher sees: a compiler, recomputation by policy, a trace."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
