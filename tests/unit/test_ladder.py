"""mdit/bench/ladder.py: every rung trains the same model, and one that fails stops no other."""

import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdit.bench import ladder
from mdit.bench.ladder import FIRST, RUNGS, climb, in_measuring_order, larger, parity
from mdit.bench.row import Parity
from mdit.config import UserError
from mdit.dist import World
from mdit.kernels import dispatch
from mdit.models import MicroDiT
from mdit.parallel.fuse import fuse
from mdit.parallel.settings import RunSettings, resolve_ds_config
from tests import bench_rows
from tests.recipes import tiny_config
from tests.training import run_in_processes

HERE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
BOUND = 1e-4  # relative, of a loss after ten steps in float32


def resolved(config, micro_batch):
    ds_json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": micro_batch}
    return resolve_ds_config(ds_json, config, data_size=1, bf16_works=False, path="ds.json")


class Backend:
    """Fails the first time; then compiles to what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.graphs == 1:
            raise RuntimeError("no compiler here")
        return graph.forward


def climb_on_cpu(world) -> tuple[list, list, int, bool]:
    optim = {"lr": 1e-2, "warmup_steps": 0}  # gates are zero at first: without large steps there is little to compare
    config, backend, saved = tiny_config(ema=None, model={"depth": 2}, optim=optim), Backend(), []
    rows = climb(
        *(config, RunSettings(), resolved(config, 8), world),
        steps=1,
        seconds=0.0,
        long_parity_steps=20,
        backend=backend,
        save=lambda rows: saved.append(sum(row.problem is None for row in rows)),
    )
    return rows, saved, backend.graphs


@pytest.fixture(scope="module")
def climbed():
    (answer,) = run_in_processes(climb_on_cpu, 1)
    return answer


def test_all_rungs_in_order_and_why_some_have_no_figures(climbed):
    rows, saved, graphs = climbed
    assert [row.name for row in rows] == [rung.name for rung in RUNGS]
    problems = {row.name: row.problem for row in rows}
    measured = {name for name, problem in problems.items() if problem is None}
    assert measured == {"as published", "experts by index", "experts by index, compiled", "+ micro-batch x 2"}
    assert "no compiler here" in problems.pop("as published, compiled")
    assert {problem for problem in problems.values() if problem} == {"needs a GPU"}
    assert graphs == 1 + 4  # the one that failed, then four blocks
    assert saved == sorted(saved) and saved[-1] == 4
    for row in rows:
        assert row.kind == "ladder" and (row.measured is None) == (row.problem is not None)
        assert row.setting.compile == (row.name.endswith("compiled") or row.name == "+ torch.compile")


def test_every_rung_trains_the_same_model(climbed):
    found = {row.name: row.figures for row in climbed[0] if row.problem is None}
    first = found.pop("as published")
    assert first.parity == Parity(steps=20, largest=0.0, mean_first=0.0, mean_last=0.0)
    for name in ("experts by index", "experts by index, compiled"):
        assert found[name].parity.steps == 10 and 0 < found[name].parity.largest < BOUND, name
        assert found[name].losses == pytest.approx(first.losses[:10], rel=BOUND)
    wider = next(row for row in climbed[0] if row.name == "+ micro-batch x 2")
    assert wider.figures.parity is None and wider.setting.global_batch == wider.setting.micro_batch == 16


def test_what_has_to_be_compiled_comes_last():
    order = in_measuring_order()
    assert sorted(order, key=RUNGS.index) == list(RUNGS) and order[0] is FIRST
    assert [rung.compile for rung in order] == sorted(rung.compile for rung in order)
    assert order.index(RUNGS[-3]) < order.index(RUNGS[1])  # our compiled model before the published one


def test_what_failed_is_left_out_of_later_rungs():
    last = RUNGS[-1]
    assert last.kernels == ("patch_mixing", "swiglu", "expert_choice", "masked_attention", "fp8_linear")
    assert last.without({"swiglu"}).kernels == ("patch_mixing", "expert_choice", "masked_attention", "fp8_linear")
    assert last.without({"compile", "micro-batch"}).compile is False and last.without({"micro-batch"}).times == 1
    assert RUNGS[1].without({"compile"}) == RUNGS[1] and last.without(set()) == last


def test_twice_the_micro_batch():
    config = tiny_config()
    (same, ds_config), (more, more_ds) = (larger(config, resolved(config, micro), 2) for micro in (2, 8))
    assert same.training.global_batch_size == ds_config["train_batch_size"] == 8
    assert (ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]) == (4, 2)
    assert more.training.global_batch_size == more_ds["train_batch_size"] == 16
    assert (more_ds["train_micro_batch_size_per_gpu"], more_ds["gradient_accumulation_steps"]) == (16, 1)


def test_parity_of_losses():
    reference = [2.0] * 20
    losses = [2.2, 2.0] + [2.0] * 12 + [2.0, 1.8, 2.0, 2.0, 1.8, 2.0]
    found = parity(losses, reference)
    assert found.steps == 20 and found.largest == pytest.approx(0.1)
    assert found.mean_first == pytest.approx(0.05)  # of two steps
    assert found.mean_last == pytest.approx(0.04)  # of five
    assert parity([1.0, 5.0], [1.0]).steps == 1


def test_no_time_and_no_parallel_experts():
    config = tiny_config()
    rows = climb(config, RunSettings(), resolved(config, 8), HERE, budget_s=0.0)
    assert {row.problem for row in rows} == {"not measured: no time was left of 0 s"} and len(rows) == len(RUNGS)
    with pytest.raises(UserError, match="expected expert_parallel = 1"):
        climb(config, RunSettings(expert_parallel=2), resolved(config, 8), HERE)


def short_row(climber, rung):
    return bench_rows.row(kind="ladder", name=rung.name)


def climb_by_the_clock(budget_s, measure):
    """-> (rungs that were begun, rows). `measure` stands for what a rung does, and gives its problem."""
    config, begun, saved = tiny_config(), [], []

    def measured(climber, rung, steps, seconds):
        begun.append(rung)
        return short_row(climber, rung).with_(problem=measure(rung))

    with mock.patch.multiple(ladder._Ladder, row=short_row, measure=measured):
        rows = climb(config, RunSettings(), resolved(config, 8), HERE, budget_s=budget_s, save=saved.append)
    assert saved[-1] == rows and [row.name for row in rows] == [rung.name for rung in RUNGS]
    return begun, rows


BLOCKS = tiny_config().model.depth + tiny_config().model.mixer_depth
PLAIN = [rung for rung in RUNGS if not rung.compile]


@given(
    budget_s=st.floats(0, 500),
    run_s=st.floats(1, 20),
    first_build=st.floats(0, BLOCKS * ladder.BUILD_S),
    later=st.floats(0, 1),
)
def test_a_ladder_ends_in_its_time(budget_s, run_s, first_build, later):
    """By a clock that is not there. Builds take no longer than was assumed, the first one the longest."""
    now, builds = [0.0], []

    def measure(rung):
        if rung.compile:
            builds.append(first_build * (later if builds else 1))
        now[0] += run_s + (builds[-1] if rung.compile else 0)

    with (
        mock.patch.object(ladder, "time", SimpleNamespace(perf_counter=lambda: now[0])),
        mock.patch.object(ladder, "no_longer_than", lambda seconds: nullcontext()),
    ):
        begun, rows = climb_by_the_clock(budget_s, measure)
    assert now[0] <= max(budget_s, run_s)  # of the very first rung nothing is known
    assert begun == in_measuring_order()[: len(begun)]
    assert [row.problem is None for row in rows] == [rung in begun for rung in RUNGS]
    if budget_s > (len(PLAIN) + 1) * run_s + BLOCKS * ladder.BUILD_S:
        assert builds


def test_what_is_not_done_in_time_is_broken_off():
    done, handler = [], signal.getsignal(signal.SIGALRM)

    def measure(rung):
        if done:
            try:
                time.sleep(60)
            except Exception:  # as a compiler's errors are caught, and told in the row
                return "caught"
        done.append(rung)

    begun, rows = climb_by_the_clock(0.3, measure)
    problems = {row.name: row.problem for row in rows}
    assert problems.pop(begun[0].name) is None and len(begun) == 2
    assert set(problems.values()) == {"not measured: no time was left of 0.3 s"}
    assert signal.getsignal(signal.SIGALRM) is handler


def test_a_rung_is_switched_off_again():
    model = fuse(MicroDiT(tiny_config().model))
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    for rung in RUNGS:
        with ladder.switched(model, rung, backend="eager"):
            changed = [(type(module), dict(module.__dict__)) for module in model.modules()] != before
            assert changed == (rung.published or rung.compile or rung.fp8)
            in_triton = dispatch.interpreted() and "swiglu" in rung.kernels
            assert dispatch.use_triton("swiglu", torch.ones(1)) == in_triton
        assert [(type(module), dict(module.__dict__)) for module in model.modules()] == before
