"""Work of a step's categories (mdit.bench.profile), predicted: FLOPs and bytes, for the roofline.

Bytes are the least that an operation must move: each tensor read or written once. FLOPs are those of the MFU
(mdit.costs.trace), and of work that waits for memory one for each number moved. Blocks that run again count as often as
they run.
"""

from collections import defaultdict

import torch

from mdit.bench.row import Setting, Work
from mdit.config import TrainConfig
from mdit.costs.calls import kernel_calls
from mdit.costs.trace import Form, forward_flops, trace
from mdit.parallel.settings import count_parameters

CATEGORY_OF_OP = {
    "masked_attention": "attention",
    "patch_mixing": "norm and modulation",
    "swiglu": "SwiGLU",
    "expert_choice": "experts",
}
ADAM_NUMBERS = 7  # of a weight: itself, its gradient and two moments read, all but the gradient written
MASTER_BYTES = 4


def category_work(config: TrainConfig, setting: Setting) -> dict[str, Work]:
    """Work of a step on one GPU by category, for a row's `setting`.

    Only of categories that hold a known set of operations: without its kernel an operation's work falls among
    "compiled elementwise", or with torch.compile off, among many.
    """
    model, ratio, micro_batch = config.model, config.training.fixed_mask_ratio, setting.micro_batch
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    images = setting.global_batch / setting.gpus
    batches = images / micro_batch
    again = int(setting.activation_checkpointing == "block")
    form = Form(triton=False, checkpointing="block" if again else "none", dtype=dtype)
    kernels = trace(model, ratio, form, config.align).at(micro_batch)
    flops = {name: (3 + again) * images * count for name, count in forward_flops(model, ratio, config.align).items()}
    moved: dict[str, float] = defaultdict(float)
    for call, count in kernel_calls(model, micro_batch, ratio).items():
        op, cost = call.op.split(".")[0], call.cost(dtype)
        if op == "masked_attention" or op in setting.kernels:
            category = CATEGORY_OF_OP[op]
        elif setting.compile:
            category = "compiled elementwise"
        else:
            continue
        moved[category] += batches * count * ((1 + again) * cost.forward_bytes + cost.backward_bytes)
    moved["matmuls"] = batches * sum(count * kernel.bytes for kernel, count in kernels.items() if kernel.product)
    numbers = ADAM_NUMBERS * count_parameters(model) / setting.gpus
    work = {name: Work(flops=flops.get(name, size / dtype.itemsize), bytes=size) for name, size in moved.items()}
    return work | {"optimizer": Work(flops=numbers, bytes=MASTER_BYTES * numbers)}
