"""What a step's categories (mdit.bench.profile) have to do, by formula: FLOPs and bytes, for the roofline.

Bytes are the least that an operation must move: each tensor read or written once, matmuls their two operands and their
result, forward and twice backward. FLOPs are those of the MFU (mdit.costs.flops), and of work that waits for memory
one for each number moved. Blocks that run again count as often as they run.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from mdit.config import ModelConfig, TrainConfig, kept_tokens
from mdit.costs.kernel_calls import kernel_calls
from mdit.costs.layouts import count_weights
from mdit.costs.time import forward_parts
from mdit.models import meta_model
from mdit.models.moe import ExpertChoice

CATEGORY_OF_OP = {
    "masked_attention": "attention",
    "patch_mixing": "norm and modulation",
    "swiglu": "SwiGLU",
    "expert_choice": "experts",
}
ADAM_NUMBERS = 7  # of a weight: itself, its gradient and two moments read, all but the gradient written
MASTER_BYTES = 4


class Product(NamedTuple):
    """(rows, inputs) times `matrices` of (inputs, outputs), each for its share of the rows."""

    rows: int
    inputs: int
    outputs: int
    matrices: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    def numbers(self, images: float, batches: float) -> float:
        """Read and written, where `images` come in so many micro-batches."""
        weights = self.matrices * self.inputs * self.outputs
        return images * self.rows * (self.inputs + self.outputs) + batches * weights


# Parts of the model by how many rows of an image they see; whatever is not here sees the kept tokens.
ONCE = ("t_embedder.", "pooled_y_emb_process.")
CAPTION = ("y_embedder.", "y_emb_preprocess.", "patch_mixer_map_y.")
ALL_TOKENS = ("x_embedder.", "patch_mixer.", "patch_mixer_map_xin.")


def category_work(config: TrainConfig, setting: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{category: {"flops", "bytes"}} of a step on one GPU, for a row's `setting`.

    Only of categories that hold a known set of operations: without its kernel an operation's work falls among
    "compiled elementwise", or with torch.compile off, among many.
    """
    model, ratio = config.model, config.training.mask_ratio
    itemsize = 2 if setting["precision"] == "bf16" else 4
    images = setting["global_batch"] / setting["gpus"]
    batches = images / setting["micro_batch"]
    runs = 4 if setting["activation_checkpointing"] == "block" else 3
    flops = forward_parts(model, ratio)
    moved = sum(product.numbers(images, batches) for product in products(model, ratio))
    work = {"matmuls": {"flops": runs * images * (flops.whole + flops.cut), "bytes": runs * itemsize * moved}}
    for category, moved in _bytes_of_ops(config, setting, itemsize, again=runs - 3).items():
        found = work.setdefault(category, {"flops": 0.0, "bytes": 0.0})
        found["bytes"] += batches * moved
        found["flops"] += 0 if category == "attention" else batches * moved / itemsize
    work["attention"]["flops"] = runs * images * flops.attention
    weights = count_weights(model)
    stepped = (weights.experts + weights.matrices + weights.others) / setting["gpus"]
    numbers = ADAM_NUMBERS * stepped
    return work | {"optimizer": {"flops": numbers, "bytes": MASTER_BYTES * numbers}}


def _bytes_of_ops(config: TrainConfig, setting: dict[str, Any], itemsize: int, again: int) -> dict[str, float]:
    """{category: bytes of a micro-batch}, forward and backward, and forward `again`."""
    sums: dict[str, float] = {}
    for call in kernel_calls(config.model, setting["micro_batch"], config.training.mask_ratio):
        op = call.op.split(".")[0]
        if op == "masked_attention" or op in setting["kernels"]:
            category = CATEGORY_OF_OP[op]
        elif setting["compile"]:
            category = "compiled elementwise"
        else:
            continue
        bytes_moved = (1 + again) * call.forward_bytes(itemsize) + call.backward_bytes(itemsize)
        sums[category] = sums.get(category, 0.0) + call.count * bytes_moved
    return sums


def products(config: ModelConfig, mask_ratio: float) -> Iterator[Product]:
    """Every matmul of an image's forward pass."""
    model, all_tokens = meta_model(config), config.num_patches
    kept = kept_tokens(all_tokens, mask_ratio)
    experts = {name: module for name, module in model.named_modules() if isinstance(module, ExpertChoice)}
    for name, parameter in model.named_parameters():
        rows = _rows(name, all_tokens, kept, config.caption_length)
        if parameter.ndim == 3:  # an expert's rows are the tokens that it takes
            count, inputs, outputs = parameter.shape
            yield Product(count * experts[name.rpartition(".")[0]].tokens_per_expert(rows), inputs, outputs, count)
        elif parameter.ndim > 1:
            yield Product(rows, parameter[0].numel(), len(parameter))


def _rows(name: str, all_tokens: int, kept: int, caption: int) -> int:
    if ".adaLN_modulation." in name or name.startswith(ONCE):
        return 1
    if ".kv_linear." in name or name.startswith(CAPTION):
        return caption
    return all_tokens if name.startswith(ALL_TOKENS) else kept
