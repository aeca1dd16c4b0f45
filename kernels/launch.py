"""Every Triton kernel is started here, so that a build without a GPU sees exactly what a run would launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # multiply-adds round once, whatever the version of Triton takes for its default
_recording: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """One start of a kernel. `arguments` in the order of the kernel's parameters, `constants` by name."""

    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants):
    """Start `kernel` over `grid`. Run-time arguments come by position, tl.constexpr ones by name."""
    if _recording is not None:
        _recording.append(Launch(kernel, arguments, constants, num_warps, num_stages))
    else:
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, **OPTIONS)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are noted instead of run (outputs stay unwritten); tensors may be on any device."""
    global _recording
    _recording, before = [], _recording
    try:
        yield _recording
    finally:
        _recording = before


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv on the host takes 10 us


def power_of_2(a: int) -> int:
    """The smallest power of two that is not less than `a`."""
    return 1 << (a - 1).bit_length()


def dense(x: Tensor) -> Tensor:
    """x, its last dimension without gaps; a copy only where it has some."""
    return x if x.stride(-1) == 1 else x.contiguous()


def matrix(x: Tensor) -> Tensor:
    """(..., C) -> (M, C), its last dimension without gaps; a view where strides allow it."""
    return dense(x.reshape(-1, x.shape[-1]))


def strides(x: Tensor | None, count: int = 1) -> tuple[int, ...]:
    """The first `count` strides, zeros for None."""
    return (0,) * count if x is None else x.stride()[:count]
