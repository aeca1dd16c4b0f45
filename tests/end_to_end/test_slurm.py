"""The sbatch files, unchanged, on a real Slurm of two nodes: stop, requeue, resume, and the weights of a quiet run."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mdit.config import load_config
from mdit.documents import read_json
from tests.slurm_cluster import Cluster, wait_for, why_not
from tests.training import REPOSITORY, environment, read_metrics, train, write_ds_json, write_recipe, write_toml

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

STEPS = 100
TIME_LIMIT = ("--signal=USR1", "--batch")  # what --signal=B:USR1 does before the time limit
PREEMPTION = ("--signal=TERM",)  # to the tasks, not to the batch shell
SIGNALS = {"train.sbatch": [TIME_LIMIT, PREEMPTION], "train_deepspeed.sbatch": [TIME_LIMIT]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Checkpoints only where a run stops, and one at a time."""
    report = {"checkpoint_every": 1000, "keep_checkpoints": 1, "log_every": 1}
    folder = tmp_path_factory.mktemp("recipe")
    write_ds_json(folder / "ds.json")
    return write_recipe(folder, training={"num_steps": STEPS}, report=report)


@pytest.fixture(scope="module")
def disturbed(cluster, recipe, tmp_path_factory):
    """A run under each script, which end in the future: both at a time, as one computes while the other is queued."""
    folder = tmp_path_factory.mktemp("disturbed")
    with ThreadPoolExecutor() as pool:
        yield {script: pool.submit(disturb, cluster, script, recipe, folder / script) for script in SIGNALS}


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe, recipe.parent / "ds.json", run_dir, processes=2)
    return run_dir


def submit(cluster: Cluster, script: str, run_dir: Path, *arguments: str, gpus: int = 1, **parameters: str) -> str:
    """-> the job's number. What a small cluster needs otherwise is said from outside."""
    smaller = ["--ntasks-per-node=1", "--cpus-per-task=1", f"--gpus-per-node={gpus}", "--time=5"]
    where = [f"--chdir={REPOSITORY}", f"--output={run_dir}.log"]
    path = str(REPOSITORY / "launchers" / "slurm" / script)
    parameters = {**environment(), "VENV": sys.prefix, "RUN_DIR": str(run_dir), **parameters}
    return cluster.run("sbatch", "--parsable", *smaller, *where, path, *arguments, **parameters).strip()


def log_of(run_dir: Path) -> str:
    return Path(f"{run_dir}.log").read_text()


def disturb(cluster: Cluster, script: str, recipe: Path, run_dir: Path) -> Path:
    """Submit a run, stop it by one signal after another, each time a few steps after its start, until it has finished;
    -> `run_dir`."""
    job = submit(cluster, script, run_dir, RECIPE=str(recipe), DS_CONFIG=str(recipe.parent / "ds.json"))
    stopped = 0
    for restarts, signal in enumerate(SIGNALS[script], 1):
        wait_for_steps(cluster, job, run_dir, after=stopped)
        cluster.run("scancel", *signal, job)
        before, stopped = stopped, wait_for_resumption(cluster, job, run_dir, restarts)
        assert before < stopped < STEPS
    assert cluster.wait_until(job, "COMPLETED", 150)["Restarts"] == str(len(SIGNALS[script])), log_of(run_dir)
    return run_dir


def wait_for_steps(cluster: Cluster, job: str, run_dir: Path, after: int) -> None:
    def done():
        assert cluster.job(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), log_of(run_dir)
        return (run_dir / "metrics.jsonl").exists() and max(read_metrics(run_dir), default=0) > after + 2

    wait_for(done, f"steps after {after}", 150)


def wait_for_resumption(cluster: Cluster, job: str, run_dir: Path, restarts: int) -> int:
    """Until a job has been requeued and goes on from what it saved -> the step where it does."""
    wait_for(lambda: cluster.job(job)["Restarts"] == str(restarts), f"requeue {restarts}", 60)
    (checkpoint,) = (run_dir / "checkpoints").iterdir()  # whole, and of one step

    def resumed():
        return re.findall(r"resuming at step (\d+)", log_of(run_dir))[restarts - 1 :]

    (step,) = wait_for(resumed, f"start {restarts + 1}", 150)
    assert checkpoint.name == f"step_{int(step):08d}"
    return int(step)


# Stands in for python and for deepspeed: takes the arguments down, goes on until it is stopped, ends with $CODE.
STAND_IN = """#!/bin/bash
trap 'echo a signal >"$RUN_DIR/STOP"; exit "$CODE"' TERM
echo "$@" >"$RUN_DIR/arguments.$SLURM_PROCID"
until [ -e "$RUN_DIR/STOP" ]; do sleep 0.1; done
exit "$CODE"
"""


def test_what_is_not_requeued(cluster, disturbed, tmp_path):
    """A trainer that fails, though it was stopped; a stop by hand; a job that is cancelled."""
    for name in ("python", "deepspeed"):
        path = tmp_path / "venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)

    def start(script: str, name: str, code: int) -> tuple[str, Path]:
        run_dir = tmp_path / f"{script}_{name}"
        stand_in = {"VENV": str(tmp_path / "venv"), "CODE": str(code), "RECIPE": "some.toml"}
        return submit(cluster, script, run_dir, "--set", "optim.lr=1", gpus=0, **stand_in), run_dir

    failing = [start(script, "fail", 3) for script in SIGNALS]
    touched = [start(script, "touch", 0) for script in SIGNALS]
    cancelled = [start(script, "cancel", 0) for script in SIGNALS]
    for job, run_dir in failing + touched + cancelled:
        wait_for(lambda path=run_dir / "arguments.1": path.exists() and path.read_text(), f"job {job}")
        arguments = (run_dir / "arguments.1").read_text()
        assert f"launchers/train.py --recipe some.toml --ds_config configs/zero2.json --run_dir {run_dir}" in arguments
        assert arguments.endswith(" --set optim.lr=1\n")
    for job, _ in failing:
        cluster.run("scancel", *TIME_LIMIT, job)
    for _, run_dir in touched:
        (run_dir / "STOP").touch()
    for job, _ in cancelled:
        cluster.run("scancel", job)
    for jobs, state in ((failing, "FAILED"), (touched, "COMPLETED"), (cancelled, "CANCELLED")):
        for job, run_dir in jobs:
            assert cluster.wait_until(job, state)["Restarts"] == "0", log_of(run_dir)


MEET = """
import torch
from mdit.dist import world_from_env
from mdit.meeting import init_distributed
world = world_from_env()
init_distributed(world)
total = torch.tensor(float(10 ** world.rank))
torch.distributed.all_reduce(total)
print(world.rank, world.size, world.local_rank, int(total))
torch.distributed.destroy_process_group()
"""


def test_srun_alone_is_enough_to_meet(cluster, disturbed):
    """No MASTER_ADDR, no MASTER_PORT: two tasks of a node find each other."""
    printed = cluster.run("srun", "--nodes=1", "--ntasks=2", sys.executable, "-c", MEET, **environment())
    assert sorted(printed.splitlines()) == ["0 2 0 11", "1 2 1 11"]


@pytest.mark.parametrize("script", SIGNALS)
def test_same_weights_as_undisturbed(disturbed, undisturbed, script):
    run_dir = disturbed[script].result()
    if script == "train_deepspeed.sbatch":
        assert "--local_rank=0" in log_of(run_dir), "deepspeed's launcher was at work"
    assert read_metrics(run_dir) == read_metrics(undisturbed)
    for kind in ("ema", "raw"):
        name = f"snapshots/latest/{kind}.safetensors"
        assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes()


def test_stages_are_jobs_that_wait_for_each_other(cluster, disturbed, recipe, tmp_path):
    for name in ("first", "second"):
        write_toml(tmp_path / f"{name}.toml", load_config(recipe, [f"name={name}", "training.num_steps=4"]))
    (tmp_path / "plan.toml").write_text('name = "plan"\nstages = ["first.toml", "second.toml"]\n')

    def submit_stages(runs: str, ds_config: Path) -> list[str]:
        smaller = "--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --time=5"
        command = f"cd {REPOSITORY} && bash launchers/slurm/recipe.sbatch {smaller} --output={tmp_path}/{runs}_%j.log"
        places = {"PLAN": tmp_path / "plan.toml", "RUNS": tmp_path / runs, "DS_CONFIG": ds_config, "VENV": sys.prefix}
        given = {**environment(), **{name: str(value) for name, value in places.items()}}
        return re.findall(r": job (\d+)", cluster.run("bash", "-c", command, **given))

    jobs, failing = submit_stages("runs", recipe.parent / "ds.json"), submit_stages("failing", Path("none.json"))
    for job, state in zip(jobs + failing, ("COMPLETED", "COMPLETED", "FAILED", "CANCELLED"), strict=True):
        cluster.wait_until(job, state, 150)
    second = read_json(tmp_path / "runs/second/config.json")
    assert second["initial_weights"]["snapshot"] == str(tmp_path / "runs/first/snapshots/step_00000004")
    assert not (tmp_path / "failing/second").exists()
