"""mdit/bench/ladder.py: every step trains the same model, and one that fails stops no other."""

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
from mdit.bench.ladder import FIRST, LADDER, Ladder, in_measuring_order, parity
from mdit.bench.row import MADE_UP, Parity
from mdit.bench.stages import Job
from mdit.config import UserError
from mdit.dist import World
from mdit.parallel.settings import Execution, RunSettings
from tests.recipes import tiny_config
from tests.training import run_in_processes

HERE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
BOUND = 1e-4  # relative, of a loss after ten steps in float32


def job(config=None, micro_batch=8, **settings) -> Job:
    config = config or tiny_config()
    ds_json = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": micro_batch}
    execution = Execution.resolve(ds_json, config, processes=1, bf16_works=False, path="ds.json")
    return Job(config, Execution(RunSettings(**settings), execution.deepspeed), MADE_UP, 1)


class Backend:
    """Fails the first time; then compiles to what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        if self.graphs == 1:
            raise RuntimeError("no compiler here")
        return graph.forward


def climb_on_cpu(world) -> tuple[list, list, int]:
    optim = {"lr": 1e-2, "warmup_steps": 0}  # gates are zero at first: without large steps there is little to compare
    config, backend = tiny_config(ema=None, model={"depth": 2}, optim=optim), Backend()
    climber = Ladder(job(config), world, steps=1, seconds=0.0, parity_steps=20, backend=backend)
    saved = list(climber.climb())
    return saved[-1], [sum(row.problem is None for row in rows) for rows in saved], backend.graphs


@pytest.fixture(scope="module")
def climbed():
    (answer,) = run_in_processes(climb_on_cpu, 1)
    return answer


def test_all_steps_in_order_and_why_some_have_no_figures(climbed):
    rows, saved, graphs = climbed
    assert [row.name for row in rows] == [step.name for step in LADDER]
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


def test_every_step_trains_the_same_model(climbed):
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
    assert sorted(order, key=LADDER.index) == list(LADDER) and order[0] is FIRST
    assert [step.compile for step in order] == sorted(step.compile for step in order)
    assert order.index(LADDER[-3]) < order.index(LADDER[1])  # our compiled model before the published one


def test_what_failed_is_left_out_of_later_steps():
    last = LADDER[-1]
    assert last.kernels == ("patch_mixing", "swiglu", "expert_choice", "masked_attention", "fp8_linear")
    assert last.without({"swiglu"}).kernels == ("patch_mixing", "expert_choice", "masked_attention", "fp8_linear")
    assert last.without({"compile", "micro-batch"}).compile is False and last.without({"micro-batch"}).times == 1
    assert LADDER[1].without({"compile"}) == LADDER[1] and last.without(set()) == last


def test_a_step_without_memory_is_tried_with_a_smaller_micro_batch():
    asked = []

    def figures(climber, step):
        asked.append((step.name, climber.job.micro_batch))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with mock.patch.object(Ladder, "figures", figures):
        *_, rows = Ladder(job(), HERE).climb()
    assert asked[:4] == [("as published", size) for size in (8, 4, 2, 1)] and asked[4][1] == 1
    assert rows[0].problem == "out of memory at micro-batch 1"


def test_parity_of_losses():
    found = parity([2.2, 2.0] + [2.0] * 12 + [2.0, 1.8, 2.0, 2.0, 1.8, 2.0], [2.0] * 20)
    assert found.steps == 20 and found.largest == pytest.approx(0.1)
    assert found.mean_first == pytest.approx(0.05)  # of two steps
    assert found.mean_last == pytest.approx(0.04)  # of five
    assert parity([1.0, 5.0], [1.0]).steps == 1


def test_parallel_experts_have_no_ladder():
    with pytest.raises(UserError, match="expected expert_parallel = 1"):
        Ladder(job(expert_parallel=2), HERE)


def climb_by_the_clock(budget_s, measure):
    """-> (steps that were begun, rows). `measure` stands for what a step does, and gives its problem."""
    begun = []

    def measured(climber, step):
        begun.append(step)
        return climber.row(step).with_(problem=measure(step))

    with mock.patch.object(Ladder, "measure", measured):
        *_, rows = Ladder(job(), HERE).climb(budget_s)
    assert [row.name for row in rows] == [step.name for step in LADDER]
    return begun, rows


BLOCKS = tiny_config().model.depth + tiny_config().model.mixer_depth
PLAIN = [step for step in LADDER if not step.compile]


@given(
    budget_s=st.floats(0, 500),
    run_s=st.floats(1, 20),
    first_build=st.floats(0, BLOCKS * ladder.BUILD_S),
    later=st.floats(0, 1),
)
def test_a_ladder_ends_in_its_time(budget_s, run_s, first_build, later):
    """By a clock that is not there. Builds take no longer than was assumed, the first one the longest."""
    now, builds = [0.0], []

    def measure(step):
        if step.compile:
            builds.append(first_build * (later if builds else 1))
        now[0] += run_s + (builds[-1] if step.compile else 0)

    with (
        mock.patch.object(ladder, "time", SimpleNamespace(perf_counter=lambda: now[0])),
        mock.patch.object(ladder, "no_longer_than", lambda seconds: nullcontext()),
    ):
        begun, rows = climb_by_the_clock(budget_s, measure)
    assert now[0] <= max(budget_s, run_s)  # of the very first step nothing is known
    assert begun == in_measuring_order()[: len(begun)]
    assert [row.problem is None for row in rows] == [step in begun for step in LADDER]
    if budget_s > (len(PLAIN) + 1) * run_s + BLOCKS * ladder.BUILD_S:
        assert builds


def test_what_is_not_done_in_time_is_broken_off():
    done, handler = [], signal.getsignal(signal.SIGALRM)

    def measure(step):
        if done:
            try:
                time.sleep(60)
            except Exception:  # as a compiler's errors are caught, and told in the row
                return "caught"
        done.append(step)

    begun, rows = climb_by_the_clock(0.3, measure)
    problems = {row.name: row.problem for row in rows}
    assert problems.pop(begun[0].name) is None and len(begun) == 2
    assert set(problems.values()) == {"not measured: no time was left of 0.3 s"}
    assert signal.getsignal(signal.SIGALRM) is handler
