"""Commands of many tasks, a few tasks at a time, in processes that end with this one."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POLL = 0.1  # seconds
PR_SET_PDEATHSIG = 1  # Linux


@dataclass(frozen=True)
class CommandTask:
    """Commands one after the other, until one fails; what they print is appended to `log`."""

    name: str
    commands: Sequence[Sequence[str]]
    log: Path


class StartedProcess(Protocol):
    def poll(self) -> int | None:
        """The exit status, None while it runs."""

    def terminate(self) -> None: ...


Start = Callable[[Sequence[str], Path], StartedProcess]  # (command, log)


def start_single_threaded(command: Sequence[str], log: Path) -> StartedProcess:
    return start_process(command, log, OMP_NUM_THREADS="1")


def start_process(command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """In a session of its own, where a terminal's Ctrl-C does not reach it."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )


def side_by_side(
    tasks: Sequence[CommandTask], workers: int, start: Start, ended: Callable[[CommandTask, int], None]
) -> None:
    """Run all tasks, `workers` at a time, and call `ended(task, exit status)` after each. On Ctrl-C or SIGTERM those
    that run are asked to stop, and waited for, before KeyboardInterrupt goes on."""
    waiting, running = list(reversed(tasks)), dict[str, tuple[CommandTask, int, StartedProcess]]()
    with terminate_as_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    task = waiting.pop()
                    task.log.parent.mkdir(parents=True, exist_ok=True)
                    running[task.name] = task, 0, start(task.commands[0], task.log)
                for name, (task, number, process) in list(running.items()):
                    if (status := process.poll()) is None:
                        continue
                    if status == 0 and number + 1 < len(task.commands):
                        running[name] = task, number + 1, start(task.commands[number + 1], task.log)
                        continue
                    del running[name]
                    ended(task, status)
                time.sleep(POLL)
        finally:
            for _, _, process in running.values():
                process.terminate()
            while any(process.poll() is None for _, _, process in running.values()):
                time.sleep(POLL)


def last_line(log: Path) -> str:
    """The last thing that a command said."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """Between fork and exec: a parent that is killed takes the process along, which would keep its run's lock."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
