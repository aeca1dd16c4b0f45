"""CUDA devices that are not there, for one process: `install()`, then `with FakeGPU(...) as gpu:`.

What is on a "cuda" device is a FakeTensor: a shape, a dtype and a device, which torch's own rules carry through every
operation; so an operation on tensors of two devices is the error that it would be. What is on the CPU is real.
torch.cuda answers as an H100 would. Numbers that the host reads from a device are made up (1, finite, no two equal).

FakeGPU notes wherever the host would wait for the device, and every other device that a tensor lands on.
"""

import collections
import ctypes
import os
import sys
import threading
import types
from contextlib import contextmanager
from pathlib import Path

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

ROOT = Path(__file__).resolve().parents[2]
OURS = (f"{ROOT}/mdit/", f"{ROOT}/kernels/")
# Operations whose results, or their shapes, the host has to know.
READS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
NAME, CAPABILITY, MEMORY = "NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30

_pinned: set[int] = set()  # addresses of pinned memory
_noted: "FakeGPU | None" = None
_library: ctypes.CDLL  # guard.cpp


class Wait(collections.namedtuple("Wait", "kind frames")):
    """`kind` is what made the host wait; `frames` are those of mdit and DeepSpeed, innermost first, each as
    "mdit/train/meter.py:report"."""


class FakeGPU(TorchDispatchMode):
    """Inside, tensors may be on "cuda". `waits` and `elsewhere` (operations whose result is on another device than
    this process's) are what was noted; `threads` says which device each call that touches CUDA was made on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.waits, self.elsewhere, self.threads = device, [], [], []
        self.fakes = FakeTensorMode()

    def __enter__(self) -> "FakeGPU":
        global _noted
        _noted = self
        return super().__enter__()

    def __exit__(self, *error) -> None:
        global _noted
        _noted = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        device = kwargs.get("device")
        to_gpu = device is not None and torch.device(device).type == "cuda"
        if not to_gpu and not any(isinstance(t, FakeTensor) for t in given):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        on_gpu = any(t.device.type == "cuda" for t in given)
        if on_gpu and (name in READS or _indexes_by_mask(name, args)):
            note(name)
        if name == "_local_scalar_dense":
            return torch.full((), getattr(args[0], "truth", 1), dtype=args[0].dtype).item()
        if name == "equal":
            return True
        fake_args, fake_kwargs = tree_map(self._fake, args), tree_map(self._fake, kwargs)
        with self.fakes:
            out = func(*fake_args, **fake_kwargs)
        for found in tree_leaves(out):
            if not isinstance(found, torch.Tensor):
                continue
            if found.dtype == torch.bool or any(hasattr(t, "truth") for t in given):
                found.truth = _truth(name, args)
            if found.device.type == "cuda" and found.device != self.device:
                self.elsewhere.append((f"{name} on {found.device}", frames()))
        if name in ("_to_copy", "copy_"):
            self._note_copy(out, args[1] if name == "copy_" else args[0], args, kwargs)
        return out if to_gpu or not on_gpu or name == "copy_" else tree_map(_as_read, out)

    def _fake(self, value):
        """A tensor of the CPU as one of the fakes; all else as it is."""
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self.fakes.from_tensor(value.detach(), static_shapes=True) if real else value

    def _note_copy(self, out: torch.Tensor, source: torch.Tensor, args: tuple, kwargs: dict) -> None:
        """A copy between host and device is waited for unless both sides allow it not to be."""
        if source.device.type == out.device.type or "meta" in (source.device.type, out.device.type):
            return
        asked = bool(kwargs.get("non_blocking")) or (len(args) > 2 and args[2] is True)
        host = source if source.device.type == "cpu" else out
        pinned = not isinstance(host, FakeTensor) and host.untyped_storage().data_ptr() in _pinned
        if not (asked and pinned):
            note(f"copy {source.device.type} to {out.device.type}{'' if asked else ', blocking'}")


def _as_read(value):
    """The value, real again where it has come from a device to the CPU."""
    if not isinstance(value, FakeTensor) or value.device.type != "cpu":
        return value
    return torch.full(value.shape, getattr(value, "truth", 1), dtype=value.dtype)


def _truth(name: str, args: tuple) -> bool:
    """Elements of a result of type bool, where all numbers are finite and no two are equal."""
    if name in ("eq", "ne"):
        return (args[0] is args[1]) == (name == "eq")
    known = [t.truth for t in tree_leaves(args) if hasattr(t, "truth")]
    return bool(known and known[0] != (name in ("bitwise_not", "logical_not")))


def _indexes_by_mask(name: str, args: tuple) -> bool:
    masks = tree_leaves(args[1]) if name in ("index", "index_put_", "index_put") and len(args) > 1 else []
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in masks)


def note(kind: str) -> None:
    if _noted is not None:
        _noted.waits.append(Wait(kind, frames()))


def touches(what: str) -> None:
    """Note on which device this thread is when it does something that opens a context there."""
    if _noted is not None:
        _noted.threads.append((what, threading.current_thread().name, _library.fake_cuda_current()))


def frames() -> list[str]:
    """Functions of mdit and DeepSpeed that are at work, innermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if "/site-packages/" in path:
            _, _, path = path.partition("/site-packages/")
            found += [f"{path}:{name}"] if path.startswith("deepspeed/") else []
        elif path.startswith(OURS):
            found.append(f"{path.removeprefix(f'{ROOT}/')}:{name}")
        frame = frame.f_back
    return found


class Stream:
    """Of a device; nothing waits on it."""

    def __init__(self, device=None, **options) -> None:
        self.device, self.cuda_stream = torch.device("cuda", _index(device)), 0

    def wait_event(self, event) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def record_event(self, event=None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        note("Stream.synchronize")

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error) -> None:
        pass

    def __eq__(self, other) -> bool:
        return isinstance(other, Stream) and self.device == other.device

    def __hash__(self) -> int:
        return hash(self.device)


class Event:
    def __init__(self, *args, **options) -> None:
        touches("Event")

    def record(self, stream=None) -> None:
        touches("Event.record")

    def wait(self, stream=None) -> None:
        pass

    def synchronize(self) -> None:
        touches("Event.synchronize")
        note("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Generator(torch.Generator):
    """Of a device, which is the CPU's: no number is drawn from it."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def install(library: Path) -> None:
    """Put answers of an H100 in place of torch.cuda's, for good. `library` was loaded before torch (run.py)."""
    global _library
    _library = ctypes.CDLL(str(library))
    cuda = torch.cuda
    fake_tensor.init_gpu_context = lambda *args: None
    answers = dict(
        is_available=True, is_initialized=True, is_bf16_supported=True, get_device_name=NAME, mem_get_info=(MEMORY,) * 2
    )
    answers |= dict(get_device_capability=CAPABILITY, ipc_collect=None, empty_cache=None, init=None, _lazy_init=None)
    answers |= dict.fromkeys(("manual_seed", "manual_seed_all", "reset_peak_memory_stats", "_sleep"))
    for kind in ("memory_allocated", "memory_reserved", "memory_cached"):
        answers |= {kind: 0, f"max_{kind}": 0, f"reset_max_{kind}": None}
    for name, value in answers.items():
        setattr(cuda, name, lambda *args, value=value, **options: value)
    properties = types.SimpleNamespace(total_memory=MEMORY, multi_processor_count=132, name=NAME, major=9, minor=0)
    cuda.get_device_properties = lambda device=None: properties
    cuda.device_count = lambda: int(os.environ["FAKE_CUDA_DEVICES"])
    cuda.current_device = lambda: _library.fake_cuda_current()
    cuda.set_device = lambda device: _library.fake_cuda_set(_index(device))
    cuda.synchronize = lambda device=None: note("synchronize")
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda device=None: Stream(device)
    cuda.stream, cuda.device = _nothing, _on
    cuda.nvtx = types.SimpleNamespace(range_push=lambda *args: None, range_pop=lambda: None)
    torch.Tensor.record_stream = lambda self, stream: None
    torch.Tensor.pin_memory = lambda self, device=None: _pin(self.clone())
    torch.Tensor.is_pinned = lambda self, device=None: self.untyped_storage().data_ptr() in _pinned
    torch.Generator, torch.nn.Module._apply = Generator, _apply
    FakeTensor.tolist = lambda self: torch.ones_like(self.cpu()).tolist()  # as item() gives 1
    for name in ("empty", "zeros"):
        setattr(torch, name, _pinning(getattr(torch, name)))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _from_numbers(getattr(torch, name)))


def _index(device) -> int:
    if device is None:
        return _library.fake_cuda_current()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _library.fake_cuda_current() if index is None else index


@contextmanager
def _nothing(*args):
    yield


@contextmanager
def _on(device):
    before = _library.fake_cuda_current()
    _library.fake_cuda_set(_index(device))
    yield
    _library.fake_cuda_set(before)


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    touches("pinned memory")
    _pinned.add(tensor.untyped_storage().data_ptr())
    return tensor


def _pinning(function):
    def made(*args, pin_memory=False, **options):
        return _pin(function(*args, **options)) if pin_memory else function(*args, **options)

    return made


def _from_numbers(function):
    """torch.tensor(numbers, device="cuda") copies pageable memory, and waits for it."""

    def made(data, *args, device=None, **options):
        if device is None or torch.device(device).type != "cuda":
            return function(data, *args, device=device, **options)
        return function(data, *args, **options).to(device)

    return made


def _apply(module: torch.nn.Module, function, recurse=True) -> torch.nn.Module:
    """torch's own exchanges the insides of tensors, which those of real and fake ones do not fit."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        with torch.no_grad():
            applied = function(parameter.data)
        if applied.device != parameter.device:
            module._parameters[name] = torch.nn.Parameter(applied, parameter.requires_grad)
        elif applied.dtype != parameter.dtype:
            parameter.data = applied
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module
