"""Whole runs in directories that are not as they should be: one line, exit code 2, nothing that was there is lost."""

import json
import resource
import shutil
import time

import pytest

from mdit.checkpoint.training_state import complete_checkpoints, latest_step
from tests.processes import fork_server, run_forked
from tests.training import attempt, command, launch, train, write_ds_json, write_recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """-> recipe, JSON, the directory of a run of four steps."""
    folder = tmp_path_factory.mktemp("finished")
    recipe, ds_json = write_recipe(folder, report={"snapshot_every": 2}), write_ds_json(folder / "ds.json")
    train(recipe, ds_json, folder / "run")
    return recipe, ds_json, folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run that can be damaged."""
    return shutil.copytree(finished[2], tmp_path / "run", symlinks=True)


def content(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def error_of(returncode: int, output: str) -> str:
    assert returncode == 2 and "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


def test_no_usable_checkpoint_is_no_new_run(finished, run):
    recipe, ds_json, _ = finished
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        (checkpoint / "state.json").unlink()
    weights, before = str(finished[2] / "snapshots" / "latest"), content(run)
    error = error_of(*attempt(recipe, ds_json, run, "--set", "training.num_steps=6", "--init_from", weights))
    assert "step_00000004: state.json is missing" in error and "step_00000002" in error and "--restart" in error
    assert content(run) == before


def test_restart_moves_aside(finished, run):
    recipe, ds_json, _ = finished
    before = content(run)
    assert "finished at step 4" in train(recipe, ds_json, run, "--restart", "--set", "seed=1")
    assert {f"before_1/{name}" for name in before} < content(run).keys()
    assert json.loads((run / "config.json").read_text(encoding="utf-8"))["recipe"]["seed"] == 1


def test_a_lost_snapshot_is_made_again(finished, run):
    recipe, ds_json, expected = finished
    shutil.rmtree(run / "snapshots")
    assert "resuming at step 4 of 4" in train(recipe, ds_json, run)
    for kind in ("raw", "ema"):
        name = f"snapshots/latest/{kind}.safetensors"
        assert (run / name).read_bytes() == (expected / name).read_bytes()


def test_killed_while_saving_its_first_checkpoint(finished, run):
    """Report and snapshot of that step are there: the same command begins again and comes to the same weights."""
    recipe, ds_json, expected = finished
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "snapshots" / "step_00000004")
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(metrics[:2]), encoding="utf-8")
    train(recipe, ds_json, run)
    for kind in ("raw", "ema"):
        name = f"snapshots/latest/{kind}.safetensors"
        assert (run / name).read_bytes() == (expected / name).read_bytes()


def test_two_at_once(finished, tmp_path):
    recipe, ds_json, _ = finished
    forever = command(recipe, ds_json, tmp_path / "run", "--set", "training.num_steps=1000000")
    first = fork_server().Process(target=launch, args=(forever[1], forever[2:]))
    first.start()
    try:
        while not (tmp_path / "run" / "config.json").exists() and first.is_alive():
            time.sleep(0.05)
        assert f"in use by process {first.pid} on " in error_of(*attempt(recipe, ds_json, tmp_path / "run"))
    finally:
        first.kill()
        first.join()
    train(recipe, ds_json, tmp_path / "run")  # the lock that was left is taken over


def launch_on_a_small_disk(script: str, arguments: list[str], most: int) -> None:
    """No file can grow beyond `most` bytes: writing more is an OSError, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    launch(script, arguments)


def test_a_full_disk_does_not_end_a_run(finished, tmp_path):
    """Checkpoints do not fit, all else does: training goes to its end, says what is missing, and can be repeated."""
    recipe, ds_json, expected = finished
    run = tmp_path / "run"
    _, script, *arguments = command(recipe, ds_json, run)
    snapshot = (expected / "snapshots" / "latest" / "raw.safetensors").stat().st_size
    ended = run_forked(launch_on_a_small_disk, script, arguments, snapshot + 4096)
    error = error_of(ended.returncode, ended.output)
    assert "stopped at step 4, but its checkpoint is not saved" in error and "File too large" in error
    assert "checkpoint of step 2 not saved" in ended.output and latest_step(run / "checkpoints") == 0
    assert (run / "snapshots" / "step_00000002").exists() and (run / "snapshots" / "step_00000004").exists()
    assert len((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    assert "--restart" in error_of(*attempt(recipe, ds_json, run))
