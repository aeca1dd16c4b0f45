"""Doctor: what stands between these processes, on these machines, and a run; one finding a line.

A finding is "ok", "slow" (a run works, but not as it could) or "fails" (a run would end before, or in, its first step).
What a run checks itself before step 0 is not written down again here: the same functions are called.
"""

import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed

from mdit.caches import CACHES
from mdit.config import UserError
from mdit.costs.machines import LINK_SHARE, machine_named
from mdit.data.shards import open_dataset
from mdit.dist import World, cores, gather
from mdit.documents import differences, explain
from mdit.files import sync
from mdit.meeting import processes_here
from mdit.precompute import is_precomputed
from mdit.provenance import package_versions
from mdit.train.run import Run, check_data
from mdit.train.run_directory import check_space

State = Literal["ok", "slow", "fails"]
STATES: tuple[State, ...] = ("ok", "slow", "fails")
OPTIONAL = ("apex", "nvidia-dali-cuda130", "megatron-core", "torch-fidelity")
MIB = 2**20
WRITTEN, READ = 64 * MIB, 64 * MIB  # bytes of each process, for the disks
REDUCED, EXCHANGED = 256 * MIB, 64 * MIB  # bytes of a collective
REPEATS = 5
MOST_APART = 1.0  # seconds, of clocks
FEWEST_FILES, ENOUGH_FILES = 256, 1024
SHARED_MEMORY = 256 * MIB  # of each process
LEAST_SHARE = 0.5  # of what a link should reach


@dataclass(frozen=True)
class Finding:
    what: str
    state: State
    told: str

    @property
    def line(self) -> str:
        return f"{self.state:5}  {self.what:16} {self.told}"


class Slow(Exception):
    """Raised by a look at something that works, but not as it could."""


def examine(world: World, resolve: Callable[[], Run]) -> Iterator[Finding]:
    """Findings, from the processes to the run that they would do, which `resolve` returns or raises UserError. A
    collective: every rank gives the same ones."""
    runs: list[Run] = []

    def resolved() -> str:
        run = resolve()
        runs.append(run)
        ops = ", ".join(sorted(run.execution.triton_ops)) or "none"
        return f"{run.config.name} in {run.run_dir}; kernels in Triton: {ops} ({run.execution.kernels_reason})"

    looks: dict[str, Callable[[], str]] = {
        "processes": lambda: _processes(world),
        "versions": lambda: _versions(world),
        "device": lambda: _device(world),
        "cores": lambda: _cores(world),
        "clocks": lambda: _clocks(world),
        "gloo": lambda: _gloo(world),
        "NCCL": lambda: _nccl(world),
        "open files": _open_files,
        "locked memory": lambda: _locked_memory(world),
        "shared memory": lambda: _shared_memory(world),
        "caches": _caches,
        "recipe": resolved,
    }
    for what, look in looks.items():
        yield _examined(world, what, look)
    if not all(gather(bool(runs), world)):
        return
    (run,) = runs
    yield _examined(world, "data", lambda: _data(run))
    yield _examined(world, "run directory", lambda: _run_directory(run))


def _examined(world: World, what: str, look: Callable[[], str]) -> Finding:
    """The worst of what the ranks found, of those the first rank's."""
    try:
        state, told = "ok", look()
    except Slow as slow:
        state, told = "slow", str(slow)
    except (UserError, OSError, RuntimeError) as error:
        state, told = "fails", explain(error)
    found = gather((STATES.index(state), told, socket.gethostname()), world)
    rank = max(range(len(found)), key=lambda each: (found[each][0], -each))
    worst, told, host = found[rank]
    alike = len({text for _, text, _ in found}) == 1
    where = "" if alike or worst == 0 else f" (rank {rank} on {host})"
    return Finding(what, STATES[worst], f"{told}{where}")


def _processes(world: World) -> str:
    hosts = gather(socket.gethostname(), world)
    each = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    if len({*each.values()}) > 1:
        raise Slow(f"{world.size}: {', '.join(f'{count} on {host}' for host, count in each.items())}")
    return f"{world.size}, {world.size // len(each)} on each of {len(each)} hosts"


def _versions(world: World) -> str:
    first, *others = gather(package_versions(), world)
    for rank, theirs in enumerate(others, 1):
        for key, here, there in differences(first, theirs):
            raise UserError(f"rank 0 has {key} {here}, rank {rank} has {there}")
    return ", ".join(f"{name} {number}" for name, number in {**first, **package_versions(OPTIONAL)}.items())


def _device(world: World) -> str:
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "a CPU"
    if others := {each for each in gather(name, world) if each != name}:
        raise UserError(f"{name}, other ranks have {', '.join(sorted(others))}")
    if world.device.type != "cuda":
        return f"{name}: there is no GPU"
    free, total = torch.cuda.mem_get_info(world.device)
    told = f"{name}, {total / 2**30:.0f} GiB, CUDA {torch.version.cuda}, driver {_driver()}"
    if free < 0.9 * total:
        raise Slow(f"{told}; {(total - free) / 2**30:.1f} GiB are taken already, by this process's context or others")
    if machine_named(name) is None:
        return f"{told}; no data sheet of it here, so no prediction"
    return told


def _driver() -> str:
    if (program := shutil.which("nvidia-smi")) is None:
        return "unknown (no nvidia-smi)"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    ran = subprocess.run(query, capture_output=True, encoding="utf-8", timeout=60)
    return ran.stdout.splitlines()[0].strip() if ran.stdout.strip() else "unknown"


def _cores(world: World) -> str:
    here, threads = processes_here(world), os.environ.get("OMP_NUM_THREADS", "not set")
    told = f"{cores()} for {here} processes, OMP_NUM_THREADS {threads}"
    if cores() < here:
        raise Slow(f"{told}: fewer than one for each")
    return told


def _clocks(world: World) -> str:
    gather(None, world)  # all are here
    times = gather(time.time(), world)
    apart = max(times) - min(times)
    if apart > MOST_APART:
        raise Slow(f"{apart:.1f} s apart: times in logs and of files mislead")
    return f"within {apart:.2g} s"


def _gloo(world: World) -> str:
    if world.size == 1:
        return "one process: nothing to send"
    total = torch.tensor(float(world.rank))
    torch.distributed.all_reduce(total)
    if total != (expected := world.size * (world.size - 1) / 2):
        raise UserError(f"an all-reduce of the ranks' numbers gives {total:g}, not {expected:g}")
    seconds = _seconds(lambda: torch.distributed.all_reduce(total), torch.device("cpu"))
    return f"an all-reduce takes {1e3 * seconds:.2g} ms"


def _nccl(world: World) -> str:
    """Bandwidths as nccl-tests counts them: what passes each GPU's links in one direction."""
    if world.device.type != "cuda" or world.size == 1:
        return "not used: " + ("no GPU" if world.device.type != "cuda" else "one process")
    share = (world.size - 1) / world.size
    reduced = torch.ones(REDUCED // 2, dtype=torch.bfloat16, device=world.device)
    seconds = _seconds(lambda: torch.distributed.all_reduce(reduced), world.device)
    sent = torch.ones(EXCHANGED // 2 // world.size * world.size, dtype=torch.bfloat16, device=world.device)
    got = torch.empty_like(sent)
    exchange = _seconds(lambda: torch.distributed.all_to_all_single(got, sent), world.device)
    rates = {"all-reduce": 2 * share * REDUCED / seconds, "all-to-all": share * sent.nbytes / exchange}
    told = ", ".join(f"{name} {rate / 1e9:.0f} GB/s" for name, rate in rates.items())
    if (machine := machine_named(torch.cuda.get_device_name(world.device))) is None:
        return told
    within = world.size <= processes_here(world)
    expected = LINK_SHARE * (machine.link if within else machine.network)
    told = f"{told}; {expected / 1e9:.0f} expected {'in a node' if within else 'between nodes'}"
    if min(rates.values()) < LEAST_SHARE * expected:
        raise Slow(f"{told}: NCCL_DEBUG=INFO says what it chose")
    return told


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / REPEATS


def _open_files() -> str:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a run raises what it has as far as it may
    if most != resource.RLIM_INFINITY and most < FEWEST_FILES:
        raise UserError(f"ulimit -Hn is {most}; a run needs {FEWEST_FILES}")
    if most != resource.RLIM_INFINITY and most < ENOUGH_FILES:
        raise Slow(f"ulimit -Hn is {most}: sets of many shards are opened again and again")
    return "ulimit -Hn is " + ("unlimited" if most == resource.RLIM_INFINITY else str(most))


def _locked_memory(world: World) -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    told = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / MIB:.0f} MiB"
    if world.device.type == "cuda" and world.size > processes_here(world) and soft != resource.RLIM_INFINITY:
        raise Slow(f"ulimit -l is {told}: InfiniBand pins its buffers and wants it unlimited")
    return f"ulimit -l is {told}"


def _shared_memory(world: World) -> str:
    place = Path("/dev/shm")
    if not place.is_dir():
        return "no /dev/shm here"
    free, wanted = shutil.disk_usage(place).free, SHARED_MEMORY * processes_here(world)
    told = f"{free / 2**30:.1f} GiB free in {place}"
    if world.device.type == "cuda" and free < wanted:
        raise Slow(f"{told}: NCCL wants up to {wanted / 2**30:.1f} (docker run --shm-size)")
    return told


def _caches() -> str:
    told = []
    for name in CACHES:
        if not (place := os.environ.get(name)):
            told.append(f"{name} not set: in the home directory")
            continue
        Path(place).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place):
            told.append(place)
    return ", ".join(told)


def _data(run: Run) -> str:
    if not is_precomputed(run.config):
        return f"{', '.join(run.config.data.train)}: not there yet; made before the first step"
    check_data(run)
    sets = [open_dataset(directory) for directory in run.config.data.train]
    shard = max((each.directory / each.manifest.shards[0].file for each in sets), key=lambda file: file.stat().st_size)
    began, read = time.perf_counter(), 0
    with shard.open("rb", buffering=0) as file:
        while read < READ and (content := file.read(8 * MIB)):
            read += len(content)
    rate = read / (time.perf_counter() - began) / 1e6
    return f"{sum(each.samples for each in sets):,} samples; {rate:,.0f} MB/s from {shard.name}, or from memory"


def _run_directory(run: Run) -> str:
    """Write, sync, rename, read and remove in the nearest directory that is there, and see whether a run has room."""
    place = next(each for each in (run.run_dir.absolute(), *run.run_dir.absolute().parents) if each.is_dir())
    check_space(place, run.config)
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor_") as folder:
        path, content = Path(folder, "written"), os.urandom(MIB)
        began = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(WRITTEN // MIB):
                file.write(content)
        sync(path)
        rate = WRITTEN / (time.perf_counter() - began) / 1e6
        path.rename(other := Path(folder, "renamed"))
        with other.open("rb") as file:
            if file.read(MIB) != content:
                raise UserError(f"{other}: reads back as something else than was written")
    return f"{place}: {rate:,.0f} MB/s written and synced, {shutil.disk_usage(place).free / 2**30:,.0f} GiB free"
