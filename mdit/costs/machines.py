"""Machines for the paper plan: what vendors promise of a GPU, and what share of it a step is assumed to reach.

Peaks are those of the data sheets: "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" (SXM), "NVIDIA A100
Tensor Core GPU" (80GB SXM), "NVIDIA Ada GPU Architecture" (appendix A, GeForce RTX 4090); dense bfloat16 with float32
sums, NVLink and PCIe in one direction (half of what the sheets add up). The network is that of DGX H100, DGX H200 and
DGX A100: one ConnectX port of 400 or 200 Gb/s for each GPU.
"""

import math
from dataclasses import dataclass

# Shares of the peaks, assumed, not measured: what NCCL commonly reaches of its links; of an H100 2.5 TB/s, 350 TFLOP/s
# of attention, and inside a matmul's tile, where nothing but products is waited for, 738. Products in float8 are as
# much faster as 1,100 TFLOP/s are than 650 (docs/kernels.md).
TILE_SHARE = 0.746
ATTENTION_SHARE = 0.35
MEMORY_SHARE = 0.75
LINK_SHARE = 0.75
L2_SHARE = 1.65  # of the memory's bandwidth, what passes between the multiprocessors and the L2 cache
FP8_RATE = 1100 / 650
MATMUL_CHOICE = 1.07  # cuBLAS does not always take the best tile
OVERLAP_SHARE = 0.5  # of the computation, behind which communication can hide where DeepSpeed overlaps it

# Seconds, assumed, not measured.
KERNEL_START = 2e-6  # from the end of a kernel until the next one has filled the GPU
COLLECTIVE_START = 15e-6  # until a collective moves bytes,
COLLECTIVE_HOP = 5e-6  # and for each doubling of its ranks

# Seconds of the host, measured on 28 November 2026 on a core of an AMD EPYC, the least of many micro-batches of 34
# blocks of tiny width, with a libcuda that does nothing; the host of a GPU machine is taken to be as fast. Without
# DeepSpeed: in PyTorch 91 ms for 8,900 operations, with kernels 115 ms for 6,300 and 760 launches. Under it, with 470
# parameters: ZeRO-1 122, ZeRO-2 156, ZeRO-3 450 ms.
LAUNCH, ARGUMENT = 57e-6, 0.45e-6  # a launch of Triton with the Python of its op and autograd, and each argument
TORCH_OP = 10.3e-6  # an operation of PyTorch, views and allocations included, with the Python of model and autograd
HOOK_OF_A_PARAMETER = {1: 15e-6, 2: 88e-6, 3: 710e-6}  # by stage, forward and backward

# GiB beside what torch reports: CUDA's context, NCCL's buffers, and what the allocator cannot hand out. Assumed.
RESERVED_GIB = 5.0


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs. `peak` in FLOP/s (bfloat16), `memory_gib` in GiB, all others in bytes per second and GPU.

    `link` joins the GPUs of a node, in one direction; `network` is a GPU's share of its node's way out; `device` is its
    name as torch gives it.
    """

    name: str
    device: str
    peak: float
    memory_gib: float
    memory: float
    link: float
    network: float
    multiprocessors: int
    gpus_per_node: int = 8
    triton: bool = True  # does `"kernels": "auto"` take the kernels on it?
    fp8: bool = True  # do its tensor cores know float8?

    def seconds(self, link_bytes: float, network_bytes: float, ranks: int, count: float = 1) -> float:
        """Seconds of `count` collectives over `ranks` ranks, which move so many bytes in all: NCCL's rings run through
        both kinds of link at once, so that the slower one decides, and every collective has a start."""
        start = COLLECTIVE_START + COLLECTIVE_HOP * math.log2(max(ranks, 1))
        moving = max(link_bytes / self.link, network_bytes / self.network) / LINK_SHARE
        return moving + count * start if ranks > 1 else 0.0

    def share_on_network(self, ranks: int, stride: int = 1) -> float:
        """Share that leaves the node of the bytes a GPU sends in a ring over ranks `stride` apart. With g ranks in each
        node one of g steps does; as many rings as GPUs share the ways out evenly."""
        in_node = max(1, self.gpus_per_node // stride)
        return 0.0 if ranks <= in_node else 1 / in_node


MACHINES = {
    machine.name: machine
    for machine in (
        Machine("h100", "NVIDIA H100 80GB HBM3", 989e12, 80, 3.35e12, link=450e9, network=50e9, multiprocessors=132),
        Machine("h200", "NVIDIA H200", 989e12, 141e9 / 2**30, 4.8e12, link=450e9, network=50e9, multiprocessors=132),
        Machine(
            "a100",
            "NVIDIA A100-SXM4-80GB",
            312e12,
            80,
            2.039e12,
            link=300e9,
            network=25e9,
            multiprocessors=108,
            triton=False,
            fp8=False,
        ),
        # No NVLink: PCIe 4.0 x16. The network is assumed: one port of 100 Gb/s for the 8 GPUs of a node.
        Machine(
            "rtx4090",
            "NVIDIA GeForce RTX 4090",
            165e12,
            24,
            1.008e12,
            link=32e9,
            network=12.5e9 / 8,
            multiprocessors=128,
            triton=False,
        ),
    )
}


def machine_named(device: str) -> Machine | None:
    """The data sheet of a GPU by the name that torch gives it; None where there is none."""
    return next((machine for machine in MACHINES.values() if machine.device == device), None)
