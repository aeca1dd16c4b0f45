"""Memory of one GPU in an optimizer step, from the second one on. docs/planning.md has the formulas with their sources.

Numbers are counted in parameters, `b` is the bytes of one in bfloat16.
"""

from dataclasses import dataclass

from mdit.config import TrainConfig
from mdit.costs.layouts import ITEMSIZE, Layout, count_weights, gathered_numbers
from mdit.costs.machines import RESERVED_GIB, Machine
from mdit.costs.muon import orthogonalisation_buffers
from mdit.costs.trace import trace
from mdit.costs.traffic import exchanged_bytes
from mdit.masking import constant_parts

ADAM_BYTES, EMA_BYTES, MASTER_BYTES, GRADIENT_BYTES = 8, 4, 4, 4  # float32: two moments, and one each
SECOND_MOMENT_BYTES = 4  # of ADAM_BYTES, which Muon does without
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


def predict_memory(config: TrainConfig, layout: Layout) -> Memory:
    parts = [part for _, part in constant_parts(config)]
    moments = [moment for part in parts for moment in memory_moments(part, layout).values()]
    return Memory(*map(max, zip(*moments)), peak=max(map(sum, moments)))


def memory_moments(config: TrainConfig, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Bytes on one GPU by part, in the order of `Memory`, at moments of a step. `held`: after a micro-batch that is not
    the last. `backward`: as the last one's backward pass begins. `reduce`: as gradients are exchanged for the first
    time in it. `step`: in the optimizer."""
    b, weights = ITEMSIZE, count_weights(config)
    numbers, part = weights.on_a_rank(layout)
    always, turning, flying = gathered_numbers(config, layout)
    held = part if layout.stage == 3 else numbers  # of the weights, at least
    optimizer = (MASTER_BYTES + ADAM_BYTES + EMA_BYTES * config.num_averages) * part
    optimizer = 0 if layout.offload else optimizer - SECOND_MOMENT_BYTES * weights.muon_on_a_rank(layout)
    muon = orthogonalisation_buffers(config, layout)
    through = max(weights.tensors) if layout.offload else 0
    peak, inputs = activation_bytes(config, layout), input_bytes(config, layout)
    left = max(0, numbers - layout.options.reduce_bucket_size) / numbers  # of backward, at the first exchange
    activations = {"held": 0, "backward": peak, "reduce": int(left * peak) if layout.stage > 1 else 0, "step": 0}
    largest = max(count for count, _, _ in weights.groups(layout))
    return {
        moment: (
            b * (held + (turning if moment in ("backward", "reduce") else always)),
            gradients,
            optimizer,
            activations[moment],
            buffers
            + (0 if moment == "held" else inputs)
            + (muon if moment == "step" else 0)
            + (b * flying if moment == "backward" else 0)
            + (b + (NORM_BYTES if moment == "reduce" else 0)) * through,
        )
        for moment, (gradients, buffers) in gradient_bytes(layout, numbers, part, largest).items()
    }


def activation_bytes(config: TrainConfig, layout: Layout) -> int:
    """The most that activations and their gradients take; with what is kept of an exchange among experts."""
    received = exchanged_bytes(config, layout)[0] if layout.ep > 1 and layout.checkpointing == "selective" else 0
    found = trace(config.model, config.training.fixed_mask_ratio, layout.form, config.align)
    return found.peak.of(layout.micro_batch) + received


def host_bytes(config: TrainConfig, layout: Layout) -> int:
    """Bytes of host memory for each GPU of an offloaded optimizer (zero/stage_1_and_2.py): masters, moments, EMA and
    gradients in float32, the new weights on their way back, and the buffer that a gradient passes through."""
    if not layout.offload:
        return 0
    weights = count_weights(config)
    each = MASTER_BYTES + ADAM_BYTES + GRADIENT_BYTES + EMA_BYTES * config.num_averages + ITEMSIZE
    return each * weights.on_a_rank(layout)[1] + ITEMSIZE * max(weights.tensors)


def gradient_bytes(layout: Layout, numbers: int, part: int, largest: int) -> dict[str, tuple[int, int]]:
    """(gradients, buffers that they pass through) at each moment, as DeepSpeed 0.19 allocates them."""
    if layout.stage == 1:  # mdit/train/zero_step.py: float32 sums of all; autograd's own come and go
        sums, sent = GRADIENT_BYTES * numbers, ITEMSIZE * largest if layout.data_size > 1 else 0
        every = ITEMSIZE * numbers
        return {"held": (sums, 0), "backward": (sums, 0), "reduce": (sums + every, 0), "step": (sums, sent)}
    size, partition = layout.options.reduce_bucket_size, GRADIENT_BYTES * part
    bucket = ITEMSIZE * size * (2 if layout.stage == 2 and layout.overlapped else 1)
    copy = ITEMSIZE * min(size, numbers)  # a bucket is flattened before it is sent
    stays, flat = (bucket, partition) if layout.stage == 3 else (0, 0)  # flat: the optimizer's own copy
    kept = partition if layout.accumulation > 1 or layout.stage == 3 else 0
    moments = {"held": (partition, stays), "backward": (kept, bucket)}
    return moments | {"reduce": (partition, bucket + copy), "step": (partition, stays + flat)}


def input_bytes(config: TrainConfig, layout: Layout) -> int:
    """Latents, captions and a vision tower's features of a rank's share in 2 bytes, noise in float32."""
    model, share = config.model, layout.micro_batch * layout.accumulation
    pixels = model.latent_channels * model.latent_size**2
    features = model.num_patches * config.align.channels if config.align else 0
    sample = 2 * (pixels + model.caption_length * model.caption_channels + features)
    return share * (BATCHES_HELD * sample + 4 * pixels)
