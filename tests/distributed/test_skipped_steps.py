"""Steps whose loss is not finite are skipped, counted and named, in every layout alike; resuming changes nothing."""

import json
import logging
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import complete_checkpoints
from mdit.dist import World
from mdit.parallel.shard import WHOLE
from mdit.train import loop
from mdit.train.run import opened, resolve_run
from mdit.train.skipped import name_samples, non_finite
from tests.processes import run_forked
from tests.training import LAUNCHER, run_in_processes, write_ds_json, write_recipe

STEPS = 6
POISONED = {0, 2, 3}  # steps: the first of all, two in a row, the first after a resume
STEADY = {"schedule": "constant", "final_lr_ratio": 1.0, "eps": 1e-5}  # see test_same_curve.py


class Poisoned:
    """A loader whose last sample of some global batches has a latent that is not a number."""

    def __init__(self, loader, steps, is_last: bool) -> None:
        self.loader, self.steps, self.is_last = loader, steps, is_last

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.loader.close()

    def __next__(self):
        batch = next(self.loader)
        if self.is_last and batch.step in self.steps:
            latents = batch.latents_NCHW.clone()
            latents[-1, 0, 0, 0] = torch.nan
            batch = replace(batch, latents_NCHW=latents)
        return batch


def poison(steps) -> None:
    build = loop.build_loader

    def build_poisoned(*args, rank: int, world_size: int, **options):
        return Poisoned(build(*args, rank=rank, world_size=world_size, **options), steps, rank == world_size - 1)

    loop.build_loader = build_poisoned


def train_all(world: World, folder: str, runs: dict[str, list[dict]]) -> list[str]:
    """Train each run on and on, under one layout after the other, each for as many steps or "until" its own -> rank
    0's log."""
    log = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())
    logging.getLogger("mdit").addHandler(handler)
    logging.getLogger("mdit").setLevel(logging.INFO if world.is_rank_zero else logging.WARNING)
    poison(POISONED)
    for name, layouts in runs.items():
        run_dir = Path(folder, name)
        run_dir.mkdir(exist_ok=True)
        for i, layout in enumerate(layouts, 1):
            until, layout = layout.get("until", STEPS * i // len(layouts)), {**layout}
            layout.pop("until", None)
            ds_json = write_ds_json(Path(folder, f"{name}.{i}.{world.rank}.json"), **layout)
            overrides = [f"training.num_steps={until}"]
            options = dict(overrides=overrides, run_dir=run_dir, init_from=None, restart=False, world=world)
            run = resolve_run(Path(folder, "recipe.json"), ds_json, **options)
            with opened(run) as directory:
                loop.train(run, directory)
            torch.distributed.barrier()
    return log


def metrics(run_dir: Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = complete_checkpoints(run_dir / "checkpoints")[0]
    assert newest.name == f"step_{STEPS:08d}"
    return {f"{file.name} {name}": t for file in newest.glob("*.safetensors") for name, t in load_file(file).items()}


EP2 = {"mdit": {"expert_parallel": 2}}
BF16 = {"bf16": {"enabled": True}}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
CHAIN = [
    {"stage": 1},
    {"stage": 3, "micro_batch": 2},
    {"zero_optimization": {"stage": 2, **OFFLOADED}},
]
IN_PARTS = {
    "ZeRO-1, experts over 2": {"stage": 1, **BF16, **EP2},
    "ZeRO-2, in host memory, accumulated twice": {
        "zero_optimization": {"stage": 2, **OFFLOADED},
        "micro_batch": 2,
        **BF16,
    },
    "ZeRO-3": {"stage": 3, **BF16},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """-> the directory of all runs, rank 0's log. Two processes, one run after the other, the same steps poisoned."""
    folder = tmp_path_factory.mktemp("skipped")
    write_recipe(folder, training={"num_steps": STEPS}, optim=STEADY, report={"checkpoint_every": STEPS})
    runs = {"expected": [{"stage": 2, "micro_batch": 2, **EP2}], "chained": CHAIN}
    for name, layout in IN_PARTS.items():
        runs |= {f"{name}, whole": [layout], f"{name}, in parts": [layout] * 2}
    log, _ = run_in_processes(train_all, 2, str(folder), runs, timeout=280)
    return folder, log


def test_a_skipped_step_is_counted_and_named(runs):
    folder, log = runs
    rows = metrics(folder / "expected")
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert [row["skipped_steps"] for row in rows] == [sum(before < row["step"] for before in POISONED) for row in rows]
    for key in ("loss", "gradient_norm"):
        assert {row["step"] for row in rows if row[key] is None} == {step + 1 for step in POISONED}
    lines = log[: log.index(next(line for line in log if line.startswith("finished ")))]
    lines = [line for line in lines if " skipped, " in line]
    assert len(lines) == len(POISONED)
    assert lines[2].startswith("step 4 skipped, 2 in a row of at most 10: the loss is not finite of sample ")
    assert all(line.endswith(" on rank 1") for line in lines)
    assert any(line.startswith(f"finished at step {STEPS} (3 of them skipped") for line in log)


def test_every_layout_skips_the_same_steps_and_goes_on_from_every_other(runs):
    ours, theirs = (runs[0] / name for name in ("chained", "expected"))
    for key in ("loss", "gradient_norm", "learning_rate", "skipped_steps"):
        expected = [-1 if row[key] is None else row[key] for row in metrics(theirs)]
        assert [-1 if row[key] is None else row[key] for row in metrics(ours)] == pytest.approx(expected, rel=1e-6), key
    for kind in ("raw", "ema"):
        found, expected = (load_file(run / "snapshots/latest" / f"{kind}.safetensors") for run in (ours, theirs))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=f"{kind} {name}")


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_run_that_is_stopped_after_skipped_steps_goes_on_bit_for_bit(runs, name):
    """In bf16. Nothing of a skipped step is left to those that follow: they are those of float32, about."""
    losses, expected = ([row["loss"] for row in metrics(runs[0] / run)] for run in (f"{name}, whole", "expected"))
    assert [loss or -1 for loss in losses] == pytest.approx([loss or -1 for loss in expected], rel=1e-2)
    whole, parts = (runs[0] / f"{name}, {how}" for how in ("whole", "in parts"))
    ours, theirs = state(parts), state(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for key in ("loss", "gradient_norm", "skipped_steps"):
        assert [row[key] for row in metrics(parts)] == [row[key] for row in metrics(whole)]


# The end of a run


def launch_poisoned(arguments: list[str], steps: list[int], masters: bool) -> None:
    poison(steps)
    if masters:
        build = loop.Engine
        loop.Engine = lambda *args: spoil(build(*args))
    sys.argv = [str(LAUNCHER), *arguments]
    runpy.run_path(str(LAUNCHER), run_name="__main__")


def spoil(engine):
    engine.master_weights[0].data[7] = torch.nan
    return engine


def launch(recipe: Path, run_dir: Path, *, steps=(), masters: bool = False, **options) -> tuple[int, list[str]]:
    """-> exit status, the lines that begin with "error: "."""
    ds_json = write_ds_json(run_dir.with_suffix(".json"), stage=2)
    arguments = ["--recipe", str(recipe), "--ds_config", str(ds_json), "--run_dir", str(run_dir)]
    ended = run_forked(launch_poisoned, arguments, list(steps), masters, **options)
    return ended.returncode, [line for line in ended.output.splitlines() if line.startswith("error: ")]


def test_a_run_ends_when_steps_do_not_stop_being_skipped(tmp_path):
    training = {"num_steps": 9, "max_skipped_in_a_row": 2}
    recipe = write_recipe(tmp_path, training=training, report={"checkpoint_every": 3, "log_every": 4})
    run_dir = tmp_path / "run"
    returncode, errors = launch(recipe, run_dir, steps=[1, *range(4, 9)], processes=2)
    (error,) = {*errors}
    assert returncode == 2
    assert "step 6: 2 steps in a row were skipped (training.max_skipped_in_a_row = 2)" in error
    assert "the loss is not finite of sample " in error and " on rank 1;" in error
    assert error.endswith(f"the last good checkpoint is {run_dir / 'checkpoints' / 'step_00000003'}")
    assert [path.name for path in complete_checkpoints(run_dir / "checkpoints")] == ["step_00000003"]
    assert [(row["step"], row["skipped_steps"]) for row in metrics(run_dir)] == [(4, 1), (6, 3)]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    recipe = write_recipe(tmp_path)
    returncode, (error,) = launch(recipe, tmp_path / "run", masters=True)
    assert returncode == 2 and "master/" in error and "is not finite: nothing is saved" in error
    assert not complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert not (tmp_path / "run" / "snapshots").exists()


def test_what_is_not_finite_is_found():
    fragments = [Fragment("a", (2,), WHOLE, 0, 2, 0, 0), Fragment("b", (3,), WHOLE, 0, 3, 1, 1)]
    tensors = {kind: [torch.zeros(2), torch.full((5,), torch.inf)] for kind in ("master", "ema")}
    for flats in tensors.values():
        flats[1][1:4] = 1e30
    assert non_finite(tensors, fragments) is None  # what is between fragments is padding
    for value in (torch.nan, torch.inf, -torch.inf):
        tensors["ema"][1][2] = value
        assert non_finite(tensors, fragments) == "ema/b"
    assert non_finite(tensors, []) is None


def test_samples_are_named_and_many_are_counted():
    assert name_samples([[], [3], [5, 9]]) == "the loss is not finite of sample 3 on rank 1, of samples 5, 9 on rank 2"
    assert name_samples([[], []]) == "the gradient is not finite, though every loss is"
    many = name_samples([list(range(20))] * 12)
    assert "of samples 0, 1, 2, 3, 4, 5, 6, 7 and 12 more on rank 0" in many and many.endswith("and on 4 more ranks")
