"""The sbatch files, unchanged, on a real Slurm of five nodes: stopped, preempted and cut off they go on by themselves,
to the weights of a quiet run; precompute's array makes the set that one process makes."""

import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launchers import precompute
from mdit.config import load_config
from tests import training
from tests.picture_sets import contents, png
from tests.slurm_cluster import DISTURBED, QUIET, Cluster, wait_for, why_not
from tests.training import REPOSITORY, environment, read_metrics, write_ds_json, write_recipe

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

STEPS = 40
TRAINERS = ("train.sbatch", "train_deepspeed.sbatch")
TIME_LIMIT = ("--signal=USR1", "--batch")  # what --signal=B:USR1 does before the time limit
ON_QUIET, ON_DISTURBED = f"--exclude={','.join(DISTURBED)}", f"--exclude={','.join(QUIET)}"  # two nodes, two of three
SOURCE = {"--source": "folder", "--image_size": "16", "--image_encoder": "pixels", "--text_encoder": "minilm"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm = Cluster(tmp_path_factory.mktemp("slurm"))
    yield slurm
    slurm.close()


@pytest.fixture(scope="module")
def pool(cluster):
    """Threads, so that what computes for long does so beside the tests that wait."""
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Checkpoints only where a run stops, and one at a time."""
    report = {"checkpoint_every": 1000, "keep_checkpoints": 1, "log_every": 1}
    folder = tmp_path_factory.mktemp("recipe")
    write_ds_json(folder / "ds.json")
    return write_recipe(folder, training={"num_steps": STEPS}, report=report)


@pytest.fixture(scope="module", autouse=True)
def disturbed(cluster, pool, recipe, stand_in, tmp_path_factory):
    """A run that ends in the future."""
    return pool.submit(disturb, cluster, recipe, stand_in, tmp_path_factory.mktemp("disturbed") / "run")


@pytest.fixture(scope="module", autouse=True)
def array(cluster, pool, tmp_path_factory):
    """A source, and the set that an array makes of it in the future."""
    folder = tmp_path_factory.mktemp("precompute")
    for part in range(12):
        (folder / "source" / str(part)).mkdir(parents=True)
        for number in range(40 * part, 40 * part + 40):
            place = folder / "source" / str(part) / f"{number:04d}.png"
            place.write_bytes(png(number, (20, 18)))
            place.with_suffix(".txt").write_text(f"picture {number}")
    return folder / "source", pool.submit(make_set, cluster, folder / "source", folder / "sets")


# Stands in for python and for deepspeed: takes the arguments down, goes on until it is stopped, ends with $CODE. As the
# doctor it ends with $FOUND, or waits for STOP too.
STAND_IN = """#!/bin/bash
trap 'echo a signal >"$RUN_DIR/STOP"; exit "$CODE"' ${HEEDS:-TERM}
until_stopped() { until [ -e "$RUN_DIR/STOP" ]; do sleep 0.1; done; }
case "$*" in
*--list) exec "$REAL" "$@" ;;
*tools/doctor.py*)
    echo "$SLURM_JOB_ID $*" >"$RUN_DIR/doctor.$SLURM_PROCID"
    [ "$FOUND" = wait ] && until_stopped && exit 0
    exit "$FOUND"
    ;;
esac
echo "$SLURM_JOB_ID $*" >>"$RUN_DIR/arguments.$SLURM_PROCID"
mkdir -p "$RUN_DIR/checkpoints/step_00000007"
[ "$AT_ONCE" ] || until_stopped
exit "$CODE"
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory) -> Mapping[str, str]:
    """Variables of a job in which nothing is computed."""
    venv = tmp_path_factory.mktemp("venv")
    (venv / "bin").mkdir()
    for name in ("python", "deepspeed"):
        (venv / "bin" / name).write_text(STAND_IN)
        (venv / "bin" / name).chmod(0o755)
    return {"VENV": str(venv), "REAL": sys.executable, "CODE": "0", "FOUND": "0", "RECIPE": "some.toml"}


def submit(
    cluster: Cluster, script: str, log: Path, *arguments: str, options: tuple[str, ...] = (ON_QUIET,), **parameters: str
) -> str:
    """-> the job's number. What a small cluster needs otherwise is said from outside."""
    smaller = ["--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", "--time=5"]
    where = [f"--chdir={REPOSITORY}", f"--output={log}"]
    path = str(REPOSITORY / "launchers" / "slurm" / script)
    given = {**environment(), "VENV": sys.prefix, **parameters}
    return cluster.run("sbatch", "--parsable", *smaller, *where, *options, path, *arguments, **given).strip()


def submit_run(cluster: Cluster, script: str, run_dir: Path, *arguments: str, **given) -> str:
    return submit(cluster, script, run_dir.with_name(f"{run_dir.name}.log"), *arguments, RUN_DIR=str(run_dir), **given)


def log_of(run_dir: Path) -> str:
    return run_dir.with_name(f"{run_dir.name}.log").read_text()


def preempt(cluster: Cluster, nodes: str, count: int) -> None:
    """A job of a partition with priority takes all GPUs of these nodes for a moment."""
    needs = ("--partition=urgent", f"--nodelist={nodes}", f"--nodes={count}", "--gpus-per-node=2", "--output=/dev/null")
    cluster.run("sbatch", *needs, "--wrap=true")


# --- disturbances of a run


def disturb(cluster: Cluster, recipe: Path, stand_in: Mapping[str, str], run_dir: Path) -> Path:
    """One run, told to stop near a time limit, preempted, cut off from a node, each a few steps after its start; both
    scripts go on from what the other has left. -> `run_dir`."""
    given = {"RECIPE": str(recipe), "DS_CONFIG": str(recipe.parent / "ds.json")}
    options = (ON_DISTURBED, "--gpus-per-node=1")
    job = submit_run(cluster, "train_deepspeed.sbatch", run_dir, options=options, DOCTOR="0", **given)
    pause_at_work(cluster, job, run_dir, after=0)
    cluster.run("scancel", *TIME_LIMIT, job)
    wait_for((run_dir / "STOP").exists, "the batch shell")
    cluster.run("scancel", "--signal=CONT", job)
    cluster.wait_for_job(job, Restarts="1")
    cluster.run("scancel", job)
    assert "--local_rank=0" in log_of(run_dir), "deepspeed's launcher was at work"

    starting = run_dir.with_name("starting")
    whole = (*options, "--exclusive")
    early = submit_run(cluster, "train.sbatch", starting, options=whole, DOCTOR="0", HEEDS="USR2", **stand_in)
    wait_for((starting / "arguments.1").exists, "a trainer that does not heed signals yet")
    preempt(cluster, ",".join(DISTURBED), len(DISTURBED))
    cluster.wait_for_job(early, Restarts="1")
    cluster.run("scancel", early)

    job = submit_run(cluster, "train.sbatch", run_dir, options=options, **given)
    pause_at_work(cluster, job, run_dir, after=saved(run_dir))
    preempt(cluster, ",".join(DISTURBED), len(DISTURBED))  # Slurm sends CONT before TERM
    cluster.wait_for_job(job, Restarts="1")
    pause_at_work(cluster, job, run_dir, after=saved(run_dir))

    _, second = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    one_node = (f"--nodelist={second}", "--nodes=1")
    cut_off = submit_run(
        cluster, "train.sbatch", run_dir.with_name("cut_off"), options=one_node, DOCTOR="0", **stand_in
    )
    wait_for((run_dir.with_name("cut_off") / "arguments.0").exists, "a job whose own node will fail")
    cluster.fail_node(second)
    cluster.run("scancel", "--signal=CONT", job)
    cluster.wait_for_job(job, Restarts="2")
    cluster.wait_for_job(cut_off, Restarts="1")
    cluster.run("scancel", cut_off)
    assert cluster.wait_until(job, "COMPLETED", 150)["Restarts"] == "2", log_of(run_dir)
    return run_dir


def saved(run_dir: Path) -> int:
    """The step of the checkpoint, which is whole, and of one step."""
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    return int(checkpoint.name.removeprefix("step_"))


def pause_at_work(cluster: Cluster, job: str, run_dir: Path, after: int) -> None:
    """Let a run take some steps after that one, and none beyond them before it is told to end."""

    def done():
        return (run_dir / "metrics.jsonl").exists() and max(read_metrics(run_dir), default=0) > after + 2

    try:
        wait_for(done, f"steps after {after}", 150)
    except AssertionError as error:
        error.add_note(log_of(run_dir))
        raise
    cluster.run("scancel", "--signal=STOP", job)


def make_set(cluster: Cluster, source: Path, out: Path) -> Path:
    """The set of an array of two, one of which is preempted at its work. -> its directory."""
    arguments = [word for pair in source_flags(source, out).items() for word in pair]
    options = (ON_QUIET, "--array=0-1", "--gpus-per-node=2")  # a node for each
    job = submit(cluster, "precompute.sbatch", out.with_name("log_%a"), *arguments, options=options)
    wait_for(lambda: [*out.glob(".16.partial/part_*.json")], "a part", 90)
    cluster.run("scancel", "--signal=STOP", f"{job}_0")  # it has not ended when it is told to
    preempt(cluster, cluster.job(f"{job}_0")["NodeList"], 1)
    cluster.wait_for_job(f"{job}_0", Restarts="1")
    for element in (0, 1):
        cluster.wait_until(f"{job}_{element}", "COMPLETED", 90)
    return out


def source_flags(source: Path, out: Path) -> dict[str, str]:
    return {**SOURCE, "--root": str(source), "--out": str(out), "--caption_length": "12"}


# --- jobs that compute nothing, meanwhile


def recorded(run_dir: Path, what: str = "arguments.1") -> list[str]:
    """Job number and arguments of the stand-in's starts, a line each."""
    wait_for(lambda: (run_dir / what).exists() and (run_dir / what).read_text(), f"{run_dir}/{what}")
    return (run_dir / what).read_text().splitlines()


def test_what_is_not_requeued(cluster, stand_in, tmp_path):
    """A trainer that fails, though it was stopped; a stop by hand; a job that is cancelled; an unfit machine."""

    def start(script: str, name: str, **given: str) -> tuple[str, Path]:
        run_dir = tmp_path / f"{script}_{name}"
        return submit_run(cluster, script, run_dir, "--set", "optim.lr=1", **{**stand_in, **given}), run_dir

    touched = [start(script, "touch") for script in TRAINERS]
    failing = [start(script, "fail", CODE="3") for script in TRAINERS]
    cancelled = [start(script, "cancel", DOCTOR="0") for script in TRAINERS]
    unfit = [start(script, "unfit", FOUND="1") for script in TRAINERS]
    for _, run_dir in touched:
        (line,) = recorded(run_dir)
        assert f"launchers/train.py --recipe some.toml --ds_config configs/zero2.json --run_dir {run_dir}" in line
        assert line.endswith(" --set optim.lr=1")
        assert recorded(run_dir, "doctor.1") == [line.replace("launchers/train.py", "tools/doctor.py")]
        (run_dir / "STOP").touch()
    for job, run_dir in failing:
        assert recorded(run_dir)
        cluster.run("scancel", *TIME_LIMIT, job)
    for job, run_dir in cancelled:
        assert recorded(run_dir) and not (run_dir / "doctor.1").exists()
        cluster.run("scancel", job)
    states = ((failing, "FAILED", "3:0"), (touched, "COMPLETED", "0:0"), (cancelled, "CANCELLED", "0:15"))
    for jobs, state, code in (*states, (unfit, "FAILED", "1:0")):
        for job, run_dir in jobs:
            told = cluster.wait_until(job, state)
            assert (told["Restarts"], told["ExitCode"]) == ("0", code), log_of(run_dir)
    assert all(recorded(run_dir, "doctor.1") and not (run_dir / "arguments.1").exists() for _, run_dir in unfit)


def test_a_stop_while_the_doctor_looks(cluster, stand_in, tmp_path):
    """Near the time limit: the next start trains, unlooked at. By hand: it stays stopped."""
    requeued, stopped = tmp_path / "requeued", tmp_path / "stopped"
    given = {**stand_in, "FOUND": "wait"}
    jobs = {run_dir: submit_run(cluster, "train.sbatch", run_dir, **given) for run_dir in (requeued, stopped)}
    assert recorded(requeued, "doctor.1") and recorded(stopped, "doctor.1")
    cluster.run("scancel", *TIME_LIMIT, jobs[requeued])
    (stopped / "STOP").touch()
    assert cluster.wait_until(jobs[stopped], "COMPLETED")["Restarts"] == "0"
    assert not (stopped / "arguments.1").exists()
    assert recorded(requeued)
    (requeued / "STOP").touch()
    assert cluster.wait_until(jobs[requeued], "COMPLETED")["Restarts"] == "1"


def test_a_run_that_hung_is_requeued_if_it_has_come_further(cluster, stand_in, tmp_path):
    """The first start saves a checkpoint, the second one none."""
    given = {**stand_in, "CODE": "142", "AT_ONCE": "yes", "DOCTOR": "0"}
    job = submit_run(cluster, "train.sbatch", tmp_path / "run", **given)
    told = cluster.wait_until(job, "FAILED")
    assert (told["Restarts"], told["ExitCode"]) == ("1", "142:0"), log_of(tmp_path / "run")


def test_elements_of_an_array_are_runs_of_their_own(cluster, stand_in, tmp_path):
    options = (ON_QUIET, "--array=7-8")
    job = submit_run(cluster, "train.sbatch", tmp_path / "seed_%a", "--set", "seed=%a", options=options, **stand_in)
    lines = {number: recorded(tmp_path / f"seed_{number}")[0] for number in (7, 8)}
    for number, line in lines.items():
        assert f"--run_dir {tmp_path}/seed_{number} " in line and line.endswith(f" --set seed={number}")
    assert lines[7].split()[0] != lines[8].split()[0], "each has its job number, which makes its port"
    (tmp_path / "seed_7" / "STOP").write_text("a word\n")
    (tmp_path / "seed_8" / "STOP").touch()
    assert cluster.wait_until(f"{job}_8", "COMPLETED")["Restarts"] == "0"
    wait_for(lambda: len(recorded(tmp_path / "seed_7")) == 2, "the second start of element 7")
    (tmp_path / "seed_7" / "STOP").touch()
    assert cluster.wait_until(f"{job}_7", "COMPLETED")["Restarts"] == "1"


@pytest.mark.parametrize(
    "options, told",
    [
        (("--array=3",), "one: an array needs one for each element; write %a where its number is to stand"),
        (
            ("--ntasks=1", ON_QUIET, ":"),
            "a heterogeneous job has a list of nodes for each component",
        ),
    ],
)
def test_jobs_that_would_share_or_split_a_run_are_refused(cluster, stand_in, tmp_path, options, told):
    job = submit_run(cluster, "train.sbatch", tmp_path / "one", options=(*options, "--nodes=1", ON_QUIET), **stand_in)
    cluster.wait_for_job(job, ExitCode="2:0")
    (line,) = [line for line in log_of(tmp_path / "one").splitlines() if line.startswith("error: ")]
    assert told in line and not (tmp_path / "one").exists()
    cluster.run("scancel", job, check=False)


def test_elements_of_precompute_that_fail_are_started_again(cluster, stand_in, tmp_path):
    """Up to STARTS times, or not at all where a person has to mend something; and near the time limit."""

    def start(name: str, *, at_once: str = "yes", **given: str) -> str:
        (tmp_path / name).mkdir()
        given = {**stand_in, "RUN_DIR": str(tmp_path / name), "AT_ONCE": at_once, "STARTS": "2", **given}
        options = (ON_QUIET, "--array=5")
        return submit(cluster, "precompute.sbatch", tmp_path / "log", "--set", "a=1", options=options, **given) + "_5"

    failing, refused, late = start("failing", CODE="139"), start("refused", CODE="2"), start("late", at_once="")
    assert recorded(tmp_path / "late", "arguments.0")
    cluster.run("scancel", *TIME_LIMIT, late)
    cluster.wait_for_job(late, Restarts="1")
    for job, restarts in ((failing, "1"), (refused, "0")):
        assert cluster.wait_until(job, "FAILED")["Restarts"] == restarts
    assert [line.partition(" ")[2] for line in recorded(tmp_path / "failing", "arguments.0")] == [
        "launchers/precompute.py --set a=1"
    ] * 2
    cluster.run("scancel", late)


def test_stages_are_jobs_that_wait_for_each_other(cluster, stand_in, recipe, tmp_path):
    for name in ("first", "second"):
        training.write_toml(tmp_path / f"{name}.toml", load_config(recipe, [f"name={name}"]))
    (tmp_path / "plan.toml").write_text('name = "plan"\nstages = ["first.toml", "second.toml"]\n')

    def submit_stages(runs: str, code: str) -> list[str]:
        smaller = f"--nodes=1 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 --time=5 {ON_QUIET}"
        command = f"cd {REPOSITORY} && bash launchers/slurm/recipe.sbatch {smaller} --output={tmp_path}/{runs}_%j.log"
        given = {**stand_in, "PLAN": str(tmp_path / "plan.toml"), "RUNS": str(tmp_path / runs)}
        given |= {"CODE": code, "AT_ONCE": "yes", "DOCTOR": "0"}
        return re.findall(r": job (\d+)", cluster.run("bash", "-c", command, **environment() | given))

    jobs, failing = submit_stages("runs", "0"), submit_stages("failing", "3")
    for job, state in zip(jobs + failing, ("COMPLETED", "COMPLETED", "FAILED", "CANCELLED"), strict=True):
        cluster.wait_until(job, state, 90)
    (line,) = recorded(tmp_path / "runs" / "second", "arguments.0")
    assert line.endswith(
        f" launchers/train_recipe.py --plan {tmp_path}/plan.toml --stage second --ds_config configs/zero2.json "
        f"--run_dir {tmp_path}/runs"
    )
    assert not (tmp_path / "failing" / "second").exists()


# --- what they have come to


def test_an_array_makes_the_set_that_one_process_makes(array, tmp_path):
    source, future = array
    precompute.main([word for pair in source_flags(source, tmp_path / "sets").items() for word in pair])
    assert contents(future.result()) == contents(tmp_path / "sets")


def test_same_weights_as_undisturbed(disturbed, recipe, tmp_path):
    run_dir = tmp_path / "undisturbed"
    training.train(recipe, recipe.parent / "ds.json", run_dir, processes=2)
    assert read_metrics(disturbed.result()) == read_metrics(run_dir)
    for kind in ("ema", "raw"):
        name = f"snapshots/latest/{kind}.safetensors"
        assert (disturbed.result() / name).read_bytes() == (run_dir / name).read_bytes()
    told = log_of(disturbed.result())
    assert len(re.findall(r"^ok +processes +2, ", told, re.MULTILINE)) == 1, "the doctor looks at a job's first start"
    assert told.count("resuming at step ") == 3
