"""mdit/bench/run.py and timing.py: what is measured is training, from its first step on, and leaves nothing behind."""

import itertools
import weakref
from unittest import mock

import pytest
import torch

from mdit.bench.run import BenchmarkRun
from mdit.bench.timing import PhaseTimer, length_of_union, summarize
from mdit.config import TrainConfig, load_config
from mdit.parallel.settings import Execution
from tests.recipes import tiny_config
from tests.training import read_metrics, run_in_processes, train, write_ds_json, write_recipe


def resolve(config: TrainConfig, size: int = 1, stage: int = 2, micro_batch: int = 2, bf16: bool = False) -> Execution:
    ds_json = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": micro_batch}
    ds_json["bf16"] = {"enabled": bf16}
    return Execution.resolve(ds_json, config, processes=size, bf16_works=False, path="ds")


def losses_of_the_recipes_data(world, recipe: str, steps: int) -> list[float]:
    config = load_config(recipe)
    with BenchmarkRun(config, resolve(config), world, data="recipe") as run:
        return run.losses(steps)


def test_its_steps_are_those_of_the_loop(tmp_path):
    recipe = write_recipe(tmp_path, training={"num_steps": 4})
    train(recipe, write_ds_json(tmp_path / "ds.json", stage=2, micro_batch=2), tmp_path / "run")
    expected = [loss for _, loss in sorted(read_metrics(tmp_path / "run").items())]
    [found] = run_in_processes(losses_of_the_recipes_data, 1, str(recipe), 4)
    assert found == expected and len(set(found)) == 4


def twice_in_one_process(world, cases: list[tuple[int, bool]]) -> list[dict]:
    config, found = tiny_config(), []
    for stage, bf16 in cases:
        losses, alive, held = [], 0, []
        for _ in range(2):
            with BenchmarkRun(config, resolve(config, stage=stage, bf16=bf16), world) as run:
                losses.append(run.losses(4))
                state = run.engine.zero.optimizer.state
                moments = [t for one in state.values() for t in one.values() if isinstance(t, torch.Tensor)]
                held = [weakref.ref(t) for t in (*run.engine.master_weights, *moments, *run.ema.partitions)]
                weights = [weakref.ref(p) for p in run.model.parameters()]
                del state, moments
            alive += sum(t() is not None for t in held)
            alive += sum(p() is not None and p().numel() > 0 for p in weights)
        found.append({"first": losses[0], "again": losses[1], "held": len(held), "alive": alive})
    return found


@pytest.mark.parametrize("cases", [[(1, False), (1, True), (2, False)], [(3, False)]])
def test_it_begins_again_bit_for_bit_and_leaves_no_memory_behind(cases):
    """ZeRO stage, bfloat16; one run after the other in one process."""
    [found] = run_in_processes(twice_in_one_process, 1, cases)
    for run in found:
        assert run["first"] == run["again"] and len(set(run["first"])) == 4
        assert run["held"] >= 4 and run["alive"] == 0
        assert run["first"] == pytest.approx(found[0]["first"], rel=2e-3)


def measured(world) -> dict:
    config = tiny_config(ema={"decay": 0.9, "start_step": 1})
    with BenchmarkRun(config, resolve(config, world.size), world) as run:
        found = {"figures": run.measure(warm_up=2, steps=3, seconds=0.0), "memory": run.memory()}
        found["parameters"] = sum(p.numel() for p in run.model.parameters())
        with mock.patch("time.perf_counter", itertools.count(0.0).__next__):  # a second at every look
            return found | {"longer": run.measure(warm_up=0, steps=1, seconds=100.0)}


def test_figures_of_one_process_and_of_two():
    [alone] = run_in_processes(measured, 1)
    figures, ms = alone["figures"], alone["figures"].milliseconds
    assert figures.steps == 3 and 2 <= alone["longer"].steps < 100
    assert ms.data + ms.forward + ms.backward + ms.optimizer == pytest.approx(ms.step, rel=1e-9)
    assert ms.communication is None and min(ms.forward, ms.backward, ms.optimizer) > 0
    assert figures.images_per_second == pytest.approx(8 / (ms.step / 1e3)) and figures.fastest_ms <= ms.step
    assert len(figures.losses) == 5 and figures.peak_gib > 0
    gib, bytes_of = alone["memory"], {"weights": 4, "masters": 4, "moments": 8, "ema": 4}
    for part, size in bytes_of.items():
        assert gib[part] * 2**30 == pytest.approx(size * alone["parameters"], rel=0.01), part
    assert gib["peak"] > sum(gib[part] for part in bytes_of)

    both = run_in_processes(measured, 2)
    assert both[0]["figures"] == both[1]["figures"]  # of the slowest rank
    assert both[0]["figures"].losses == pytest.approx(figures.losses, rel=1e-5)
    assert both[0]["figures"].milliseconds.communication > 0
    assert both[0]["memory"]["masters"] == pytest.approx(gib["masters"] / 2, rel=0.01)


def test_marks_divide_a_step(monkeypatch):
    """The clock is read at every mark, once when timing starts and once when a step is done."""
    times = iter([0, 0.0, 0.001, 0.004, 0.010, 0.011, 0.012, 0, 0.020, 0.021, 0.031, 0, 0.050])
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))
    timer = PhaseTimer(torch.device("cpu"))
    timer.mark("data")  # before it starts: not kept
    phases = iter(
        [["data", "forward", "backward", "optimizer", "forward", "backward"], ["data", "forward", "optimizer"]]
    )
    steps = timer.time_steps(lambda: [timer.mark(phase) for phase in next(phases)], steps=2, seconds=-1.0)
    assert steps[0] == pytest.approx({"data": 1, "forward": 3 + 1, "backward": 6 + 8, "optimizer": 1})
    assert steps[1] == pytest.approx({"data": 1, "forward": 10, "backward": 0, "optimizer": 19})


def test_as_many_steps_as_there_is_time_for(monkeypatch):
    """At least two; a step takes a second."""
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    timer = PhaseTimer(torch.device("cpu"))

    def step() -> None:
        nonlocal now
        timer.mark("data")
        now += 1.0

    assert [len(timer.time_steps(step, steps=2, seconds=seconds)) for seconds in (0.0, 2.9, 5.5)] == [2, 2, 5]


def test_the_median_step_and_its_parts():
    steps = [{"data": d, "forward": 10.0, "backward": 0.0, "optimizer": 0.0} for d in (5.0, 1.0, 90.0, 2.0)]
    found = summarize(steps, global_batch=24)
    assert (found.milliseconds.step, found.milliseconds.data, found.milliseconds.forward) == (12.0, 2.0, 10.0)
    assert (found.steps, found.fastest_ms, found.images_per_second) == (4, 11.0, 2000.0)
    assert summarize(steps[:3], 1).milliseconds.step == 15.0


@pytest.mark.parametrize(
    "spans, length",
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(8, 9), (1, 5), (2, 3)], 5), ([(1, 2), (2, 3)], 2)],
)
def test_time_that_is_covered(spans, length):
    assert length_of_union(spans) == length
