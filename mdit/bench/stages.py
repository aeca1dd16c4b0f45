"""Jobs of a benchmark: recipes and a DeepSpeed JSON, resolved as a run is, at other batch sizes or in tiny shapes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mdit.bench.report import TINY
from mdit.bench.row import MADE_UP, OUT_OF_MEMORY, BenchmarkRow, Kind, Measured, Setting, machine_of, stage_name
from mdit.bench.run import BenchmarkRun, free_memory
from mdit.config import TrainConfig, UserError, load_config
from mdit.costs.trace import training_flops
from mdit.dist import World, logger
from mdit.documents import brief
from mdit.parallel.settings import Execution, count_parameters, load_ds_json
from mdit.train.run import resolve_execution

# Sizes that a CPU trains in milliseconds, with every kind of block.
TINY_MODEL = dict(dim=32, depth=4, head_dim=16, mixer_depth=2, mixer_dim=32, multiple_of=16, num_experts=4)
TINY_MODEL |= dict(caption_length=5, caption_channels=12)
TINY_BATCH = 8
LATENTS_OF_TINY = 4  # times fewer on a side


@dataclass(frozen=True)
class Job:
    """One row to measure. `data`: "made up" or "recipe". `images`: of the whole stage, where the global batch that is
    measured is not the recipe's."""

    config: TrainConfig
    execution: Execution
    data: str = MADE_UP
    images: int | None = None

    @property
    def micro_batch(self) -> int:
        return self.execution.micro_batch

    @property
    def share(self) -> int:
        """Samples of a step for each process."""
        return self.micro_batch * self.execution.accumulation_steps

    def row(self, world: World, kind: Kind = "stage", name: str | None = None) -> BenchmarkRow:
        """Its row, before anything is measured."""
        config, execution, settings = self.config, self.execution, self.execution.settings
        bf16, machine = execution.dtype == torch.bfloat16, machine_of(world.device)
        setting = Setting(
            gpus=world.size,
            micro_batch=execution.micro_batch,
            global_batch=execution.global_batch,
            precision="bf16" if bf16 else "fp32",
            fp8=settings.fp8,
            kernels=tuple(sorted(execution.triton_ops)),
            compile=settings.compile,
            activation_checkpointing=settings.activation_checkpointing,
            zero_stage=execution.deepspeed["zero_optimization"]["stage"],  # 0, no ZeRO, for a baseline
        )
        return BenchmarkRow(
            kind=kind,
            name=name or stage_name(config),
            recipe=config.name,
            images=self.images or config.training.num_steps * config.training.global_batch_size,
            parameters=count_parameters(config.model),
            latent_size=config.model.latent_size,
            mask_ratio=config.training.fixed_mask_ratio,
            setting=setting,
            data=MADE_UP if self.data == MADE_UP else ", ".join(config.data.train),
            flops_per_image=training_flops(config.model, config.training.fixed_mask_ratio, config.align),
            peak_tflops=machine.peak / 1e12 if machine and bf16 and not settings.fp8 else None,
        )

    def run(self, world: World, **options: Any) -> BenchmarkRun:
        return BenchmarkRun(self.config, self.execution, world, data=self.data, **options)

    def sized(self, micro_batch: int, accumulation_steps: int) -> "Job":
        """The same job with another micro-batch, and so many of them a step."""
        batch = self.execution.global_batch // self.share * micro_batch * accumulation_steps
        execution = self.execution.with_batch(batch, micro_batch, accumulation_steps)
        return replace(self, config=with_batch(self.config, batch), execution=execution)

    def shortened(self) -> "Job":
        """With two micro-batches a step, or fewer: for what needs many steps, or few kernels."""
        return self.sized(self.micro_batch, min(2, self.execution.accumulation_steps))

    def halved(self) -> "Job | None":
        """With the next smaller micro-batch that divides the share, at most half; None below one image."""
        sizes = range(self.micro_batch // 2, 0, -1)
        return next((self.sized(size, self.share // size) for size in sizes if self.share % size == 0), None)

    def enlarged(self, times: int) -> "Job":
        """With so many times the micro-batch: in the same global batch where enough micro-batches make it up, else in
        one that is larger by as much."""
        fewer, rest = divmod(self.execution.accumulation_steps, times)
        return self.sized(self.micro_batch * times, self.execution.accumulation_steps if rest else fewer)

    def learning(self, warm_up: int) -> "Job":
        """With a warm-up of the learning rate over so many steps at most: the recipe's thousands leave a loss where it
        is, and losses that stand still agree whatever is wrong."""
        optim = self.config.optim.model_copy(update={"warmup_steps": min(warm_up, self.config.optim.warmup_steps)})
        return replace(self, config=self.config.model_copy(update={"optim": optim}))


def resolve_job(
    recipe: Path,
    ds_path: Path,
    world: World,
    *,
    overrides: Sequence[str] = (),
    global_batch: int | None = None,
    micro_batch: int | None = None,
    mdit: dict[str, Any] | None = None,
    data: str = MADE_UP,
    tiny: bool = False,
) -> Job:
    """Read, check and resolve, as a run does. `mdit` goes over the JSON's own section. Raises UserError."""
    config = load_config(recipe, overrides)
    if tiny:
        config = tiny_form(config)
    images = config.training.num_steps * config.training.global_batch_size
    if global_batch is not None:
        config = with_batch(config, global_batch)
    ds_json = load_ds_json(ds_path, mdit=mdit, micro_batch=micro_batch)
    return Job(config, resolve_execution(ds_json, ds_path, config, recipe, world), data, images)


def tiny_form(config: TrainConfig) -> TrainConfig:
    """The same recipe with a model and a batch for a CPU, and another name, since its figures say nothing of it."""
    latent_size = max(4 * config.model.patch_size, config.model.latent_size // LATENTS_OF_TINY)
    model = config.model.model_copy(update={"latent_size": latent_size, **TINY_MODEL})
    return with_batch(config.model_copy(update={"model": model, "name": config.name + TINY}), TINY_BATCH)


def with_batch(config: TrainConfig, global_batch: int) -> TrainConfig:
    training = config.training.model_copy(update={"global_batch_size": global_batch})
    return config.model_copy(update={"training": training})


def attempt(row: BenchmarkRow, measure: Callable[[], Measured], world: World, *, alone: bool = False) -> BenchmarkRow:
    """The row with what `measure` gives, or with the reason why it gives nothing; UserError passes through.

    Several processes cannot go on when one of them fails: then it raises, unless all fail alike, as `alone` has it.
    """
    alone = alone or world.size == 1
    try:
        return row.with_(measured=measure())
    except UserError:
        raise
    except torch.OutOfMemoryError:
        problem = f"{OUT_OF_MEMORY} at micro-batch {row.setting.micro_batch}"
        if not alone:
            raise UserError(f"{problem}: give a smaller --micro_batch") from None
    except Exception as error:  # whatever a compiler, a driver or a kernel may say: the other rows still count
        if not alone:
            raise
        logger.warning(f"traceback of {row.name}, which failed", exc_info=error)
        problem = brief(error)
    free_memory()  # behind the except clauses, which hold what the failed step held
    return row.with_(problem=problem)
