"""Which ops run in their Triton kernels in this process; the others, and all until somebody says so, run in PyTorch.

Who decides is `mdit.kernels.selection`, once, before a run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FP8 = "fp8_linear"
OPS = ("masked_attention", "patch_mixing", "expert_choice", "swiglu", FP8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_in_triton: dict[str, ModuleType] = {}  # op: its triton_impl
_dtypes: tuple[torch.dtype, ...] = ()  # that they run in; tensors of all others go to PyTorch
_calls: list[tuple[str, tuple]] | None = None  # where they are noted
_off_gpu = os.environ.get("TRITON_INTERPRET") == "1"  # whether kernels may be given tensors of other devices


def run(op: str, reference: Callable[..., T], *inputs: Any) -> T:
    """Result of the op's function of the same name in Triton, or of `reference`. The first input decides."""
    global _calls
    plain, noted = getattr(inputs[0], "plain", inputs[0]), _calls  # of an InFloat8
    function = getattr(_in_triton[op], reference.__name__) if use_triton(op, plain) else reference
    if noted is None:
        return function(*inputs)
    noted.append((f"{op}.{reference.__name__}", inputs))
    _calls = None
    try:
        return function(*inputs)
    finally:
        _calls = noted


def use_triton(op: str, tensor: Tensor) -> bool:
    """Whether the Triton kernel of `op` handles this tensor: only on a GPU, and in the dtype that was selected."""
    return op in _in_triton and tensor.dtype in _dtypes and (tensor.is_cuda or _off_gpu)


def interpreted() -> bool:
    """Whether kernels can run without a GPU."""
    return _off_gpu


def set_triton_ops(*ops: str, dtype: torch.dtype) -> None:
    """From now on exactly these, in this dtype alone: nobody has checked, or wants to wait for builds of, another."""
    global _in_triton, _dtypes
    _in_triton, _dtypes = _kernels_of(ops), (dtype,) if dtype in DTYPES else ()


@contextmanager
def using(*ops: str, off_gpu: bool = False) -> Iterator[None]:
    """Inside, exactly these ops run in Triton, in any dtype, unchecked: for tests and benchmarks."""
    global _in_triton, _dtypes, _off_gpu
    before = _in_triton, _dtypes, _off_gpu
    _in_triton, _dtypes, _off_gpu = _kernels_of(ops), DTYPES, _off_gpu or off_gpu
    try:
        yield
    finally:
        _in_triton, _dtypes, _off_gpu = before


def _kernels_of(ops: tuple[str, ...]) -> dict[str, ModuleType]:
    """Imported here, since they import triton."""
    return {op: import_module(f"mdit.kernels.{op}.triton_impl") for op in ops}


@contextmanager
def recorded_calls() -> Iterator[list[tuple[str, tuple]]]:
    """Inside, calls of ops are noted, ("swiglu.swiglu_linear", arguments), but for those that another one makes."""
    global _calls
    found: list[tuple[str, tuple]] = []
    _calls, before = found, _calls
    try:
        yield found
    finally:
        _calls = before
