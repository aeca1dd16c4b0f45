"""mdit.train.zero_step against DeepSpeed's own optimizers, bit for bit; where it is more exact, against plain sums."""

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.engine import DeepSpeedEngine

from mdit.bench.run import plan_of, synthetic_batches
from mdit.data.loader import Batch
from mdit.dist import World
from mdit.models import MicroDiT
from mdit.parallel.apply import parallelize
from mdit.parallel.settings import Execution
from mdit.train import engine as engines
from mdit.train.engine import Engine
from mdit.train.loop import optimizer_step
from mdit.train.zero_step import IMPROVED, BF16Sums
from tests.recipes import tiny_config
from tests.training import run_in_processes

CONFIG = tiny_config(
    model={"mixer_dim": 16, "mixer_depth": 1},  # 2 heads, for two tensor ranks
    training={"global_batch_size": 16},
    optim={"lr": 1e-2, "warmup_steps": 1, "max_grad_norm": 0.3},
)
STEPS, POISONED = 3, 1
BF16 = {"bf16": {"enabled": True}}


def build(world: World, ds_json: dict, config=CONFIG) -> tuple[Engine, Iterator[Batch]]:
    execution = Execution.resolve(ds_json, config, processes=world.size, bf16_works=False, path="test")
    settings = execution.settings
    plan = plan_of(settings.expert_parallel, settings.tensor_parallel, world)
    torch.manual_seed(0)
    model = MicroDiT(config.model)
    for parameter in model.parameters():  # the released initialisation leaves most gradients zero at first
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    parallelize(model, settings, plan)
    return Engine(model, config, execution, plan), synthetic_batches(config, plan)


def trained(world: World, ds_json: dict, **options) -> dict:
    """-> of each step whether it was applied, the gradient's norm, and a copy of the masters."""
    engine, batches = build(world, ds_json, **options)
    found = {"applied": [], "norm": [], "masters": []}
    for step in range(STEPS):
        batch = next(batches)
        if step == POISONED and world.rank == world.size - 1:
            batch = replace(batch, latents_NCHW=torch.full_like(batch.latents_NCHW, torch.nan))
        optimizer_step(engine, batch, step, CONFIG)
        found["applied"].append(engine.step_applied)
        found["norm"].append(engine.gradient_norm())
        found["masters"].append([master.detach().clone() for master in engine.master_weights])
    return found


def trained_both_ways(world: World, ds_jsons: list[dict]) -> list[tuple[dict, dict]]:
    pairs = []
    for ds_json in ds_jsons:
        ours = trained(world, ds_json)
        with mock.patch.object(engines, "improve"):
            pairs.append((ours, trained(world, ds_json)))
    return pairs


def zero(stage: int, micro_batch: int, **keys) -> dict:
    return {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": micro_batch} | keys


SAME = {  # processes: layouts in which DeepSpeed computes in the same dtypes
    1: [zero(1, 8), zero(2, 8) | BF16],
    2: [
        *(zero(stage, micro_batch) | BF16 for stage, micro_batch in ((1, 4), (1, 8), (2, 4))),
        zero(1, 4, bf16={"enabled": True, "immediate_grad_update": True}),
        zero(2, 8, zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    ],
    4: [zero(stage, 2, mdit={"expert_parallel": 2}) | BF16 for stage in (1, 2)],
}
TENSORS = [zero(1, 4, mdit={"tensor_parallel": 2}) | BF16]


def assert_bit_for_bit(processes: int, ds_jsons: list[dict]) -> None:
    for rank, pairs in enumerate(run_in_processes(trained_both_ways, processes, ds_jsons)):
        for ds_json, (ours, theirs) in zip(ds_jsons, pairs, strict=True):
            where = f"{ds_json} on rank {rank} of {processes}"
            assert ours["applied"] == theirs["applied"] == [step != POISONED for step in range(STEPS)], where
            assert ours["norm"] == theirs["norm"] and max(theirs["norm"][:POISONED]) > CONFIG.optim.max_grad_norm, where
            for mine, other in zip(ours["masters"], theirs["masters"], strict=True):
                assert all(map(torch.equal, mine, other)), where
            assert not torch.equal(ours["masters"][0][0], ours["masters"][-1][0]), where


@pytest.mark.parametrize("processes", SAME)
def test_the_masters_are_deepspeeds(processes):
    assert_bit_for_bit(processes, SAME[processes])


def test_the_masters_are_deepspeeds_with_tensors_spread():
    pytest.importorskip("megatron.core")
    assert_bit_for_bit(4, TENSORS)


def summed(world: World, ds_json: dict) -> tuple[float, int]:
    """-> the largest difference between the gradients that the optimizer steps by and sums in float32 of what autograd
    gave, where one rank has all that is to be summed; how many numbers were compared."""
    engine, batches = build(world, ds_json)
    assert type(engine.zero) is BF16Sums
    named, sums = dict(engine.deepspeed.module.named_parameters()), {}

    def add(name, parameter):
        gradient = parameter.grad.float().view(-1)
        sums[name] = sums[name] + gradient if name in sums else gradient

    for name, parameter in named.items():
        if world.size == 1 or not getattr(parameter, "allreduce", True):
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: add(name, p))
    step, used = engine.zero.step, {}

    def look_and_step():
        for group, gradients in zip(engine.zero.bf16_groups, engine.zero.fp32_groups_gradients):
            used.update({id(parameter): gradient.clone() for parameter, gradient in zip(group, gradients)})
        step()

    engine.zero.step = look_and_step
    optimizer_step(engine, next(batches), 0, CONFIG)
    differences = [(used[id(named[name])] - total / world.size).abs().max() for name, total in sums.items()]
    return float(max(differences)), sum(map(torch.numel, sums.values()))


@pytest.mark.parametrize("processes, micro_batch", [(1, 2), (1, 16), (2, 2)])
def test_what_one_rank_sums_is_never_rounded(processes, micro_batch):
    ds_json = zero(1, micro_batch, mdit={"expert_parallel": processes}) | BF16
    for difference, compared in run_in_processes(summed, processes, ds_json):
        assert difference == 0 and compared > 1000


def waits(world: World) -> int:
    """Number of times that DeepSpeed waits for the device during training."""
    engine, batches = build(world, zero(2, 4))
    with mock.patch.object(type(get_accelerator()), "synchronize") as synchronize:
        for step in range(5):  # DeepSpeed's timer begins at the third
            optimizer_step(engine, next(batches), step, CONFIG)
    return synchronize.call_count


def test_nothing_is_timed_behind_a_wait():
    assert run_in_processes(waits, 1) == [0]


def test_there_is_something_to_override():
    """A method that DeepSpeed renames would be left alone without a word."""
    for base, ours in IMPROVED.items():
        own = {name for name, value in vars(ours).items() if callable(value)} - {"global_norm"}
        assert own and all(callable(getattr(base, name)) for name in own)
    assert callable(DeepSpeedEngine.allreduce_and_copy)
