"""The same command again goes on where the run stopped, whatever stopped it."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from mdit.checkpoint.training_state import complete_checkpoints
from tests.training import attempt, read_metrics, start, train, write_ds_json, write_recipe

STEPS, EVERY = 36, 4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(
        folder,
        training={"num_steps": STEPS},
        report={"checkpoint_every": EVERY, "log_every": 3, "snapshot_every": 10, "validate_every": 12},
    )
    train(recipe, write_ds_json(folder / "ds.json"), folder / "run")
    return recipe, folder / "ds.json", folder / "run"


def final_state(run):
    (newest, *_) = complete_checkpoints(run / "checkpoints")
    assert newest.name == f"step_{STEPS:08d}"
    return {name: value for file in newest.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_run(run, expected):
    ours, theirs = final_state(run), final_state(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_metrics(run) == read_metrics(expected)
    assert read_metrics(run, "validation_loss") == read_metrics(expected, "validation_loss")
    for kind in ("ema", "raw"):
        name = f"snapshots/latest/{kind}.safetensors"
        assert (run / name).read_bytes() == (expected / name).read_bytes()


def steps_done(run):
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def test_killed_at_random_moments(undisturbed, tmp_path):
    recipe, ds_json, expected = undisturbed
    run, rng, kills = tmp_path / "run", random.Random(0), 0
    while kills < 3:
        process = start(recipe, ds_json, run)
        lines = steps_done(run)
        while steps_done(run) <= lines and process.exitcode is None:  # until it has gone on a little further
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert kills > 0
    train(recipe, ds_json, run)
    assert_same_run(run, expected)


def test_stop_signal_leaves_a_checkpoint(undisturbed, tmp_path):
    recipe, ds_json, expected = undisturbed
    run = tmp_path / "run"
    process = start(recipe, ds_json, run)
    while steps_done(run) < 2 and process.exitcode is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGUSR1)
    process.join(60)
    assert process.exitcode == 0
    stopped_at = json.loads((complete_checkpoints(run / "checkpoints")[0] / "state.json").read_text())["step"]
    assert 0 < stopped_at < STEPS
    assert f"resuming at step {stopped_at}" in train(recipe, ds_json, run)
    assert_same_run(run, expected)


def test_finished_run_says_so(undisturbed):
    recipe, ds_json, run = undisturbed
    before = (run / "metrics.jsonl").read_bytes()
    assert f"finished at step {STEPS}" in train(recipe, ds_json, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_another_format_is_refused_and_nothing_is_written(undisturbed, tmp_path):
    recipe, ds_json, expected = undisturbed
    shutil.copytree(expected, run := tmp_path / "run")
    state = complete_checkpoints(run / "checkpoints")[0] / "state.json"
    state.write_text(state.read_text().replace("mdit-checkpoint/", "mdit-checkpoint/9"))
    before = (run / "config.json").read_bytes()
    returncode, output = attempt(recipe, ds_json, run, "--set", "training.num_steps=99")
    assert returncode == 2
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert str(state) in error and "'mdit-checkpoint/94'" in error and "'mdit-checkpoint/4'" in error
    assert (run / "config.json").read_bytes() == before
