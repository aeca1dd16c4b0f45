"""The DeepSpeed JSON: how a run is laid out. It never changes what is learned.

Its "mdit" section (`RunSettings`) is ours; the rest goes to DeepSpeed after every key has been checked here, since
DeepSpeed accepts unknown top-level keys without a word. Facts that the recipe owns are "auto" in the JSON.
"""

import difflib
import json
from pathlib import Path
from typing import Any, Literal

from mdit.config import Section, TrainConfig, UserError, kept_tokens, parse_section
from mdit.parallel.activations import meta_model

# What DeepSpeed may be told here. Its other sections either belong to the recipe or would change what is learned.
KNOWN_KEYS = {
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
    "mdit",
}
REFUSED_KEYS = {
    "optimizer": "the recipe's [optim] decides",
    "scheduler": "the recipe's [optim] decides",
    "fp16": 'not supported, use "bf16"',
    "data_types": "gradients are always accumulated in float32",
}

# zero_optimization.KEY: (its only value here, why).
FIXED_ZERO_KEYS = {
    "round_robin_gradients": (False, "DeepSpeed would mix up which weights are whose in validation and snapshots"),
    "mics_shard_size": (-1, "partitions are cut over all processes"),
    "zero_hpz_partition_size": (1, "a resumed run's second copies of the weights would be those of its start"),
    "compute_grad_norm": (True, "the recipe clips gradients"),
    "zero_quantized_weights": (False, "it changes what is learned"),
    "zero_quantized_nontrainable_weights": (False, "it changes what is learned"),
    "zero_quantized_gradients": (False, "it changes what is learned"),
    "zenflow": (None, "it changes what is learned"),
}

# The paper's micro-batches of xl_2 on one H100 (256, 64, 64 and 16 images) are all 16,384 kept tokens.
AUTO_TOKENS = 16_384

DEEPSPEED_BUCKET = 500_000_000  # numbers; its default of zero_optimization.reduce_bucket_size


class RunSettings(Section):
    """The "mdit" section of the JSON.

    `expert_parallel`, `tensor_parallel`: over how many processes the experts, or the matrices, are spread
    (mdit.parallel.plan). `compile`: torch.compile each block. `activation_checkpointing`: what of a block's forward is
    run again in the backward pass: nothing, all ("block"), or all but matmuls and attention ("selective").
    `fp8`: the blocks' matmuls and their inputs' gradients in float8 (mdit.parallel.fp8).
    `kernels`: what the fused operations run in (mdit.kernels.choice). `data_engine`: what moves latents to the device;
    "auto" takes DALI where it is installed and a GPU is there.
    """

    expert_parallel: int = 1
    tensor_parallel: int = 1
    compile: bool = False
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    fp8: bool = False
    kernels: Literal["auto", "reference", "triton"] = "auto"
    data_engine: Literal["auto", "native", "dali"] = "auto"


def load_ds_json(path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the DeepSpeed JSON: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def load_run_settings(ds_json: dict, path: str | Path) -> RunSettings:
    return parse_section(RunSettings, ds_json.get("mdit", {}), f'{path}: "mdit"')


def resolve_ds_config(
    ds_json: dict, config: TrainConfig, *, data_size: int, bf16_works: bool, path: str | Path
) -> dict:
    """What DeepSpeed is given: the JSON with every "auto" filled from the recipe. Pure.

    `data_size` processes share a global batch: all of them, but for tensor parallelism. `bf16_works` says whether this
    machine computes in bfloat16 ("auto" takes it where it does). Raises UserError for an unknown key, a value that
    contradicts the recipe, and a global batch that the processes cannot share evenly.
    """
    for key in ds_json:
        if key in REFUSED_KEYS:
            raise UserError(f"{path}: key {key} does not belong in the JSON: {REFUSED_KEYS[key]}")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            raise UserError(f"{path}: unknown key {key}" + (f" (did you mean {near[0]}?)" if near else ""))
    resolved = {key: value for key, value in ds_json.items() if key != "mdit"}
    resolved["zero_optimization"] = {"reduce_bucket_size": bucket_size(config)} | _zero_section(ds_json, path)
    resolved["bf16"] = _bf16_section(ds_json, bf16_works, path)
    resolved.update(_batch_sizes(ds_json, config, data_size, path))
    clip = config.optim.max_grad_norm
    _agree(ds_json, "gradient_clipping", clip, "optim.max_grad_norm", path)
    resolved["gradient_clipping"] = clip
    resolved["data_types"] = {"grad_accum_dtype": "fp32"}
    resolved.setdefault("steps_per_print", 10**9)  # the loop reports
    # The optimizer is torch's AdamW, made from the recipe; DeepSpeed shards whatever it is handed.
    resolved.setdefault("zero_allow_untested_optimizer", True)
    resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    return resolved


def bucket_size(config: TrainConfig) -> int:
    """Numbers of DeepSpeed's bucket for gradients where the JSON says nothing. It allocates all of it: 1 or 2 GB by
    default, whatever the model."""
    return min(DEEPSPEED_BUCKET, sum(p.numel() for p in meta_model(config.model).parameters()))


def _zero_section(ds_json: dict, path) -> dict:
    zero = ds_json.get("zero_optimization", {})
    stage = zero.get("stage") if isinstance(zero, dict) else zero
    if stage not in (1, 2, 3):
        # Stage 0 accumulates bf16 gradients in bf16; stage 1 on one process costs the same and does not.
        raise UserError(f"{path}: zero_optimization.stage = {stage!r}: expected 1, 2 or 3")
    for key, (value, reason) in FIXED_ZERO_KEYS.items():
        if zero.get(key, value) != value:
            raise UserError(f"{path}: zero_optimization.{key} = {zero[key]!r}: expected {value!r}, since {reason}")
    for key in ("offload_optimizer", "offload_param"):
        if (section := zero.get(key)) and section.get("device") == "nvme":
            raise UserError(f'{path}: zero_optimization.{key}.device = \'nvme\': expected "cpu" or "none"')
    return dict(zero)


def _bf16_section(ds_json: dict, bf16_works: bool, path) -> dict:
    section = dict(ds_json.get("bf16", {"enabled": "auto"}))
    enabled = section.get("enabled", "auto")
    if enabled == "auto":
        enabled = bf16_works
    if not isinstance(enabled, bool):
        raise UserError(f'{path}: bf16.enabled = {enabled!r}: expected true, false or "auto"')
    if section.get("check_grad_overflow", True) is not True:
        value = section["check_grad_overflow"]
        raise UserError(f"{path}: bf16.check_grad_overflow = {value!r}: expected true, else NaN reaches the weights")
    return section | {"enabled": enabled}


def _batch_sizes(ds_json: dict, config: TrainConfig, data_size: int, path) -> dict:
    batch = config.training.global_batch_size
    _agree(ds_json, "train_batch_size", batch, "training.global_batch_size", path)
    share, rest = divmod(batch, data_size)
    if rest:
        raise UserError(
            f"{path}: training.global_batch_size {batch} of recipe {config.name} cannot be shared evenly by "
            f"{data_size} processes"
        )
    micro, steps = (
        ds_json.get(key, "auto") for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    for key, value in (("train_micro_batch_size_per_gpu", micro), ("gradient_accumulation_steps", steps)):
        if value != "auto" and (type(value) is not int or value < 1 or share % value):
            raise UserError(
                f"{path}: {key} = {value!r} does not divide the {share} samples of each process "
                f"(training.global_batch_size {batch} over {data_size} processes)"
            )
    if micro == "auto":
        micro = share // steps if steps != "auto" else _auto_micro_batch(config, share)
    if steps not in ("auto", share // micro):
        raise UserError(
            f"{path}: train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {steps} x {data_size} "
            f"processes is not training.global_batch_size {batch}"
        )
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
    }


def _auto_micro_batch(config: TrainConfig, share: int) -> int:
    """The largest divisor of a process's share that keeps to AUTO_TOKENS."""
    kept = kept_tokens(config.model.num_patches, config.training.mask_ratio)
    return max(size for size in range(1, share + 1) if share % size == 0 and (size == 1 or size * kept <= AUTO_TOKENS))


def _agree(ds_json: dict, key: str, expected, recipe_key: str, path) -> None:
    value = ds_json.get(key, "auto")
    if value not in ("auto", expected):
        raise UserError(f"{path}: {key} = {value!r} contradicts the recipe's {recipe_key} = {expected!r}")
