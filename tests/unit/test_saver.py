"""Saving beside training: what is written is the state of its step, whatever training does meanwhile."""

import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import find_latest, load_into, save_training_state
from mdit.config import UserError
from mdit.dist import World
from mdit.parallel.shard import WHOLE
from mdit.train import saver
from mdit.train.saver import Saver, available_memory

WORLD = World(0, 1, 0, torch.device("cpu"))
FRAGMENTS = [Fragment("weights", (5,), WHOLE, 0, 5, partition=0, offset=0)]

pytestmark = pytest.mark.usefixtures("group_of_one")


@pytest.fixture
def state():
    """Muon's partitions have no second moment."""
    return {"master": [torch.zeros(5), torch.zeros(3)], "exp_avg_sq": [torch.zeros(5), None]}


def saver_of(path, *, background: bool = True, check=lambda: None) -> Saver:
    return Saver(SimpleNamespace(path=path, lock=SimpleNamespace(check=check)), WORLD, background=background)


def write(path, step: int, let_go: threading.Event, tensors) -> None:
    assert let_go.wait(20)
    options = dict(numbers={}, run={}, layout={}, world=WORLD, keep=9)
    save_training_state(path / "checkpoints", step, tensors, FRAGMENTS, **options)


def saved(path, step: int) -> float:
    """The value that all elements of the newest checkpoint have, which is that of `step`."""
    found = find_latest(path / "checkpoints", WORLD)
    assert found is not None and found.step == step
    flat = torch.empty(5)
    load_into(found, {"master": [flat]}, FRAGMENTS, layout={}, world=WORLD)
    return flat.unique().item()


def test_training_goes_on_and_the_state_of_the_step_is_written(tmp_path, state):
    let_go = threading.Event()
    with saver_of(tmp_path) as saving:
        saving.prepare(state)
        state["master"][0].fill_(7)
        saving.start_with_copy("checkpoint", 3, state, partial(write, tmp_path, 3, let_go))
        state["master"][0].fill_(8)  # the next step
        assert not (tmp_path / "checkpoints").exists()
        let_go.set()
    assert saved(tmp_path, 3) == 7


def test_one_save_at_a_time(tmp_path, state):
    first, running, most = threading.Event(), [], []

    def count(step: int, tensors) -> None:
        running.append(step)
        most.append(len(running))
        write(tmp_path, step, first, tensors)
        running.remove(step)

    with saver_of(tmp_path) as saving:
        saving.prepare(state)
        threading.Timer(0.2, first.set).start()
        for step in (1, 2, 3):
            state["master"][0].fill_(step)
            saving.start_with_copy("checkpoint", step, state, partial(count, step))
    assert most == [1, 1, 1] and saved(tmp_path, 3) == 3


@pytest.mark.parametrize("reason", ["turned off", "no room"])
def test_without_a_copy_steps_wait(tmp_path, state, reason, monkeypatch, caplog):
    monkeypatch.setattr(saver, "available_memory", lambda: saver.RESERVE)
    let_go = threading.Event()
    let_go.set()
    with saver_of(tmp_path, background=reason == "no room") as saving:
        saving.prepare(state)
        state["master"][0].fill_(7)
        saving.start_with_copy("checkpoint", 3, state, partial(write, tmp_path, 3, let_go))
        assert saved(tmp_path, 3) == 7
    assert ("has no room in this host's memory" in caplog.text) == (reason == "no room")


def test_a_full_disk_is_told_at_the_end_and_anything_else_at_once(tmp_path, state, caplog):
    def full(tensors) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    with saver_of(tmp_path) as saving:
        saving.start_with_copy("checkpoint", 3, state, full)
    assert "checkpoint of step 3 not saved" in caplog.text
    with pytest.raises(UserError, match="stopped at step 3, but its checkpoint is not saved: .*no checkpoint"):
        saving.check_saved(3)
    with pytest.raises(ZeroDivisionError), saver_of(tmp_path) as saving:
        saving.start("snapshot", 3, lambda: 1 // 0)


def test_what_ended_a_run_counts_and_what_is_under_way_is_saved(tmp_path, state):
    let_go = threading.Event()
    with pytest.raises(UserError, match="steps in a row"), saver_of(tmp_path) as saving:
        saving.prepare(state)
        saving.start_with_copy("checkpoint", 3, state, partial(write, tmp_path, 3, let_go))
        threading.Timer(0.1, let_go.set).start()
        raise UserError("3 steps in a row were skipped")
    assert saved(tmp_path, 3) == 0


def test_nothing_is_written_in_a_directory_that_another_took_over(tmp_path, state):
    def taken() -> None:
        raise UserError("taken over by process 7")

    with pytest.raises(UserError, match="taken over"), saver_of(tmp_path, check=taken) as saving:
        saving.start_with_copy("checkpoint", 3, state, lambda tensors: pytest.fail("written"))


def test_a_cgroup_bounds_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "CGROUP", tmp_path)
    whole = available_memory()
    assert whole > 2**28
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 2**28
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert available_memory() == 2000
