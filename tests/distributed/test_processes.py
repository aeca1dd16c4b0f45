"""Forked processes stand in for real starts, so they have to be like them."""

import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

from tests import processes
from tests.processes import fork_server, run_forked
from tests.training import command, environment, read_metrics, run_in_processes, train, write_ds_json, write_recipe


def test_forked_processes_train_as_those_of_torchrun(tmp_path):
    """Two processes that share experts and accumulate under ZeRO-2: the same numbers to the last bit, and snapshot."""
    recipe, settings = write_recipe(tmp_path), {"expert_parallel": 2}
    ds_json = write_ds_json(tmp_path / "ds.json", stage=2, micro_batch=2, mdit=settings)
    started = command(recipe, ds_json, tmp_path / "torchrun", processes=2)
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "shm_comm" not in done.stdout + done.stderr, "DeepSpeed compiled an op for CPUs"
    printed = train(recipe, ds_json, tmp_path / "forked", processes=2)
    assert "finished at step 4" in done.stderr and "finished at step 4" in printed
    for key in ("loss", "gradient_norm"):
        ours, theirs = (read_metrics(tmp_path / name, key) for name in ("forked", "torchrun"))
        assert ours == theirs and len(ours) == 4
    for kind in ("raw", "ema"):
        ours, theirs = (
            tmp_path / name / "snapshots" / "latest" / f"{kind}.safetensors" for name in ("forked", "torchrun")
        )
        assert ours.read_bytes() == theirs.read_bytes()


def sums(world, offset: torch.Tensor) -> tuple[int, torch.Tensor, str]:
    total = offset + world.rank
    torch.distributed.all_reduce(total)
    return world.rank, total, torch.distributed.get_backend()


def fail_on_rank_1(world) -> None:
    if world.rank == 1:
        raise ValueError("the reason")
    time.sleep(60)


def test_a_process_that_fails_ends_the_others_and_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(processes, "GRACE", 0.2)
    with pytest.raises(AssertionError, match="(?s)Traceback.*fail_on_rank_1.*ValueError: the reason") as raised:
        run_in_processes(fail_on_rank_1, 2)
    assert "not done" not in str(raised.value)


def talk_and(action: str) -> None:
    print("on stdout")
    os.system("echo from a program")
    print(os.environ["GREETING"], file=sys.stderr, flush=True)
    if action == "exit":
        sys.exit(7)
    sys.stdout.flush()
    if action == "abort":
        os.abort()
    if action == "sleep":
        time.sleep(60)


@pytest.mark.parametrize("action, returncode", [("return", 0), ("exit", 7), ("abort", -6)])
def test_exit_status_streams_and_environment_are_those_of_a_program(monkeypatch, action, returncode):
    monkeypatch.setenv("GREETING", "hello")
    ended = run_forked(talk_and, action)
    assert ended.returncode == returncode
    assert sorted(ended.output.splitlines()[:3]) == ["from a program", "hello", "on stdout"]
    monkeypatch.setenv("GREETING", "hello again")
    assert "good bye" in run_forked(talk_and, action, env={"GREETING": "good bye"}).output


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_the_server_has_no_thread_that_a_fork_would_lose():
    fork_server()
    assert run_in_processes(sums, 1, torch.zeros(1))  # it has imported everything
    server = forkserver._forkserver._forkserver_pid
    assert len(list(Path(f"/proc/{server}/task").iterdir())) == 1


def use_gpu() -> None:
    print(torch.ones(2, device="cuda").sum().item())


@pytest.mark.gpu
def test_a_gpu_can_be_used_after_the_fork():
    assert run_forked(use_gpu).output.endswith("2.0\n")
