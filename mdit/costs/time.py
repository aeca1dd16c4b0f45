"""Seconds that one GPU computes for an optimizer step, by part: matmuls, each op of mdit.kernels, what PyTorch adds,
gradients, optimizer, and what the GPU waits for the host.

    micro-batch = max(its kernels + handling of its gradients, host)
    step        = accumulation * micro-batch + what gradients cost once a step + optimizer

Kernels are those of a trace of the model (mdit.costs.trace). Rates are shares of a machine's peaks that are assumed,
host times are measured (mdit.costs.machines). Small micro-batches lose twice: a matmul takes at least the time to
read its weights, and a kernel at least the time to launch it.
"""

import math
from functools import cache
from typing import NamedTuple

from mdit.config import ModelConfig, TrainConfig, kept_tokens
from mdit.costs.flops import attention, caption_block_flops, forward_flops, linear
from mdit.costs.kernel_calls import kernel_calls
from mdit.costs.layouts import Layout, count_weights
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
from mdit.costs.trace import PYTORCH, Kernel, Product, trace
from mdit.models import meta_model
from mdit.models.moe import ExpertChoice

PARTS = {  # of a step, in the order of the table
    "matmuls": "matmuls",
    "patch_mixing": "patch_mixing (norms, modulation, residual adds)",
    "masked_attention": "attention",
    "expert_choice": "experts, without their matmuls",
    "swiglu": "SwiGLU, without its matmuls",
    "fp8_linear": "quantising to float8",
    PYTORCH: "autograd's adds and casts, embeddings, loss",
    "gradients": "gradients to float32 sums",
    "optimizer": "clipping, AdamW, EMA, weights to bfloat16",
    "host": "the GPU waits for the host",
}
# Bytes that PyTorch moves for each byte that an op must move; counted for xl_2 at 256 px, mask 0.75.
PASSES = {
    "patch_mixing": 145 / 44.3,
    "swiglu": 25 / 12.4,
    "expert_choice": 40 / 26.9,
    "masked_attention": 82 / 34.0,
}
# Operations of PyTorch, views and allocations included, in a micro-batch without kernels: counted on a CPU.
OPERATIONS_OF_A_BLOCK, OPERATIONS_BESIDE = 250, 400
# Bytes a parameter and micro-batch in bfloat16, by stage. 1: added to float32 sums as they are (zero_step.py in
# mdit/train). 2 and 3: copied to a bucket, averaged, flattened. One kernel a parameter.
GRADIENT_TRAFFIC = {1: 10, 2: 12, 3: 12}
# Bytes a parameter and step under ZeRO-1, by every GPU: sums cleared; of several ranks cast, scaled, cast back, copied.
CLEARED, SENT = 4, 24
# Bytes of each number of a partition: norm and clipping 12, AdamW 28 (four tensors read, three written), cast 6.
OPTIMIZER_TRAFFIC, EMA_TRAFFIC = 46, 12
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


class Flops(NamedTuple):
    """Forward FLOPs of an image: matmuls that every rank of a tensor group repeats, those that it shares, attention."""

    whole: int
    cut: int
    attention: int


def step_parts(config: TrainConfig, layout: Layout, machine: Machine) -> dict[str, float]:
    """Seconds of one optimizer step without communication, by part: the keys of PARTS."""
    bytes_per_second, m = machine.memory * MEMORY_SHARE, layout.accumulation
    groups = count_weights(config.model).groups(layout)
    numbers, part = sum(count for count, _, _ in groups), sum(count / ranks for count, ranks, _ in groups)
    weights = sum(1 for p in meta_model(config.model).parameters())
    gradients = m * (GRADIENT_TRAFFIC[layout.stage] * numbers / bytes_per_second + weights * KERNEL_START)
    optimizer = (CLEARED + (SENT if layout.data_size > 1 else 0)) * numbers if layout.stage == 1 else 0
    optimizer += (NORM_TRAFFIC if layout.offload else OPTIMIZER_TRAFFIC + ema_traffic(config)) * part
    after = host_optimizer_seconds(config, layout) if layout.offload else 0.0
    parts = {name: m * seconds for name, seconds in device_parts(config, layout, machine).items()}
    parts |= {"gradients": gradients, "optimizer": optimizer / bytes_per_second + after}
    launching = m * host_seconds(config, layout)
    waiting = launching - sum(seconds for name, seconds in parts.items() if name != "optimizer")
    return {name: max(0.0, waiting) if name == "host" else parts.get(name, 0.0) for name in PARTS}


def host_optimizer_seconds(config: TrainConfig, layout: Layout) -> float:
    """Gradients to the host, its step, and the weights back: one after the other."""
    part = sum(count / ranks for count, ranks, _ in count_weights(config.model).groups(layout))
    moved = GRADIENT_BYTES + layout.itemsize
    return part * (moved / HOST_LINK + (moved + layout.itemsize + HOST_TRAFFIC + ema_traffic(config)) / HOST_MEMORY)


def ema_traffic(config: TrainConfig) -> int:
    return EMA_TRAFFIC if config.ema else 0


def device_parts(config: TrainConfig, layout: Layout, machine: Machine) -> dict[str, float]:
    """Seconds of a micro-batch's kernels, by part. Recomputation adds a forward pass, "selective" one of what is
    neither matmul nor attention; tensor parallelism shares some matmuls, attention and SwiGLU out."""
    model, ratio, tp = config.model, config.training.mask_ratio, layout.tp
    seconds = {}
    for part, (forward, backward) in traced_seconds(model, ratio, layout.fp8, layout.micro_batch, machine).items():
        if part not in PASSES or is_fused(part, layout):
            seconds[part] = forward * (1 + runs_again(part, layout)) + backward
    for op, (forward, backward) in bytes_of_ops(model, layout.micro_batch, ratio).items():
        if not is_fused(op, layout):
            moved = (forward * (1 + runs_again(op, layout)) + backward) * PASSES[op]
            seconds[op] = moved / (machine.memory * MEMORY_SHARE)
    flops = forward_parts(model, ratio)
    if not is_fused("masked_attention", layout):
        runs = 3 + runs_again("masked_attention", layout)
        products = runs * layout.micro_batch * flops.attention / (machine.peak * ATTENTION_SHARE)
        seconds["masked_attention"] = max(seconds["masked_attention"], products)
    shares = {"matmuls": (flops.whole + flops.cut / tp) / (flops.whole + flops.cut)}
    shares |= {"masked_attention": 1 / tp, "swiglu": 1 / tp}
    return {part: found * shares.get(part, 1.0) for part, found in seconds.items()}


def is_fused(op: str, layout: Layout) -> bool:
    return layout.triton and (op != "masked_attention" or layout.tp == 1)


def runs_again(part: str, layout: Layout) -> bool:
    """In the backward pass, with activation checkpointing."""
    kept = ("matmuls", "masked_attention", PYTORCH)
    return layout.checkpointing == "block" or (layout.checkpointing == "selective" and part not in kept)


@cache
def traced_seconds(
    config: ModelConfig, mask_ratio: float, fp8: bool, micro_batch: int, machine: Machine
) -> dict[str, tuple[float, float]]:
    """Seconds of a micro-batch's kernels by part, (forward, backward)."""
    sums: dict[str, tuple[float, float]] = {}
    for kernel, count in trace(config, mask_ratio, fp8).at(micro_batch).items():
        forward, backward = sums.get(kernel.part, (0.0, 0.0))
        seconds = count * kernel_seconds(kernel, machine)
        forward, backward = (forward, backward + seconds) if kernel.backward else (forward + seconds, backward)
        sums[kernel.part] = forward, backward
    return sums


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
    found = trace(config.model, config.training.mask_ratio, layout.fp8)
    weights = sum(1 for p in meta_model(config.model).parameters())
    if layout.triton:
        launches = [(seen.kernel.arguments, count) for seen, count in found.kernels.items() if seen.kernel.arguments]
        seconds = sum(count * (LAUNCH + ARGUMENT * arguments) for arguments, count in launches)
        seconds += found.operations * TORCH_OP
    else:
        model = meta_model(config.model)
        blocks = len(model.patch_mixer) + len(model.blocks)
        seconds = (blocks * OPERATIONS_OF_A_BLOCK + OPERATIONS_BESIDE) * TORCH_OP
    seconds *= 1 if layout.checkpointing == "none" else 4 / 3
    return seconds + weights * HOOK_OF_A_PARAMETER[layout.stage]


@cache
def forward_parts(config: ModelConfig, mask_ratio: float) -> Flops:
    model, length, all_tokens = meta_model(config), config.caption_length, config.num_patches
    kept = kept_tokens(all_tokens, mask_ratio)
    caption = model.y_emb_preprocess
    products = attention(length, length, caption.attn.proj.in_features)
    cut = caption_block_flops(caption, length) - products
    for block in (*model.patch_mixer, *model.blocks):
        tokens = all_tokens if block in model.patch_mixer else kept
        cross = block.cross_attn
        cut += tokens * (linear(block.attn) + linear(cross.q_linear) + linear(cross.proj))
        cut += length * linear(cross.kv_linear)
        cut += 0 if isinstance(block.mlp, ExpertChoice) else tokens * linear(block.mlp)
        products += attention(tokens, tokens, block.attn.proj.in_features)
        products += attention(tokens, length, cross.proj.in_features)
    return Flops(forward_flops(config, kept) - cut - products, cut, products)


@cache
def bytes_of_ops(config: ModelConfig, micro_batch: int, mask_ratio: float) -> dict[str, tuple[int, int]]:
    """For each op of mdit.kernels the bytes that its calls must move (forward, backward) in bfloat16."""
    sums = {op: (0, 0) for op in PASSES}
    for call in kernel_calls(config, micro_batch, mask_ratio):
        op, count = call.op.split(".")[0], call.count
        forward, backward = sums[op]
        sums[op] = (forward + count * call.forward_bytes(), backward + count * call.backward_bytes())
    return sums
