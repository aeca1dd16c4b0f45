"""Calls of the ops of mdit.kernels in a forward pass, read off the model, with what each must cost.

for call, count in kernel_calls(xl_2(), micro_batch=256, mask_ratio=0.75).items():
    outputs = call.function(*call.inputs("cuda", torch.bfloat16))
"""

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mdit.config import ModelConfig
from mdit.costs.trace import Form, fused_attention, on_meta
from mdit.kernels import cost, dispatch, expert_choice
from mdit.kernels.cost import Cost
from mdit.kernels.expert_choice import Routing
from mdit.kernels.fp8_linear import InFloat8

STAGES = {  # of the paper: latent_size, mask_ratio, and a micro-batch of 16,384 kept tokens
    "256 px, mask 0.75": (32, 0.75, 256),
    "256 px, mask 0": (32, 0.0, 64),
    "512 px, mask 0.75": (64, 0.75, 64),
    "512 px, mask 0": (64, 0.0, 16),
}


@dataclass(frozen=True)
class Shape:
    """A tensor without its numbers."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class KernelCall:
    """A call of a public function, `op` "swiglu.swiglu_linear", with a Shape in place of every tensor."""

    op: str
    arguments: tuple

    @property
    def function(self) -> Callable:
        """Takes the inputs and gives tensors; what runs is what `mdit.kernels.dispatch` says at that time."""
        op, name = self.op.split(".")
        function, fill = getattr(import_module(f"mdit.kernels.{op}"), name), self._filled

        def call(*inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
            found = function(*fill(inputs))
            if isinstance(found, Tensor):
                return found
            return tuple([part.plain if isinstance(part, InFloat8) else part for part in found])

        return call

    def cost(self, dtype: torch.dtype = torch.bfloat16) -> Cost:
        return self._cost(*self._filled(self.inputs("meta", dtype, torch.empty)))

    def inputs(
        self, device: torch.device | str, dtype: torch.dtype, fill: Callable[..., Tensor] = torch.randn
    ) -> list[Tensor | None]:
        """New tensors, with the strides that they have in the model; None for those that are left out."""
        named, found = self._named(), []
        for name, value in named.items():
            if isinstance(value, Routing):
                weights_NEK, _, slots_NTE = cast(tuple[Shape, Shape, Shape], value)
                (n, tokens, experts), (_, _, k) = slots_NTE.sizes, weights_NEK.sizes
                found += expert_choice.reference.route(fill(n, tokens, experts, device=device, dtype=dtype), k)
            elif name == "keep_NK" and value is not None:
                n, tokens, _ = named["x_NTD"].sizes  # as sample_mask has it
                found.append(torch.rand(n, tokens, device=device).argsort(dim=1)[:, : value.sizes[1]])
            elif value is None or isinstance(value, Shape):
                found.append(value and _tensor(value, device, dtype, fill))
        return found

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by the letters of the arguments' names, other numbers, and which tensors are there that need not be."""
        found: dict[str, int] = {}
        parameters = inspect.signature(self._cost).parameters
        for name, value in self._named().items():
            fields = value._asdict() if isinstance(value, Routing) else {name: value}
            for field, part in fields.items():
                if isinstance(part, Shape):
                    stem, _, letters = field.rpartition("_")
                    if "None" in str(parameters[name].annotation):
                        found[stem] = True
                    if re.fullmatch("[A-Z]+", letters):
                        found |= {letter: size for letter, size in zip(letters, part.sizes) if letter not in found}
                    else:  # (..., rows, columns)
                        found |= dict(zip(("rows", "columns"), (math.prod(part.sizes[:-1]), part.sizes[-1])))
                elif isinstance(part, int):
                    found[field] = part
        return found

    @property
    def label(self) -> str:
        """N256 T64 D1024 y gate"""
        return " ".join(name if value is True else f"{name}{value}" for name, value in self.shape.items())

    @property
    def _cost(self) -> Callable[..., Cost]:
        return getattr(cost, self.op.split(".")[1])

    def _named(self) -> dict[str, Any]:
        return inspect.signature(self._cost).bind(*self.arguments).arguments

    def _filled(self, inputs: Sequence[Tensor | None]) -> tuple:
        """The arguments, with these tensors."""
        tensors = iter(inputs)
        return tree_map(lambda x: next(tensors) if x is None or isinstance(x, Shape) else x, self.arguments)


@cache
def kernel_calls(config: ModelConfig, micro_batch: int, mask_ratio: float, fp8: bool = False) -> dict[KernelCall, int]:
    """Kernel calls of a forward pass, each with its count, in the order of the model; each has its backward."""
    _, loss_of_batch, _ = on_meta(config, micro_batch, mask_ratio, Form(triton=False, fp8=fp8))
    found: Counter[KernelCall] = Counter()
    with torch.no_grad(), dispatch.using(), fused_attention(), dispatch.recorded_calls() as calls:
        loss_of_batch()
    for op, arguments in calls:
        if op != "fp8_linear.in_float8":  # once for all blocks, and without a backward pass
            found[KernelCall(op, tree_map(_without_numbers, arguments, is_leaf=_is_in_float8))] += 1
    return found


def _is_in_float8(value: Any) -> bool:
    return isinstance(value, InFloat8)


def _without_numbers(value: Any) -> Any:
    value = value.plain if _is_in_float8(value) else value
    return Shape(tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _tensor(shape: Shape, device: torch.device | str, dtype: torch.dtype, fill: Callable[..., Tensor]) -> Tensor:
    """Float32 stays what it is in a model of any dtype."""
    numbers = 1 + sum((size - 1) * stride for size, stride in zip(shape.sizes, shape.strides))
    dtype = shape.dtype if shape.dtype == torch.float32 else dtype
    return fill(numbers, device=device, dtype=dtype).as_strided(shape.sizes, shape.strides)
