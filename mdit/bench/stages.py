"""What a benchmark is asked to measure: recipes and a DeepSpeed JSON, settled as a run is, and the row of each."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from mdit.bench.report import TINY
from mdit.bench.row import MADE_UP, OUT_OF_MEMORY, BenchmarkRow, Kind, describe, stage_name
from mdit.bench.trial import Trial, give_back_memory
from mdit.config import TrainConfig, UserError, load_config
from mdit.dist import World, logger
from mdit.parallel.settings import RunSettings, load_ds_json, load_run_settings
from mdit.precompute import is_precomputed, precompute
from mdit.train.run import resolve_execution

STAGES = ("res_256_pretrain", "res_256_finetune", "res_512_pretrain", "res_512_finetune")
# Sizes that a CPU trains in milliseconds, with every kind of block.
TINY_MODEL = dict(dim=32, depth=4, head_dim=16, mixer_depth=2, mixer_dim=32, multiple_of=16, num_experts=4)
TINY_MODEL |= dict(caption_length=5, caption_channels=12)
TINY_BATCH = 8
LATENTS_OF_TINY = 4  # times fewer on a side


@dataclass(frozen=True)
class Job:
    """One row to measure. `images` are those of the whole stage, whatever global batch is measured."""

    config: TrainConfig
    settings: RunSettings
    ds_config: dict
    data: Literal["made up", "recipe"]
    images: int
    kernels: tuple[str, ...]

    @property
    def micro_batch(self) -> int:
        return self.ds_config["train_micro_batch_size_per_gpu"]

    @property
    def share(self) -> int:
        """Samples of a step for each process."""
        return self.micro_batch * self.ds_config["gradient_accumulation_steps"]

    def row(self, world: World, kind: Kind = "stage") -> BenchmarkRow:
        """Its row, without figures."""
        return describe(
            kind=kind,
            name=stage_name(self.config),
            config=self.config,
            settings=self.settings,
            ds_config=self.ds_config,
            world=world,
            kernels=self.kernels,
            data=MADE_UP if self.data == MADE_UP else ", ".join(self.config.data.train),
            images=self.images,
        )

    def trial(self, world: World) -> Trial:
        return Trial(self.config, self.settings, self.ds_config, world, data=self.data)

    @property
    def short(self) -> "Job":
        """With two micro-batches a step, or fewer: for what needs many steps, or few kernels."""
        micro, shares = self.micro_batch, self.ds_config["train_batch_size"] // self.share
        if self.share <= 2 * micro:
            return self
        batch = 2 * micro * shares
        sizes = {"train_batch_size": batch, "gradient_accumulation_steps": 2}
        return replace(self, config=with_batch(self.config, batch), ds_config=self.ds_config | sizes)

    def learning(self, warm_up: int) -> "Job":
        """With a warm-up of the learning rate over so many steps at most: the recipe's thousands leave a loss where it
        is, and losses that stand still agree whatever is wrong."""
        optim = self.config.optim.model_copy(update={"warmup_steps": min(warm_up, self.config.optim.warmup_steps)})
        return replace(self, config=self.config.model_copy(update={"optim": optim}))

    def halved(self) -> "Job | None":
        """With the next smaller micro-batch that divides the share, at most half; None below one image."""
        for size in range(self.micro_batch // 2, 0, -1):
            if self.share % size == 0:
                sizes = {"train_micro_batch_size_per_gpu": size, "gradient_accumulation_steps": self.share // size}
                return replace(self, ds_config=self.ds_config | sizes)
        return None


def settle(
    recipe: Path,
    ds_path: Path,
    world: World,
    *,
    overrides: Sequence[str] = (),
    global_batch: int | None = None,
    micro_batch: int | None = None,
    mdit: dict[str, Any] | None = None,
    data: Literal["made up", "recipe"] = MADE_UP,
    tiny: bool = False,
) -> Job:
    """Read, check and resolve, as a run does. `mdit` goes over the JSON's own section. Raises UserError."""
    config = load_config(recipe, overrides)
    if tiny:
        config = tiny_form(config)
    images = config.training.num_steps * config.training.global_batch_size
    if global_batch is not None:
        config = with_batch(config, global_batch)
    ds_json = load_ds_json(ds_path)
    settings = load_run_settings(ds_json, ds_path).model_dump(exclude_unset=True)
    ds_json |= {"mdit": {**settings, **(mdit or {})}}
    if micro_batch is not None:
        ds_json |= {"train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": "auto"}
    execution = resolve_execution(ds_json, ds_path, config, recipe, world)
    kernels = tuple(sorted(execution.triton_ops))
    return Job(config, execution.settings, execution.deepspeed, data, images, kernels)


def tiny_form(config: TrainConfig) -> TrainConfig:
    """The same recipe with a model and a batch for a CPU, and another name, since its figures say nothing of it."""
    latent_size = max(4 * config.model.patch_size, config.model.latent_size // LATENTS_OF_TINY)
    changes = {"latent_size": latent_size, **TINY_MODEL}
    model = config.model.model_copy(update=changes)
    tiny = config.model_copy(update={"model": model, "name": config.name + TINY})
    return with_batch(tiny, TINY_BATCH)


def with_batch(config: TrainConfig, global_batch: int) -> TrainConfig:
    return config.model_copy(
        update={"training": config.training.model_copy(update={"global_batch_size": global_batch})}
    )


def attempt(job: Job, world: World, *, warm_up: int | None, steps: int, seconds: float) -> BenchmarkRow:
    """The row of a job: what Trial.measure finds, or why it finds nothing.

    With one process, whatever goes wrong is a row. Several cannot go on when one of them fails: then it raises.
    """
    if warm_up is None:  # a step of several micro-batches has seen all shapes
        warm_up = 2 if job.share == job.micro_batch else 1
    row = job.row(world)
    try:
        with job.trial(world) as trial:
            measured = trial.measure(warm_up=warm_up, steps=steps, seconds=seconds)
            return row.with_(measured=measured.model_copy(update={"memory_gib": trial.memory()}))
    except UserError:
        raise
    except torch.OutOfMemoryError:
        problem = f"{OUT_OF_MEMORY} at micro-batch {job.micro_batch}"
        if world.size > 1:
            raise UserError(f"{problem}: give a smaller --micro_batch") from None
    except Exception as error:  # whatever a compiler or a driver may say: the other rows still count
        if world.size > 1:
            raise
        logger.warning("traceback of a row that failed", exc_info=error)
        problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    give_back_memory()  # behind the except clauses, which hold what the failed step held
    return row.with_(problem=problem)


def prepare_data(job: Job, world: World) -> None:
    """The sets that a job reads, made as a run would make them where the recipe says how. Raises UserError."""
    if job.data == MADE_UP:
        return
    while not (world.is_first or is_precomputed(job.config)):
        time.sleep(0.5)
    precompute(job.config, device=world.device)
