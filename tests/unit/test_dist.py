import logging
import os
import signal
import subprocess
import sys

import pytest
import torch

from mdit.dist import StopSignal, World, configure_logging, identify, logger

CPU = torch.device("cpu")


@pytest.fixture
def environment(monkeypatch):
    """An environment with no trace of a launcher, on a machine without a GPU; returns a function that adds to it."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]


def test_plain_python_is_one_process(environment):
    assert identify() == World(rank=0, size=1, local_rank=0, device=CPU)


def test_deepspeed_and_torchrun_give_rank_world_size_and_local_rank(environment):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="node0", MASTER_PORT="29500")
    assert identify() == World(rank=5, size=8, local_rank=1, device=CPU)


SRUN = dict(SLURM_JOB_ID="7", SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1")


def test_a_task_of_srun_takes_its_place_from_slurm(environment):
    environment(**SRUN, SLURM_STEP_ID="0")
    assert identify() == World(rank=3, size=4, local_rank=1, device=CPU)


def test_the_batch_shell_of_a_job_is_one_process(environment):
    """sbatch sets SLURM_PROCID too; waiting there for three more processes would hang for ever."""
    environment(**{**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert identify() == World(rank=0, size=1, local_rank=0, device=CPU)


def test_deepspeed_inside_a_slurm_step_goes_by_deepspeeds_ranks(environment):
    environment(**SRUN, SLURM_STEP_ID="0", RANK="6", WORLD_SIZE="16", LOCAL_RANK="2")
    assert identify() == World(rank=6, size=16, local_rank=2, device=CPU)


def test_each_process_of_a_node_gets_its_own_gpu(environment, monkeypatch):
    environment(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert identify().device == torch.device("cuda", 1)


def test_only_rank_0_is_first():
    assert World(0, 2, 0, CPU).is_first and not World(1, 2, 1, CPU).is_first


def test_only_rank_0_tells_the_story_but_all_may_warn():
    before = logger.level
    try:
        configure_logging(World(1, 2, 1, CPU))
        assert not logger.isEnabledFor(logging.INFO) and logger.isEnabledFor(logging.WARNING)
        configure_logging(World(0, 2, 0, CPU))
        assert logger.isEnabledFor(logging.INFO)
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_is_remembered_until_the_loop_asks(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        stop, alone = StopSignal(), World(0, 1, 0, CPU)
        assert not stop.agreed(alone)
        signal.raise_signal(number)
        assert stop.agreed(alone) and stop.agreed(alone)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


ONE_PROCESS = """
import torch
from mdit.dist import identify, start
start(identify())
t = torch.ones(1)
torch.distributed.all_reduce(t)
print(torch.distributed.get_world_size(), t.item(), torch.distributed.get_backend())
torch.distributed.destroy_process_group()
"""


def test_one_process_starts_a_group_of_one_with_no_address_given(environment):
    command = [sys.executable, "-c", ONE_PROCESS]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.split() == ["1", "1.0", "gloo"]
