"""mdit/bench/trial.py and clock.py: what is measured is training, it can begin again, and it leaves nothing behind."""

import math
import weakref

import pytest
import torch

from mdit.bench.clock import Marks, length_of_union, median_step
from mdit.bench.trial import Trial
from mdit.config import TrainConfig, load_config
from mdit.parallel.settings import RunSettings, resolve_ds_config
from tests.recipes import tiny_config
from tests.training import read_metrics, run_in_processes, train, write_ds_json, write_recipe


def resolve(config: TrainConfig, world, stage: int = 2, micro_batch=2, bf16: bool = False) -> dict:
    ds_json = {
        "zero_optimization": {"stage": stage},
        "train_micro_batch_size_per_gpu": micro_batch,
        "bf16": {"enabled": bf16},
    }
    return resolve_ds_config(ds_json, config, data_size=world.size, bf16_works=False, path="ds.json")


def losses_of_the_recipes_data(world, recipe: str, steps: int) -> list[float]:
    config = load_config(recipe)
    with Trial(config, RunSettings(), resolve(config, world), world, data="recipe") as trial:
        trial.losses(2)
        trial.reset()
        return trial.losses(steps)


def test_its_steps_are_those_of_the_loop(tmp_path):
    recipe = write_recipe(tmp_path, training={"num_steps": 4})
    train(recipe, write_ds_json(tmp_path / "ds.json", stage=2, micro_batch=2), tmp_path / "run")
    expected = [loss for _, loss in sorted(read_metrics(tmp_path / "run").items())]
    [found] = run_in_processes(losses_of_the_recipes_data, 1, str(recipe), 4)
    assert found == expected and len(set(found)) == 4


def begins_again_and_ends(world, cases: list[tuple[int, bool]]) -> list[dict]:
    config, found = tiny_config(), []
    for stage, bf16 in cases:
        trial = Trial(config, RunSettings(), resolve(config, world, stage, bf16=bf16), world)
        first = trial.losses(4)
        trial.reset()
        again = trial.losses(4)
        masters, state = trial.engine.master_weights, trial.engine.zero.optimizer.state
        moments = [t for one in state.values() for t in one.values() if isinstance(t, torch.Tensor)]
        ema = trial.ema.partitions
        held = [weakref.ref(t) for t in (*masters, *moments, *ema)]
        weights = [weakref.ref(p) for p in trial.model.parameters()]
        del masters, state, moments, ema
        trial.close()
        alive = [t for t in held if t() is not None] + [p for p in weights if p() is not None and p().numel()]
        found.append({"first": first, "again": again, "held": len(held), "alive": len(alive)})
    return found


@pytest.mark.parametrize("cases", [[(1, False), (1, True), (2, False)], [(3, False)]])
def test_it_begins_again_bit_for_bit_and_leaves_no_memory_behind(cases):
    """ZeRO stage, bfloat16; one trial after the other in one process."""
    [found] = run_in_processes(begins_again_and_ends, 1, cases)
    for trial in found:
        assert trial["first"] == trial["again"] and len(set(trial["first"])) == 4
        assert trial["held"] >= 4 and trial["alive"] == 0
    assert all(trial["first"] == pytest.approx(found[0]["first"], rel=2e-3) for trial in found)


def measured(world, longer: bool) -> dict:
    config = tiny_config(ema={"decay": 0.9, "start_step": 1})
    with Trial(config, RunSettings(), resolve(config, world), world) as trial:
        found = {"figures": trial.measure(warm_up=2, steps=3, seconds=0.0), "memory": trial.memory()}
        found["parameters"] = sum(p.numel() for p in trial.model.parameters())
        if longer:
            seconds = 8 * found["figures"].milliseconds.step / 1e3
            found["longer"] = trial.measure(warm_up=0, steps=1, seconds=seconds)
            trial.reset()
            found["again"] = trial.losses(5)
    return found


def test_figures_of_one_process_and_of_two():
    [alone] = run_in_processes(measured, 1, True)
    figures, ms = alone["figures"], alone["figures"].milliseconds
    assert figures.steps == 3 and alone["longer"].steps >= 2
    assert math.isclose(ms.data + ms.forward + ms.backward + ms.optimizer, ms.step, rel_tol=1e-9)
    assert ms.communication is None and min(ms.forward, ms.backward, ms.optimizer) > 0
    assert figures.images_per_second == pytest.approx(8 / (ms.step / 1e3)) and figures.fastest_ms <= ms.step
    assert list(figures.losses) == alone["again"] and figures.peak_gib > 0
    gib, bytes_of = alone["memory"], {"weights": 4, "masters": 4, "moments": 8, "ema": 4}
    for part, size in bytes_of.items():
        assert gib[part] * 2**30 == pytest.approx(size * alone["parameters"], rel=0.01), part
    assert gib["peak"] > sum(gib[part] for part in bytes_of)

    both = run_in_processes(measured, 2, False)
    assert both[0]["figures"] == both[1]["figures"]  # of the slowest rank
    assert both[0]["figures"].losses == pytest.approx(figures.losses, rel=1e-5)
    assert both[0]["figures"].milliseconds.communication > 0
    assert both[0]["memory"]["masters"] == pytest.approx(gib["masters"] / 2, rel=0.01)


def test_marks_divide_a_step(monkeypatch):
    times = iter([0.0, 0.001, 0.004, 0.010, 0.011, 0.012, 0.020, 0.021, 0.031, 0.050])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    marks = Marks(torch.device("cpu"))
    marks.put("data")  # before it begins: not kept
    marks.begin()
    for phase in ("data", "forward", "backward", "optimizer", "forward", "backward", "data", "forward", "optimizer"):
        marks.put(phase)
    steps = marks.end(lambda: None)
    assert steps[0] == pytest.approx({"data": 1, "forward": 3 + 1, "backward": 6 + 8, "optimizer": 1})
    assert steps[1] == pytest.approx({"data": 1, "forward": 10, "backward": 0, "optimizer": 19})
    assert median_step([steps[0]])["step"] == pytest.approx(20)


def test_the_median_step_and_its_parts():
    steps = [{"data": d, "forward": 10.0} for d in (5.0, 1.0, 90.0, 2.0)]
    assert median_step(steps) == {"step": 12.0, "data": 2.0, "forward": 10.0}
    assert median_step(steps[:3]) == {"step": 15.0, "data": 5.0, "forward": 10.0}


@pytest.mark.parametrize(
    "spans, length",
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(8, 9), (1, 5), (2, 3)], 5), ([(1, 2), (2, 3)], 2)],
)
def test_time_that_is_covered(spans, length):
    assert length_of_union(spans) == length
