"""Process start-up, the same under deepspeed, torchrun, srun and plain python; rank-0 logging; the stop signal."""

import errno
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed

from mdit.config import UserError

logger = logging.getLogger("mdit")
T = TypeVar("T")


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
    device = torch.device("cpu")
    if torch.cuda.is_available():
        own_gpu_only = "SLURM_STEP_ID" in env and torch.cuda.device_count() == 1  # as with --gpus-per-task: number 0
        device = torch.device("cuda", 0 if own_gpu_only else local_rank)
    return World(rank, size, local_rank, device)


def start(world: World) -> None:
    """Join the process group (NCCL on GPUs, gloo on CPUs). One process alone gets a group of one, on no open port.

    Several meet at MASTER_ADDR:MASTER_PORT, which deepspeed and torchrun set. Under srun, what is not set is found: the
    first host of the step and a port that follows from the numbers of job and step. Raises UserError elsewhere, and
    where a node has more processes than GPUs.
    """
    if world.size > 1:
        find_meeting_point(world)
    on_gpu = world.device.type == "cuda"
    if on_gpu and world.device.index >= (seen := torch.cuda.device_count()):
        raise UserError(f"LOCAL_RANK = {world.local_rank}, but {seen} GPUs are to be seen: start one process for each")
    local_rank = world.device.index if on_gpu else world.local_rank  # by which DeepSpeed chooses the GPU
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local_rank))
    if on_gpu:
        torch.cuda.set_device(world.device)
    elif "OMP_NUM_THREADS" not in os.environ:  # processes that share a CPU share its cores
        beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // beside))
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    options = {"timeout": timedelta(minutes=30)}
    if world.size == 1:
        options["store"] = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, rank=world.rank, world_size=world.size, **options)


def gather(value: Any, world: World) -> list:
    """One small object of every rank, on every rank. A collective."""
    values = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values


def on_all_ranks(world: World, function: Callable[[], T]) -> T:
    """Return what `function` returns on this rank. A collective: where it raises on any rank, all ranks raise the error
    of the first such rank, so none waits for one that is gone; UserError and OSError stay what they are. The line names
    that rank and its host, but for rank 0 and where all ranks say the same."""
    value, error = None, None
    try:
        value = function()
    except Exception as caught:
        error = caught
    where = "" if world.is_first else f" (rank {world.rank} on {socket.gethostname()})"
    found = gather(error and (*_described(error), where), world)
    if error is not None and not isinstance(error, UserError | OSError):
        raise error  # a fault of ours, with its traceback
    if errors := [each for each in found if each]:
        kind, arguments, where = errors[0]
        alike = len(errors) == world.size and all(each[:2] == (kind, arguments) for each in errors)
        raise shared(_made(kind, arguments, "" if alike else where))
    return value


def shared(error: Exception) -> Exception:
    """The error, marked as one that all ranks raise alike, so that rank 0 alone tells it."""
    error.all_ranks_have_it = True
    return error


def tells(error: BaseException) -> bool:
    """Whether this process is the one to print an error: rank 0 where all ranks have it, else whoever raises it."""
    if not (isinstance(error, KeyboardInterrupt) or getattr(error, "all_ranks_have_it", False)):
        return True
    try:
        return identify().is_first
    except UserError:
        return True


def _described(error: Exception) -> tuple[type[Exception], tuple]:
    """An error as it can be sent: its class and arguments."""
    if isinstance(error, UserError):
        return UserError, (str(error),)
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str | bytes | None) else str(error.filename)
        return OSError, (error.errno or errno.EIO, error.strerror or str(error), name)
    return RuntimeError, (f"{type(error).__name__}: {error}",)


def _made(kind: type[Exception], arguments: tuple, where: str) -> Exception:
    """The error again, with `where` it happened in its words."""
    if kind is OSError:
        number, reason, name = arguments
        return OSError(number, reason + where, name)
    return kind(arguments[0] + where)


def find_meeting_point(world: World) -> None:
    """Set MASTER_ADDR and MASTER_PORT from what srun tells its tasks; what is set already stays."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(port_of_step(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]:
        raise UserError(
            f"{' and '.join(missing)}: not set, so {world.size} processes cannot find each other; start them with "
            "deepspeed, torchrun or srun, or export MASTER_ADDR=<the host of rank 0> MASTER_PORT=<a free port there>"
        )


def first_host(node_list: str) -> str:
    """The first name that `scontrol show hostnames` makes of Slurm's "rack[1-2]n[07-12,15],login". No scontrol needed:
    inside containers there is none."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])+", node_list).group()  # up to a comma outside brackets
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port_of_step(job: int, step: int) -> int:
    """20000..29999: below the ports that Linux hands out by itself, different for jobs and steps that share a host."""
    return 20000 + (job + 1009 * step) % 10000


def configure_logging(world: World) -> None:
    """Rank 0 tells the story; the others speak up only for warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logger.setLevel(logging.INFO if world.is_first else logging.WARNING)


class StopSignal:
    """Ends the loop between two steps, on all ranks at the same one: by SIGTERM or SIGUSR1 to any rank, or a stop file.

    Rank 0 looks for the file. A person makes an empty one (touch). One with a word in it says that the run should go on
    later: a batch script writes that, and so does rank 0 after a signal. What is left of an earlier stop is removed.
    """

    def __init__(self, stop_file: Path, world: World) -> None:
        self.stop_file, self.world, self.signalled = stop_file, world, False
        if world.is_first:
            stop_file.unlink(missing_ok=True)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame) -> None:
        self.signalled = True

    def agreed(self) -> bool:
        """True on every rank once any of them has a reason to stop. A collective when there is more than one rank."""
        stop = self.signalled or (self.world.is_first and self.stop_file.exists())
        if self.world.size > 1:
            flag = torch.tensor(float(stop))  # on the CPU, through gloo: a GPU goes on undisturbed
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        if stop and self.world.is_first and not self.stop_file.exists():
            try:
                self.stop_file.write_text("a signal\n", encoding="utf-8")
            except OSError as error:
                logger.warning(f"{self.stop_file}: cannot be written ({error.strerror}); stopping all the same")
        return stop
