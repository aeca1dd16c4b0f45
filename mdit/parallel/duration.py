"""How long one GPU computes for an optimizer step, by formula: matmuls, attention, memory traffic, or the host's pace.

    micro-batch = max(matmuls + attention + elementwise, host)
    step        = accumulation * micro-batch + handling of gradients + optimizer, or what the host does in its place

Rates are shares of a machine's peaks that are assumed (mdit.parallel.machines). Small micro-batches lose twice: a
matmul takes at least the time to read its weights, and a kernel at least the time to launch it.
"""

from functools import cache
from typing import NamedTuple

from mdit.config import ModelConfig, TrainConfig, kept_tokens
from mdit.models.flops import attention, caption_block_flops, forward_flops, linear
from mdit.models.kernel_calls import kernel_calls
from mdit.models.moe import ExpertChoice
from mdit.parallel.activations import meta_model
from mdit.parallel.layout import Layout, count_weights
from mdit.parallel.machines import ATTENTION_SHARE, GATHER_HOOK, KERNEL_FLOOR, MATMUL_SHARE, MEMORY_SHARE, Machine

# Bytes that (Triton, PyTorch) moves for each byte that an op must move; counted for xl_2 at 256 px, mask 0.75.
PASSES = {
    "patch_mixing": (46 / 44.3, 145 / 44.3),
    "swiglu": (16 / 12.4, 25 / 12.4),
    "expert_choice": (35 / 26.9, 40 / 26.9),
    "masked_attention": (55 / 34.0, 82 / 34.0),
}
# Kernels of a block, forward and backward: counted for PyTorch, estimated for Triton; of all else; of a gradient.
KERNELS_OF_A_BLOCK = (65, 100)
KERNELS_BESIDE = 200
KERNELS_OF_A_PARAMETER = 2
# What DeepSpeed's Python does for a parameter in backward, by stage, in kernels that the host could launch meanwhile:
# measured on a CPU beside the host's time for the model itself (docs/log.md). The same is taken for stage 3.
HOOK_OF_A_PARAMETER = {1: 1, 2: 8, 3: 8}
# Bytes a parameter and micro-batch in bfloat16, by stage. 1: added to float32 sums; from the second one on cleared
# first and added up by autograd. 2 and 3: copied to a bucket, averaged, flattened.
GRADIENT_TRAFFIC = {1: 10, 2: 12, 3: 12}
LATER_TRAFFIC = {1: 8, 2: 0, 3: 0}
# Bytes a parameter and step. Stage 1: sums cast, scaled, cast back, copied, their norm, clipped, cleared; by every GPU.
WHOLE_STEP_TRAFFIC = {1: 40, 2: 0, 3: 0}
# Bytes of each number of a partition: norm and clipping 12, AdamW 28 (four tensors read, three written), cast 6.
OPTIMIZER_TRAFFIC, EMA_TRAFFIC = 46, 12
# Of an optimizer in host memory, bytes of each number. On the GPU: the norm in float64. Between both: the gradient in
# float32 and the new weight. In host memory: both again, clipping 8, AdamW 28, cast 4 + the weight.
NORM_TRAFFIC, GRADIENT_BYTES, HOST_TRAFFIC = 20, 4, 8 + 28 + 4
# Bytes per second and GPU, assumed, not measured: PCIe to memory that is not pinned, two channels of DDR5 from the CPU.
HOST_LINK, HOST_MEMORY = 12e9, 40e9


class Flops(NamedTuple):
    """Forward FLOPs of an image: matmuls that every rank of a tensor group repeats, those that it shares, attention."""

    whole: int
    cut: int
    attention: int


def compute_seconds(config: TrainConfig, layout: Layout, machine: Machine) -> float:
    """Of one optimizer step, without communication."""
    bytes_per_second = machine.memory * MEMORY_SHARE
    groups = count_weights(config.model).groups(layout)
    numbers, part = sum(count for count, _, _ in groups), sum(count / ranks for count, ranks, _ in groups)
    gradients = GRADIENT_TRAFFIC[layout.stage] * layout.accumulation
    gradients += LATER_TRAFFIC[layout.stage] * (layout.accumulation - 1) + WHOLE_STEP_TRAFFIC[layout.stage]
    optimizer = NORM_TRAFFIC if layout.offload else OPTIMIZER_TRAFFIC + ema_traffic(config)
    after = host_optimizer_seconds(config, layout) if layout.offload else 0.0
    micro_batch = max(sum(device_seconds(config, layout, machine)), host_seconds(config.model, layout))
    return layout.accumulation * micro_batch + (gradients * numbers + optimizer * part) / bytes_per_second + after


def host_optimizer_seconds(config: TrainConfig, layout: Layout) -> float:
    """Gradients to the host, its step, and the weights back: one after the other."""
    part = sum(count / ranks for count, ranks, _ in count_weights(config.model).groups(layout))
    moved = GRADIENT_BYTES + layout.itemsize
    return part * (moved / HOST_LINK + (moved + layout.itemsize + HOST_TRAFFIC + ema_traffic(config)) / HOST_MEMORY)


def ema_traffic(config: TrainConfig) -> int:
    return EMA_TRAFFIC if config.ema else 0


def device_seconds(config: TrainConfig, layout: Layout, machine: Machine) -> tuple[float, float, float]:
    """Of a micro-batch: (matmuls, attention, all that waits for memory). Recomputation adds a forward pass of blocks,
    "selective" one of what is neither matmul nor attention. Backward costs twice the FLOPs of forward."""
    n, tp, ratio = layout.micro_batch, layout.tp, config.training.mask_ratio
    flops, runs = forward_parts(config.model, ratio), 4 if layout.checkpointing == "block" else 3
    numbers = sum(count for count, _, _ in count_weights(config.model).groups(layout))
    reading = runs * layout.itemsize * numbers / (machine.memory * MEMORY_SHARE)
    matmuls = max(runs * n * (flops.whole + flops.cut / tp) / (machine.peak * MATMUL_SHARE), reading)
    seconds = {"masked_attention": 0.0, "others": 0.0}
    for op, (forward, backward) in bytes_of_ops(config.model, n, ratio).items():
        fused = layout.triton and (op != "masked_attention" or tp == 1)
        again = 0 if layout.checkpointing == "none" else forward
        if op == "masked_attention" and layout.checkpointing == "selective":
            again = 0
        moved = (forward + backward + again) * PASSES[op][0 if fused else 1]
        moved /= tp if op in ("masked_attention", "swiglu") else 1
        seconds["masked_attention" if op == "masked_attention" else "others"] += moved / (machine.memory * MEMORY_SHARE)
    products = runs * n * flops.attention / tp / (machine.peak * ATTENTION_SHARE)
    return matmuls, max(seconds["masked_attention"], products), seconds["others"]


def host_seconds(config: ModelConfig, layout: Layout) -> float:
    """The least time in which Python can launch a micro-batch."""
    model = meta_model(config)
    blocks = len(model.patch_mixer) + len(model.blocks)
    weights = sum(1 for p in model.parameters())
    kernels = blocks * KERNELS_OF_A_BLOCK[0 if layout.triton else 1] + KERNELS_BESIDE + KERNELS_OF_A_PARAMETER * weights
    runs = 1 if layout.checkpointing == "none" else 4 / 3
    hooks = HOOK_OF_A_PARAMETER[layout.stage] * KERNEL_FLOOR
    hooks += 4 * GATHER_HOOK if layout.stage == 3 else 0.0  # before and after, forward and backward
    return runs * kernels * KERNEL_FLOOR + hooks * weights


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
