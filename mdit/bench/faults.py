"""Faults that strike a run on purpose, one function each: it injects, waits for what must come of it, and repairs.

A function gets the run, the moment that was planned for it and a generator of its own for all else; it returns whether
there was something to strike. Another kind is a function and a line of FAULTS; CONDITIONS are those that a start runs
under from its beginning.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mdit.bench.torture_start import EPOCH, LIMIT, WATCHDOG
from mdit.bench.tortured_run import KILLED, Lost, TorturedRun, Wrong
from mdit.config import UserError
from mdit.documents import brief
from mdit.train.run_directory import CONFIG
from mdit.train.watchdog import HUNG


@dataclass(frozen=True)
class PlannedFault:
    """A fault and its moment: at a step, or `at_startup` some `delay` after a new start. `everyone`: all ranks and not
    one alone; of faults that strike no rank the harder form. `number` seeds what the fault draws itself."""

    kind: str
    step: int
    at_startup: bool
    rank: int
    everyone: bool
    delay: float
    number: int

    def ranks(self, run: TorturedRun) -> list[int]:
        processes = run.start.layout.processes
        return [*range(processes)] if self.everyone else [self.rank % processes]


# Ranks


def kill(run: TorturedRun, planned: PlannedFault, rng: random.Random) -> bool:
    run.kill(planned.ranks(run))
    return True


def stop(run: TorturedRun, planned: PlannedFault, rng: random.Random, *, number: int) -> bool:
    """A signal that asks to stop: in training, all ranks end with 0 and a checkpoint of the step reached."""
    start = run.start
    if not start.trains:
        run.kill(planned.ranks(run), number)  # nobody listens yet
        return True
    start.send(number, planned.ranks(run))
    run.await_end(start)
    late = {-number} if "finished at step" in start.text(0) else set()  # as the interpreter ends
    run.must_end({rank: {0, *late} for rank in range(len(start.ranks))})
    if "stopped at step" in start.text(0) and run.best != start.reached:
        raise Lost(f"stopped at step {start.reached}, but the newest whole checkpoint is that of step {run.best}")
    return True


def pause(run: TorturedRun, planned: PlannedFault, rng: random.Random) -> bool:
    start, ranks = run.start, planned.ranks(run)
    start.send(signal.SIGSTOP, ranks)
    time.sleep(rng.uniform(0.5, 4))
    start.send(signal.SIGCONT, ranks)
    run.must_go_on()
    return True


def hang(run: TorturedRun, planned: PlannedFault, rng: random.Random) -> bool:
    """SIGSTOP of one of two ranks for ever: the other's watchdog must end it by a line that names the stopped one."""
    start = run.start
    if not start.trains or start.layout.processes == 1:
        return False
    stopped, other = planned.rank, 1 - planned.rank
    start.send(signal.SIGSTOP, [stopped])
    if not start.wait_until(lambda: start.codes[other] is not None, WATCHDOG + LIMIT):
        start.abort()
        raise Wrong(f"hang: rank {other} waits for a stopped one, and its watchdog does not end it")
    start.kill()
    run.must_end({stopped: {KILLED}, other: {HUNG}})
    if not any(f"rank {stopped}" in line and "does not answer" in line for line in start.errors):
        raise Wrong(f"hung, and ended with {start.errors}, which do not name rank {stopped}")
    return True


# Disks


def not_written(run: TorturedRun, planned: PlannedFault, rng: random.Random, *, way) -> bool:
    """The run directory takes nothing for a while. Training goes on and says what is not saved; a start is refused."""
    start = run.start
    if not start.trains:
        return False
    due, before = 3 * run.place.checkpoint_every, len(start.text(0))

    def said() -> bool:
        return " not saved: " in start.text(0)[before:]

    with way(run):
        begun = start.reached  # by now: to fill a disk takes some steps
        if planned.everyone:
            run.kill()
            run.must_refuse(str(run.run_dir))
        else:
            start.wait_until(lambda: not start.running or said() or start.reached > begun + due, LIMIT)
            if start.running and not said():
                raise Wrong(f"from step {begun} to {start.reached} nothing could be saved, and nobody said so")
            if not start.running and {*start.codes} != {0}:
                run.must_end({rank: {2} for rank in range(len(start.ranks))})
                if not any("is not saved" in line for line in start.errors):
                    raise Wrong(f"has ended with {start.errors}, which do not say that something is not saved")
    if run.current is not None:
        run.must_go_on()
    return True


@contextmanager
def full(run: TorturedRun) -> Iterator[None]:
    ballast = run.disk / "ballast"
    try:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(2**16)):
                pass
        yield
    finally:
        ballast.unlink()


@contextmanager
def mounted(place: Path, *words: str | Path) -> Iterator[None]:
    """Mount something at `place`, by these words of mount, and unmount it. Raises UserError."""
    mount(*words, place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def mount(*words: str | Path) -> None:
    try:
        done = subprocess.run(["mount", *words], capture_output=True, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{words[-1]}: nothing can be mounted: {brief(error)}") from None
    if done.returncode:
        raise UserError(f"{words[-1]}: nothing can be mounted: {' '.join(done.stderr.split())}")


@contextmanager
def read_only(run: TorturedRun) -> Iterator[None]:
    """By a mount of the directory over itself, or by its modes, which do not hold root."""
    if os.geteuid() == 0:
        aside = run.folder / "aside"  # where nobody writes: a mount that is written to cannot become read-only
        aside.mkdir(exist_ok=True)
        with mounted(aside, "--bind", run.run_dir):
            mount("-o", "remount,bind,ro", aside)
            with mounted(run.run_dir, "--bind", aside):
                yield
        return
    folders = [run.run_dir, *(folder for folder in run.run_dir.iterdir() if folder.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o555)
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


# Checkpoints, after a kill of all ranks


def truncated(target: Path, others: list[Path], rng: random.Random) -> None:
    file = rng.choice(sorted(target.iterdir()))
    os.truncate(file, rng.randrange(file.stat().st_size))


def emptied(target: Path, others: list[Path], rng: random.Random) -> None:
    os.truncate(rng.choice(sorted(target.iterdir())), 0)


def flipped(target: Path, others: list[Path], rng: random.Random) -> None:
    file = rng.choice(sorted(target.iterdir()))
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def swapped(target: Path, others: list[Path], rng: random.Random) -> None:
    """Two files of it, or one with that of another checkpoint, but for the oldest."""
    one, other = rng.sample(sorted(target.iterdir()), 2)
    if rng.random() < 0.5 and (there := [path / one.name for path in others[:-1] if (path / one.name).exists()]):
        other = rng.choice(there)
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)


def copied(target: Path, others: list[Path], rng: random.Random) -> None:
    """Another one's files over it: all, or the tensors alone."""
    tensors_alone = rng.random() < 0.5
    for file in sorted(rng.choice(others).iterdir()):
        if not (tensors_alone and file.suffix == ".json"):
            shutil.copy(file, target / file.name)


DAMAGES = (truncated, emptied, flipped, swapped, copied)


def damage(run: TorturedRun, planned: PlannedFault, rng: random.Random, *, ways, all_of_them: bool = False) -> bool:
    """Damage the newest checkpoints, or all. The next whole one must be gone on from; without one, a start is refused
    until a copy is put back."""
    run.kill()
    whole, best, copy = run.whole(), run.best, run.folder / "copy"
    if len(whole) < 2:
        return False
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run.checkpoints, copy)
    for target in whole if all_of_them else whole[: rng.randint(1, len(whole) - 1)]:
        rng.choice(ways)(target, [path for path in whole if path != target], rng)
    run.damaged_on_purpose()
    if not run.best:
        run.must_refuse("every checkpoint is damaged")
        shutil.rmtree(run.checkpoints)
        shutil.copytree(copy, run.checkpoints)  # which may be on another disk
        run.best = best
    return True


# The training set


def bad_shard(run: TorturedRun, planned: PlannedFault, rng: random.Random, *, replaced: bool) -> bool:
    """A shard that is gone, or has the bytes of another: while a run reads it (unless `everyone`), and when one starts.
    Both end with a line that names it. A start may take the steps before it comes to that shard."""
    shard, other = rng.sample(sorted(run.place.train_set.glob("*.tar")), 2)
    aside = shard.with_suffix(".aside")
    shard.rename(aside)
    try:
        if replaced:
            shutil.copy(other, shard)
        if planned.everyone or not run.start.trains:
            run.kill()
        else:
            run.await_end(run.start)
            if {*run.start.codes} != {0}:
                errors = run.must_end({rank: {2} for rank in range(len(run.start.ranks))}).errors
                if not any(shard.name in line for line in errors):
                    raise Wrong(f"has ended with {errors}, which do not name {shard.name}")
        if run.current is None and run.best <= run.place.steps - EPOCH:
            run.must_refuse(shard.name, may_begin=replaced)
    finally:
        aside.replace(shard)
    return True


# Starts


def second_start(run: TorturedRun, planned: PlannedFault, rng: random.Random) -> bool:
    """Another start of the command in the same directory must be refused, while the first one trains or, with
    `everyone`, is stopped; the first one goes on. It is stopped in any case until the second has come so far: steps
    are faster than starts."""
    first = run.start
    first.send(signal.SIGSTOP)
    second = run.launch(layout=first.layout)
    try:
        if not planned.everyone:
            second.wait_until(lambda: "kernels: " in second.text(0) or not second.running, LIMIT)
            first.send(signal.SIGCONT)
        run.await_end(second)
        over = not first.running
    finally:
        second.kill()
        first.send(signal.SIGCONT)
    if not over:
        if {*second.codes} != {2}:
            raise Wrong(f"a second start has ended with {second.codes}, not with 2, while the first one ran")
        if len(second.errors) != 1 or "in use by process" not in second.errors[0]:
            raise Wrong(f"a second start was refused by {second.errors}")
    run.must_speak(second)
    run.must_go_on()
    return True


OTHERS = ("optim.lr=0.5", "seed=7", "training.global_batch_size=16", "ema.decay=0.5", "data.caption_drop=0.5")


def other_recipe(run: TorturedRun, planned: PlannedFault, rng: random.Random) -> bool:
    """One rank is started with another recipe."""
    run.kill()
    layout, change = next(run.layouts), rng.choice(OTHERS)
    if layout.processes == 1 and not (run.run_dir / CONFIG).exists():
        return False  # it would be a new run of that recipe
    rank = planned.rank % layout.processes
    run.must_refuse(change.partition("=")[0], layout=layout, more={rank: ["--set", change]})
    return True


# Conditions

CLOCK_BACK = """import datetime, os, time

BACK = float(os.environ["TORTURE_CLOCK_BACK"])
seconds, nanoseconds = time.time, time.time_ns
time.time = lambda: seconds() - BACK
time.time_ns = lambda: nanoseconds() - int(BACK * 1e9)


class Behind(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) - datetime.timedelta(seconds=BACK)


Behind.__name__ = Behind.__qualname__ = "datetime"
datetime.datetime = Behind
"""

SLOW_STORAGE = """import os, time

PAUSE = float(os.environ["TORTURE_SLOW"])


def slow(function):
    def wrapped(*args, **options):
        time.sleep(PAUSE)
        return function(*args, **options)

    return wrapped


os.preadv, os.fsync = slow(os.preadv), slow(os.fsync)
"""


@dataclass(frozen=True)
class Condition:
    """Python that every process of a start runs first, and its parameter: a variable and the values it may have."""

    program: str
    variable: str
    values: Collection[str]

    def environment(self, folder: Path, rng: random.Random) -> dict[str, str]:
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(self.program, encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        return {"PYTHONPATH": path, self.variable: rng.choice([*self.values])}


CONDITIONS = {
    "clock_back": Condition(CLOCK_BACK, "TORTURE_CLOCK_BACK", ("90", "7200", "40000000")),
    "slow_storage": Condition(SLOW_STORAGE, "TORTURE_SLOW", ("0.01", "0.05", "0.2")),
}


@dataclass(frozen=True)
class Fault:
    """`strike(run, planned, rng)`; whether it may come while a start begins, what it needs, and the first step at which
    it makes sense."""

    strike: Callable[[TorturedRun, PlannedFault, random.Random], bool]
    at_startup: bool = False
    mounts: bool = False
    not_before: int = 2


FAULTS = {
    "kill": Fault(kill, at_startup=True),
    "sigterm": Fault(partial(stop, number=signal.SIGTERM), at_startup=True),
    "sigint": Fault(partial(stop, number=signal.SIGINT), at_startup=True),
    "sighup": Fault(partial(stop, number=signal.SIGHUP), at_startup=True),
    "pause": Fault(pause, at_startup=True),
    "full_disk": Fault(partial(not_written, way=full), mounts=True),
    "read_only": Fault(partial(not_written, way=read_only), mounts=os.geteuid() == 0),
    **{way.__name__: Fault(partial(damage, ways=[way]), not_before=17) for way in DAMAGES},
    "all_damaged": Fault(partial(damage, ways=DAMAGES, all_of_them=True), not_before=17),
    "shard_gone": Fault(partial(bad_shard, replaced=False)),
    "shard_replaced": Fault(partial(bad_shard, replaced=True)),
    "second_start": Fault(second_start),
    "other_recipe": Fault(other_recipe, at_startup=True),
    "hang": Fault(hang),
}
KINDS = (*FAULTS, *CONDITIONS)
