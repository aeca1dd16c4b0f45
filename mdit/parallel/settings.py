"""The DeepSpeed JSON: how a run is laid out. It never changes what is learned.

`DeepSpeedJson` is all that may be in it, at every depth: its "mdit" section (`RunSettings`) is ours; the rest goes to
DeepSpeed, which by itself takes unknown keys, strings for numbers, and keys that no run here would read. Facts that the
recipe owns are "auto" in the JSON; "auto" is everywhere as if the key were not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from mdit.config import ModelConfig, PositiveInt, Section, TrainConfig, UserError, kept_tokens, parse_section
from mdit.documents import read_json
from mdit.models import meta_model
from mdit.parallel.align import projection_sizes

# The paper's micro-batches of xl_2 on one H100 (256, 64, 64 and 16 images) are all 16,384 kept tokens.
AUTO_TOKENS = 16_384

DEEPSPEED_BUCKET = 500_000_000  # numbers; its default of zero_optimization.reduce_bucket_size

Kernels = Literal["auto", "reference", "triton"]
Checkpointing = Literal["none", "block", "selective"]


def _whole(value: Any) -> Any:
    """5e8, as DeepSpeed's examples have it, is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Numbers = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]


def only(value: Any, why: str) -> AfterValidator:
    """A key that has one value here."""
    return _refused(f"expected {value!r}, since {why}", lambda given: type(given) is type(value) and given == value)


def never(why: str) -> AfterValidator:
    """A key that has no place in the JSON."""
    return _refused(f"does not belong in the JSON: {why}", lambda given: False)


def _refused(reason: str, unless: Callable[[Any], bool]) -> AfterValidator:
    def check(given: Any) -> Any:
        if not unless(given):
            raise PydanticCustomError("refused", "{reason}", {"reason": reason})
        return given

    return AfterValidator(check)


LEARNED = "it changes what is learned"
OWN_FILES = "mdit writes its own checkpoints and snapshots"


class Offload(Section):
    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class ZeroOptions(Section):
    """Keys that memory and traffic depend on, with DeepSpeed's defaults (deepspeed/runtime/zero/config.py). Sizes in
    numbers, not bytes. `overlap_comm` None: at stage 3 only. A run makes the bucket no larger than its model."""

    overlap_comm: bool | None = None
    reduce_bucket_size: Annotated[Numbers, Field(gt=0)] = DEEPSPEED_BUCKET
    use_multi_rank_bucket_allreduce: bool = True
    stage3_prefetch_bucket_size: Numbers = 50_000_000
    stage3_max_reuse_distance: Numbers = 1_000_000_000
    stage3_param_persistence_threshold: Numbers = 100_000


class ZeRO(ZeroOptions):
    """Stage 0 accumulates bf16 gradients in bf16; stage 1 on one process costs the same and does not."""

    stage: Annotated[int, Field(ge=1, le=3)]
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Annotated[Numbers, Field(gt=0, multiple_of=2)] = DEEPSPEED_BUCKET  # of NCCL's alignment
    offload_param: Offload | None = None
    offload_optimizer: Offload | None = None
    sub_group_size: Annotated[Numbers, Field(gt=0)] = 1_000_000_000
    stage3_model_persistence_threshold: Numbers = 2**63 - 1
    stage3_max_live_parameters: Numbers = 1_000_000_000
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    parameter_alignment: bool = False
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    ignore_unused_parameters: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    # With one value each:
    round_robin_gradients: Annotated[Any, only(False, "DeepSpeed would mix up which weights are whose")] = False
    zero_hpz_partition_size: Annotated[Any, only(1, "a resumed run's second copies would be those of its start")] = 1
    compute_grad_norm: Annotated[Any, only(True, "the recipe clips gradients")] = True
    stage3_module_granularity_threshold: Annotated[Any, only(0, "DeepSpeed fails in the backward pass")] = 0
    zero_quantized_weights: Annotated[Any, only(False, LEARNED)] = False
    zero_quantized_nontrainable_weights: Annotated[Any, only(False, LEARNED)] = False
    zero_quantized_gradients: Annotated[Any, only(False, LEARNED)] = False
    zenflow: Annotated[Any, only(None, LEARNED)] = None
    load_from_fp32_weights: Annotated[Any, only(True, OWN_FILES)] = True
    elastic_checkpoint: Annotated[Any, only(False, OWN_FILES)] = False
    stage3_gather_16bit_weights_on_model_save: Annotated[Any, only(False, OWN_FILES)] = False

    @model_validator(mode="after")
    def _parameters_stay_at_stages_1_and_2(self):
        if self.offload_param and self.offload_param.device != "none" and self.stage != 3:
            raise ValueError(f"stage = {self.stage} with offload_param.device = 'cpu': expected stage 3")
        return self


class BF16(Section):
    enabled: bool | None = None
    immediate_grad_update: bool = False
    check_grad_overflow: Annotated[Any, only(True, "NaN would reach the weights")] = True
    bf16_master_weights_and_grads: Annotated[Any, only(False, LEARNED)] = False
    bf16_optimizer_states: Annotated[Any, only(False, LEARNED)] = False


class CommsLogger(Section):
    enabled: bool = False
    prof_all: bool = True
    prof_ops: tuple[str, ...] = ()
    verbose: bool = False
    debug: bool = False


class FlopsProfiler(Section):
    enabled: bool = False
    recompute_fwd_factor: Annotated[float, Field(ge=0)] = 0.0
    profile_step: PositiveInt = 1
    module_depth: Annotated[int, Field(ge=-1, le=4)] = -1  # 4: a layer of a block; it fails at one that is not there
    top_modules: PositiveInt = 1
    detailed: bool = True
    output_file: Annotated[Any, only(None, "the profile is printed, which cannot fail in the middle of a run")] = None


class RunSettings(Section):
    """The "mdit" section of the JSON.

    `expert_parallel`, `tensor_parallel`: over how many processes the experts, or the matrices, are spread
    (mdit.parallel.plan). `compile`: torch.compile each block. `activation_checkpointing`: what of a block's forward is
    run again in the backward pass: nothing, all ("block"), or all but matmuls and attention ("selective").
    `fp8`: the blocks' matmuls and their inputs' gradients in float8 (mdit.parallel.fp8).
    `kernels`: what the fused operations run in (mdit.kernels.selection). `data_engine`: what moves latents to the
    device; "auto" takes DALI where it is installed and a GPU is there. `async_checkpoints`: what is saved is copied
    into host memory and written while training goes on. `watchdog_s`: seconds in which nothing moves on any rank, after
    which the run ends (mdit.train.watchdog); 0 is for ever.
    """

    expert_parallel: PositiveInt = 1
    tensor_parallel: PositiveInt = 1
    compile: bool = False
    activation_checkpointing: Checkpointing = "none"
    fp8: bool = False
    kernels: Kernels = "auto"
    data_engine: Literal["auto", "native", "dali"] = "auto"
    async_checkpoints: bool = True
    watchdog_s: Annotated[int, Field(ge=0, le=10**6)] = 600


class DeepSpeedJson(Section):
    """The whole file."""

    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: float | None = None
    zero_optimization: ZeRO
    bf16: BF16 = BF16()
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    comms_logger: CommsLogger = CommsLogger()
    flops_profiler: FlopsProfiler = FlopsProfiler()
    zero_allow_untested_optimizer: Annotated[Any, only(True, "the recipe's [optim] decides")] = True
    zero_force_ds_cpu_optimizer: Annotated[Any, only(False, "the recipe's [optim] decides")] = False
    mdit: RunSettings = RunSettings()
    optimizer: Annotated[Any, never("the recipe's [optim] decides")] = None
    scheduler: Annotated[Any, never("the recipe's [optim] decides")] = None
    fp16: Annotated[Any, never('not supported, use "bf16"')] = None
    data_types: Annotated[Any, never("gradients are always accumulated in float32")] = None


def load_ds_json(path: str | Path, *, mdit: dict[str, Any] | None = None, micro_batch: int | None = None) -> dict:
    """A DeepSpeed JSON as it is written; `mdit`, for its section of that name, and `micro_batch` go over it."""
    values = read_json(path, "the DeepSpeed JSON")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(values).__name__}")
    own = {} if values.get("mdit", "auto") == "auto" else values["mdit"]
    if mdit and isinstance(own, dict):  # else it is refused where it is resolved
        values |= {"mdit": own | mdit}
    if micro_batch is not None:
        values |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": "auto"}
    return values


@dataclass(frozen=True)
class Execution:
    """Execution of a run, never what it learns: resolved once, from the DeepSpeed JSON and the recipe.

    `settings` is the JSON's "mdit" section, `deepspeed` all that DeepSpeed is given; `triton_ops` are the ops that run
    in Triton, `kernels_reason` says why those.
    """

    settings: RunSettings
    deepspeed: dict[str, Any]
    triton_ops: frozenset[str] = frozenset()
    kernels_reason: str = ""

    @classmethod
    def resolve(
        cls, ds_json: dict[str, Any], config: TrainConfig, *, processes: int, bf16_works: bool, path: object
    ) -> "Execution":
        """The JSON with every "auto" filled from the recipe. Pure.

        `bf16_works` says whether this machine computes in bfloat16 ("auto" takes it where it does). Raises UserError,
        naming the JSON at `path`, for what `DeepSpeedJson` does not have, a value that contradicts the recipe, and a
        global batch that the processes cannot share evenly.
        """
        given = parse_section(DeepSpeedJson, _without_auto(ds_json), path)
        resolved = given.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"mdit"})
        trained = count_parameters(config.model) + sum(projection_sizes(config.model.dim, config.align))
        bucket = min(given.zero_optimization.reduce_bucket_size, trained)  # it is all allocated
        resolved["zero_optimization"]["reduce_bucket_size"] = bucket
        resolved.setdefault("bf16", {}).setdefault("enabled", bf16_works)
        resolved.update(_batch_sizes(given, config, processes, path))
        _agree(given.gradient_clipping, "gradient_clipping", config.optim.max_grad_norm, "optim.max_grad_norm", path)
        resolved["gradient_clipping"] = config.optim.max_grad_norm
        resolved["data_types"] = {"grad_accum_dtype": "fp32"}
        resolved.setdefault("steps_per_print", 10**9)  # the loop reports
        resolved["timers"] = {"throughput": {"enabled": False}}  # it lets the GPU run dry twice a micro-batch
        # The optimizer is made from the recipe; DeepSpeed shards whatever it is handed.
        resolved["zero_allow_untested_optimizer"], resolved["zero_force_ds_cpu_optimizer"] = True, False
        if not given.comms_logger.enabled:  # DeepSpeed takes the section itself for a yes
            resolved.pop("comms_logger", None)
        return cls(given.mdit, resolved)

    @cached_property
    def zero(self) -> ZeRO:
        return parse_section(ZeRO, self.deepspeed["zero_optimization"], "zero_optimization")

    @property
    def dtype(self) -> torch.dtype:
        """The number format that the model computes in, in training and whenever a run looks at it."""
        return torch.bfloat16 if self.deepspeed["bf16"]["enabled"] else torch.float32

    @property
    def global_batch(self) -> int:
        return self.deepspeed["train_batch_size"]

    @property
    def micro_batch(self) -> int:
        """Images of one forward pass of a process."""
        return self.deepspeed["train_micro_batch_size_per_gpu"]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.deepspeed["gradient_accumulation_steps"]

    def with_batch(self, global_batch: int, micro_batch: int, accumulation_steps: int) -> "Execution":
        return replace(self, deepspeed=self.deepspeed | _sizes(global_batch, micro_batch, accumulation_steps))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states and step are on the CPU."""
        return self.zero.offload_optimizer is not None and self.zero.offload_optimizer.device != "none"

    @property
    def offloads_parameters(self) -> bool:
        return self.zero.offload_param is not None and self.zero.offload_param.device != "none"

    def layout(self, world_size: int) -> dict[str, Any]:
        """All that the partitions of a checkpoint depend on."""
        zero = dict(self.deepspeed["zero_optimization"])
        return {
            "world_size": world_size,
            "expert_parallel": self.settings.expert_parallel,
            "tensor_parallel": self.settings.tensor_parallel,
            "zero_stage": zero.pop("stage"),
            "zero_options": zero,  # some of them reorder or cut partitions
            "bf16": self.dtype == torch.bfloat16,
        }


@cache
def count_parameters(config: ModelConfig) -> int:
    return sum(p.numel() for p in meta_model(config).parameters())


def _without_auto(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_auto(value) for key, value in values.items() if value != "auto"}
    return values


def _batch_sizes(given: DeepSpeedJson, config: TrainConfig, processes: int, path: object) -> dict[str, int]:
    """Micro-batches x accumulation x processes, of which tensor-parallel ones work as one, is the global batch."""
    for key in ("expert_parallel", "tensor_parallel"):
        if processes % (value := getattr(given.mdit, key)):
            raise UserError(f'{path}: "mdit": {key} = {value} does not divide the {processes} processes')
    batch, data_size = config.training.global_batch_size, processes // given.mdit.tensor_parallel
    _agree(given.train_batch_size, "train_batch_size", batch, "training.global_batch_size", path)
    share, rest = divmod(batch, data_size)
    if rest:
        raise UserError(
            f"{path}: training.global_batch_size {batch} of recipe {config.name} cannot be shared evenly by "
            f"{data_size} processes"
        )
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if (value := getattr(given, key)) is not None and share % value:
            raise UserError(
                f"{path}: {key} = {value!r} does not divide the {share} samples of each process "
                f"(training.global_batch_size {batch} over {data_size} processes)"
            )
    micro, steps = given.train_micro_batch_size_per_gpu, given.gradient_accumulation_steps
    if micro is None:
        micro = share // steps if steps is not None else _auto_micro_batch(config, share)
    if steps not in (None, share // micro):
        raise UserError(
            f"{path}: train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps {steps} x {data_size} "
            f"processes is not training.global_batch_size {batch}"
        )
    return _sizes(batch, micro, share // micro)


def _sizes(batch: int, micro_batch: int, accumulation_steps: int) -> dict[str, int]:
    return {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation_steps,
    }


def _auto_micro_batch(config: TrainConfig, share: int) -> int:
    """The largest divisor of a process's share that keeps to AUTO_TOKENS, in the steps that keep the most."""
    most = AUTO_TOKENS // kept_tokens(config.model.num_patches, min(config.training.mask_ratios))
    return next((size for size in range(min(most, share), 0, -1) if share % size == 0), 1)


def _agree(value, key: str, expected, recipe_key: str, path) -> None:
    if value not in (None, expected):
        raise UserError(f"{path}: {key} = {value!r} contradicts the recipe's {recipe_key} = {expected!r}")
