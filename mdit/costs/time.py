"""Seconds that one GPU computes for an optimizer step, by part: matmuls, each op of mdit.kernels, what PyTorch adds,
gradients, optimizer, and what the GPU waits for the host.

    micro-batch = max(its kernels + handling of its gradients, host)
    step        = accumulation * micro-batch + what gradients cost once a step + optimizer

Kernels are those of a trace of the model (mdit.costs.trace). Rates are shares of a machine's peaks that are assumed,
host times are measured (mdit.costs.machines). Small micro-batches lose twice: a matmul takes at least the time to read
its weights, and a kernel at least the time to launch it.
"""

import math
from functools import cache

from mdit.config import AlignConfig, ModelConfig, TrainConfig
from mdit.costs.layouts import ITEMSIZE, Layout, count_weights
from mdit.costs.machines import (
    ARGUMENT,
    ATTENTION_SHARE,
    FP8_RATE,
    HOOK_OF_A_PARAMETER,
    KERNEL_START,
    L2_SHARE,
    LAUNCH,
    MATMUL_CHOICE,
    MEMORY_SHARE,
    TILE_SHARE,
    TORCH_OP,
    Machine,
)
from mdit.costs.muon import orthogonalisations
from mdit.costs.trace import PYTORCH, Form, Kernel, Product, trace

PARTS = {  # of a step, in the order of the table
    "matmuls": "matmuls",
    "patch_mixing": "patch_mixing (norms, modulation, residual adds)",
    "masked_attention": "attention",
    "expert_choice": "experts, without their matmuls",
    "swiglu": "SwiGLU, without its matmuls",
    "fp8_linear": "quantising to float8",
    PYTORCH: "PyTorch: adds, casts, embeddings, loss, all else",
    "gradients": "gradients to float32 sums",
    "optimizer": "clipping, AdamW, EMA, weights to bfloat16",
    "muon": "Newton-Schulz",
    "host": "the GPU waits for the host",
}
# Bytes a parameter and micro-batch in bfloat16, by stage. 1: added to float32 sums as they are (zero_step.py in
# mdit/train). 2 and 3: copied to a bucket, averaged, flattened. One kernel a parameter.
GRADIENT_TRAFFIC = {1: 10, 2: 12, 3: 12}
# Bytes a parameter and step under ZeRO-1, by every GPU: sums cleared; of several ranks cast, scaled, cast back, copied.
CLEARED, SENT = 4, 24
# Bytes of each number of a partition: norm and clipping 12, AdamW 28 (four tensors read, three written), cast 6.
OPTIMIZER_TRAFFIC, EMA_TRAFFIC = 46, 12
MUON_TRAFFIC = 44 - 28  # more than AdamW's: momentum and Nesterov's 12 each, decay 8, the update 12
# Of Newton-Schulz, bytes of each number of a GPU's matrices beside those of its products: from the float32 partition
# and back 12, the norm 2, normalised 4, scaled 8; and operations of PyTorch for a matrix, of which half are copies.
NEWTON_SCHULZ_TRAFFIC, NEWTON_SCHULZ_OPERATIONS = 26, 4
# Of an optimizer in host memory, bytes of each number. On the GPU: the norm in float64. Between both: the gradient in
# float32 and the new weight. In host memory: both again, clipping 8, AdamW 28, cast 4 + the weight.
NORM_TRAFFIC, GRADIENT_BYTES, HOST_TRAFFIC = 20, 4, 8 + 28 + 4
# Bytes per second and GPU, assumed, not measured: PCIe to memory that is not pinned, two channels of DDR5 from the CPU.
HOST_LINK, HOST_MEMORY = 12e9, 40e9
# Of matmuls. Tiles (rows, columns) and the share of the largest one's rate that each reaches; parts that a sum is split
# into, of how many products at least; bytes of a result and of a partial sum.
TILES = (
    *((128, 256, 1.0), (256, 128, 1.0), (128, 192, 0.97), (192, 128, 0.97), (128, 128, 0.88)),
    *((64, 256, 0.85), (64, 128, 0.72), (64, 64, 0.55)),
)
SPLITS, SHORTEST_SUM = (1, 2, 3, 4, 6, 8, 12, 16), 256
RESULT_BYTES, SUM_BYTES = 2, 4
HIDDEN_WRITING = 0.35  # of a tile's result, what the next tile's main loop does not hide


def step_parts(config: TrainConfig, layout: Layout, machine: Machine) -> dict[str, float]:
    """Seconds of one optimizer step without communication, by part: the keys of PARTS."""
    bytes_per_second, m = machine.memory * MEMORY_SHARE, layout.accumulation
    weights = count_weights(config)
    numbers, part = weights.on_a_rank(layout)
    gradients = m * (GRADIENT_TRAFFIC[layout.stage] * numbers / bytes_per_second + len(weights.tensors) * KERNEL_START)
    optimizer = (CLEARED + (SENT if layout.data_size > 1 else 0)) * numbers if layout.stage == 1 else 0
    optimizer += (NORM_TRAFFIC if layout.offload else OPTIMIZER_TRAFFIC + ema_traffic(config)) * part
    optimizer += MUON_TRAFFIC * weights.muon_on_a_rank(layout)
    after = host_optimizer_seconds(config, part) if layout.offload else 0.0
    options = layout.form, layout.micro_batch, machine, config.align
    kernels = device_parts(config.model, config.training.fixed_mask_ratio, *options)
    parts = {name: m * seconds for name, seconds in kernels.items()}
    parts |= {"gradients": gradients, "optimizer": optimizer / bytes_per_second + after}
    launching = m * host_seconds(config, layout)
    waiting = launching - sum(seconds for name, seconds in parts.items() if name != "optimizer")
    parts["muon"] = orthogonalisation_seconds(config, layout, machine)
    return {name: max(0.0, waiting) if name == "host" else parts.get(name, 0.0) for name in PARTS}


def host_optimizer_seconds(config: TrainConfig, part: int) -> float:
    """Gradients of `part` numbers to the host, its step, and the weights back: one after the other."""
    moved = GRADIENT_BYTES + ITEMSIZE
    return part * (moved / HOST_LINK + (moved + ITEMSIZE + HOST_TRAFFIC + ema_traffic(config)) / HOST_MEMORY)


def orthogonalisation_seconds(config: TrainConfig, layout: Layout, machine: Machine) -> float:
    """Seconds of a step on the GPU with most to do, for which all wait; without what is sent."""
    steps, seconds = config.optim.muon.newton_schulz_steps if config.optim.muon else 0, 0.0
    for found in orthogonalisations(config, layout):
        computing = steps * sum(count * product_seconds(product, machine) for product, count in found.products.items())
        copying = NEWTON_SCHULZ_TRAFFIC * found.numbers / (machine.memory * MEMORY_SHARE)
        launching = NEWTON_SCHULZ_OPERATIONS * found.matrices
        seconds += max(computing + copying + launching / 2 * KERNEL_START, launching * TORCH_OP)
    return seconds


def ema_traffic(config: TrainConfig) -> int:
    return EMA_TRAFFIC * config.num_averages


@cache
def device_parts(
    config: ModelConfig,
    mask_ratio: float,
    form: Form,
    micro_batch: int,
    machine: Machine,
    align: AlignConfig | None = None,
) -> dict[str, float]:
    """Seconds of a micro-batch's kernels, by part."""
    seconds: dict[str, float] = {}
    for kernel, count in trace(config, mask_ratio, form, align).at(micro_batch).items():
        seconds[kernel.part] = seconds.get(kernel.part, 0.0) + count * kernel_seconds(kernel, machine)
    return seconds


def kernel_seconds(kernel: Kernel, machine: Machine) -> float:
    """A kernel whose programs are alone on a multiprocessor computes and moves bytes in turn, any other at once."""
    if kernel.product is not None:
        return product_seconds(kernel.product, machine)
    moving = kernel.bytes / (machine.memory * MEMORY_SHARE)
    computing = kernel.flops / (machine.peak * ATTENTION_SHARE)
    return KERNEL_START + (moving + computing if kernel.alone else max(moving, computing))


@cache
def product_seconds(product: Product, machine: Machine) -> float:
    """With the best of some tiles, and of ways to split the sum into parts that are added up afterwards: waves of tiles
    over the multiprocessors, each as long as a tile's main loop and the writing of its result."""
    matrices, rows, columns, inner, itemsize = product
    bytes_per_second = machine.memory * MEMORY_SHARE
    rate = machine.peak * TILE_SHARE / machine.multiprocessors * (FP8_RATE if itemsize == 1 else 1)
    numbers = itemsize * (rows * inner + inner * columns) + RESULT_BYTES * rows * columns
    best = math.inf
    for high, wide, share in TILES:
        tiles = matrices * math.ceil(rows / high) * math.ceil(columns / wide)
        for split in (split for split in SPLITS if split == 1 or inner / split >= SHORTEST_SUM):
            waves = math.ceil(tiles * split / machine.multiprocessors)
            loop = 2 * high * wide * inner / split / (rate * share)
            writing = RESULT_BYTES * high * wide * machine.multiprocessors / bytes_per_second
            seconds = waves * (loop + writing * (HIDDEN_WRITING if waves > 1 else 1))
            if split > 1:
                adding = SUM_BYTES * matrices * rows * columns * (split + 1)
                seconds += KERNEL_START + adding / (L2_SHARE * machine.memory)
            best = min(best, seconds)
    return KERNEL_START + max(MATMUL_CHOICE * best, matrices * numbers / bytes_per_second)


def host_seconds(config: TrainConfig, layout: Layout) -> float:
    """The least time in which Python can launch a micro-batch."""
    found = trace(config.model, config.training.fixed_mask_ratio, layout.form, config.align)
    arguments = [(seen.kernel.arguments, count) for seen, count in found.kernels.items() if seen.kernel.arguments]
    launching = sum(count * (LAUNCH + ARGUMENT * number) for number, count in arguments)
    hooks = len(count_weights(config).tensors)
    return launching + found.operations * TORCH_OP + hooks * HOOK_OF_A_PARAMETER[layout.stage]
