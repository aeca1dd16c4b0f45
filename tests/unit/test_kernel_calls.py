"""mdit/costs/kernel_calls.py, compared with what a model really calls and with what torch counts."""

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdit.costs.kernel_calls import expert_layers, fp8_calls, kernel_calls
from mdit.kernels import expert_choice, masked_attention, patch_mixing, swiglu
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from mdit.models.presets import xl_2
from mdit.parallel.fuse import fuse
from tests.recipes import tiny_model

OPS = {
    patch_mixing: ["add_norm_modulate"],
    masked_attention: ["self_attention", "cross_attention"],
    swiglu: ["swiglu_linear"],
    expert_choice: ["route", "gather_tokens", "gelu_bmm", "scatter_tokens"],
}
CHANGES = [{}, {"use_patch_mixer": False}, {"mixer_dim": 32}, {"experts_every_n": 0}, {"capacity_factor": 1.5}]


def described(arguments):
    """Shape, dtype and density of the tensors among the arguments, and the numbers, in order; eps is left out."""
    flat = [part for a in arguments for part in (a if isinstance(a, tuple) else [a])]
    return tuple(
        (tuple(a.shape), a.dtype, a.is_contiguous(), a.stride(-1)) if isinstance(a, Tensor) else a
        for a in flat
        if not isinstance(a, float)
    )


@pytest.fixture
def called(monkeypatch):
    """Counts every call of a public function of mdit.kernels by name and arguments."""
    counts: Counter = Counter()

    def watch(module, name):
        function = getattr(module, name)

        def counting(*args, **named):
            op = f"{module.__name__.removeprefix('mdit.kernels.')}.{name}"
            counts[op, described([*args, *named.values()])] += 1
            return function(*args, **named)

        monkeypatch.setattr(module, name, counting)

    for module, names in OPS.items():
        for name in names:
            watch(module, name)
    return counts


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_the_calls_are_those_of_a_forward_pass(called, changes, mask_ratio):
    config = tiny_model(**changes)
    mask = sample_mask(torch.rand(3, config.num_patches), mask_ratio)
    fuse(MicroDiT(config))(torch.randn(3, 4, 8, 8), torch.zeros(3), torch.randn(3, 5, 12), mask=mask)
    in_the_model = Counter(called)
    called.clear()
    for call in kernel_calls(config, 3, mask_ratio):
        inputs = call.inputs("cpu", torch.float32)
        for _ in range(call.count):
            call.function(*inputs)
    assert trimmed(called) == trimmed(in_the_model)


def trimmed(counts):
    """Without the Nones at the end, which one caller leaves out and another gives."""
    found: Counter = Counter()
    for (op, arguments), count in counts.items():
        while arguments[-1] is None:
            arguments = arguments[:-1]
        found[op, arguments] += count
    return found


def tiny_calls():
    config = tiny_model()
    calls = [call for ratio in (0.0, 0.75) for call in kernel_calls(config, 3, ratio)]
    return [*calls, *expert_layers(config, 3, 0.75), *fp8_calls(config, 3, 0.75)]


def identified(call):
    return f"{call.op} {call.where} {call.label}"


def floating(tensors):
    return [t for t in tensors if t is not None and t.is_floating_point()]


@pytest.mark.parametrize("call", tiny_calls(), ids=identified)
def test_flops_are_what_torch_counts(call):
    inputs = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in leaves(call)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        outputs = outputs_of(call, inputs)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        sum(o.sum() for o in outputs if o.requires_grad).backward()
    assert call.forward_flops == forward.get_total_flops()
    assert call.backward_flops == backward.get_total_flops()


def leaves(call):
    return [None if t is None else t.detach() for t in call.inputs("cpu", torch.float64)]


def outputs_of(call, inputs):
    outputs = call.function(*inputs)
    return floating([outputs] if isinstance(outputs, Tensor) else outputs)


@pytest.mark.parametrize("call", [c for c in tiny_calls() if c.op != "expert_choice"], ids=identified)
def test_bytes_are_at_least_those_of_the_tensors(call):
    """Forward exactly, but for rows that a mask drops; backward at least cotangents and gradients."""
    inputs = leaves(call)
    outputs = call.function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    kept = call.shape.get("K") if call.op.endswith("add_norm_modulate") else None
    of_inputs = 0
    for t in inputs:
        if t is None or (call.op.endswith(("gather_tokens", "scatter_tokens")) and t is not inputs[0]):
            continue  # of a routing only one tensor is read
        of_inputs += t.nbytes * kept // call.shape["T"] if kept and t.ndim == 3 else t.nbytes
    written = sum(o.nbytes for o in outputs if not any(o is t for t in inputs))
    routing = {"gather_tokens": inputs[-2:-1], "scatter_tokens": inputs[-1:]}.get(call.op.split(".")[1], [])
    index = sum(t.nbytes for t in routing)
    # In float64 router weights stay so; the estimate knows them as float32.
    widened = sum(t.nbytes // 2 for t in [*inputs, *outputs] if t is not None and is_router_weight(call, t, inputs))
    is_norm_in_float8 = call.op == "fp8_linear.fp8_add_norm_modulate"
    float8 = outputs[1].numel() + 4 * outputs[1][..., 0].numel() if is_norm_in_float8 else 0
    assert call.forward_bytes(itemsize=8) == of_inputs + written + index - widened + float8
    gradients = sum(t.nbytes for t in floating(inputs)[:1])
    assert call.backward_bytes(itemsize=8) >= gradients + sum(o.nbytes for o in floating(outputs)) - widened


def is_router_weight(call, t, inputs):
    if call.op.endswith("route"):
        return t is not inputs[0] and t.is_floating_point()
    return call.op.endswith("gelu_bmm") and t is inputs[-1] or call.op.endswith("fp8_experts") and t is inputs[3]


def test_the_paper_calls_of_stage_one():
    calls = {(c.op, c.where, c.label): c for c in kernel_calls(xl_2(), 256, 0.75)}
    counts: Counter = Counter()
    for (op, where, _), call in calls.items():
        counts[op, where] += call.count
    assert counts["masked_attention.self_attention", "backbone"] == 28
    assert counts["patch_mixing.add_norm_modulate", "mixer"] == 3 * 6 + 1
    assert counts["patch_mixing.add_norm_modulate", "backbone"] == 3 * 28 + 1
    assert counts["swiglu.swiglu_linear", "backbone"] == 15 and counts["swiglu.swiglu_linear", "mixer"] == 3
    assert counts["expert_choice.gelu_bmm", "backbone"] == 13 and counts["expert_choice.gelu_bmm", "mixer"] == 3
    widest = calls["masked_attention.self_attention", "backbone", "N256 T64 A1024 heads16"]
    assert widest.forward_bytes() == 2 * 4 * 256 * 64 * 1024
    assert widest.backward_bytes() == 2 * 8 * 256 * 64 * 1024  # qkv, the output, its cotangent, the gradient of qkv
    assert widest.forward_flops == 4 * 256 * 64 * 64 * 1024
    chain = calls["patch_mixing.add_norm_modulate", "mixer", "N256 T256 D768 y gate"]
    rows = 256 * 256 * 768
    assert chain.forward_bytes() == pytest.approx(2 * 4 * rows, rel=0.01)  # x, y -> x', h
    assert chain.backward_bytes() == pytest.approx(2 * 6 * rows, rel=0.01)  # x', y, two cotangents -> dx, dy
    leaving = calls["patch_mixing.add_norm_modulate", "mixer", "N256 T256 D768 K64 y gate"]
    assert leaving.forward_bytes() == pytest.approx(chain.forward_bytes() / 4, rel=0.01)


def test_inputs_have_the_strides_of_the_model_and_any_dtype():
    norm = next(c for c in kernel_calls(xl_2(), 2, 0.75) if c.shape.get("modulated") and c.shape["gate"])
    x, y, gate, weight, shift, scale, keep = norm.inputs("meta", torch.float16)
    assert {t.dtype for t in (x, y, gate, weight, shift, scale)} == {torch.float16} and keep is None
    assert gate.stride() == shift.stride() == scale.stride() == (6 * x.shape[2], 1)
    leaving = next(c for c in kernel_calls(tiny_model(), 2, 0.75) if c.shape.get("modulated") is False and c.shape["K"])
    keep = leaving.inputs("cpu", torch.float32)[-1]
    assert keep.dtype == torch.int64 and all(len(set(row)) == 4 for row in keep.tolist())
