"""The lock of a run directory: one holder at a time, refused while it lives, taken over when it does not."""

import os
import resource
import signal
import time

import pytest

from mdit.config import UserError
from mdit.train import lock
from mdit.train.lock import Lock
from tests.processes import fork_server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.3)
    monkeypatch.setattr(lock, "SETTLE", 0.02)


def hold(path) -> None:
    with Lock(path):
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock at tmp_path / "run.lock"."""
    process = fork_server().Process(target=hold, args=(tmp_path / "run.lock",))
    process.start()
    while not (tmp_path / "run.lock").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def take(path) -> None:
    with Lock(path):
        assert path.exists()
    assert not path.exists()


def test_refused_while_its_holder_lives_on_this_machine(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
            take(tmp_path / "run.lock")
    os.kill(holder.pid, signal.SIGKILL)  # not yet waited for: a zombie
    holder.join()
    take(tmp_path / "run.lock")


def test_a_process_number_that_was_given_again_is_another_process(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    with Lock(path):
        content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"process_began": ', '"process_began": 1'), encoding="utf-8")
    take(path)


def test_another_machines_is_watched(tmp_path, monkeypatch):
    path = tmp_path / "run.lock"
    with Lock(path):
        monkeypatch.setattr(lock, "_machine", lambda: "another")
        with pytest.raises(UserError, match="in use by process"):  # it is seen to change
            take(path)
        content = path.read_bytes()
    path.write_bytes(content)  # left behind: it changes no more
    monkeypatch.setattr(lock, "_machine", lambda: "a third")
    started = time.monotonic()
    take(path)
    assert time.monotonic() - started > lock.SILENCE


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]"])
def test_what_is_no_lock_of_ours_is_waited_for_once(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    take(tmp_path / "run.lock")


def test_one_that_cannot_be_taken_over_names_the_lock_and_leaves_it(tmp_path, holder):
    """A full disk; here no file may grow."""
    path, limits = tmp_path / "run.lock", resource.getrlimit(resource.RLIMIT_FSIZE)
    holder.kill()
    holder.join()
    before = path.read_bytes()
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            take(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_holder_that_lost_it_says_so_and_leaves_it_alone(tmp_path):
    path = tmp_path / "run.lock"
    with Lock(path) as mine:
        mine.check()
        theirs = path.read_text(encoding="utf-8").replace(mine.token, "0" * 32)
        path.write_text(theirs, encoding="utf-8")
        while not mine._stolen_by:
            time.sleep(0.01)
        with pytest.raises(UserError, match="taken over by process"):
            mine.check()
    assert path.read_text(encoding="utf-8") == theirs


def test_of_many_at_once_one_holds_it(tmp_path):
    path = tmp_path / "run.lock"
    with Lock(path):
        pass
    path.write_text('{"token": "left behind", "machine": "another"}', encoding="utf-8")
    log = tmp_path / "log"
    contenders = [fork_server().Process(target=contend, args=(path, log)) for _ in range(4)]
    for process in contenders:
        process.start()
    for process in contenders:
        process.join()
    assert log.read_text(encoding="utf-8").count("held") == 1


def contend(path, log) -> None:
    lock.BEAT, lock.SILENCE, lock.SETTLE = 0.05, 0.3, 0.2
    try:
        with Lock(path), log.open("a", encoding="utf-8") as file:
            file.write("held\n")
            time.sleep(1.0)
    except UserError:
        pass
