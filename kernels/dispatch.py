"""Which ops run in their Triton kernels in this process; the others, and all until somebody says so, run in PyTorch.

Who decides is `mdit.kernels.choice`, once, before a run.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

FP8 = "fp8_linear"
OPS = ("masked_attention", "patch_mixing", "expert_choice", "swiglu", FP8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_in_triton: frozenset[str] = frozenset()
_dtypes: tuple[torch.dtype, ...] = ()  # that they run in; tensors of all others go to PyTorch
_off_gpu = os.environ.get("TRITON_INTERPRET") == "1"  # may kernels be given tensors of other devices?


def takes_triton(op: str, tensor: Tensor) -> bool:
    """Does the Triton kernel of `op` handle this tensor? Only on a GPU, and in the dtype that was settled."""
    return op in _in_triton and tensor.dtype in _dtypes and (tensor.is_cuda or _off_gpu)


def interpreted() -> bool:
    """Can kernels run without a GPU?"""
    return _off_gpu


def run_in_triton(*ops: str, dtype: torch.dtype) -> None:
    """From now on exactly these, in this dtype alone: nobody has checked, or wants to wait for builds of, another."""
    global _in_triton, _dtypes
    _in_triton, _dtypes = frozenset(ops), (dtype,) if dtype in DTYPES else ()


@contextmanager
def using(*ops: str, off_gpu: bool = False) -> Iterator[None]:
    """Inside, exactly these ops run in Triton, in any dtype, unchecked: for tests and benchmarks."""
    global _in_triton, _dtypes, _off_gpu
    before = _in_triton, _dtypes, _off_gpu
    _in_triton, _dtypes, _off_gpu = frozenset(ops), DTYPES, _off_gpu or off_gpu
    try:
        yield
    finally:
        _in_triton, _dtypes, _off_gpu = before
