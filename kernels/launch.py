"""Every Triton kernel is started here, so that a build without a GPU sees exactly what a run would launch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

OPTIONS = {"enable_fp_fusion": True}  # multiply-adds round once, whatever the version of Triton takes for its default
_recording: list["Launch"] | None = None


@dataclass(frozen=True)
class Launch:
    """What one kernel was started with. `arguments` in the order of the kernel's parameters, `constants` by name."""

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


def is_recorded() -> bool:
    """Are kernels noted instead of run?"""
    return _recording is not None
