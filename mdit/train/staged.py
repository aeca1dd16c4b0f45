"""A recipe of several stages, trained one after the other, each from the weights that the one before it ended with.

runs/NAME/STAGE/   a run's directory (mdit.train.run_directory) for each stage, named after the stage's recipe
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mdit.config import TrainConfig, UserError
from mdit.dist import World, logger, on_all_ranks
from mdit.stages import RecipeStage, StagedRecipe
from mdit.train.agreement import prepare_on_first, require_agreement, what_runs
from mdit.train.loop import train
from mdit.train.meter import training_seconds
from mdit.train.run import Run, dry_run, finished, opened, resolve_run
from mdit.train.run_directory import METRICS, SNAPSHOTS, finished_at

HOUR = 3600


@dataclass(frozen=True)
class StagedRun:
    """All stages of `recipe`, each in its own directory below `root`, under one DeepSpeed JSON."""

    recipe: StagedRecipe
    ds_config: Path
    root: Path
    world: World
    restart: bool = False

    def directory(self, stage: RecipeStage) -> Path:
        return self.root / stage.name

    def before(self, stage: RecipeStage) -> RecipeStage | None:
        place = self.recipe.stages.index(stage)
        return self.recipe.stages[place - 1] if place else None

    def check(self) -> list[Run]:
        """Every stage as far as it can be settled before those before it have run: recipe, JSON, directory. Raises
        UserError; writes nothing."""
        return [self._resolve(stage) for stage in self.recipe.stages]

    def resolve(self, stage: RecipeStage) -> Run:
        """A stage from the weights of the one before it. Raises UserError where that has not ended."""
        if (before := self.before(stage)) is None:
            return self._resolve(stage)
        folder, steps = self.directory(before), before.config.training.num_steps
        if finished_at(folder, steps) is None:
            raise UserError(f"{folder}: {before.name} has not ended, from whose weights {stage.name} goes on")
        return self._resolve(stage, folder / SNAPSHOTS / "latest")

    def _resolve(self, stage: RecipeStage, init_from: Path | None = None) -> Run:
        return resolve_run(
            stage.recipe,
            self.ds_config,
            overrides=stage.overrides,
            run_dir=self.directory(stage),
            init_from=init_from,
            with_moments=stage.moments and init_from is not None,
            restart=self.restart,
            world=self.world,
        )


def train_stages(staged: StagedRun, runs: Sequence[Run], only: RecipeStage | None, began: float, price: float) -> None:
    """Train all stages, or `only` one, and go on where they were. `runs` are what `staged.check` found: the data of all
    of them is made or looked at before the first step. A collective; returns early when a run was asked to stop."""
    stages = staged.recipe.stages
    chosen = [(number, stage) for number, stage in enumerate(stages) if only in (None, stage)]
    for number, _ in chosen:
        require_agreement(staged.world, what_runs(runs[number]))
        prepare_on_first(runs[number])
    for number, stage in chosen:
        run = on_all_ranks(staged.world, lambda stage=stage: staged.resolve(stage))
        require_agreement(staged.world, what_runs(run))
        logger.info(f"\nstage {number + 1} of {len(stages)}, {stage.name}: {forecast(run, price)}")
        if not finished(run):
            with opened(run, began) as directory:
                step = train(run, directory)
            gc.collect()  # an engine is in cycles of references
            if run.world.device.type == "cuda":
                torch.cuda.empty_cache()
            if step < stage.config.training.num_steps:
                return
        if staged.world.is_rank_zero:
            logger.info(f"{stage.name}: {outcome(run, price)}")


def forecast(run: Run, price: float) -> str:
    """The line of what a run will take: images, FLOPs and, on a GPU with a data sheet, predicted hours and dollars."""
    from mdit.costs.layouts import layout_of  # planners, which training does not need
    from mdit.costs.machines import machine_named
    from mdit.costs.prediction import predict
    from mdit.costs.trace import mean_training_flops

    config, device = run.config, run.world.device
    told = f"{images(config) / 1e6:,.3g} M images, {images(config) * mean_training_flops(config) / 1e15:,.3g} PFLOP"
    machine = machine_named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if machine is None:
        return told
    try:
        triton = bool(run.execution.triton_ops)
        layout = layout_of(run.execution, config, run.world.size, triton=triton, path=run.run_dir)
    except UserError:  # a layout that the paper plan does not know
        return told
    seconds = images(config) / predict(config, layout, machine).images_per_second
    return f"{told}; predicted: {time_and_price(run.world, seconds, price)}"


def outcome(run: Run, price: float) -> str:
    """The line of what a finished run took, by its metrics.jsonl: the steps alone, without evaluations and saving."""
    seconds = training_seconds(run.run_dir / METRICS, run.config.training.num_steps)
    rate = images(run.config) / seconds if seconds else 0.0
    return f"took {time_and_price(run.world, seconds, price)}; {rate:,.0f} images/s"


def time_and_price(world: World, seconds: float, price: float) -> str:
    if world.device.type != "cuda":
        return f"{seconds / 60:,.1f} minutes on {world.size} CPU process" + "es" * (world.size > 1)
    hours = seconds / HOUR * world.size
    return f"{seconds / HOUR:,.2f} hours, {hours:,.1f} GPU-hours, ${hours * price:,.2f} at ${price:g} a GPU-hour"


def images(config: TrainConfig) -> int:
    return config.training.num_steps * config.training.global_batch_size


def dry_run_of_all(staged: StagedRun, runs: Sequence[Run], price: float) -> str:
    """The text of --dry_run: every stage's own."""
    told = []
    for number, (stage, run) in enumerate(zip(staged.recipe.stages, runs, strict=True), 1):
        told.append(f"stage {number} of {len(runs)}, {stage.name}: {forecast(run, price)}\n{dry_run(run)}")
    return "\n\n".join(told)
