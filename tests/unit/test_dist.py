import itertools
import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from mdit.config import UserError
from mdit.dist import (
    StopSignal,
    World,
    cores,
    first_host,
    forget_stop,
    gather,
    on_all_ranks,
    set_rendezvous,
    tells,
    work_on,
    world_from_env,
)
from mdit.documents import explain
from mdit.meeting import init_distributed, processes_here
from tests.processes import run_forked
from tests.training import REPOSITORY, run_in_processes

CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch):
    """An environment with no trace of a launcher, on a machine without a GPU; returns a function that adds to it."""
    launchers = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    mine = re.compile("SLURM_|PMI|OMPI_|MV2_|PALS_|MPI_")
    for name in launchers | {name for name in os.environ if mine.match(name)}:
        monkeypatch.setenv(name, "")  # known from now on, so that what a test leaves there is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_plain_python_is_one_process(environment):
    assert world_from_env() == World(rank=0, size=1, local_rank=0, device=CPU)


def test_deepspeed_and_torchrun_give_rank_world_size_and_local_rank(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="node0", MASTER_PORT="29500")
    assert world_from_env() == World(rank=5, size=8, local_rank=1, device=CPU)


SRUN = dict(SLURM_JOB_ID="7", SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1")


def test_a_task_of_srun_takes_its_place_from_slurm(environment):
    environment(**SRUN, SLURM_STEP_ID="0")
    assert world_from_env() == World(rank=3, size=4, local_rank=1, device=CPU)


def test_the_batch_shell_of_a_job_is_one_process(environment):
    """sbatch sets SLURM_PROCID too; waiting there for three more processes would hang for ever."""
    environment(**{**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert world_from_env() == World(rank=0, size=1, local_rank=0, device=CPU)


def test_deepspeed_inside_a_slurm_step_goes_by_deepspeeds_ranks(environment):
    environment(**SRUN, SLURM_STEP_ID="0", RANK="6", WORLD_SIZE="16", LOCAL_RANK="2")
    assert world_from_env() == World(rank=6, size=16, local_rank=2, device=CPU)


def test_each_process_of_a_node_gets_its_own_gpu(environment, monkeypatch):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert world_from_env().device == torch.device("cuda", 1)


def numerics() -> tuple[str | None, bool, bool]:
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG"), *reduced


def look_when_cuda_is_asked() -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    seen = []
    for name in ("is_available", "device_count", "set_device"):
        setattr(torch.cuda, name, lambda *args: seen.append(numerics()) or 1)
    work_on(world_from_env().device)
    assert len(seen) >= 3 and {*seen} == {(":4096:8", False, False)}, seen


def test_sums_are_settled_before_cuda_is_asked_for_anything():
    ended = run_forked(look_when_cuda_is_asked)
    assert ended.returncode == 0, ended.output


def test_sums_are_settled_in_a_runs_process_and_a_workspace_of_ones_own_is_kept(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert run_in_processes(in_a_run, 1) == [(":16:8", False, False)]


def in_a_run(world):
    return numerics()


def test_every_command_that_computes_on_a_gpu_settles_them():
    """`world_from_env` does. One measures both ways, one moves bytes, one starts others: without a sum of their own."""
    commands = [*REPOSITORY.glob("launchers/*.py"), *REPOSITORY.glob("tools/*.py")]
    sources = {path.name: path.read_text(encoding="utf-8") for path in commands}
    computing = {name for name, source in sources.items() if "torch.cuda." in source or "world_from_env" in source}
    assert computing > {"train.py", "evaluate.py", "precompute.py", "bench_train.py", "bench_kernels.py"}
    settled = {name for name, source in sources.items() if re.search(r"\b(world_from_env|settle_numerics)\(\)", source)}
    assert computing - settled <= {"bench_reductions.py", "bench_loader.py", "first_contact.py"}


def test_a_task_that_sees_one_gpu_only_takes_it(environment, monkeypatch):
    """As with srun's --gpus-per-task."""
    environment(**SRUN, SLURM_STEP_ID="0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert world_from_env() == World(rank=3, size=4, local_rank=1, device=torch.device("cuda", 0))


def test_more_processes_than_gpus_are_refused(environment, monkeypatch):
    environment(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="LOCAL_RANK = 1, but 1 GPUs are to be seen: start one process for each"):
        work_on(world_from_env().device)


OPENMPI = dict(OMPI_COMM_WORLD_RANK="3", OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_RANK="1")
HYDRA = dict(PMI_RANK="3", PMI_SIZE="4", MPI_LOCALRANKID="1")
INTERACTIVE = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_LOCALID="0", SLURM_STEP_ID="4294967290")


@pytest.mark.parametrize("variables", [OPENMPI, HYDRA], ids=["OpenMPI", "MPICH"])
@pytest.mark.parametrize("slurm", [{}, dict(SRUN, SLURM_STEP_ID="0", SLURM_PROCID="1")], ids=["", "under srun"])
def test_mpirun_gives_rank_world_size_and_local_rank(environment, variables, slurm):
    """Its daemons are tasks of srun in a job, whose numbers are not those of the processes."""
    environment(**{**slurm, **variables})
    assert world_from_env() == World(rank=3, size=4, local_rank=1, device=CPU)


def test_the_shell_of_an_interactive_job_is_one_process(environment):
    environment(**INTERACTIVE)
    assert world_from_env() == World(rank=0, size=1, local_rank=0, device=CPU)


GOOD = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.mark.parametrize("value", ["", "-1", "x", "1.0", " 1", "\N{SUPERSCRIPT TWO}", "9" * 5000, "12345678"])
@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_that_cannot_be_is_named(environment, name, value):
    environment(**{**GOOD, name: value})
    with pytest.raises(UserError) as refused:
        world = world_from_env()
        processes_here(world)
        set_rendezvous(world)
    assert str(refused.value).startswith(name) and value[:40] in str(refused.value)


@pytest.mark.parametrize("variables", [{"RANK": "0"}, {"WORLD_SIZE": "2"}, {"PMIX_RANK": "0"}, {"PALS_RANKID": "1"}])
def test_a_launcher_that_is_not_known_is_no_single_process(environment, variables):
    environment(**variables)
    with pytest.raises(UserError, match=f"{[*variables][0]}.*start with deepspeed, torchrun or srun"):
        world_from_env()


def test_cores_are_counted_where_nobody_tells_which_are_ours(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores() == os.cpu_count()


FOUR = World(3, 4, 1, CPU)
MEETING_POINT = ("MASTER_ADDR", "MASTER_PORT")


def test_under_srun_the_first_host_and_the_job_say_where_to_meet(environment):
    environment(**SRUN, SLURM_STEP_ID="0", SLURM_STEP_NODELIST="gpu[07-08]", SLURM_JOB_NODELIST="gpu[05-08]")
    set_rendezvous(FOUR)
    assert [os.environ[name] for name in MEETING_POINT] == ["gpu07", "20007"]


def test_steps_and_jobs_that_share_a_host_do_not_meet(environment):
    ports = set()
    for job, step in itertools.product(("67043327", "81", "82"), ("0", "1", "2")):
        environment(SLURM_JOB_ID=job, SLURM_STEP_ID=step, SLURM_STEP_NODELIST="a")
        os.environ.pop("MASTER_PORT", None)
        set_rendezvous(FOUR)
        ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 9 and all(1024 < port < 32768 for port in ports)  # Linux hands out 32768 and above


def test_what_the_launcher_says_about_the_meeting_point_holds(environment):
    environment(**SRUN, SLURM_STEP_ID="0", SLURM_STEP_NODELIST="gpu[07-08]", MASTER_ADDR="node0", MASTER_PORT="29500")
    set_rendezvous(FOUR)
    assert [os.environ[name] for name in MEETING_POINT] == ["node0", "29500"]


def test_without_a_launcher_nobody_knows_where_to_meet(environment):
    environment(RANK="3", WORLD_SIZE="4", MASTER_PORT="29500")
    with pytest.raises(UserError, match="^MASTER_ADDR: not set, so 4 processes cannot find each other; .*torchrun"):
        set_rendezvous(FOUR)


@pytest.mark.parametrize(  # as `scontrol show hostnames` has them
    "node_list, first",
    [
        ("login", "login"),
        ("a,b", "a"),
        ("127.0.0.[1-2]", "127.0.0.1"),
        ("gpu-a[007-012,015],login", "gpu-a007"),
        ("n[3,5-9],m1", "n3"),
        ("rack[1-2]n[07-12]", "rack1n07"),
    ],
)
def test_first_host_of_a_node_list(node_list, first):
    assert first_host(node_list) == first


ALONE = World(0, 1, 0, CPU)


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {n: signal.getsignal(n) for n in numbers}
    yield
    for n, handler in before.items():
        signal.signal(n, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_leaves_word(number, handlers, tmp_path):
    stop = StopSignal(tmp_path / "STOP", ALONE)
    assert not stop.requested()
    signal.raise_signal(number)
    assert not (tmp_path / "STOP").exists()
    assert stop.requested() and stop.requested()
    assert (tmp_path / "STOP").read_text() == "a signal\n"


def test_a_stop_file_stops_and_keeps_its_content(handlers, tmp_path):
    stop = StopSignal(tmp_path / "STOP", ALONE)
    assert not stop.requested()
    (tmp_path / "STOP").touch()
    assert stop.requested() and (tmp_path / "STOP").read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_ctrl_c_stops_as_a_signal_does_and_the_second_ends_at_once(number, handlers, tmp_path, capfd):
    stop = StopSignal(tmp_path / "STOP", ALONE)
    signal.raise_signal(number)
    assert stop.requested() and capfd.readouterr().err.strip().count("\n") == 0
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_holds(handlers, tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    StopSignal(tmp_path / "STOP", ALONE)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_only_the_stop_file_of_an_earlier_run_is_removed(handlers, tmp_path):
    forget_stop(tmp_path / "STOP", time.time())  # there is none
    (tmp_path / "STOP").touch()
    forget_stop(tmp_path / "STOP", time.time() - 60)
    assert StopSignal(tmp_path / "STOP", ALONE).requested(), "it was put there while this run was starting"
    forget_stop(tmp_path / "STOP", time.time() + 60)
    assert [*tmp_path.iterdir()] == []


def agree(world: World, folder: str) -> list[bool]:
    """On two ranks: nobody wants to stop, then rank 1 has had a signal, then only the file says so."""
    stop_file = Path(folder, "STOP")
    stop = StopSignal(stop_file, world)
    answers = [stop.requested()]
    if world.rank == 1:
        signal.raise_signal(signal.SIGUSR1)
    answers.append(stop.requested())
    answers.append(stop_file.read_text() == "a signal\n" if world.is_rank_zero else stop.signalled)
    stop.signalled = False
    return [*answers, stop.requested()]


def test_all_ranks_stop_for_one(tmp_path):
    assert run_in_processes(agree, 2, str(tmp_path)) == [[False, True, True, True]] * 2


FAULTS = {  # what a rank raises -> what all ranks raise, and whether rank 0 alone tells it
    "one": lambda rank: UserError("no such file") if rank == 1 else None,
    "all": lambda rank: UserError("seed is -1"),
    "disk": lambda rank: OSError(28, "No space left on device", "a/b") if rank == 1 else None,
}


def fail_together(world: World, fault: str) -> tuple:
    error = FAULTS[fault](world.rank)

    def function():
        if error is not None:
            raise error
        return world.rank

    try:
        return "returned", on_all_ranks(world, function)
    except (UserError, OSError) as raised:
        return type(raised), explain(raised), tells(raised)


def fail_together_in_all_ways(world: World) -> list[tuple]:
    return [on_all_ranks(world, lambda: world.rank), *(fail_together(world, fault) for fault in FAULTS)]


def test_what_one_rank_raises_all_raise_and_rank_0_tells():
    host = f"rank 1 on {socket.gethostname()}"
    for rank, found in enumerate(run_in_processes(fail_together_in_all_ways, 2)):
        assert found == [
            rank,
            (UserError, f"no such file ({host})", rank == 0),
            (UserError, "seed is -1", rank == 0),
            (OSError, f"a/b: No space left on device ({host})", rank == 0),
        ]


def _gather_pictures_alone() -> None:
    torch.set_num_threads(2)
    world = world_from_env()
    init_distributed(world)
    pictures = {i: picture for i, picture in enumerate(torch.ones(16, 3, 64, 64))}
    sum(torch.ones(2**20) for _ in range(2))  # OpenMP's threads of this one are there
    threads = len(os.listdir("/proc/self/task"))
    (found,) = gather(pictures, world)
    assert all(torch.equal(found[i], pictures[i]) for i in pictures)
    assert len(os.listdir("/proc/self/task")) == threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_a_process_alone_gathers_without_threads_of_gloos():
    # More of OpenMP's threads than cores would make every later step on a CPU half as long again.
    ended = run_forked(_gather_pictures_alone)
    assert ended.returncode == 0, ended.output
