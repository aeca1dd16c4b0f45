"""Which ops run in their Triton kernels in this process; the others, and all until somebody says so, run in PyTorch.

Who decides is `mdit.kernels.selection`, once, before a run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

FP8 = "fp8_linear"
OPS = ("masked_attention", "patch_mixing", "expert_choice", "swiglu", FP8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_in_triton: dict[str, ModuleType] = {}  # op: its triton_impl
_dtypes: tuple[torch.dtype, ...] = ()  # that they run in; tensors of all others go to PyTorch
_off_gpu = os.environ.get("TRITON_INTERPRET") == "1"  # whether kernels may be given tensors of other devices


def implementation(op: str, tensor: Tensor, reference: ModuleType) -> ModuleType:
    """The module whose function of the same name handles this call: the op's triton_impl, or `reference`."""
    module = _in_triton[op] if use_triton(op, tensor) else reference
    return module if _calls is None else _Recorder(op, module)  # type: ignore[return-value] # has its functions


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


_calls: list[tuple[str, tuple]] | None = None


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


class _Recorder:
    def __init__(self, op: str, module: ModuleType) -> None:
        self.op, self.module = op, module

    def __getattr__(self, name: str) -> Callable:
        def call(*arguments):
            global _calls
            noted, _calls = _calls, None
            assert noted is not None
            noted.append((f"{self.op}.{name}", arguments))
            try:
                return getattr(self.module, name)(*arguments)
            finally:
                _calls = noted

        return call
