"""Processes that do not meet, do not run the same, or end: one line on every other, naming the rank, and no hang."""

import os
import runpy
import signal
import socket
import subprocess
import sys

import pytest

from mdit import cli, meeting
from mdit.config import UserError
from mdit.dist import World, configure_logging, tells, world_from_env
from mdit.meeting import joined, open_store, while_others_wait
from mdit.train.agreement import require_agreement
from tests.processes import Ended, run_forked
from tests.training import LAUNCHER, environment, write_ds_json, write_recipe

HOST = socket.gethostname()
KILLED = "killed or cut off without a word; what was saved before is there"
SAME = "start all processes of a run with the same"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def told(function, *, processes: int = 2, **env: str) -> tuple[int, list[str]]:
    """-> exit status, the lines of all processes. Nobody waits for long."""
    ended: Ended = run_forked(_impatient, function, processes=processes, env=NO_GPU | env, timeout=60)
    assert "Traceback" not in ended.output, ended.output
    return ended.returncode, ended.output.splitlines()


def _impatient(function) -> None:
    meeting.NOTICE, meeting.PATIENCE, meeting.FAREWELL = 0.5, 1.5, 1.0
    world = world_from_env()
    configure_logging(world)
    cli.run(lambda: function(world), tells=tells)


def plan_fails_on_rank_1(world: World) -> None:
    def plan():
        if world.rank == 1:
            raise UserError("recipe.toml: unknown key lrr")

    with joined(world, plan):
        raise AssertionError


def ends_by_an_error_on_rank_1(world: World) -> None:
    with joined(world):
        if world.rank == 1:
            raise UserError("latents/00001.tar: damaged")
        while_others_wait(world, "makes the data", lambda: None)


def is_killed_on_rank_1(world: World) -> None:
    with joined(world):
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        while_others_wait(world, "makes the data", lambda: None)


def fails_while_others_wait(world: World) -> None:
    def make():
        raise OSError(28, "No space left on device", "data/train")

    with joined(world):
        while_others_wait(world, "makes the data", make)


def is_interrupted_everywhere(world: World) -> None:
    with joined(world):
        while_others_wait(world, "makes the data", lambda: None)  # by then all have joined
        raise KeyboardInterrupt


def runs_something_else_on_rank_1(world: World) -> None:
    with joined(world):
        require_agreement(world, {"seed": 0, "lr": 0.1 * (1 + world.rank), "versions.torch": world.rank})


@pytest.mark.parametrize(
    "function, lines",
    [
        (plan_fails_on_rank_1, [f"error: recipe.toml: unknown key lrr (rank 1 on {HOST})"]),
        (
            ends_by_an_error_on_rank_1,
            [f"error: rank 1 on {HOST} has ended: latents/00001.tar: damaged", "error: latents/00001.tar: damaged"],
        ),
        (is_killed_on_rank_1, [f"error: rank 1 on {HOST}: {KILLED}"]),
        (fails_while_others_wait, ["error: data/train: No space left on device"]),
        (is_interrupted_everywhere, ["interrupted"]),
        (
            runs_something_else_on_rank_1,
            [f"error: rank 1 on {HOST} has lr = 0.2, but rank 0 on {HOST} has 0.1; {SAME}"],
        ),
    ],
)
def test_the_end_of_one_is_a_line_of_the_others(function, lines):
    code, output = told(function)
    assert code != 0 and [line for line in output if not line.startswith("waiting for")] == lines


def join(world: World) -> None:
    with joined(world):
        pass


def is_killed_on_rank_0_while_they_meet(world: World) -> None:
    def die(world: World, store, line: str | None) -> None:
        store.wait(["here/1"])
        os.kill(os.getpid(), signal.SIGKILL)

    meeting._call_the_roll = die
    join(world)


def test_the_end_of_rank_0_while_they_meet_is_a_line_of_the_others():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    _, lines = told(is_killed_on_rank_0_while_they_meet, **env)
    where = f"MASTER_ADDR = 127.0.0.1, MASTER_PORT = {port}"
    [error] = [line for line in lines if line.startswith("error: ")]
    assert error == f"error: rank 0 at {where} has ended, or was cut off, before all processes had met"


def test_who_does_not_come_is_named():
    code, output = told(join, WORLD_SIZE="3")
    assert code == 2 and "waiting for rank 2, not here yet; WORLD_SIZE = 3" in output
    (error,) = [line for line in output if line.startswith("error: ")]
    assert error.startswith("error: waited") and "rank 2, not here yet" in error


def test_two_that_have_the_same_rank_are_told():
    code, output = told(join, RANK="0")
    assert code == 2 and any(line.startswith("error: RANK = 0") for line in output)


@pytest.fixture
def listening(monkeypatch):
    """A socket that takes connections and says nothing; its port is MASTER_PORT."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(server.getsockname()[1]))
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "rank, message", [(0, "cannot be opened"), (1, "what answers there is no process of this run")]
)
def test_a_port_that_is_somebody_elses(listening, rank, message):
    with pytest.raises(UserError, match=f"MASTER_PORT = {listening}: {message}"):
        open_store(World(rank, 2, rank, None), 0.5)


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="rank 1 on .* does not reach rank 0 at MASTER_ADDR = nowhere.invalid"):
        open_store(World(1, 2, 1, None), 0.0)


def launch(arguments: list[str]) -> None:
    sys.argv = [str(LAUNCHER), *arguments, *(["--set", "optim.lr=0.5"] if os.environ["RANK"] == "1" else [])]
    runpy.run_path(str(LAUNCHER), run_name="__main__")


def test_a_rank_with_another_learning_rate_ends_the_run_before_anything_is_written(tmp_path):
    recipe, ds_json = write_recipe(tmp_path), write_ds_json(tmp_path / "ds.json")
    arguments = ["--recipe", str(recipe), "--ds_config", str(ds_json), "--run_dir", str(tmp_path / "run")]
    ended = run_forked(launch, arguments, processes=2, env=NO_GPU)
    (error,) = [line for line in ended.output.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and f"rank 1 on {HOST} has recipe.optim.lr = 0.5" in error
    assert "Traceback" not in ended.output and not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="threads of C++ are found in /proc")
def test_gloos_threads_end_with_the_group():
    """One that lets go of its last tensor while Python ends would abort the process."""
    code = (
        "import os, torch\nfrom mdit.dist import World\nfrom mdit.meeting import joined\n"
        "with joined(World(0, 1, 0, torch.device('cpu'))):\n"
        "    torch.distributed.all_reduce(torch.ones(1))\n"
        "    import torch.distributed.nn.functional\n"
        "print(*(open(f'/proc/self/task/{task}/comm').read() for task in os.listdir('/proc/self/task')))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert "python" in ended.stdout and "gloo" not in ended.stdout
