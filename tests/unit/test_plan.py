"""The parallel plan: who shares what, and which plans are refused, each in one line that names the file and the key."""

import importlib.util

import pytest
import torch

from mdit.config import UserError
from mdit.dist import World
from mdit.models.presets import tiny_2, xl_2
from mdit.parallel import plan
from mdit.parallel.plan import ParallelPlan, check_plan, uneven
from mdit.parallel.settings import Execution
from tests.recipes import tiny_config, tiny_model

MODEL = tiny_model(mixer_dim=16)  # 4 experts; every attention has an even number of heads


def check(world_size=8, zero=None, model=MODEL, **settings) -> None:
    config = tiny_config(model=model.model_dump(), training={"global_batch_size": 24 * world_size})
    ds_json = {"zero_optimization": {"stage": 2, **(zero or {})}, "mdit": settings}
    execution = Execution.resolve(ds_json, config, processes=world_size, bf16_works=False, path="ds.json")
    check_plan(execution, model, world_size, "ds.json")


def error_of(**options):
    with pytest.raises(UserError) as caught:
        check(**options)
    assert "\n" not in str(caught.value) and str(caught.value).startswith('ds.json: "mdit": ')
    return str(caught.value)


def test_expert_parallel_ranks_each_have_a_share_of_the_batch():
    place = ParallelPlan(World(5, 8, 5, torch.device("cpu")))
    assert (place.data_rank, place.data_size) == (5, 8)


def test_tensor_parallel_neighbours_have_the_same_share():
    places = [ParallelPlan(World(rank, 8, rank, torch.device("cpu")), tensor_parallel=2) for rank in range(8)]
    assert [place.data_rank for place in places] == [0, 0, 1, 1, 2, 2, 3, 3] and places[0].data_size == 4


@pytest.mark.parametrize("key", ["expert_parallel", "tensor_parallel"])
@pytest.mark.parametrize("value", [3, 16])
def test_groups_have_to_come_out_even(key, value):
    assert f"{key} = {value} does not divide the 8 processes" in error_of(**{key: value})


@pytest.mark.parametrize("key", ["expert_parallel", "tensor_parallel"])
def test_zero_3_is_refused(key):
    assert f"{key} = 2 with zero_optimization.stage = 3" in error_of(zero={"stage": 3}, **{key: 2})


def test_experts_need_reduce_scatter():
    assert "expert_parallel = 2 with zero_optimization.reduce_scatter = false" in error_of(
        zero={"reduce_scatter": False}, expert_parallel=2
    )


def test_compiled_blocks_with_cut_tensors_are_refused():
    assert "tensor_parallel = 2 with compile = true: expected false" in error_of(tensor_parallel=2, compile=True)


def test_experts_and_tensors_at_once_are_refused():
    assert "expert_parallel = 2 with tensor_parallel = 4" in error_of(expert_parallel=2, tensor_parallel=4)


@pytest.mark.parametrize("model, experts", [(tiny_model(), 4), (tiny_model(depth=2, mixer_depth=1), 0)])
def test_the_experts_have_to_come_out_even(model, experts):
    assert f"expert_parallel = 8 does not divide the recipe's {experts} experts" in error_of(
        model=model, expert_parallel=8
    )


def test_megatron_is_asked_for_when_it_is_not_there(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(plan, "find_spec", lambda name: None if name.startswith("megatron") else found(name))
    assert "tensor_parallel = 2 needs megatron-core: pip install -e '.[megatron]'" in error_of(tensor_parallel=2)


@pytest.mark.parametrize(
    "model, tp, layer",
    [
        (tiny_model(), 2, "the 3 heads of patch_mixer.0.attn"),
        (tiny_model(mixer_dim=16, multiple_of=5), 2, "the width 85 of y_emb_preprocess.mlp"),
        (xl_2(), 4, "the 10 heads of blocks.1.attn"),
    ],
)
def test_the_layer_that_ranks_cannot_share_is_named(model, tp, layer):
    assert uneven(model, tp) == f"tensor_parallel = {tp} does not divide {layer}"


@pytest.mark.parametrize("model", [MODEL, tiny_2(), xl_2()])
def test_two_ranks_share_the_papers_models(model):
    assert uneven(model, 2) is None


@pytest.mark.parametrize("settings", [{}, {"expert_parallel": 4}, {"expert_parallel": 1, "tensor_parallel": 1}])
@pytest.mark.parametrize("stage", [1, 2])
def test_what_fits_passes(settings, stage):
    check(zero={"stage": stage}, **settings)


@pytest.mark.parametrize("value", ["2", 2.5, True, None, 0, -2])
def test_only_whole_numbers_above_0(value):
    with pytest.raises(UserError, match="ds.json: mdit.expert_parallel = "):
        check(expert_parallel=value)
