"""Who this process is, the same under deepspeed, torchrun, srun, mpirun and plain python; errors of several ranks;
rank-0 logging; the stop signal."""

import errno
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed

from mdit.config import UserError
from mdit.documents import explain

logger = logging.getLogger("mdit")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Who this process is among all: `device` is where its tensors live, `group` by what the ranks speak with each
    other (None: the default group)."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    group: torch.distributed.ProcessGroup | None = None

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


# What launchers call the rank, the number of processes, and the number on this node; the first that is there counts.
# mpirun starts its daemons as tasks of srun, whose variables its processes then have too.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", ("LOCAL_RANK",)),  # deepspeed, torchrun, or by hand
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", ("MV2_COMM_WORLD_LOCAL_RANK",)),
    ("PMI_RANK", "PMI_SIZE", ("MPI_LOCALRANKID", "SLURM_LOCALID")),  # MPICH, Intel MPI, srun --mpi=pmi2
)
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ("SLURM_LOCALID",))
# A process's number among several, from launchers that do not say in one way how many there are.
UNKNOWN = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "FLUX_TASK_RANK", "JSM_NAMESPACE_RANK")
# Slurm numbers what is no step of srun's from here on: the shell of salloc (interactive), of sbatch, and others.
FIRST_SPECIAL_STEP = 0xFFFFFFF0
MANY = 10**6  # processes


def world_from_env() -> World:
    """Read rank and world size from what the launcher left in the environment; touches no network.

    Known are LAUNCHERS, srun (where this process is a step's task, not the shell of a job), and nothing at all, which
    is one process. Raises UserError for values that cannot be, and for the variables of other launchers. Settles how
    this process computes too, as whatever computes begins here.
    """
    settle_numerics()
    env = os.environ
    device = torch.device("cpu")
    rank, size, local_rank = _place()
    if torch.cuda.is_available():
        own_gpu_only = "SLURM_STEP_ID" in env and torch.cuda.device_count() == 1  # as with --gpus-per-task: number 0
        device = torch.device("cuda", 0 if own_gpu_only else local_rank)
    return World(rank, size, local_rank, device)


def _place() -> tuple[int, int, int]:
    """Rank, world size, local rank."""
    env = os.environ
    in_step = "SLURM_PROCID" in env and number("SLURM_STEP_ID", FIRST_SPECIAL_STEP, 2**32) < FIRST_SPECIAL_STEP
    launchers = (*LAUNCHERS, SRUN) if in_step else LAUNCHERS
    for rank_name, size_name, local_names in launchers:
        if rank_name not in env and size_name not in env:
            continue
        if size_name == "SLURM_STEP_NUM_TASKS" and size_name not in env:
            size_name = "SLURM_NTASKS"
        for name, other in ((rank_name, size_name), (size_name, rank_name)):
            if name not in env:
                raise UserError(f"{name}: not set, though {other} = {env[other]!r} is; {HOW_TO_START}")
        size = number(size_name, None, MANY, least=1)
        local_name = next((name for name in local_names if name in env), local_names[0])
        try:
            return number(rank_name, None, size - 1), size, number(local_name, 0, size - 1)
        except UserError as error:
            raise UserError(f"{error}; {size_name} = {size}") from None
    if found := [name for name in UNKNOWN if name in env and not in_step]:
        raise UserError(f"{found[0]} = {env[found[0]]!r} is of a launcher that is not known here; {HOW_TO_START}")
    return 0, 1, 0


HOW_TO_START = (
    "start with deepspeed, torchrun or srun, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for "
    "each process"
)


def number(name: str, default: int | None, most: int, least: int = 0) -> int:
    """The whole number in an environment variable; `default` where it is not set. Raises UserError otherwise."""
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not re.fullmatch(r"[0-9]{1,10}", value) or not least <= int(value) <= most:
        raise UserError(f"{name} = {value!r}: expected a whole number from {least} to {most}")
    return int(value)


def settle_numerics() -> None:
    """Let cuBLAS add up in float32 what it splits, and in fixed workspaces, so that a sum is the same each time.

    By default it may round partial sums to the operands' dtype, as of a weight's gradient over 65,536 rows. The
    variable is read when cuBLAS is first used in a process: set it before CUDA is asked for anything.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the size that PyTorch gives it on an H100 anyway
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def work_on(device: torch.device) -> None:
    """Give this thread its device, before it touches CUDA in any way. Every new thread is on GPU 0, where its first
    pinned buffer, event or kernel would open a context: half a GiB there for each process of the node. Raises UserError
    for a GPU that is not there."""
    if device.type == "cuda":
        if (device.index or 0) >= (seen := torch.cuda.device_count()):
            raise UserError(f"LOCAL_RANK = {device.index}, but {seen} GPUs are to be seen: start one process for each")
        torch.cuda.set_device(device)


def cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_rendezvous(world: World) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT, where they are not set from what srun tells its tasks. Raises UserError."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env:
        env.setdefault("MASTER_ADDR", first_host(env["SLURM_STEP_NODELIST"]))
        env.setdefault("MASTER_PORT", str(port_of_step(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"]))))
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]:
        raise UserError(
            f"{' and '.join(missing)}: not set, so {world.size} processes cannot find each other; start them with "
            "deepspeed, torchrun or srun, or export MASTER_ADDR=<the host of rank 0> MASTER_PORT=<a free port there>"
        )
    return env["MASTER_ADDR"], number("MASTER_PORT", None, 65535, least=1)


def gather(value: Any, world: World) -> list:
    """One small object of every rank, on every rank. A collective."""
    if world.size == 1:
        # gloo copies in a thread of its own, with OpenMP threads of its own when tensors are large. OpenMP then counts
        # more threads than cores and lets all of them sleep between operations: a CPU's steps take half as long again.
        return [value]
    values = [None] * world.size
    torch.distributed.all_gather_object(values, value, group=world.group)
    return values


def on_all_ranks(world: World, function: Callable[[], T]) -> T:
    """Return what `function` returns on this rank. A collective: where it raises on any rank, all ranks raise the error
    of the first such rank, so none waits for one that is gone; UserError and OSError stay what they are. The line names
    that rank and its host, but for rank 0 and where all ranks say the same."""
    value, error = cast(T, None), None
    try:
        value = function()
    except Exception as caught:
        error = caught
    where = "" if world.is_rank_zero else f" (rank {world.rank} on {socket.gethostname()})"
    found = gather(error and (_plain(error), _plain(error, where)), world)
    if error is not None and not isinstance(error, UserError | OSError):
        raise error  # a fault of ours, with its traceback
    if errors := [each for each in found if each]:
        alike = len(errors) == world.size and len({explain(plain) for plain, _ in errors}) == 1
        raise shared(errors[0][0 if alike else 1])
    return value


def on_rank_zero(world: World, function: Callable[[], T]) -> T:
    """Return on all ranks what `function`, called on rank 0, returns there. A collective, which raises on all ranks
    what is raised there."""
    value = on_all_ranks(world, function if world.is_rank_zero else lambda: cast(T, None))
    return gather(value, world)[0]


def shared(error: Exception | str) -> Exception:
    """The error, or a UserError of these words, marked as one that all ranks raise alike: rank 0 alone tells it."""
    error = UserError(error) if isinstance(error, str) else error
    vars(error)["all_ranks_have_it"] = True
    return error


def tells(error: BaseException) -> bool:
    """Whether this process is the one to print an error: rank 0 where all have it, else whoever raises it first."""
    if getattr(error, "told_elsewhere", False):
        return False
    if not (isinstance(error, KeyboardInterrupt) or getattr(error, "all_ranks_have_it", False)):
        return True
    try:
        return world_from_env().is_rank_zero
    except UserError:
        return True


def _plain(error: Exception, where: str = "") -> Exception:
    """The error as it can be sent to other ranks, with `where` it happened in its words."""
    if isinstance(error, OSError):
        name = error.filename if isinstance(error.filename, str | bytes | None) else str(error.filename)
        return OSError(error.errno or errno.EIO, (error.strerror or str(error)) + where, name)
    if isinstance(error, UserError):
        return UserError(f"{error}{where}")
    return RuntimeError(f"{type(error).__name__}: {error}{where}")


def enumerated(noun: str, numbers: Collection[int], most: int = 8) -> str:
    """ "rank 3", "ranks 1, 2, 3 and 9 more"."""
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{noun}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, sorted(numbers)[:most]))}{more}"


def first_host(node_list: str) -> str:
    """The first name that `scontrol show hostnames` makes of Slurm's "rack[1-2]n[07-12,15],login". No scontrol needed:
    inside containers there is none."""
    first = re.split(r",(?![^[]*\])", node_list)[0]  # at commas outside brackets
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first)


def port_of_step(job: int, step: int) -> int:
    """20000..29999: below the ports that Linux hands out by itself, different for jobs and steps that share a host."""
    return 20000 + (job + 1009 * step) % 10000


def configure_logging(world: World) -> None:
    """Rank 0 tells the story; the others speak up only for warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logger.setLevel(logging.INFO if world.is_rank_zero else logging.WARNING)


class StopSignal:
    """Ends the loop between two steps, on all ranks at the same one: by a signal to any rank, or by a stop file.

    Rank 0 looks for the file. A person makes an empty one (touch). One with a word in it says that the run should go on
    later: a batch script writes that, and so does rank 0 after a signal. Of SIGINT (Ctrl-C) and SIGHUP (the terminal is
    closed) the second one ends the process at once; where they are ignored, as under nohup, they stay so.
    """

    def __init__(self, stop_file: Path, world: World) -> None:
        self.stop_file, self.world, self.signalled = stop_file, world, False
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)
        for number in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note_once)

    def _note(self, number: int, frame) -> None:
        self.signalled = True

    def _note_once(self, number: int, frame) -> None:
        self.signalled = True
        signal.signal(number, signal.SIG_DFL)  # needs no Python: ends a process that waits in a collective, too
        if number == signal.SIGHUP:  # what is written to a terminal that is gone would be an error
            nothing = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(nothing, descriptor)
        if self.world.is_rank_zero:
            name = signal.Signals(number).name
            line = f"\n{name}: saves a checkpoint after this step and stops; the next one ends at once\n"
            with suppress(OSError):
                os.write(2, line.encode())  # sys.stderr may be in the midst of a line of its own

    def requested(self) -> bool:
        """True on every rank once any of them has a reason to stop. A collective when there is more than one rank."""
        stop = self.signalled or (self.world.is_rank_zero and self.stop_file.exists())
        if self.world.size > 1:
            flag = torch.tensor(float(stop))  # on the CPU, through gloo: a GPU goes on undisturbed
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            stop = bool(flag)
        if stop and self.world.is_rank_zero and not self.stop_file.exists():
            try:
                self.stop_file.write_text("a signal\n", encoding="utf-8")
            except OSError as error:
                logger.warning(f"{self.stop_file}: cannot be written ({error.strerror}); stopping all the same")
        return stop


def forget_stop(stop_file: Path, began: float) -> None:
    """Remove what is left of an earlier stop: a stop file older than `began`, in seconds of this machine's clock. The
    file's own time is that of its file system, whose clock is asked by making a file."""
    if stop_file.exists():
        with tempfile.NamedTemporaryFile(dir=stop_file.parent, prefix=".clock.", suffix=".partial") as file:
            ahead = os.stat(file.name).st_mtime - time.time()
        if stop_file.stat().st_mtime < began + ahead:
            stop_file.unlink(missing_ok=True)
