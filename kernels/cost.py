"""The least that a call of an op must do. Every op states it in <op>/cost.py, by a function of the same name and
arguments as the op's own, whose tensors need not hold anything."""

from typing import NamedTuple

from torch import Tensor


class Cost(NamedTuple):
    """Bytes that forward and backward cannot help moving, each tensor once, and FLOPs of forward's products; backward
    has twice as many."""

    forward_bytes: int
    backward_bytes: int
    flops: int = 0


def size(*tensors: Tensor | None) -> int:
    """Bytes of these together."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
