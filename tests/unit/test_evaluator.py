"""The copy of the model that a run evaluates, and first weights: drawn once and for new runs alone."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mdit.dist import World
from mdit.models import MicroDiT
from mdit.parallel.settings import Execution, RunSettings
from mdit.train import evaluator
from mdit.train.checkpointer import Checkpointer
from mdit.train.ema import EMA
from mdit.train.evaluator import Evaluator
from mdit.train.loop import first_weights
from mdit.train.run import Run
from tests.recipes import tiny_config
from tests.training import write_shards

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def config(tmp_path):
    directory = str(tmp_path / "set")
    config = tiny_config(data={"train": [directory], "validation": directory})
    write_shards(tmp_path / "set", config, 8, seed=0)
    return config


class Weights:
    """Stands where the engine does: whole float32 weights of a model that it has drawn."""

    def __init__(self, config):
        self.model = MicroDiT(config.model)

    def full_weights(self, partitions):
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()


def run_of(config, run_dir, dtype) -> Run:
    execution = Execution(RunSettings(), {"bf16": {"enabled": dtype == torch.bfloat16}})
    return Run(config, execution, run_dir, WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_is_evaluated_in_the_format_that_it_trains_in(config, tmp_path, monkeypatch, dtype):
    engine, seen = Weights(config), []

    def found(net, latents_NCHW, captions_NLC, **options):
        if isinstance(net, MicroDiT):
            seen.append({name: t.clone() for name, t in net.state_dict().items()})
        return function(net, latents_NCHW, captions_NLC, **options)

    function = evaluator.validation_loss
    monkeypatch.setattr(evaluator, "validation_loss", found)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    written = []
    meter = SimpleNamespace(write=lambda step, group, values: written.append(values["validation_loss"]), pause=int)
    state = torch.get_rng_state()
    Evaluator(run_of(config, tmp_path, dtype), engine, EMA(None, []), meter).validate(1)
    assert torch.equal(torch.get_rng_state(), state), "nothing is drawn that weights overwrite"
    for name, value in engine.model.state_dict().items():
        assert torch.equal(seen[0][name], value.to(dtype)), name
    assert 0 < written[0] < 10


def test_snapshots_hold_float32_whatever_is_evaluated(config, tmp_path):
    engine, run = Weights(config), run_of(config, tmp_path, torch.bfloat16)
    parts = dict(engine=engine, ema=EMA(None, []), meter=None, skipped=None)
    found = Checkpointer(run, SimpleNamespace(path=tmp_path), None, **parts)._whole_weights(None)
    wanted = engine.model.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
        assert found[name].data_ptr() != value.data_ptr(), name


def test_only_a_new_run_draws_weights(config):
    run = Run(config, None, None, WORLD)
    drawn = first_weights(run, None).state_dict()
    torch.manual_seed(config.seed)
    for name, value in MicroDiT(config.model).state_dict().items():
        assert torch.equal(drawn[name], value), name
    state = torch.get_rng_state()
    given = {name: torch.full_like(value, 2.0) for name, value in drawn.items() if name != "pos_embed"}
    started = first_weights(dataclasses.replace(run, initial_weights=given), None).state_dict()
    resumed = first_weights(run, SimpleNamespace(step=3)).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in started.items():
        assert torch.equal(value, given.get(name, drawn["pos_embed"])), name
    assert resumed.keys() == drawn.keys()
    for name in ("pos_embed", "mask_token"):
        assert torch.equal(resumed[name], drawn[name])
