"""Kernels built for a GPU that need not be there, and what they cost: registers, spills, shared memory.

    with recorded() as launches, dispatch.using("swiglu", off_gpu=True):
        swiglu_linear(a, b, weight)                # tensors of any device; nothing runs
    faults(build(source(launches[0])))             # [] where it fits an H100

In a process that has called `pretend_to_have_a_gpu`, `keep` builds into Triton's cache what a GPU would look for there.

A launch is specialised by Triton itself, so that is built what a GPU would run: None and 1 become constants, pointers
and integers that are multiples of 16 are known to be. Triton must have been imported without TRITON_INTERPRET.
"""

import ctypes
import importlib
import io
import os
import re
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from mdit.kernels.launch import OPTIONS, Launch

VERSION: str = triton.__version__
SHARED_BYTES = 227 * 1024  # what a block can have on an H100
LOG = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg", re.S)


@dataclass(frozen=True)
class KernelSource:
    """Input of Triton's compiler for a launch. Equal ones give equal binaries; other processes can build them too."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    num_warps: int
    num_stages: int
    capability: int


@dataclass(frozen=True)
class Build:
    name: str
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    stack_bytes: int
    spill_bytes: int  # stored and loaded, in the text of the program
    shared_bytes: int
    seconds: float


def source(launch: Launch, capability: int = 90) -> KernelSource:
    kernel, backend = launch.kernel, make_backend(_target(capability))
    warps = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options = {**launch.constants, **warps, "debug": False, **OPTIONS}
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialised, rest = binder(*launch.arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialised, rest)
    return KernelSource(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((path, tuple((name, value) for name, value in found)) for path, found in attributes.items()),
        launch.num_warps,
        launch.num_stages,
        capability,
    )


def build(wanted: KernelSource) -> Build:
    """Compiles, whatever Triton's cache holds."""
    log, start = io.StringIO(), time.perf_counter()
    with knobs.compilation.scope(), knobs.nvidia.scope(), redirect_stdout(log):
        knobs.compilation.always_compile = knobs.nvidia.dump_ptxas_log = True
        built = _compile(wanted)
    seconds = time.perf_counter() - start
    found = LOG.search(log.getvalue())
    if found is None:
        raise RuntimeError(f"{wanted.kernel}: ptxas does not say what it used: {log.getvalue()!r}")
    stack, stores, loads, registers = map(int, found.groups())
    used = registers, stack, stores + loads, built.metadata.shared
    return Build(wanted.kernel, wanted.num_warps, wanted.num_stages, *used, seconds)


def faults(found: Build) -> list[str]:
    """Why this kernel cannot run, or runs much slower than it could."""
    wrong = []
    if found.shared_bytes > SHARED_BYTES:
        wrong.append(f"{found.name} needs {found.shared_bytes} bytes of shared memory, a block has {SHARED_BYTES}")
    if found.spill_bytes or found.stack_bytes:
        wrong.append(f"{found.name} spills: {found.spill_bytes} bytes, with {found.stack_bytes} bytes of stack")
    return wrong


def pretend_to_have_a_gpu(capability: int, stub: Path) -> None:
    """From now on, and to the end of this process, Triton finds a GPU that does nothing: `stub` is the directory of a
    libcuda.so.1 (tools/libcuda_stub.c)."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(stub)
    ctypes.CDLL(str(stub / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    torch.cuda.is_available = lambda: True
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def keep(wanted: KernelSource) -> bool:
    """Whether Triton's cache lacked this kernel; now it holds its binary, and the launcher that Python calls it by."""
    hits: list[bool] = []
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
        assert _compile(wanted).run is not None  # where Triton builds launchers
    return not all(hits)


def _compile(wanted: KernelSource):
    kernel = getattr(importlib.import_module(wanted.module), wanted.kernel)
    attributes = {path: [list(attribute) for attribute in found] for path, found in wanted.attributes}
    text = ASTSource(fn=kernel, signature=dict(wanted.signature), constexprs=dict(wanted.constants), attrs=attributes)
    options = {"num_warps": wanted.num_warps, "num_stages": wanted.num_stages, **OPTIONS}
    return triton.compile(text, target=_target(wanted.capability), options=options)


def _target(capability: int) -> GPUTarget:
    return GPUTarget("cuda", capability, 32)
