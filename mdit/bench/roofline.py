"""Work of a step's categories (mdit.bench.profile), predicted: FLOPs and bytes, for the roofline.

Bytes are the least that an operation must move: each tensor read or written once. FLOPs are those of the MFU
(mdit.costs.trace), and of work that waits for memory one for each number moved. Blocks that run again count as often as
they run.
"""

from typing import Any

import torch

from mdit.config import TrainConfig
from mdit.costs.calls import kernel_calls
from mdit.costs.layouts import count_weights
from mdit.costs.trace import Form, forward_flops, trace

CATEGORY_OF_OP = {
    "masked_attention": "attention",
    "patch_mixing": "norm and modulation",
    "swiglu": "SwiGLU",
    "expert_choice": "experts",
}
ADAM_NUMBERS = 7  # of a weight: itself, its gradient and two moments read, all but the gradient written
MASTER_BYTES = 4


def category_work(config: TrainConfig, setting: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{category: {"flops", "bytes"}} of a step on one GPU, for a row's `setting`.

    Only of categories that hold a known set of operations: without its kernel an operation's work falls among
    "compiled elementwise", or with torch.compile off, among many.
    """
    model, ratio, micro_batch = config.model, config.training.mask_ratio, setting["micro_batch"]
    dtype = torch.bfloat16 if setting["precision"] == "bf16" else torch.float32
    images = setting["global_batch"] / setting["gpus"]
    batches = images / micro_batch
    again = int(setting["activation_checkpointing"] == "block")
    form = Form(triton=False, checkpointing="block" if again else "none", dtype=dtype)
    kernels = trace(model, ratio, form).at(micro_batch)
    moved = sum(count * kernel.bytes for kernel, count in kernels.items() if kernel.product)
    flops = {name: (3 + again) * images * count for name, count in forward_flops(model, ratio).items()}
    work = {"matmuls": {"flops": flops["matmuls"], "bytes": batches * moved}}
    for call, count in kernel_calls(model, micro_batch, ratio).items():
        op, cost = call.op.split(".")[0], call.cost(dtype)
        if op == "masked_attention" or op in setting["kernels"]:
            category = CATEGORY_OF_OP[op]
        elif setting["compile"]:
            category = "compiled elementwise"
        else:
            continue
        moved = batches * count * ((1 + again) * cost.forward_bytes + cost.backward_bytes)
        found = work.setdefault(category, {"flops": 0.0, "bytes": 0.0})
        found["bytes"] += moved
        found["flops"] += moved / dtype.itemsize
    work["attention"]["flops"] = flops["attention"]
    weights = count_weights(model)
    numbers = ADAM_NUMBERS * (weights.experts + weights.matrices + weights.others) / setting["gpus"]
    return work | {"optimizer": {"flops": numbers, "bytes": MASTER_BYTES * numbers}}
