"""Muon against the singular value decomposition and its formula on whole matrices; who orthogonalises what."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mdit.config import UserError
from mdit.models import meta_model
from mdit.models.layers import CrossAttention, SelfAttention, SwiGLU
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.muon import (
    Exchange,
    choose_owners,
    held_elements,
    matrices_of,
    newton_schulz,
    takes_muon,
)
from mdit.parallel.settings import Execution, RunSettings
from mdit.train.muon import MuonAdamW
from mdit.train.optim import build_optimizer, check_implementation, parameter_groups
from tests.recipes import tiny_config
from tests.training import run_in_processes

KEYS = {"lr": 0.02, "weight_decay": 0.0}


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
def test_newton_schulz_keeps_the_singular_vectors(shape):
    """Jordan et al. 2024: after five steps all singular values that were not tiny are between 0.68 and 1.14."""
    generator = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(3, *shape, generator=generator).double(), full_matrices=False)
    s = s.clamp(min=0.05 * float(s.max()))
    x_NRC = u @ torch.diag_embed(s) @ vh
    found = u.mT @ newton_schulz(x_NRC, 5, 1e-7) @ vh.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, torch.diag_embed(values), rtol=0, atol=1e-9)
    assert 0.68 < values.min() and values.max() < 1.14
    exact = u @ torch.diag_embed(values) @ vh
    torch.testing.assert_close(newton_schulz(x_NRC.float(), 5, 1e-7).double(), exact, rtol=0, atol=1e-4)
    assert (newton_schulz(x_NRC.bfloat16(), 5, 1e-7).double() - exact).norm() / exact.norm() < 0.05


def test_nothing_comes_of_nothing():
    assert not newton_schulz(torch.zeros(2, 3, 4), 5, 1e-7).any()


def test_next_to_nothing_counts_as_nothing():
    """Each matrix by itself. What is small beside eps, and not that small, grows by the slope at 0 in each step."""
    x_CR = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    large, small, nothing = newton_schulz(torch.stack([x_CR, 1e-13 * x_CR, 1e-16 * x_CR]), 5, 1e-7)
    assert torch.equal(large, newton_schulz(x_CR[None], 5, 1e-7)[0]) and large.norm() > 1
    torch.testing.assert_close(small, 1e-13 * x_CR / 1e-7 * 3.4445**5, rtol=1e-3, atol=1e-8)
    assert not nothing.any()


def test_muon_takes_attention_and_feed_forward_of_the_blocks():
    model = meta_model(tiny_config().model)
    blocks = [*model.blocks, *model.patch_mixer]
    modules = [m for block in blocks for m in block.modules()]
    layers = (SelfAttention, CrossAttention, SwiGLU)
    expected = [p for m in modules if isinstance(m, layers) for p in m.parameters()]
    expected += [p for m in modules if isinstance(m, ExpertChoiceMoE) for p in (m.w1, m.w2)]
    taken = [p for name, p in model.named_parameters() if takes_muon(name, p.shape)]
    assert {*map(id, taken)} == {*map(id, expected)} and {p.ndim for p in taken} == {2, 3}
    assert not takes_muon("blocks.0.attn.qkv.bias", (96,))


def test_flops_are_those_of_the_matmuls():
    shapes = [(48, 16), (3, 16, 40), (32, 32)]
    for shape in shapes:
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.empty(shape if len(shape) == 3 else (1, *shape), device="meta"), 5, 1e-7)
        assert 5 * sum(matrix.flops for matrix in matrices_of([shape])) == counter.get_total_flops()


def contiguous(numels: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each parameter on each rank, as ZeRO 1 and 2 cut a flat group."""
    ends = np.cumsum(numels)
    size = -(-ends[-1] // ranks)
    starts = np.arange(ranks)[:, None] * size - (ends - numels)
    return np.clip(starts, 0, numels), np.clip(starts + size, 0, numels)


@pytest.mark.parametrize("ranks", [1, 3, 7])
def test_every_matrix_has_one_owner_that_holds_a_part_of_it(ranks):
    shapes = [(16, 16)] * 10 + [(6, 16, 24)] * 3 + [(48, 16)] * 4
    matrices, numels = matrices_of(shapes), np.array([np.prod(shape) for shape in shapes])
    borders = np.stack([numels * rank // ranks for rank in range(ranks + 1)])  # of each parameter, as ZeRO 3 cuts it
    for begin, end in (contiguous(numels, ranks), (borders[:-1], borders[1:])):
        _, held = held_elements(matrices, begin, end)
        owners = choose_owners(matrices, held)
        assert held.sum(1).tolist() == [matrix.numel for matrix in matrices]
        assert (held[np.arange(len(matrices)), owners] > 0).all()
    load = np.bincount(owners, [matrix.flops for matrix in matrices], minlength=ranks)
    assert load.max() - load.min() <= max(matrix.flops for matrix in matrices)
    _, held = held_elements(matrices, *contiguous(numels, ranks))
    assert ((held > 0).sum(1) > 1).sum() <= ranks - 1  # only what is on a border is sent


SHAPES = [(8, 12), (3, 10, 6), (18, 6)]
LR, DECAY, MOMENTUM = 0.05, 0.1, 0.9


def drawn(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def by_hand(steps: int) -> list[torch.Tensor]:
    """Whole matrices one by one, in float64, as the docstring of mdit.train.muon has it."""
    weights, means = [w.double() for w in drawn(0)], [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    for step in range(1, steps + 1):
        for w, m, g in zip(weights, means, drawn(step), strict=True):
            m += (1 - MOMENTUM) * (g - m)
            for matrix, u in zip(
                w.view(-1, *w.shape[-2:]), ((1 - MOMENTUM) * g + MOMENTUM * m).view(-1, *w.shape[-2:])
            ):
                rows, columns = u.shape
                x = u / (u.norm() + 1e-7)
                for _ in range(5):
                    xx = x @ x.T
                    x = 3.4445 * x - 4.7750 * xx @ x + 2.0315 * xx @ xx @ x
                matrix -= LR * DECAY * matrix + LR * max(1, rows / columns) ** 0.5 * x
    return weights


def steps_of_pieces(world, bounds: list[int]) -> torch.Tensor:
    """This rank's elements bounds[rank] .. bounds[rank + 1] of all weights, flat, after three steps."""
    low, high = bounds[world.rank : world.rank + 2]
    flat = [torch.cat([t.flatten() for t in drawn(seed)])[low:high] for seed in range(4)]
    numels = np.array([int(np.prod(shape)) for shape in SHAPES])
    first = np.cumsum(numels) - numels
    begin, end = (np.clip(np.array(edge)[:, None] - first, 0, numels) for edge in (bounds[:-1], bounds[1:]))
    config = tiny_config(optim={"name": "muon", "muon": {"lr": 1.0, "weight_decay": DECAY, "momentum": MOMENTUM}}).optim
    master = torch.nn.Parameter(flat[0])
    (_, group) = parameter_groups([("blocks.0.attn.qkv.weight", torch.empty(2, 2))], config)
    optimizer = build_optimizer([group | {"params": [master], "lr": LR}], config)
    offset = np.maximum(first - low, 0)
    optimizer.exchanges = {master: Exchange(matrices_of(SHAPES), begin, end, offset, world.rank)}
    for step in range(1, 4):
        master.grad = flat[step]
        optimizer.step()
    assert [*optimizer.state[master]] == ["exp_avg"]
    return master.detach()


@pytest.mark.parametrize("bounds", [[0, 384], [0, 100, 384], [0, 30, 60, 384]], ids=len)
def test_three_steps_of_pieces_are_those_of_the_formula(bounds):
    """Alone, in halves that cut an expert, and in thirds of which two share a matrix."""
    parts = run_in_processes(steps_of_pieces, len(bounds) - 1, bounds)
    expected = torch.cat([w.flatten() for w in by_hand(3)])
    torch.testing.assert_close(torch.cat(parts).double(), expected, rtol=0, atol=1e-5)


def test_other_groups_are_adamws():
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
    config = tiny_config(optim={"name": "muon", "muon": KEYS}).optim
    ours = build_optimizer(parameter_groups([("final_layer.linear.bias", weights[0])], config), config)
    assert isinstance(ours, MuonAdamW) and [group["peak"] for group in ours.param_groups] == [1.0, pytest.approx(20)]
    theirs = build_optimizer([weights[1]], tiny_config().optim)
    for w, optimizer in zip(weights, (ours, theirs), strict=True):
        w.grad = torch.arange(4.0)
        optimizer.step()
    assert torch.equal(*weights) and not torch.equal(weights[0], torch.ones(4))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "muon"}, "without a table [optim.muon]"),
        ({"muon": KEYS}, 'name is "adamw" with a table [optim.muon]'),
        (
            {"name": "muon", "muon": KEYS, "implementation": "deepspeed"},
            'expected "torch"',
        ),
    ],
)
def test_keys_that_contradict_each_other(changes, words):
    with pytest.raises(ValueError, match=words.replace("[", r"\[")):
        tiny_config(optim=changes)


@pytest.mark.parametrize(
    "settings, zero, words",
    [
        ({"tensor_parallel": 2}, {}, '"tensor_parallel": 2'),
        ({}, {"offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer"),
    ],
)
def test_layouts_that_leave_no_place_for_it(settings, zero, words):
    execution = Execution(RunSettings(**settings), {"zero_optimization": {"stage": 2, **zero}})
    config = tiny_config(optim={"name": "muon", "muon": KEYS}).optim
    check_implementation(tiny_config().optim, torch.device("cpu"), "recipe.toml", execution)
    with pytest.raises(UserError, match="recipe.toml: optim.name = 'muon': ") as refused:
        check_implementation(config, torch.device("cpu"), "recipe.toml", execution)
    assert words in str(refused.value) and "\n" not in str(refused.value)
