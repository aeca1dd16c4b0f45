"""mdit/costs/trace.py: a micro-batch as traced, against what torch counts, keeps and multiplies when it really runs."""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdit.config import UserError
from mdit.costs import trace as module
from mdit.costs.calls import kernel_calls
from mdit.costs.trace import IN_PLACE, MATMULS, PYTORCH, Form, forward_flops, trace, training_flops, watch
from mdit.dist import World
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from mdit.models.presets import xl_2
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import RunSettings
from tests.recipes import LEVERS, tiny_config, tiny_model

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="counts the launches of Triton kernels")
OPS = ("patch_mixing", "swiglu", "expert_choice", "masked_attention")
FP8 = {"head_dim": 16, "mixer_dim": 32, "depth": 2}


@pytest.mark.parametrize(
    "latent_size, mask_ratio, gflops", [(32, 0.75, 282), (32, 0.0, 714), (64, 0.75, 1069), (64, 0.0, 3003)]
)
def test_flops_of_the_four_stages(latent_size, mask_ratio, gflops):
    assert training_flops(xl_2(latent_size), mask_ratio) / 1e9 == pytest.approx(gflops, rel=0.005)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize(
    "changes", [{}, {"use_patch_mixer": False}, {"mixer_dim": 32}, {"capacity_factor": 1.5}, LEVERS], ids=str
)
def test_flops_are_what_torch_counts_of_a_run(changes, mask_ratio):
    """With the plain attention, whose two matmuls torch sees on a CPU too; less the gradient that nobody asks for."""
    config = tiny_model(**changes)
    model = MicroDiT(config)
    parallelize(model, RunSettings(), ParallelPlan(World(0, 1, 0, torch.device("cpu"))))
    latents, caption = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 5, 12, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(latents, torch.zeros(3), caption, mask=sample_mask(torch.rand(3, 16), mask_ratio))
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 3 * sum(forward_flops(config, mask_ratio).values())
    sine_features = 2 * 3 * model.t_embedder.mlp[0].weight.numel()
    assert counter.get_total_flops() == 3 * training_flops(config, mask_ratio) - sine_features


@with_triton
@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize(
    "changes, fp8", [({}, False), ({"use_patch_mixer": False}, False), (FP8, True), (FP8 | LEVERS, False)], ids=str
)
def test_one_trace_has_the_kernels_of_every_micro_batch(changes, fp8, mask_ratio):
    config, form = tiny_config(model=changes).model, Form(fp8=fp8)
    products, moved, flops = Counter(), Counter(), Counter()
    for sign, kernels in (
        (1, trace(config, mask_ratio, form).at(251)),
        (-1, Counter(seen.at(251) for seen in watch(config, 251, mask_ratio, form).seen)),
    ):
        for kernel, count in kernels.items():
            products[kernel.product] += sign * count
            moved[kernel.part, sign] += count * kernel.bytes
            flops[kernel.part, sign] += count * kernel.flops
    assert not any(products.values()) and None in products and len(products) > 10
    for part, _ in moved:  # norms have more programs an image for fewer images, and each program sums of its own
        rel = 0.1 if part == "patch_mixing" else 1e-9
        assert moved[part, 1] == pytest.approx(moved[part, -1], rel=rel) and flops[part, 1] == flops[part, -1], part


@with_triton
def test_kernels_move_little_more_than_they_must():
    n = 256
    kernels = trace(xl_2(), 0.75).at(n)
    calls = kernel_calls(xl_2(), n, 0.75)
    flops = forward_flops(xl_2(), 0.75)
    products = sum(count * kernel.product.flops for kernel, count in kernels.items() if kernel.product)
    assert products == pytest.approx(3 * n * flops["matmuls"], rel=0.01)
    for op in OPS:
        costs = [(call.cost(), count) for call, count in calls.items() if call.op.startswith(op)]
        least = sum(count * (cost.forward_bytes + cost.backward_bytes) for cost, count in costs)
        moved = sum(count * kernel.bytes for kernel, count in kernels.items() if kernel.part == op)
        assert least < moved < 1.7 * least, op
    of_attention = sum(count * kernel.flops for kernel, count in kernels.items())
    least = 3 * n * flops["attention"]
    assert least < of_attention < 1.6 * 3.5 / 3 * least  # seven products, and whole blocks of captions


@with_triton
def test_every_kernel_is_known_and_has_its_direction():
    kernels = [kernel for fp8 in (False, True) for kernel in trace(tiny_model(**FP8), 0.75, Form(fp8=fp8)).at(64)]
    assert IN_PLACE.keys() <= {kernel.name for kernel in kernels}
    assert {kernel.part for kernel in kernels} == {*OPS, "fp8_linear", "matmuls", PYTORCH}
    for kernel in kernels:
        assert (kernel.arguments > 0) == (kernel.part not in ("matmuls", PYTORCH)), kernel
        assert (kernel.part == "matmuls") == (kernel.name in MATMULS) == (kernel.product is not None)
        assert kernel.bytes > 0 and kernel.backward >= ("backward" in kernel.name)
    assert {kernel.product.itemsize for kernel in kernels if kernel.product} == {1, 2}


def test_without_triton_it_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        trace(tiny_config().model, 0.5)
    assert trace(tiny_config().model, 0.5, Form(triton=False)).operations > 0
