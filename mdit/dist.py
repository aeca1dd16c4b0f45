"""Process start-up, the same under deepspeed, torchrun, srun and plain python; rank-0 logging; the stop signal."""

import logging
import os
import signal
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

from mdit.config import UserError

logger = logging.getLogger("mdit")


@dataclass(frozen=True)
class World:
    """Who this process is among all: `device` is where its tensors live."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def identify() -> World:
    """Read rank and world size from what the launcher left in the environment; touches no network.

    Known: RANK / WORLD_SIZE / LOCAL_RANK (deepspeed, torchrun), SLURM_PROCID / SLURM_NTASKS / SLURM_LOCALID (srun, when
    this process is a step's task and not the batch shell), and nothing at all (one process).
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size, local_rank = int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        rank, size, local_rank = (int(env[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    else:
        rank, size, local_rank = 0, 1, 0
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return World(rank, size, local_rank, device)


def start(world: World) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs). One process alone gets a group of one, on no open port.

    Raises UserError when several processes have no MASTER_ADDR to meet at (deepspeed and torchrun set it).
    """
    if world.size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"MASTER_ADDR is not set, so {world.size} processes cannot find each other; under srun: export "
            'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1) MASTER_PORT=29500'
        )
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:  # processes that share a CPU share its cores
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    options = {"timeout": timedelta(minutes=30)}
    if world.size == 1:
        options["store"] = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, rank=world.rank, world_size=world.size, **options)


def configure_logging(world: World) -> None:
    """Rank 0 tells the story; the others speak up only for warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logger.setLevel(logging.INFO if world.is_first else logging.WARNING)


class StopSignal:
    """Remembers SIGTERM and SIGUSR1 so that the loop can stop between two steps, on all ranks at the same one."""

    def __init__(self) -> None:
        self.seen = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.seen = True

    def agreed(self, world: World) -> bool:
        """True on every rank once any rank has seen a signal. A collective when there is more than one rank."""
        if world.size == 1:
            return self.seen
        flag = torch.tensor(float(self.seen))  # on the CPU, through gloo: a GPU goes on undisturbed
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)
