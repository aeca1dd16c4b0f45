"""Commands side by side: how many at a time, in which order, and what becomes of them when this process is stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mdit.bench.side_by_side import CommandTask, last_line, side_by_side, start_single_threaded


class Command:
    """A command that ends when it has been polled twice, with the status that it names."""

    running, most, started = 0, 0, []

    def __init__(self, command, log):
        self.status, self.polls = int(command[-1]), 0
        Command.started.append(command[0])
        Command.running += 1
        Command.most = max(Command.most, Command.running)

    def poll(self):
        self.polls += 1
        if self.polls == 2:
            Command.running -= 1
        return self.status if self.polls >= 2 else None

    def terminate(self):
        self.status, self.polls = -15, 1


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr("mdit.bench.side_by_side.POLL", 0.001)
    monkeypatch.setattr(Command, "started", [])
    monkeypatch.setattr(Command, "most", 0)
    monkeypatch.setattr(Command, "running", 0)


def tasks(folder):
    commands = {"a": [("a1", 0), ("a2", 0)], "b": [("b1", 3), ("b2", 0)], "c": [("c1", 0)]}
    return [CommandTask(name, each, folder / name) for name, each in commands.items()]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_commands_of_a_task_follow_each_other_until_one_fails(tmp_path, workers):
    ended = []
    side_by_side(tasks(tmp_path), workers, Command, lambda task, status: ended.append((task.name, status)))
    assert sorted(ended) == [("a", 0), ("b", 3), ("c", 0)] and Command.most == min(workers, 3)
    assert sorted(Command.started) == ["a1", "a2", "b1", "c1"]
    if workers == 1:
        assert Command.started == ["a1", "a2", "b1", "c1"]


def test_what_runs_is_stopped_with_the_process(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        side_by_side(tasks(tmp_path), 2, Command, lambda *ended: os.kill(os.getpid(), signal.SIGTERM))
    assert Command.running == 0 and "c1" not in Command.started
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_what_is_printed_is_kept_and_a_thread_is_all_there_is(tmp_path):
    log, ended = tmp_path / "log", []
    command = ["sh", "-c", "echo $OMP_NUM_THREADS; echo last >&2; exit 7"]
    side_by_side([CommandTask("x", [command], log)], 1, start_single_threaded, lambda *each: ended.append(each[1]))
    assert ended == [7] and log.read_text() == "1\nlast\n" and last_line(log) == "last"
    assert last_line(tmp_path / "none") == "it said nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_killed_process_takes_its_commands_along(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from mdit.bench.side_by_side import start_single_threaded\n"
        "process = start_single_threaded(['sleep', '60'], pathlib.Path(sys.argv[1]))\n"
        "print(process.pid, flush=True)\n"
        "process.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "log")], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    """A zombie, which waits for a parent that does not ask, is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
