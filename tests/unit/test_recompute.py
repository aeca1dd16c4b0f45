"""Activation checkpointing of a block: the same values, less memory, nothing dear computed twice."""

import functools
from collections import Counter

import pytest
import torch
import torch.distributed
from torch import Tensor, nn

from mdit.config import ModelConfig
from mdit.kernels import dispatch
from mdit.models.dit import Block
from mdit.models.layers import SwiGLU
from mdit.models.presets import xl_2
from mdit.parallel.fuse import PendingResidual, fuse
from mdit.parallel.recompute import recompute
from tests.operations import Operations
from tests.recipes import tiny_model

MODES = ("none", "selective", "block")
N, T, L, D = 1, 4, 3, 32
MATMULS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")


def new_block(kind: str = "experts", mode: str = "none") -> Block:
    """With every weight at work: some start as zeros."""
    torch.manual_seed(0)
    block = block_of(tiny_model(dim=D, head_dim=16, mixer_dim=48), kind)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    recompute(block, mode)
    return block


def block_of(config: ModelConfig, kind: str) -> Block:
    options = dict(dim=config.dim, qkv_ratio=0.5, ffn_ratio=2.0, has_experts=kind == "experts", out_std=0.02)
    return fuse(Block(config, **options))


def inputs() -> list[Tensor]:
    """x, y and gate of a residual, caption, condition."""
    torch.manual_seed(1)
    shapes = (N, T, D), (N, T, D), (N, D), (N, L, D), (N, D)
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def run(block: Block) -> tuple[Tensor, list[Tensor]]:
    """-> what the block adds up to, and the gradients of inputs and weights of a function of that."""
    x, y, gate, caption, condition = leaves = inputs()
    out = block(PendingResidual(x, y, gate), caption, condition).added()
    gradients = torch.autograd.grad(out.sin().sum(), [*leaves, *block.parameters()])
    return out.detach(), list(gradients)


def assert_same(ours, theirs, *, bits: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if bits else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)


@functools.cache
def ran(kind: str, mode: str, kernels: str) -> tuple[Tensor, list[Tensor], Counter]:
    """What `run` gives, and how often each operation ran; once for all tests, as interpreted kernels are slow."""
    block = new_block(kind, mode)
    with dispatch.using(*(dispatch.OPS if kernels == "triton" else ()), off_gpu=True), Operations() as seen:
        return *run(block), seen.count


@pytest.fixture(params=["reference", "triton"])
def kernels(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


# Values


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_values_and_gradients_stay(kernels, kind):
    none, selective, block = (ran(kind, mode, kernels)[:2] for mode in MODES)
    assert_same(selective, none, bits=True)
    assert_same(block[0], none[0], bits=True)
    assert_same(block[1], none[1], bits=False)


@pytest.mark.parametrize("mode", MODES[1:])
def test_a_residual_of_one_tensor_and_no_gradients_wanted(mode):
    """What enters the first block; what validation asks for."""
    x, _, _, caption, condition = inputs()
    with torch.no_grad():
        expected = new_block()(PendingResidual(x), caption, condition).added()
        assert torch.equal(new_block(mode=mode)(PendingResidual(x), caption, condition).added(), expected)


@pytest.mark.parametrize("mode", MODES[1:])
def test_experts_that_like_all_tokens_alike_choose_the_same_ones_again(mode):
    gradients = []
    for block in (new_block(), new_block(mode=mode)):
        nn.init.zeros_(block.mlp.gate.weight)
        gradients.append(run(block)[1])
    assert_same(gradients[1], gradients[0], bits=mode == "selective")


# Work and memory


def test_matmuls_attention_and_routing_run_once_with_selective(kernels):
    none, selective, block = (ran("experts", mode, kernels)[2] for mode in MODES)
    if kernels == "triton":
        dear = [f"mdit.{op}.default" for op in ("masked_attention", "expert_gelu_bmm", "expert_route")]
        dear, cheap = [*MATMULS, *dear], "mdit.add_norm_modulate.default"
    else:
        dear = [*MATMULS, "aten._scaled_dot_product_flash_attention_for_cpu.default", "aten.topk.default"]
        cheap = "aten.native_layer_norm.default"
    for op in dear:
        assert none[op] == selective[op] < block[op], op
    assert none[cheap] < selective[cheap]


def test_w1_and_w2_are_one_matmul_in_both_directions(kernels):
    """A product, and its two gradients, of both together, and nothing that adds or copies besides the weights."""
    x, mlp = torch.randn(3, D, requires_grad=True), fuse(SwiGLU(D, 48, 8, use_bias=False))
    with dispatch.using(*(dispatch.OPS if kernels == "triton" else ()), off_gpu=True), Operations() as seen:
        mlp(x).sum().backward()
    assert seen.count["aten.mm.default"] == (3 if kernels == "triton" else 6)  # w3's are inside the op
    assert seen.count["aten.cat.default"] == 1 and seen.count["aten.add.Tensor"] == 0


def test_the_second_half_of_a_swiglu_runs_once_in_triton():
    pytest.importorskip("triton")
    counts = [ran("dense", mode, "triton")[2]["mdit.swiglu_linear.default"] for mode in MODES]
    assert counts == [1, 1, 2]


@pytest.mark.parametrize("kind", ["experts", "dense"])
def test_memory_shrinks_in_the_order_of_the_modes_at_the_papers_shapes(kernels, kind):
    """A backbone block of xl_2 at 256 images and a quarter of 256 tokens, in bfloat16, without computing anything."""
    n, t, d = 256, 64, 1024
    kept = {}
    for mode in MODES:
        with torch.device("meta"):
            block = block_of(xl_2(), kind).bfloat16()
            x, caption = (torch.empty(n, tokens, d, dtype=torch.bfloat16, requires_grad=True) for tokens in (t, 77))
            condition = torch.empty(n, d, dtype=torch.bfloat16)
        recompute(block, mode)
        with dispatch.using(*(dispatch.OPS if kernels == "triton" else ()), off_gpu=True), Operations() as seen:
            out = block(PendingResidual(x), caption, condition)
        kept[mode] = seen.kept()
        del out
    stream = n * t * d * 2
    assert kept["block"] == stream  # nothing but what is handed on
    # Triton's kernels keep little themselves: it is what the norms read and wrote, less what it takes to read it again.
    assert kept["selective"] <= kept["none"] - 3 * stream


# Compiled


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_blocks_keep_values_and_routing():
    """As inductor gets its graphs, without its minutes of C++; fullgraph makes it an error to compile nothing."""
    expected, kept = run(new_block()), {}
    for mode in MODES:
        block, saved = new_block(mode=mode), []
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)

        def pack(tensor: Tensor, saved: list = saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert_same(run(block), expected, bits=False)
        tokens_NEK = (N, 4, T * 2 // 4)
        assert any(tensor.dtype == torch.int64 and tensor.shape == tokens_NEK for tensor in saved), mode
        kept[mode] = sum(tensor.nbytes for tensor in saved if tensor.is_floating_point())
    assert kept["none"] > kept["selective"] > kept["block"]


# Communication


@pytest.fixture
def alone():
    """A group of one process: what it exchanges is counted all the same."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_experts_elsewhere_are_asked_once_with_selective(alone):
    from mdit.parallel.expert import shard_experts

    counts, gradients = {}, {}
    for mode in MODES:
        block = new_block()
        shard_experts(block.mlp, alone)
        recompute(block, mode)
        with Operations() as seen:
            _, gradients[mode] = run(block)
        counts[mode] = seen.count["_c10d_functional.all_to_all_single.default"]
    assert counts == {"none": 6, "selective": 6, "block": 9}
    assert_same(gradients["selective"], gradients["none"], bits=True)


class SumOverRanks(torch.autograd.Function):
    """As in megatron-core: in place."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class Row(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return SumOverRanks.apply(super().forward(x))


def test_a_kept_product_that_was_summed_over_ranks_in_place_is_not_summed_again(alone):
    counts = {}
    for mode in MODES:
        block = new_block()
        proj = block.attn.proj
        block.attn.proj = Row(proj.in_features, proj.out_features, bias=False)
        recompute(block, mode)
        with Operations() as seen:
            run(block)
        counts[mode] = seen.count["c10d.allreduce_.default"]
    assert counts == {"none": 1, "selective": 1, "block": 2}
