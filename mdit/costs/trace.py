"""The kernels of one micro-batch, read off the model itself: forward and backward run on the meta device, which
computes nothing, while the Triton kernels are noted instead of started and every operation of PyTorch is seen.

    for kernel, count in trace(config, mask_ratio=0.75).at(micro_batch=256).items():
        count * kernel.bytes

A size of a tensor is that of an image times the micro-batch, or has nothing to do with it. One trace tells them apart,
and so gives the kernels of every micro-batch: with `IMAGES`, a prime number that divides no width of a model.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdit.config import ModelConfig, UserError, kept_tokens
from mdit.diffusion.edm import Draw, edm_loss
from mdit.kernels import dispatch
from mdit.kernels.launch import Launch, recorded
from mdit.masking import Mask
from mdit.models import MicroDiT
from mdit.parallel.fp8 import use_fp8

IMAGES = 1009
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
IN_PLACE = {  # of a kernel's tensors, read and written
    "_swiglu_backward": "u_ptr",
    "_gated_gradient": "u_ptr",
    "_gelu_gradient": "da_ptr",
    "_norm_backward": "dk_ptr",
}
PYTORCH = "pytorch"


class Product(NamedTuple):
    """`matrices` products of (rows, inner) and (inner, columns), of numbers of `itemsize` bytes."""

    matrices: int
    rows: int
    columns: int
    inner: int
    itemsize: int

    @property
    def flops(self) -> int:
        return 2 * self.matrices * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Kernel:
    """One kernel of the device. `part`: the op of mdit.kernels that it belongs to, "matmuls" or "pytorch". `arguments`
    of a launch of Triton, 0 of PyTorch's. `bytes`: every tensor read or written once; `flops` of attention alone.
    `alone`: its programs are so large that only one at a time fits a multiprocessor."""

    part: str
    name: str
    backward: bool
    arguments: int = 0
    bytes: int = 0
    flops: int = 0
    alone: bool = False
    product: Product | None = None


class Size(NamedTuple):
    """A number that grows with the micro-batch by `each` for an image."""

    fixed: int = 0
    each: int = 0

    def of(self, micro_batch: int) -> int:
        return self.fixed + self.each * micro_batch

    @classmethod
    def seen(cls, number: int, images: int) -> "Size":
        return cls(number, 0) if number % images else cls(0, number // images)

    @classmethod
    def sum(cls, sizes: Iterable["Size"]) -> "Size":
        return cls(*map(sum, zip(cls(), *sizes)))


class Seen(NamedTuple):
    """A kernel without its numbers, and these as they grow."""

    kernel: Kernel
    bytes: Size
    flops: Size = Size()
    sides: tuple[Size, ...] = ()
    itemsize: int = 0

    def at(self, micro_batch: int) -> Kernel:
        sides = (side.of(micro_batch) for side in self.sides)
        product = Product(*sides, self.itemsize) if self.sides else None
        bytes, flops = self.bytes.of(micro_batch), self.flops.of(micro_batch)
        return replace(self.kernel, bytes=bytes, flops=flops, product=product)


@dataclass(frozen=True)
class Trace:
    """`kernels`: how often each is called. `operations`: how often PyTorch is, views and allocations included."""

    kernels: dict[Seen, int]
    operations: int

    def at(self, micro_batch: int) -> dict[Kernel, int]:
        found: Counter[Kernel] = Counter()
        for seen, count in self.kernels.items():
            found[seen.at(micro_batch)] += count
        return found


@cache
def trace(config: ModelConfig, mask_ratio: float, fp8: bool = False) -> Trace:
    """Kernels of a model whose ops run in Triton, not compiled or recomputed. Raises UserError without Triton."""
    if find_spec("triton") is None:
        raise UserError("a plan counts the launches of the kernels, which needs Triton: pip install triton")
    watched = watch(config, IMAGES, mask_ratio, fp8)
    return Trace(Counter(watched.seen), watched.operations)


def watch(config: ModelConfig, micro_batch: int, mask_ratio: float, fp8: bool) -> "Watch":
    """One micro-batch in bfloat16, watched."""
    n, shape = micro_batch, (micro_batch, config.latent_channels, config.latent_size, config.latent_size)
    ops = dispatch.OPS if fp8 else [op for op in dispatch.OPS if op != dispatch.FP8]
    with torch.device("meta"):
        model = MicroDiT(config).to(torch.bfloat16)
        latents = torch.empty(shape, dtype=torch.half)
        captions = torch.empty(n, config.caption_length, config.caption_channels, dtype=torch.half)
        keep = torch.empty(n, kept_tokens(config.num_patches, mask_ratio), dtype=torch.int64)
        mask = Mask(keep, config.num_patches) if mask_ratio else None
        drawn = Draw(torch.empty(n), torch.empty(shape), torch.empty(n, dtype=torch.bool), mask)
    use_fp8(model, fp8)
    with dispatch.using(*ops, off_gpu=True), recorded() as launches, Watch(launches, n) as watched:
        loss = edm_loss(model, latents, captions, drawn, sigma_data=0.5)
        watched.note_launches()
        watched.backward = True
        torch.autograd.grad(loss, list(model.parameters()))
        watched.note_launches()
    return watched


class Watch(TorchDispatchMode):
    """Notes the kernels of PyTorch, and between them those that were launched since the last one, in order."""

    def __init__(self, launches: list[Launch], images: int) -> None:
        super().__init__()
        self.launches, self.images, self.backward, self.operations = launches, images, False, 0
        self.seen: list[Seen] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        given = kwargs.get("out") if name in MATMULS else None  # which not every matmul can write on the meta device
        out = function(*args, **kwargs) if given is None else given
        self.note_launches()
        self.operations += 1
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {_storage(tensor) for tensor in read}
        viewed = not function._schema.is_mutable and all(_storage(tensor) in known for tensor in written)
        if not viewed and "empty" not in name:
            self.seen.append(self.of_pytorch(name, read, written))
        return out

    def note_launches(self) -> None:
        self.seen += map(self.of_triton, self.launches)
        self.launches.clear()

    def of_pytorch(self, name: str, read: list[Tensor], written: list[Tensor]) -> Seen:
        moved = self.bytes_of([*read, *written])
        if name not in MATMULS:
            return Seen(Kernel(PYTORCH, name, self.backward), moved)
        a, b = [tensor for tensor in read if tensor.ndim > 1][:2]
        sides = len(a) if a.ndim == 3 else 1, a.shape[-2], b.shape[-1], a.shape[-1]
        sizes = tuple(Size.seen(side, self.images) for side in sides)
        return Seen(Kernel("matmuls", name, self.backward), moved, sides=sizes, itemsize=a.itemsize)

    def of_triton(self, launch: Launch) -> Seen:
        name, part = launch.kernel.fn.__name__, launch.kernel.fn.__module__.split(".")[-2]
        arguments = dict(zip(launch.kernel.arg_names, launch.arguments))
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        tensors += [arguments[IN_PLACE[name]]] if name in IN_PLACE else []
        flops = _attention_flops(arguments | launch.constants, self.backward) if name.startswith("_attend") else 0
        alone = flops > 0 and launch.num_warps > 4  # with all registers that a thread can have
        kernel = Kernel(part, name, self.backward, len(launch.arguments), alone=alone)
        return Seen(kernel, self.bytes_of(tensors), Size.seen(flops, self.images))

    def bytes_of(self, tensors: list[Tensor]) -> Size:
        return Size.sum(Size.seen(_bytes(tensor), self.images) for tensor in tensors)


def _attention_flops(of: dict, backward: bool) -> int:
    """FLOPs of two products forward or five backward, over whole blocks of queries and keys."""
    keys = of["MAIN"] + of["TAIL"] if "MAIN" in of else _whole_blocks(of["L"], of["BLOCK_L"])
    products = 5 if backward else 2
    return 2 * products * of["N"] * of["H"] * of["HEAD_DIM"] * _whole_blocks(of["T"], of["BLOCK_T"]) * keys


def _whole_blocks(size: int, block: int) -> int:
    return -(-size // block) * block


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: an expanded one has less than its shape says."""
    return tensor.itemsize * math.prod(n for n, stride in zip(tensor.shape, tensor.stride()) if stride or not n)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
