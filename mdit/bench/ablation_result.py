"""The result of one variant from one seed: what its finished runs are worth, and the file that keeps it.

DIR/VARIANT/seed_0/train/        the launcher's run, and finetune/ where the variant has one
                   result.json   once all of it is measured; log.txt is what the commands said
DIR/grids/VARIANT.png            pictures of the first seed
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mdit.bench.ablation import Ablation, TrainingStage, VariantRun
from mdit.bench.report import Environment, environment, read_report
from mdit.checkpoint.snapshot import load_snapshot
from mdit.checkpoint.training_state import step_in
from mdit.config import Section, TrainConfig, UserError, load_config, parse_recipe, parse_section, portable
from mdit.costs.flops import run_flops, total_flops
from mdit.documents import differences, read_json
from mdit.eval.distances import FRECHET
from mdit.eval.evaluate import evaluate
from mdit.eval.samples import grid, sampling_model, sampling_options, save_png
from mdit.eval.validation import losses_on_set
from mdit.files import remove_directory, write_json
from mdit.parallel.settings import count_parameters
from mdit.train.meter import training_seconds
from mdit.train.run_directory import CONFIG, METRICS, SNAPSHOTS

SCHEMA = "mdit-ablation-result/1"
RESULT, CURVE, LOG = "result.json", "curve.json", "log.txt"
IN_A_GRID = 16


class CurvePoint(Section):
    """EMA weights after `step` steps of all stages, `flops` FLOPs of the model and `seconds` of training steps alone:
    the validation loss at each noise level."""

    step: int
    flops: int
    flops_with_optimizer: int
    seconds: float
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


class VariantResult(Section):
    """`recipes` are the baseline's, by whose noise the loss is measured, and those of the stages. Shares are None
    where no truth is known."""

    recipes: dict[str, dict[str, Any]]
    pictures: int
    parameters: int
    curve: tuple[CurvePoint, ...]
    frechet_distance: float
    background: float | None = None
    object: float | None = None
    environment: Environment

    @classmethod
    def load(cls, path: Path) -> "VariantResult":
        return parse_section(cls, read_report(path, SCHEMA, "tools/ablate.py"), path)

    def save(self, path: Path) -> None:
        write_json(path, {"schema": SCHEMA, **self.model_dump(mode="json", exclude_none=True)})


def measure(ablation: Ablation, variant: str, seed: int, out: Path, device: torch.device) -> VariantResult:
    """The result of runs that are finished, written beside them. Of their snapshots the last ones stay."""
    run = finished_run(ablation, variant, seed, out)
    curve = _curve(run, ablation.base, out, device)
    last = run.run_dir(out, run.stages[-1])
    snapshot = load_snapshot(last / SNAPSHOTS / "latest")
    options, base = sampling_options(snapshot.config, None, None), ablation.base
    model = sampling_model(snapshot, "ema", device)
    found = evaluate(snapshot, model, ablation.file.pictures, base.seed, options)
    if seed == ablation.seeds[variant][0]:
        picture = out / "grids" / f"{variant}.png"
        picture.parent.mkdir(exist_ok=True)
        save_png(grid(found.pictures_NHWC[:IN_A_GRID], found.captions[:IN_A_GRID]), picture)
    path = run.folder(out) / RESULT
    recipes = {"baseline": base, **{stage.name: stage.config for stage in run.stages}}
    result = VariantResult(
        recipes={name: portable(config, path) for name, config in recipes.items()},
        pictures=ablation.file.pictures,
        parameters=count_parameters(snapshot.config.model),
        curve=tuple(curve),
        frechet_distance=found.scores[FRECHET]["drawn"],
        environment=environment(device),
        **found.scores.get("drawn", {}),
    )
    result.save(path)
    return result


def finished_run(ablation: Ablation, variant: str, seed: int, out: Path) -> VariantRun:
    """The run as its directories have it."""
    folder = VariantRun(variant, seed, ()).folder(out)
    names = [stage.name for stage in ablation.stages[variant]]
    return VariantRun(variant, seed, tuple(TrainingStage(n, (), load_config(folder / n / CONFIG)) for n in names))


def change(ablation: Ablation, run: VariantRun, out: Path) -> str | None:
    """The first difference between a run and what DIR has of it, result or run directories, with both values."""
    path = run.folder(out) / RESULT
    wanted = {"baseline": ablation.base, **{stage.name: stage.config for stage in run.stages}}
    if path.exists():
        result = VariantResult.load(path)
        if result.pictures != (pictures := ablation.file.pictures):
            return f"{path}: pictures was {result.pictures}, now it is {pictures}"
        if (stages := [*result.recipes]) != [*wanted]:
            return f"{path}: has {', '.join(stages)}, now it is {', '.join(wanted)}"
        there = [(name, recipe, path) for name, recipe in result.recipes.items()]
    else:
        files = [(name, run.folder(out) / name / CONFIG) for name in wanted]
        there = [(name, read_json(file)["recipe"], file) for name, file in files if file.exists()]
    found = (recipe_change(file, recipe, wanted[name], f"{name}: ") for name, recipe, file in there)
    return next(filter(None, found), None)


def recipe_change(file: Path, recipe: dict[str, Any], config: TrainConfig, what: str = "") -> str | None:
    """The first key in which a recipe of `file` and `config` differ, with both values."""
    before = parse_recipe(recipe, file).model_dump(mode="json")
    for key, was, now in differences(before, config.model_dump(mode="json")):
        return f"{file}: {what}{key} was {was!r}, now it is {now!r}"
    return None


def _curve(run: VariantRun, base: TrainConfig, out: Path, device: torch.device) -> list[CurvePoint]:
    """The validation loss of all snapshots, which are removed but for the last one of each stage. Kept in a file, so
    that it can be had again without them."""
    path = run.folder(out) / CURVE
    if path.exists():
        return [parse_section(CurvePoint, point, path) for point in read_json(path)]
    points, start = [], CurvePoint(step=0, flops=0, flops_with_optimizer=0, seconds=0.0, losses=())
    for stage in run.stages:
        snapshots = snapshots_in(run.run_dir(out, stage))
        if not snapshots:
            raise UserError(f"{run.run_dir(out, stage) / SNAPSHOTS}: has no snapshot of the finished run")
        metrics = run.run_dir(out, stage) / METRICS
        for step, losses in validation_losses(snapshots, base, device):
            points.append(
                CurvePoint(
                    step=start.step + step,
                    flops=start.flops + run_flops(stage.config, step),
                    flops_with_optimizer=start.flops_with_optimizer + total_flops(stage.config, step),
                    seconds=start.seconds + training_seconds(metrics, step),
                    losses=losses,
                )
            )
        start = points[-1]
    write_json(path, [point.model_dump(mode="json") for point in points])
    for stage in run.stages:
        for snapshot in snapshots_in(run.run_dir(out, stage))[:-1]:
            remove_directory(snapshot)
    return points


def snapshots_in(run_dir: Path) -> list[Path]:
    steps = {path: step_in(path.name) for path in (run_dir / SNAPSHOTS).iterdir()}
    return sorted((path for path, step in steps.items() if step is not None), key=lambda path: steps[path] or 0)


def validation_losses(
    snapshots: Sequence[Path], base: TrainConfig, device: torch.device
) -> list[tuple[int, tuple[float, ...]]]:
    """(step, loss at each of `base`'s noise levels) of the EMA weights of snapshots of one run."""
    found = []
    for path in snapshots:
        snapshot = load_snapshot(path)
        losses = losses_on_set(sampling_model(snapshot, "ema", device), snapshot.config, device, base)
        if not all(map(math.isfinite, losses)):
            raise UserError(f"{path}: the validation losses are {losses}")
        found.append((snapshot.step, tuple(losses)))
    return found
