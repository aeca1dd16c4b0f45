"""One micro-batch, read off the model itself: forward and backward run on the meta device, which computes nothing.

    found = trace(config, mask_ratio=0.75, form=Form())
    for kernel, count in found.at(micro_batch=256).items():
        count * kernel.bytes
    found.peak.of(256)                                          # bytes of activations

The model is what a run makes of it (mdit.parallel.apply). Launches of Triton are noted instead of started, every
operation of PyTorch is seen, and so is every tensor until it is freed.

A size of a tensor is that of an image times the micro-batch, or has nothing to do with it. One trace tells them apart,
and so serves every micro-batch: with `IMAGES`, a prime number that divides no width of a model.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from mdit.config import AlignConfig, EDMNoise, ModelConfig, TrainConfig, UserError
from mdit.diffusion.edm import StepNoise, edm_loss
from mdit.dist import World
from mdit.kernels import dispatch
from mdit.kernels.custom_op import FUNCTIONS
from mdit.kernels.launch import Launch, recorded
from mdit.masking import constant_parts, sample_mask
from mdit.models import MicroDiT
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.align import add_projection, projection_of
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Checkpointing, RunSettings
from mdit.parallel.shard import DENSE, cut_dense

IMAGES = 1009
NOISE = EDMNoise(P_mean=0.0, P_std=1.0, sigma_data=0.5)  # any: FLOPs and bytes are those of either target
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
ATTENTION = "masked_attention"
PYTORCH = "pytorch"
IN_PLACE = {  # of a kernel's tensors, read and written
    "_swiglu_backward": "u_ptr",
    "_gated_gradient": "u_ptr",
    "_gelu_gradient": "da_ptr",
    "_norm_backward": "dk_ptr",
}


@dataclass(frozen=True)
class Form:
    """Form in which a rank computes the model: kernels in Triton or all in PyTorch, matmuls in float8, what of a block
    runs again in the backward pass ("none", "block", "selective"), tensor groups of `tp` ranks."""

    triton: bool = True
    fp8: bool = False
    checkpointing: Checkpointing = "none"
    tp: int = 1
    dtype: torch.dtype = torch.bfloat16


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


@dataclass(frozen=True)
class Size:
    """A number that grows with the micro-batch by `each` for an image."""

    fixed: int = 0
    each: int = 0

    def of(self, micro_batch: int) -> int:
        return self.fixed + self.each * micro_batch

    @classmethod
    def seen(cls, number: int, images: int) -> "Size":
        return cls(number, 0) if number % images else cls(0, number // images)

    def __add__(self, other: "Size") -> "Size":
        return Size(self.fixed + other.fixed, self.each + other.each)

    def __sub__(self, other: "Size") -> "Size":
        return Size(self.fixed - other.fixed, self.each - other.each)


class Seen(NamedTuple):
    """A kernel without its numbers, and these as they grow."""

    kernel: Kernel
    bytes: Size
    flops: Size = Size()
    sides: tuple[Size, ...] = ()
    itemsize: int = 0

    def at(self, micro_batch: int) -> Kernel:
        sides = [side.of(micro_batch) for side in self.sides]
        product = Product(sides[0], sides[1], sides[2], sides[3], self.itemsize) if sides else None
        bytes, flops = self.bytes.of(micro_batch), self.flops.of(micro_batch)
        return replace(self.kernel, bytes=bytes, flops=flops, product=product)


@dataclass(frozen=True)
class Trace:
    """`kernels`: how often each is called. `operations`: how often PyTorch is, views and allocations included. `kept`:
    bytes that the forward pass leaves for the backward pass; `peak`: the most that activations and their gradients take
    at once. Weights, their gradients and the batch do not count."""

    kernels: dict[Seen, int]
    operations: int
    kept: Size
    peak: Size

    def at(self, micro_batch: int) -> dict[Kernel, int]:
        found: Counter[Kernel] = Counter()
        for seen, count in self.kernels.items():
            found[seen.at(micro_batch)] += count
        return found

    def weight_gradients(self, micro_batch: int) -> dict[Product, int]:
        """The matmuls that sum over the rows of all images."""
        found: Counter[Product] = Counter()
        for seen, count in self.kernels.items():
            product = seen.at(micro_batch).product
            if product and seen.sides[3].each:
                found[product] += count
        return found


@cache
def trace(config: ModelConfig, mask_ratio: float, form: Form = Form(), align: AlignConfig | None = None) -> Trace:
    """A micro-batch of this form, not compiled. Raises UserError where Triton is missing for kernels in Triton."""
    if form.triton and find_spec("triton") is None:
        raise UserError("a plan counts the launches of the kernels, which needs Triton: pip install triton")
    watched = watch(config, IMAGES, mask_ratio, form, align=align)
    return Trace(Counter(watched.seen), watched.operations, watched.kept, watched.peak)


def launches(config: ModelConfig, micro_batch: int, mask_ratio: float, form: Form) -> list[tuple[bool, Launch]]:
    """(of the backward pass?, launch) of every kernel in Triton, in order."""
    return watch(config, micro_batch, mask_ratio, form, keeping=True).launched


def watch(
    config: ModelConfig,
    micro_batch: int,
    mask_ratio: float,
    form: Form,
    keeping: bool = False,
    align: AlignConfig | None = None,
) -> "Watch":
    """One micro-batch, watched. `keeping` its launches keeps their tensors alive, so that bytes are wrong then."""
    model, loss_of_batch, batch = on_meta(config, micro_batch, mask_ratio, form, align)
    ops = [op for op in dispatch.OPS if form.triton and (form.fp8 or op != dispatch.FP8)]
    ops = [op for op in ops if form.tp == 1 or op != ATTENTION]  # tensor parallelism's attention is PyTorch's
    recording = recorded() if form.triton else nullcontext([])
    given = [*model.parameters(), *model.buffers(), *batch]
    with dispatch.using(*ops, off_gpu=True), fused_attention(), recording as launches:
        with Watch(launches, micro_batch, given, keeping) as watched:
            for parameter in model.parameters():
                parameter.register_hook(watched.forget)
            loss = loss_of_batch()
            watched.turn_back()
            torch.autograd.grad(loss, list(model.parameters()))
            watched.note_launches()
    return watched


@cache
def forward_flops(config: ModelConfig, mask_ratio: float, align: AlignConfig | None = None) -> dict[str, int]:
    """FLOPs of one image's forward pass, of "matmuls" and of "attention": 2 for a multiply-add, kept tokens only,
    experts at capacity, tokens moved to them by index; with `align` those of its projection too."""
    _, loss_of_batch, _ = on_meta(config, 1, mask_ratio, Form(triton=False), align)
    with dispatch.using(), fused_attention(), FlopCounterMode(display=False) as counter:
        loss_of_batch()
    counts = counter.get_flop_counts()["Global"]
    matmuls = sum(count for op, count in counts.items() if op.__name__ in MATMULS)
    return {"matmuls": matmuls, "attention": sum(counts.values()) - matmuls}


def training_flops(config: ModelConfig, mask_ratio: float, align: AlignConfig | None = None) -> int:
    """Forward and backward FLOPs of one image, backward twice the forward: the model FLOPs behind every MFU here."""
    return 3 * sum(forward_flops(config, mask_ratio, align).values())


def mean_training_flops(config: TrainConfig) -> float:
    """FLOPs of one image, a mean over the run's steps: those up to align.stop_step have the projection's."""
    aligned = min(1.0, config.align.stop_step / config.training.num_steps) if config.align else 0.0
    parts = [(share, c.model, c.training.fixed_mask_ratio) for share, c in constant_parts(config)]
    means = [sum(s * training_flops(m, ratio, align) for s, m, ratio in parts) for align in (None, config.align)]
    return (1 - aligned) * means[0] + aligned * means[1]


class Layer(NamedTuple):
    """A call of one attention or feed-forward network, by the shapes of one image."""

    module: nn.Module
    inputs: tuple[torch.Size, ...]
    output: torch.Size


@cache
def layers(config: ModelConfig, mask_ratio: float) -> list[Layer]:
    """In the order of the forward pass."""
    model, loss_of_batch, _ = on_meta(config, 1, mask_ratio, Form(triton=False))
    found = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(Layer(module, tuple(x.shape for x in inputs), output.shape))

    for module in model.modules():
        if isinstance(module, (*DENSE, ExpertChoiceMoE)):
            module.register_forward_hook(note)
    with torch.no_grad():
        loss_of_batch()
    return found


def on_meta(
    config: ModelConfig, micro_batch: int, mask_ratio: float, form: Form, align: AlignConfig | None = None
) -> tuple[MicroDiT, Callable[[], Tensor], list[Tensor]]:
    """-> the model, its loss of a micro-batch, and the tensors of that batch."""
    n, shape = micro_batch, (micro_batch, *config.latent_shape)
    with torch.device("meta"):
        model = MicroDiT(config)
        if align is not None:
            add_projection(model, align)
        model.to(form.dtype)
        latents = torch.empty(shape, dtype=torch.half)
        captions = torch.empty(n, *config.caption_shape, dtype=torch.half)
        mask = sample_mask(torch.empty(n, config.num_patches), mask_ratio)
        noise = StepNoise(torch.empty(n), torch.empty(shape), torch.empty(n, dtype=torch.bool), mask)
    if form.tp > 1:
        cut_dense(model, 0, form.tp)
    settings = RunSettings(fp8=form.fp8, activation_checkpointing=form.checkpointing)
    parallelize(model, settings, ParallelPlan(World(0, 1, 0, torch.device("meta"))))
    batch = [latents, captions, noise.sigma_N, noise.noise_NCHW, noise.keep_caption_N]
    batch += [mask.keep_NK] if mask else []

    def loss_of_batch() -> Tensor:
        return edm_loss(model, latents, captions, noise, NOISE)

    if align is None or (projection := projection_of(model)) is None:
        return model, loss_of_batch, batch
    batch.append(torch.empty(n, config.num_patches, align.channels, dtype=torch.half, device="meta"))
    return model, lambda: loss_of_batch() + align.weight * projection.losses(batch[-1], mask).mean(), batch


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, PyTorch's attention on the meta device is that of a GPU; else it would be a product and a softmax."""

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: None = None) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        yield


class Watch(TorchDispatchMode):
    """Notes the kernels of PyTorch, and between them those that were launched since the last one, in order; and the
    bytes of all storages that came up and are still there."""

    def __init__(self, launches: list[Launch], images: int, given: Iterable[Tensor], keeping: bool = False) -> None:
        super().__init__()
        self.keeping = keeping
        self.launched: list[tuple[bool, Launch]] = []
        self.launches, self.images, self.backward, self.operations = launches, images, False, 0
        self.seen: list[Seen] = []
        self.sizes = {_storage(tensor): Size() for tensor in given}
        self.alive = self.kept = self.peak = Size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        with self:  # an op of ours, or one of many: what it does inside is seen
            if function.namespace == "mdit":
                return FUNCTIONS[function.name()](*args, **kwargs)
            if (parts := function.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        given = kwargs.get("out") if name in MATMULS else None  # which not every matmul can write on the meta device
        out = function(*args, **kwargs) if given is None else given
        self.note_launches()
        self.operations += 1
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        known = {_storage(tensor) for tensor in read}
        viewed = not function._schema.is_mutable and all(_storage(tensor) in known for tensor in written)
        if not viewed and "empty" not in name:
            flops = flop_registry[function.overloadpacket](*args, **kwargs, out_val=out) if "dot_product" in name else 0
            self.seen.append(self.of_pytorch(name, read, written, flops))
        for tensor in written:
            self.count(tensor.untyped_storage())
        return out

    def turn_back(self) -> None:
        """The forward pass is over."""
        self.note_launches()
        self.backward, self.kept = True, self.alive

    def count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = size = Size.seen(storage.nbytes(), self.images)
            self.alive += size
            weakref.finalize(storage, self.gone, storage._cdata)
            self.peak = max(self.peak, self.alive, key=lambda size: size.of(self.images))

    def forget(self, tensor: Tensor) -> None:
        """Its bytes are counted elsewhere."""
        self.gone(_storage(tensor))
        self.sizes[_storage(tensor)] = Size()

    def gone(self, storage: int) -> None:
        self.alive -= self.sizes.pop(storage, Size())

    def note_launches(self) -> None:
        self.seen += map(self.of_triton, self.launches)
        self.launched += [(self.backward, launch) for launch in self.launches] if self.keeping else []
        self.launches.clear()

    def of_pytorch(self, name: str, read: list[Tensor], written: list[Tensor], flops: int) -> Seen:
        moved = self.bytes_of([*read, *written])
        if name not in MATMULS:
            part = ATTENTION if flops else PYTORCH
            return Seen(Kernel(part, name, self.backward), moved, Size.seen(flops, self.images))
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
        return sum((Size.seen(_bytes(tensor), self.images) for tensor in tensors), Size())


def _attention_flops(of: dict[str, Any], backward: bool) -> int:
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
