"""Memory of one GPU in an optimizer step, from the second one on. docs/planning.md has the formulas with their sources.

Numbers are counted in parameters, `b` is the bytes of one in the computing dtype.
"""

from dataclasses import dataclass
from typing import NamedTuple

from mdit.config import TrainConfig
from mdit.costs.layouts import Layout, count_weights, gathered_numbers, persistent_numbers
from mdit.costs.machines import RESERVED_GIB, Machine
from mdit.costs.trace import trace
from mdit.costs.traffic import exchanged_bytes
from mdit.models import meta_model

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
    peak, inputs = activation_bytes(config, layout), input_bytes(config, layout)
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


def activation_bytes(config: TrainConfig, layout: Layout) -> int:
    """The most that activations and their gradients take; with what is kept of an exchange among experts."""
    received = exchanged_bytes(config, layout)[0] if layout.ep > 1 and layout.checkpointing == "selective" else 0
    return trace(config.model, config.training.mask_ratio, layout.form).peak.of(layout.micro_batch) + received


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
