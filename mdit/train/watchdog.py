"""The watchdog: ends a run in which nothing moves any more, and says which rank waits for which.

A rank moves while the Python stacks of its main thread, of those that read, save or go backward for it, or the work of
its child processes (compilers) change. A run hangs when no rank has moved for `watchdog_s` seconds: what is slow on one
rank, as a validation, a compilation or a full disk, moves there while the others wait. Ranks tell each other at the
store where they met, by a connection of their own; one that is stopped or cut off falls silent.
"""

import json
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import sleep
from types import CodeType, FrameType
from typing import Any

import psutil
from torch.distributed import DistError

import mdit
from mdit.dist import World, enumerated
from mdit.documents import parse_foreign_json, parse_json
from mdit.meeting import Patience, own_store, within
from mdit.train.run_directory import RunDirectory

HUNG = 128 + int(signal.SIGALRM)  # exit code: as of a program that an alarm ended, which may be started again
LOGS = "logs"  # in a run's directory
WORKERS = ("mdit-saving", "mdit-read-ahead", "mdit-reader")  # threads that the main one waits for
MODULES = Path(mdit.__file__).parent
FAREWELL = 3.0  # seconds for all ranks to write down where they are
STATES = {"T": "stopped", "t": "stopped", "D": "in a call that the kernel cannot interrupt", "Z": "dead", "": "gone"}


@dataclass(frozen=True)
class Place:
    """Place of a rank: host, process, the step that it has reached, the innermost function of mdit in which its main
    thread is, or the worker that this waits for, whether it waits there for other ranks, and the collective that it has
    begun and that has not ended, as torch names it."""

    host: str
    pid: int
    step: int | None = None
    where: str = ""
    waits: bool = False
    collective: str = ""


class Watchdog(AbstractContextManager):
    """Inside, a run that hangs for `seconds` (0: never) leaves the stacks of all threads of all ranks in run_dir/logs
    and ends with the exit code HUNG."""

    def __init__(self, directory: RunDirectory, world: World, seconds: float) -> None:
        self.directory, self.world, self.seconds = directory, world, seconds
        self.tick = min(1.0, seconds / 10)
        self.main = threading.get_ident()
        # In seconds of this process's own time: one that was stopped and goes on has not waited meanwhile.
        self.clock, self.moved, self.heard = 0.0, 0.0, 0.0
        self._left = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if world.size > 1:
            self._threads.append(threading.Thread(target=self._exchange, name="watchdog-courier", daemon=True))

    def __enter__(self) -> "Watchdog":
        for thread in self._threads if self.seconds else ():
            thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._left.set()
        for thread in self._threads if self.seconds else ():
            thread.join(FAREWELL)  # one that torch still holds as Python ends would abort the process

    def _watch(self) -> None:
        """Note when this rank moves. Ends it where it is alone, and where rank 0 has fallen silent."""
        last = None
        while not self._left.wait(self.tick):
            self.clock += self.tick
            late = self.clock - self.moved > self.seconds / 2
            found = (self.directory.step, stacks_of(self.main)), children_seconds() if late else 0.0
            if last is None or found[0] != last[0] or (late and found[1] > last[1] > 0):
                self.moved = self.clock
            last = found
            if self.clock - max(self.moved, self.heard) >= self.seconds:
                self._end_alone()

    def _exchange(self) -> None:
        """Tell the others how long this rank has not moved, hear of them, and end with them."""
        with suppress(DistError):  # it ends with rank 0, or with torchrun
            store = own_store()
            store.set(f"place/{self.world.rank}", _to_json(place(self.main, self.directory.step)))
            beats, pulses, first = 0, {}, b""
            while not self._left.wait(self.tick):
                beats += 1
                store.set(f"pulse/{self.world.rank}", f"{beats} {self.clock - self.moved}")
                if store.check(["hang"]):
                    return self._end_together(store, store.get("hang").decode())
                if self.world.is_rank_zero and self._all_still(store, pulses):
                    store.set("hang", datetime.now(UTC).strftime("%Y%m%dT%H%M%S"))
                if store.check(["pulse/0"]) and (pulse := store.get("pulse/0")) != first:
                    first, self.heard = pulse, self.clock

    def _all_still(self, store: Any, pulses: dict[int, tuple[bytes, float]]) -> bool:
        """Whether no rank has moved for long enough; one whose pulse does not change has not since it last did.
        `pulses` has what was heard last of each rank, and when."""
        everyone = [f"pulse/{rank}" for rank in range(self.world.size)]
        if not store.check(everyone):
            return False
        for rank, pulse in enumerate(store.multi_get(everyone)):
            if pulses.get(rank, (b"",))[0] != pulse:
                pulses[rank] = pulse, self.clock
        still = (float(pulse.split()[1]) + self.clock - since for pulse, since in pulses.values())
        return min(still) >= self.seconds

    def _end_together(self, store: Any, time: str) -> None:
        """Rank 0 tells the line. It ends last: the others' main threads would take its end for the fault."""
        self._left.set()  # no watch any more
        written, here = self._write_down(time)
        store.set(f"hung/{self.world.rank}", _to_json(here))
        if self.world.is_rank_zero:
            patience, places, ranks = Patience(FAREWELL, says=False), {}, range(self.world.size)
            while len(places) < self.world.size and not patience.over("the others"):
                places = {r: _from_json(store.get(f"hung/{r}")) for r in ranks if store.check([f"hung/{r}"])}
            silent = {r: _from_json(store.get(f"place/{r}")) for r in ranks if r not in places}
            self._tell(places, silent, written)
        sleep(FAREWELL / 3 if self.world.is_rank_zero else FAREWELL / 6)
        os._exit(HUNG)

    def _end_alone(self) -> None:
        written, here = self._write_down(datetime.now(UTC).strftime("%Y%m%dT%H%M%S"))
        if self.world.local_rank == 0 or self.world.rank == 1:  # one or two of a host are enough
            self._tell({self.world.rank: here}, {0: None} if self.world.size > 1 else {}, written)
        os._exit(HUNG)

    def _tell(self, places: Mapping[int, Place], silent: Mapping[int, Place | None], written: str) -> None:
        told = describe_hang(places, silent, self.seconds)
        sys.stderr.write(f"error: {self.directory.path}: {told}; {written}\n")
        sys.stderr.flush()

    def _write_down(self, time: str) -> tuple[str, Place]:
        """Write all stacks and torch's records -> where they are, in words, and where this rank is."""
        path = self.directory.path / LOGS / f"hung_{time}_rank_{self.world.rank:05d}.txt"
        content, records = all_stacks(), within(FAREWELL / 3, flight_records) or {}
        here = place(self.main, self.directory.step, records)

        def write() -> bool:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content, encoding="utf-8")
                for backend, record in records.items():
                    path.with_suffix(f".{backend}.json").write_bytes(record)
                return True
            return False

        files = path.with_name(f"hung_{time}_rank_*.txt")
        written = within(FAREWELL / 3, write)
        return f"stacks of all threads: {files}" if written else f"stacks cannot be written to {path.parent}", here


def describe_hang(places: Mapping[int, Place], silent: Mapping[int, Place | None], seconds: float) -> str:
    """ "nothing has moved for 600 s: rank 1 on node7 does not answer (process stopped); rank 0 on node6 waits
    for it in a collective, in mdit/dist.py:290 (requested) at step 120". `places` are those of the ranks that answer;
    of a silent one it is the first that is known of it, if any is."""
    waiting = {rank: p for rank, p in places.items() if p.waits}
    busy = {rank: p for rank, p in places.items() if not p.waits}
    told = []
    if silent:
        hosts = dict.fromkeys(known.host for known in silent.values() if known)
        on = f" on {', '.join(hosts)}" if hosts else ""
        states = {state_of(known) for known in silent.values() if known} - {None}
        why = f" (process {states.pop()})" if len(states) == 1 else ""
        told.append(f"{enumerated('rank', silent)}{on} {'does' if len(silent) == 1 else 'do'} not answer{why}")
    steps = {p.step for p in waiting.values() if p.step is not None}
    if not silent and not busy and len(steps) > 1:  # some have gone ahead, the others have not come after
        busy = {rank: p for rank, p in waiting.items() if p.step == min(steps)}
        waiting = {rank: p for rank, p in waiting.items() if rank not in busy}
    told += _told(busy, "is", "are")
    named = silent.keys() | busy.keys()
    collectives = dict.fromkeys(p.collective for p in waiting.values())
    whom = f"for {'it' if len(named) == 1 else 'them'} " if named else ""
    which = "a" if named or len(collectives) > 1 else "the same"
    for name in collectives:
        there = {rank: p for rank, p in waiting.items() if p.collective == name}
        doing = f"{whom}in {which} collective{f' ({name})' if name else ''},"
        told += _told(there, f"waits {doing}", f"wait {doing}")
    return f"nothing has moved for {seconds:g} s: {'; '.join(told)}"


def _told(places: Mapping[int, Place], one: str, several: str) -> Iterable[str]:
    """A clause for each group of ranks that are in the same place."""
    groups: dict[tuple[str, int | None], dict[int, Place]] = {}
    for rank, p in places.items():
        groups.setdefault((p.where, p.step), {})[rank] = p
    for (where, step), ranks in groups.items():
        hosts = ", ".join([*dict.fromkeys(p.host for p in ranks.values())][:8])
        at = "" if step is None else f" at step {step}"
        yield f"{enumerated('rank', ranks)} on {hosts} {one if len(ranks) == 1 else several} in {where}{at}"


def state_of(known: Place) -> str | None:
    """State of a process of this host, by the kernel; None of one of another, and of one that runs."""
    if known.host != socket.gethostname():
        return None
    try:
        letter = Path(f"/proc/{known.pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except OSError:
        letter = ""
    return STATES.get(letter)


def place(main: int, step: int | None, records: Mapping[str, bytes] | None = None) -> Place:
    """Place of this rank, which has reached `step`; `records` are those of its collectives."""
    frames = sys._current_frames()
    chain = [*_chain(frames.get(main))]
    modules = {_name(f) for f in chain}
    if "mdit/train/saver.py" in modules:
        chain = _of_worker(frames, "mdit-saving") or chain
    elif "mdit/data/prefetcher.py" in modules:
        chain = _of_worker(frames, "mdit-reader") or _of_worker(frames, "mdit-read-ahead") or chain
    inner = next((f for f in chain if _own(f) and f.f_code.co_name.isidentifier()), chain[0] if chain else None)
    where = "" if inner is None else f"{_name(inner)}:{inner.f_lineno} ({inner.f_code.co_name})"
    collective = unfinished_collective(records or {})
    # A GPU's collective does not keep the host: it waits where it wants a number, or in the backward pass.
    waits = bool(collective) or any("/torch/distributed/" in f.f_code.co_filename for f in chain)
    return Place(socket.gethostname(), os.getpid(), step, where, waits, collective)


def _of_worker(frames: Mapping[int, FrameType], name: str) -> list[FrameType]:
    """The stack of the first such thread that is in a function of mdit, innermost first."""
    chains = ([*_chain(frames.get(t.ident or 0))] for t in threading.enumerate() if t.name.startswith(name))
    return next((chain for chain in chains if any(_own(f) for f in chain)), [])


def _chain(frame: FrameType | None) -> Iterable[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _own(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(str(MODULES) + os.sep)


def _name(frame: FrameType) -> str:
    file = Path(frame.f_code.co_filename)
    return f"mdit/{file.relative_to(MODULES).as_posix()}" if _own(frame) else file.name


def stacks_of(main: int) -> list[list[tuple[CodeType, int]]]:
    """Stacks of the main thread and its workers, to the instruction. Threads that Python did not start count as such:
    autograd has one for each GPU, in which the first backward pass is compiled too."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    watched = (*WORKERS, "Dummy-")
    frames = sorted(sys._current_frames().items())
    return [
        [(f.f_code, f.f_lasti) for f in _chain(frame)]
        for thread, frame in frames
        if thread == main or names.get(thread, "Dummy-").startswith(watched)
    ]


def children_seconds() -> float:
    """CPU seconds of the processes that this one has started, as far as they live."""
    found = 0.0
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                found += sum(child.cpu_times()[:2])
    return found


def all_stacks() -> str:
    """Python stacks of all threads, for people to read."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = sys._current_frames().items()
    return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in found)


def flight_records() -> dict[str, bytes]:
    """torch's records of the last collectives, as JSON: which of each group's were begun and which have ended. Of gloo
    and of NCCL, as far as this torch keeps them; the functions are its own affair, and their names have changed."""
    from torch._C import _distributed_c10d as recorder

    found = {}
    for backend, name in (("gloo", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        if (dump := getattr(recorder, name, None)) is not None:
            with suppress(RuntimeError):
                found[backend] = dump()
    return found


def unfinished_collective(records: Mapping[str, bytes]) -> str:
    """ "nccl:all_reduce", the last collective of a group where that has not ended; "" where all have, or none is known.
    Only a group's last: parts of what is sent together stay in the record as if they had not ended."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    with suppress(ValueError):
        for backend, record in records.items():
            for entry in parse_foreign_json(record).get("entries", ()):
                last[backend, str(entry.get("process_group"))] = entry
    return next((entry.get("profiling_name", "") for entry in last.values() if not entry.get("retired", True)), "")


def _to_json(found: Place) -> str:
    return json.dumps(asdict(found))


def _from_json(text: bytes) -> Place:
    return Place(**parse_json(text, "the store"))
