"""The paper plan of one layout: memory, traffic and time of an optimizer step, predicted by formula.

docs/planning.md has the formulas with their sources. Numbers are counted in parameters, `b` is the bytes of one in
the computing dtype. Everything is for one GPU, from the second step on.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from mdit.config import TrainConfig, kept_tokens
from mdit.costs.activations import peak_bytes
from mdit.costs.layouts import Layout, count_weights, persistent_numbers
from mdit.costs.machines import OVERLAP_SHARE, RESERVED_GIB, Machine
from mdit.costs.time import step_parts
from mdit.models import meta_model
from mdit.models.dit import Block
from mdit.models.moe import ExpertChoice

ADAM_BYTES, EMA_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4, 4  # float32: two moments, and one each
NORM_BYTES = 8  # DeepSpeed takes the norm of an offloaded gradient in float64, parameter by parameter
BATCHES_HELD = 2  # by the loader: the step's and the next one


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. Each part at its largest (`optimizer`: masters, moments, EMA); `peak` is the largest sum of
    a moment, which is less than all parts together: they are not at their largest at the same time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    peak: int

    def fits(self, machine: Machine) -> bool:
        return self.peak <= (machine.memory_gib - RESERVED_GIB) * 2**30


class Moment(NamedTuple):
    """Bytes on one GPU at one moment of a step, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int


def predict_memory(config: TrainConfig, layout: Layout) -> Memory:
    moments = memory_moments(config, layout).values()
    return Memory(*map(max, zip(*moments)), peak=max(map(sum, moments)))


def memory_moments(config: TrainConfig, layout: Layout) -> dict[str, Moment]:
    """`held`: after a micro-batch that is not the last. `backward`: as the last one's backward pass begins. `reduce`:
    as gradients are exchanged for the first time in it. `step`: in the optimizer."""
    b, groups = layout.itemsize, count_weights(config.model).groups(layout)
    numbers, part = sum(count for count, _, _ in groups), sum(-(-count // ranks) for count, ranks, _ in groups)
    between = turning = b * numbers
    if layout.stage == 3:
        between, turning = (b * (part + whole) for whole in gathered_numbers(config, layout))
    optimizer = 0 if layout.offload else (MASTER_BYTES + ADAM_BYTES + (EMA_BYTES if config.ema else 0)) * part
    through = largest_parameter(config) if layout.offload else 0
    flying = b * gathering(config, layout)
    peak, inputs = peak_bytes(config.model, config.training.mask_ratio, layout.setting), input_bytes(config, layout)
    left = max(0, numbers - layout.options.reduce_bucket_size) / numbers  # of backward, at the first exchange
    activations = {"held": 0, "backward": peak, "reduce": int(left * peak) if layout.stage > 1 else 0, "step": 0}
    largest = max(count for count, _, _ in groups)
    return {
        moment: Moment(
            turning if moment in ("backward", "reduce") else between,
            gradients,
            optimizer,
            activations[moment],
            buffers
            + (0 if moment == "held" else inputs)
            + (flying if moment == "backward" else 0)
            + (b + (NORM_BYTES if moment == "reduce" else 0)) * through,
        )
        for moment, (gradients, buffers) in gradient_bytes(layout, numbers, part, largest).items()
    }


def host_bytes(config: TrainConfig, layout: Layout) -> int:
    """Bytes of host memory for each GPU of an offloaded optimizer (zero/stage_1_and_2.py): masters, moments, EMA and
    gradients in float32, the new weights on their way back, and the buffer that a gradient passes through. In float32,
    gradients are also added up here."""
    if not layout.offload:
        return 0
    part = sum(-(-count // ranks) for count, ranks, _ in count_weights(config.model).groups(layout))
    each = MASTER_BYTES + ADAM_BYTES + GRADIENT_BYTES + (EMA_BYTES if config.ema else 0) + layout.itemsize
    each += GRADIENT_BYTES if not layout.bf16 and layout.accumulation > 1 else 0
    return each * part + layout.itemsize * largest_parameter(config)


def largest_parameter(config: TrainConfig) -> int:
    return max(p.numel() for p in meta_model(config.model).parameters())


def gradient_bytes(layout: Layout, numbers: int, part: int, largest: int) -> dict[str, tuple[int, int]]:
    """(gradients, buffers that they pass through) at each moment, as DeepSpeed 0.19 allocates them."""
    b, often, options = layout.itemsize, layout.accumulation > 1, layout.options
    every, partition = b * numbers, GRADIENT_BYTES * part
    if layout.offload and not layout.bf16:  # added up in host memory; of bfloat16 on the GPU, as without offload
        partition = 0
    if layout.stage == 1 and layout.bf16:  # mdit/train/zero_step.py: float32 sums of all; autograd's own come and go
        sums, sent = GRADIENT_BYTES * numbers, b * largest if layout.data_size > 1 else 0
        return {"held": (sums, 0), "backward": (sums, 0), "reduce": (sums + every, 0), "step": (sums, sent)}
    bucket = b * options.reduce_bucket_size * (2 if layout.stage < 3 and layout.overlapped else 1)
    copy = b * min(options.reduce_bucket_size, numbers)  # a bucket is flattened before it is sent
    flat = 0 if layout.stage == 2 and layout.bf16 else partition  # the optimizer's own copy
    if layout.stage == 1:
        moments = {"held": (every, bucket), "backward": (every if often else 0, bucket)}
        return moments | {"reduce": (every, bucket + partition), "step": (partition, flat)}
    stays = bucket if layout.stage == 3 else 0
    again = partition if layout.stage == 2 and not layout.bf16 and often else 0  # this micro-batch's, not yet added
    kept = partition if often or layout.stage == 3 else 0
    moments = {"held": (partition, stays), "backward": (kept, bucket)}
    return moments | {"reduce": (partition, bucket + copy + again), "step": (partition, stays + flat)}


def gathered_numbers(config: TrainConfig, layout: Layout) -> tuple[int, int]:
    """ZeRO 3: whole weights beside the partitions, (between steps, while backward begins).

    Parameters of up to the persistence threshold always; of the others those that will be used again within the reuse
    distance, which at the turn from forward to backward is twice the way to the end, and a bucket fetched ahead.
    """
    if layout.data_size == 1:  # gathering is a view of the only partition
        return 0, 0
    options, numbers = layout.options, sum(asdict(count_weights(config.model)).values())
    always = persistent_numbers(config.model, options.stage3_param_persistence_threshold)
    ahead = options.stage3_max_reuse_distance // 2 + options.stage3_prefetch_bucket_size
    return always, always + min(numbers - always, ahead)


def gathering(config: TrainConfig, layout: Layout) -> int:
    """ZeRO 3: numbers in the buffer of the gather that was begun ahead, from which whole weights are copied."""
    options = layout.options
    numbers = sum(count for count, _, _ in count_weights(config.model).groups(layout))
    rest = numbers - persistent_numbers(config.model, options.stage3_param_persistence_threshold)
    return min(rest, options.stage3_prefetch_bucket_size) if layout.stage == 3 and layout.data_size > 1 else 0


def input_bytes(config: TrainConfig, layout: Layout) -> int:
    """Latents and captions of a rank's share as stored (2 bytes), noise in float32."""
    model, share = config.model, layout.micro_batch * layout.accumulation
    pixels = model.latent_channels * model.latent_size**2
    sample = 2 * (pixels + model.caption_length * model.caption_channels)
    return share * (BATCHES_HELD * sample + 4 * pixels)


@dataclass(frozen=True)
class Traffic:
    """What one GPU sends in a step for one purpose: bytes, in `count` collectives over `ranks` ranks `stride` apart."""

    purpose: str
    bytes: float
    ranks: int
    stride: int = 1
    count: float = 1.0

    def split(self, machine: Machine) -> tuple[float, float]:
        """(over NVLink, over the network)."""
        outside = self.bytes * machine.share_on_network(self.ranks, self.stride)
        return self.bytes - outside, outside


def predict_traffic(config: TrainConfig, layout: Layout) -> list[Traffic]:
    """Ring algorithms over n ranks send (n - 1) / n of the bytes in an all-gather, a reduce-scatter and an all-to-all,
    twice that in an all-reduce."""
    found = [*_weight_traffic(config, layout), *_expert_traffic(config, layout), *_tensor_traffic(config, layout)]
    return [one for one in found if one.ranks > 1]


def _weight_traffic(config: TrainConfig, layout: Layout) -> Iterator[Traffic]:
    b, often, options = layout.itemsize, layout.accumulation, layout.options
    for numbers, n, stride in count_weights(config.model).groups(layout):
        once = b * numbers * (n - 1) / n
        buckets = max(1.0, numbers / options.reduce_bucket_size)
        if layout.stage == 1:
            yield Traffic("gradients", 2 * once, n, stride)
        elif layout.stage == 2:
            factor = 2 if options.use_multi_rank_bucket_allreduce else 1
            yield Traffic("gradients", factor * often * once, n, stride, often * buckets)
        else:
            yield Traffic("gradients", often * once, n, stride, often * buckets)
        if layout.stage < 3:
            yield Traffic("weights", once, n, stride)
            continue
        always, while_turning = gathered_numbers(config, layout)
        moved = often * (2 * numbers - always - while_turning) + always
        fetches = 2 * sum(1 for p in meta_model(config.model).parameters() if p.ndim > 1)
        yield Traffic("weights", b * moved * (n - 1) / n, n, stride, often * fetches)


def _expert_traffic(config: TrainConfig, layout: Layout) -> Iterator[Traffic]:
    """Tokens there and back and weights there (float32), forward and backward; forward twice where blocks run again."""
    n, passes = layout.ep, 3 if layout.checkpointing == "block" else 2
    for block, tokens in blocks_with_tokens(config):
        if isinstance(block.mlp, ExpertChoice):
            dim = block.mlp.w1.shape[1]
            chosen = layout.micro_batch * block.mlp.num_experts * block.mlp.tokens_per_expert(tokens)
            moved = passes * chosen * (2 * layout.itemsize * dim + 4) * layout.accumulation
            yield Traffic("experts", moved * (n - 1) / n, n, 1, 3 * passes * layout.accumulation)


def _tensor_traffic(config: TrainConfig, layout: Layout) -> Iterator[Traffic]:
    """A sum over ranks behind every row-parallel matrix and, backward, before every column-parallel one; for the norms
    of q and k two float32 each, gathered forward and summed backward. The caption's own block comes first."""
    n, again = layout.tp, 2 if layout.checkpointing == "block" else 1
    length = config.model.caption_length
    numbers, rows, count = (2 * again + 2) * length * config.model.dim, 2 * length, 6
    for block, tokens in blocks_with_tokens(config):
        sums = 2 if isinstance(block.mlp, ExpertChoice) else 3
        numbers += (again + 1) * sums * tokens * block.norm1.weight.numel()
        numbers += length * block.cross_attn.kv_linear.in_features
        rows += 3 * tokens + length
        count += (again + 1) * (sums + 3) + 1
    summed = 2 * (n - 1) / n
    each = layout.itemsize * numbers * summed + 8 * rows * (again * (n - 1) + summed)
    images = layout.micro_batch * layout.accumulation
    yield Traffic("activations", images * each, n, 1, layout.accumulation * count)


def blocks_with_tokens(config: TrainConfig) -> Iterator[tuple[Block, int]]:
    """Every block and how many tokens of an image it sees."""
    model, all_tokens = meta_model(config.model), config.model.num_patches
    yield from ((block, all_tokens) for block in model.patch_mixer)
    yield from ((block, kept_tokens(all_tokens, config.training.mask_ratio)) for block in model.blocks)


@dataclass(frozen=True)
class Prediction:
    """Of one optimizer step on one machine. Bytes and seconds a GPU; everything predicted, nothing measured."""

    layout: Layout
    memory: Memory
    fits: bool
    link_bytes: float
    network_bytes: float
    parts: dict[str, float]  # seconds of a step without communication (mdit.costs.time.PARTS)
    exposed_seconds: float
    images: int
    host_bytes: int = 0  # a GPU, of an offloaded optimizer

    @property
    def compute_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def host_bound(self) -> bool:
        """Does the GPU wait for the host to launch its kernels?"""
        return self.parts["host"] > 0

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds

    @property
    def efficiency(self) -> float:
        """The step without communication, as a share of the step."""
        return self.compute_seconds / self.step_seconds

    def dollars_per_million_images(self, dollars_per_gpu_hour: float) -> float:
        return 1e6 / self.images_per_second / 3600 * self.layout.gpus * dollars_per_gpu_hour


def fitted(config: TrainConfig, layout: Layout, machine: Machine) -> Layout:
    """With the largest micro-batch that fits, not above the layout's own; with its own when none does."""
    share = layout.micro_batch * layout.accumulation
    for size in range(layout.micro_batch, 0, -1):
        smaller = replace(layout, micro_batch=size, accumulation=share // size, reduced=size < layout.micro_batch)
        if share % size == 0 and predict_memory(config, smaller).fits(machine):
            return smaller
    return layout


def predict(config: TrainConfig, layout: Layout, machine: Machine) -> Prediction:
    """ZeRO's own traffic hides behind the computation where DeepSpeed overlaps it; all other is waited for."""
    memory, traffic = predict_memory(config, layout), predict_traffic(config, layout)
    parts = step_parts(config, layout, machine)
    hidden = waited = link = network = 0.0
    for one in traffic:
        inside, outside = one.split(machine)
        link, network = link + inside, network + outside
        seconds = machine.seconds(inside, outside, one.ranks, one.count)
        if layout.overlapped and one.purpose in ("gradients", "weights"):
            hidden += seconds
        else:
            waited += seconds
    exposed = waited + max(0.0, hidden - OVERLAP_SHARE * sum(parts.values()))
    images, host = config.training.global_batch_size, host_bytes(config, layout)
    return Prediction(layout, memory, memory.fits(machine), link, network, parts, exposed, images, host)
