"""mdit/costs/calls.py and kernels/cost.py, against what torch counts of a call and what the paper's model does."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdit.costs.calls import Routing, kernel_calls
from mdit.models.presets import xl_2
from tests.recipes import tiny_model

TINY = [call for fp8 in (False, True) for call in kernel_calls(tiny_model(mixer_dim=16), 3, 0.75, fp8)]


@pytest.mark.parametrize("call", {call.op: call for call in TINY}.values(), ids=lambda call: call.op)
def test_a_call_costs_what_torch_counts(call):
    """FLOPs both ways; forward moves every tensor once, but for rows that a mask drops and what a routing is not read
    for; backward moves at least what forward read twice (it and its gradients), where forward's inputs are kept."""
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves(call)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        outputs = call.function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        sum(o.sum() for o in outputs if o.requires_grad).backward()
    cost = call.cost(torch.float64)
    assert (cost.flops, 2 * cost.flops) == (forward.get_total_flops(), backward.get_total_flops())
    moved = sum(t.nbytes for t in (*inputs, *outputs) if t is not None)
    assert 0.5 * moved < cost.forward_bytes <= 1.2 * moved
    assert cost.backward_bytes >= sum(t.nbytes for t in (inputs[0], *outputs) if t.is_floating_point())


def leaves(call):
    return [None if t is None else t.detach() for t in call.inputs("cpu", torch.float64)]


def test_the_paper_calls_of_stage_one():
    calls, counts = kernel_calls(xl_2(), 256, 0.75), Counter()
    for call, count in calls.items():
        counts[call.op] += count
    assert counts["masked_attention.self_attention"] == 1 + 6 + 28
    assert counts["masked_attention.cross_attention"] == 6 + 28
    assert counts["patch_mixing.add_norm_modulate"] == 2 + 3 * 6 + 1 + 3 * 28 + 1
    assert counts["swiglu.swiglu_linear"] == 1 + 3 + 15 and counts["expert_choice.gelu_bmm"] == 3 + 13
    labelled = {(call.op, call.label): call.cost() for call in calls}
    widest = labelled["masked_attention.self_attention", "N256 T64 X3072 num_heads16"]
    assert widest.forward_bytes == 2 * 4 * 256 * 64 * 1024
    assert widest.backward_bytes == 2 * 8 * 256 * 64 * 1024  # qkv, the output, its gradient, the gradient of qkv
    assert widest.flops == 4 * 256 * 64 * 64 * 1024
    rows = 256 * 256 * 768
    chain = labelled["patch_mixing.add_norm_modulate", "N256 T256 D768 y gate"]
    assert chain.forward_bytes == pytest.approx(2 * 4 * rows, rel=0.01)  # x, y -> x', h
    assert chain.backward_bytes == pytest.approx(2 * 6 * rows, rel=0.01)  # x', y, two gradients -> dx, dy
    leaving = labelled["patch_mixing.add_norm_modulate", "N256 T256 D768 y gate keep K64"]
    assert leaving.forward_bytes == pytest.approx(chain.forward_bytes / 4, rel=0.01)


def test_inputs_have_the_strides_of_the_model_and_any_dtype():
    calls = kernel_calls(tiny_model(), 2, 0.75)
    norm = next(call for call in calls if "scale" in call.shape and "gate" in call.shape)
    x, y, gate, weight, shift, scale, keep = norm.inputs("meta", torch.float16)
    assert {t.dtype for t in (x, y, gate, weight, shift, scale)} == {torch.float16} and keep is None
    assert gate.stride() == shift.stride() == scale.stride() == (6 * x.shape[2], 1)
    leaving = next(call for call in calls if "keep" in call.shape)
    keep = leaving.inputs("cpu", torch.float32)[-1]
    assert keep.dtype == torch.int64 and all(len(set(row)) == 4 for row in keep.tolist())
    gather = next(call for call in calls if call.op == "expert_choice.gather_tokens")
    assert isinstance(gather.arguments[1], Routing) and len(gather.inputs("cpu", torch.float32)) == 4
