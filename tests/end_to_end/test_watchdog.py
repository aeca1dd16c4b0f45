"""The watchdog: whatever hangs is named in time, on every rank there are stacks, and what is only slow goes on."""

import _thread
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mdit.data.shards import LatentSet
from mdit.dist import World
from mdit.meeting import own_store
from mdit.train import loop
from mdit.train.watchdog import (
    HUNG,
    Place,
    Watchdog,
    children_seconds,
    describe_hang,
    flight_records,
    place,
    unfinished_collective,
)
from tests.training import attempt, launch, run_in_processes, write_ds_json, write_recipe

SECONDS = 3
STALLED = 4  # the step that is never taken


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("watchdog"), training={"num_steps": 8})


def stall_storage(script: str, arguments: list[str]) -> None:
    """The storage never answers the last rank from its second epoch on."""
    read, reads = LatentSet.read_row, []

    def read_row(self, location, row, draw):
        reads.append(location)
        if len(reads) > 30 and int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1:
            time.sleep(1000)
        return read(self, location, row, draw)

    LatentSet.read_row = read_row
    launch(script, arguments)


def stop(rank: int):
    def at_step(script: str, arguments: list[str]) -> None:
        step = loop.optimizer_step

        def stopping(engine, batch, at, config):
            if at == STALLED and engine.world.rank == rank:
                os.kill(os.getpid(), signal.SIGSTOP)
            return step(engine, batch, at, config)

        loop.optimizer_step = stopping
        launch(script, arguments)

    return at_step


def stop_first(script: str, arguments: list[str]) -> None:
    stop(0)(script, arguments)


def stop_second(script: str, arguments: list[str]) -> None:
    stop(1)(script, arguments)


@pytest.mark.parametrize(
    "fault, processes, wanted",
    [
        (stall_storage, 1, r"rank 0 on \S+ is in mdit/data/prefetcher.py:\d+ \(read\) at step [34]"),
        (
            stall_storage,
            2,
            r"rank 1 on \S+ is in mdit/data/prefetcher.py:\d+ \(read\) at step \d; rank 0 on \S+ waits for it in a "
            r"collective \(gloo:all_reduce\), in mdit/\S+:\d+ \(\w+\) at step \d",
        ),
        (stop_second, 2, r"rank 1 on \S+ does not answer \(process stopped\); rank 0 on \S+ waits for it in a "),
        (stop_first, 2, r"rank 0 does not answer; rank 1 on \S+ waits for it in a collective \(gloo:\w+\), in mdit/"),
    ],
)
def test_what_hangs_is_named_in_time(recipe, tmp_path, fault, processes, wanted):
    run = tmp_path / "run"
    ds_json = write_ds_json(tmp_path / "ds.json", mdit={"watchdog_s": SECONDS})
    code, output = attempt(recipe, ds_json, run, processes=processes, launched=fault, timeout=100)
    moved = (run / "metrics.jsonl").stat().st_mtime
    assert code == HUNG, output
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(rf"nothing has moved for {SECONDS} s: {wanted}", line), line
    files = sorted((run / "logs").glob("hung_*_rank_*.txt"))
    assert len(files) == (processes if fault is stall_storage else 1)
    for file in files:
        assert "MainThread:" in file.read_text() and "mdit/train/loop.py" in file.read_text()
        assert file.stat().st_mtime < moved + SECONDS + 10
    if processes == 2:
        recorded = json.loads(files[0].with_suffix(".gloo.json").read_text())
        assert any("all_reduce" in entry["profiling_name"] for entry in recorded["entries"])


def test_the_next_start_goes_on(recipe, tmp_path):
    run, ds_json = tmp_path / "run", write_ds_json(tmp_path / "ds.json", mdit={"watchdog_s": SECONDS})
    assert attempt(recipe, ds_json, run, launched=stall_storage)[0] == HUNG
    code, output = attempt(recipe, ds_json, run)
    assert code == 0 and re.search(r"resuming at step [24]", output)


# In this process


@pytest.fixture
def ends(monkeypatch):
    """Places at which a watchdog of this process would have ended it."""
    found = []
    monkeypatch.setattr(Watchdog, "_end_alone", lambda self: (found.append(place(self.main, 3)), self._left.set()))
    return found


def watched(tmp_path, seconds: float) -> Watchdog:
    return Watchdog(SimpleNamespace(path=tmp_path, step=3), World(0, 1, 0, torch.device("cpu")), seconds)


def test_a_wait_is_a_hang_and_leaving_ends_the_watch(tmp_path, ends):
    with watched(tmp_path, 0.5):
        threading.Event().wait(1.5)
    assert len(ends) == 1 and not ends[0].waits and ends[0].pid == os.getpid()
    with watched(tmp_path, 0.5):
        pass
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    with watched(tmp_path, 0):
        threading.Event().wait(1)
    threading.Event().wait(1)
    assert len(ends) == 1


def test_what_is_slow_moves(tmp_path, ends):
    """Computation in this thread, a worker that reads, a thread that is not Python's own, a compiler."""
    with watched(tmp_path, 0.5):
        until, x = time.monotonic() + 1.2, torch.ones(64, 64)
        while time.monotonic() < until:
            x = torch.nn.functional.gelu(x @ x).clamp(0, 1)
            x = torch.nn.functional.layer_norm(x, (64,)).sin()
    with watched(tmp_path, 0.5):
        worker = threading.Thread(target=work, args=(1.2,), name="mdit-reader_0")
        worker.start()
        worker.join()
    with watched(tmp_path, 0.5):
        done = threading.Event()
        _thread.start_new_thread(lambda: (work(1.2), done.set()), ())
        done.wait()
    with watched(tmp_path, 0.5):
        subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1.2: pass"], check=True)
    assert ends == []


def work(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(50))
        sorted(range(50))


def test_a_process_that_was_stopped_has_not_waited():
    code = (
        "import torch, threading\nfrom types import SimpleNamespace\nfrom mdit.dist import World\n"
        "from mdit.train.watchdog import Watchdog\n"
        "with Watchdog(SimpleNamespace(step=3), World(0, 1, 0, torch.device('cpu')), 2.0):\n"
        "    print('waits', flush=True)\n    threading.Event().wait(1.0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0


def test_the_ranks_that_are_waited_for_are_named():
    collective = Place("a", 1, 7, "mdit/dist.py:5 (gather)", waits=True)
    busy = Place("b", 1, 6, "mdit/data/shards.py:9 (read_row)")
    late = Place("c", 1, 6, "mdit/dist.py:5 (gather)", waits=True)
    assert describe_hang({0: collective, 1: collective, 2: busy}, {}, 600) == (
        "nothing has moved for 600 s: rank 2 on b is in mdit/data/shards.py:9 (read_row) at step 6; "
        "ranks 0, 1 on a wait for it in a collective, in mdit/dist.py:5 (gather) at step 7"
    )
    assert "rank 2 on c is in mdit/dist.py:5 (gather) at step 6; ranks 0, 1 on a wait for it" in describe_hang(
        {0: collective, 1: collective, 2: late}, {}, 600
    )
    assert "ranks 0, 1 on a wait in the same collective, in" in describe_hang({0: collective, 1: collective}, {}, 600)
    gathers, reduces = (replace(collective, collective=f"nccl:{name}") for name in ("all_gather", "all_reduce"))
    assert (
        "rank 0 on a waits in a collective (nccl:all_gather), in mdit/dist.py:5 (gather) at step 7; "
        "ranks 1, 2 on a wait in a collective (nccl:all_reduce), in mdit/dist.py:5 (gather) at step 7"
    ) in describe_hang({0: gathers, 1: reduces, 2: reduces}, {}, 600)
    elsewhere = {2: Place("d", 1), 3: Place("e", 1)}
    assert "ranks 2, 3 on d, e do not answer; rank 0 on a waits for them" in describe_hang(
        {0: collective}, elsewhere, 600
    )


def begins_and_does_not_wait(world) -> list[Place]:
    """Places of a rank before, in and after a collective whose end it does not wait for, as with a GPU's."""
    store, found = own_store(), [place(threading.get_ident(), 3, flight_records())]
    if world.rank == 0:
        begun = torch.distributed.all_reduce(torch.ones(3), async_op=True)
        found.append(place(threading.get_ident(), 3, flight_records()))
        store.set("looked", "")
    else:
        store.wait(["looked"])
        begun = torch.distributed.all_reduce(torch.ones(3), async_op=True)
    begun.wait()
    until = time.monotonic() + 60
    while (last := place(threading.get_ident(), 3, flight_records())).waits and time.monotonic() < until:
        pass  # torch writes the end down a moment later
    return [*found, last]


def test_who_has_begun_a_collective_waits_wherever_it_is():
    first, second = run_in_processes(begins_and_does_not_wait, 2)
    assert [(p.waits, p.collective) for p in first] == [(False, ""), (True, "gloo:all_reduce"), (False, "")]
    assert [(p.waits, p.collective) for p in second] == [(False, "")] * 2


@pytest.mark.parametrize(
    "record", [b"", b"[" * 100_000, b'{"version": "3"}', b'{"entries": [{}, {"state": "started"}]}']
)
def test_a_record_of_another_torch_tells_nothing(record):
    assert unfinished_collective({"nccl": record}) == ""


def test_a_directory_that_takes_no_stacks_is_told(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    assert watched(tmp_path, 1.0)._write_down("now")[0] == f"stacks cannot be written to {tmp_path / 'logs'}"
    (tmp_path / "logs").unlink()
    assert watched(tmp_path, 1.0)._write_down("now")[0].endswith("logs/hung_now_rank_*.txt")
    assert "test_a_directory_that_takes_no_stacks" in (tmp_path / "logs/hung_now_rank_00000.txt").read_text()


def test_what_hangs_as_well_is_not_waited_for(tmp_path, monkeypatch):
    """As a GPU that is asked how far its collectives are, or a storage that takes no stacks."""
    monkeypatch.setattr("mdit.train.watchdog.FAREWELL", 0.3)
    monkeypatch.setattr("mdit.train.watchdog.flight_records", lambda: time.sleep(1000))
    told, here = watched(tmp_path, 1.0)._write_down("now")
    assert told.endswith("logs/hung_now_rank_*.txt") and here.pid == os.getpid() and not here.waits
    monkeypatch.setattr(Path, "write_text", lambda *args, **options: time.sleep(1000))
    assert watched(tmp_path, 1.0)._write_down("then")[0] == f"stacks cannot be written to {tmp_path / 'logs'}"


def test_children_count_as_far_as_they_live():
    before = children_seconds()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        time.sleep(0.5)
        assert children_seconds() > before
        child.kill()
    assert children_seconds() <= before + 0.1
