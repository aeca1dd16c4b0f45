"""metrics.jsonl keeps every good line, whatever stands beside it; progress needs no terminal and no reader."""

import json
import logging
import math
import os
import re
import runpy
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.dist import World
from mdit.meeting import init_distributed
from mdit.train import pace
from mdit.train.meter import Meter, forget_after, step_of
from mdit.train.pace import RankPace, Stopwatch, slow_ranks, spread
from tests.processes import run_forked
from tests.recipes import tiny_config
from tests.training import command, read_metrics, write_ds_json, write_recipe

ODD = [
    b"[1, 2]",
    b"3",
    b"null",
    b'"step"',
    b"{}",
    b'{"loss": 0.5}',
    b'{"step": "3"}',
    b'{"step": 2.0}',
    b'{"step": true}',
    b'{"step": null}',
    b'{"step": 1, "step": 2}',
    b'{"step": 123456789012345678901234567890}',
    b'{"step": 2, "loss": NaN}',
    b'{"step": 2, "lo',
    b'{"step": 2, "lo{"step": 3, "loss": 1.0}',
    b'{"step": 2, "name": "\xff\xfe"}',
    b"\x00\x01\x02",
    b"[" * 100_000,
]


def good(step: int) -> bytes:
    return json.dumps({"step": step, "loss": step / 7}).encode()


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_an_odd_line_is_set_aside_and_costs_no_other_line(tmp_path, odd, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([good(1), odd, good(2), good(3), odd]))
    forget_after(path, 2)
    assert path.read_bytes() == good(1) + b"\n" + good(2) + b"\n"
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == (odd + b"\n") * 2
    assert "2 lines" in caplog.text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_costs_no_line_and_is_named(tmp_path):
    path, aside = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.damaged"
    path.write_bytes(content := good(1) + b"\n" + ODD[0] + b"\n")
    aside.symlink_to("/dev/full")
    with pytest.raises(OSError) as raised:
        forget_after(path, 1)
    assert raised.value.filename == str(aside) and path.read_bytes() == content


GOOD = {good(step): step for step in range(10)}
LINES = st.one_of(st.sampled_from([*GOOD]), st.binary(max_size=20), st.sampled_from(ODD[:-1]))


@settings(max_examples=50, deadline=None)
@given(st.lists(LINES), st.integers(0, 9))
def test_what_stays_is_every_good_line_up_to_the_step(tmp_path_factory, lines, step):
    path = tmp_path_factory.getbasetemp() / "fuzzed.jsonl"
    path.write_bytes(b"\n".join(lines))
    forget_after(path, step)
    kept = path.read_bytes().splitlines()
    assert [line for line in kept if line in GOOD] == [line for line in lines if GOOD.get(line, 99) <= step]
    assert all(step_of(line) <= step for line in kept)


def test_a_file_in_order_is_not_touched_and_none_is_made(tmp_path):
    path = tmp_path / "metrics.jsonl"
    forget_after(path, 3)
    assert not path.exists()
    path.write_bytes(good(1) + b"\n")
    before = path.stat().st_ino
    forget_after(path, 3)
    assert path.stat().st_ino == before and os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.fixture
def meter(tmp_path):
    config = tiny_config(training={"num_steps": 3, "global_batch_size": 8})
    world = World(0, 1, 0, torch.device("cpu"))
    init_distributed(world)
    yield Meter(config, tmp_path, world)
    torch.distributed.destroy_process_group()


def test_what_is_not_finite_is_null(tmp_path, meter):
    with meter.recording(0):
        meter.write(1, "train", {"loss": math.nan, "gradient_norm": math.inf, "learning_rate": 0.5})
        meter.write(2, "train", {"loss": 0.25})
    first, second = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert first == '{"step": 1, "loss": null, "gradient_norm": null, "learning_rate": 0.5}'
    assert second == '{"step": 2, "loss": 0.25}'


def test_without_a_terminal_a_report_is_a_line(tmp_path, meter, caplog, capsys):
    caplog.set_level(logging.INFO, logger="mdit")
    with meter.recording(0):
        for step in (1, 2):
            meter.timed_fetch(iter([None]))
            meter.add({"loss": torch.tensor([step / 2, step / 2])})
            meter.count_step()
        time.sleep(0.01)
        meter.report(2, gradient_norm=1.0, skipped_steps=0, forward=Stopwatch(meter.world.device))
    (line,) = caplog.messages
    assert re.fullmatch(r"step 2 of 3: loss 0\.7500, \d+ images/s", line)
    assert "\r" not in "".join(capsys.readouterr())
    (written,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert written["loss"] == 0.75 and 0 <= written["data_wait_share"] < 1 and written["step_seconds"] > 0.005


def launch_unread(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    for stream in (1, 2):
        os.dup2(writing, stream)
    os.close(writing)
    os.close(reading)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """As under `| tee log` when the terminal is gone."""
    recipe = write_recipe(tmp_path, training={"num_steps": 4})
    _, *arguments = command(recipe, write_ds_json(tmp_path / "ds.json"), tmp_path / "run")
    assert run_forked(launch_unread, arguments).returncode == 0
    assert sorted(read_metrics(tmp_path / "run")) == [1, 2, 3, 4]


def test_a_rank_that_holds_the_others_up_is_named():
    even = [RankPace("a", 6.0, 0.1), RankPace("a", 6.1, 0.0), RankPace("b", 6.2, 0.1)]
    assert slow_ranks(even, 20.0) == [] and spread(even) == pytest.approx(6.3 / 6.1)
    slow, starved = [*even, RankPace("c", 9.0, 0.1)], [RankPace("d", 6.0, 8.0), *even]
    assert slow_ranks(slow, 20.0) == [
        "rank 3 on c holds the others up: its own work takes 1.49 times the median; its forward passes are slow"
    ]
    assert (
        slow_ranks(starved, 20.0)[0].startswith("rank 0 on d ") and "it waits for data" in slow_ranks(starved, 20.0)[0]
    )
    assert slow_ranks(slow, 9.0) == [], "too short to tell"
    assert slow_ranks(slow, 100.0) == [], "it costs 3 % of the time"


def test_a_stopwatch_runs_inside_alone(monkeypatch):
    monkeypatch.setattr(pace.time, "perf_counter", iter([10.0, 12.0, 20.0, 23.0]).__next__)
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.running():
            pass
    assert watch.take() == 5.0 and watch.take() == 0.0
