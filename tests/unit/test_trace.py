"""mdit/costs/trace.py: the kernels of a micro-batch, against the model's formulas."""

from collections import Counter
from importlib.util import find_spec

import pytest

from mdit.config import UserError
from mdit.costs import trace as module
from mdit.costs.flops import training_flops
from mdit.costs.kernel_calls import kernel_calls
from mdit.costs.trace import IN_PLACE, MATMULS, PYTORCH, trace, watch
from mdit.models.presets import xl_2
from tests.recipes import tiny_config

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="counts the launches of Triton kernels")
OPS = ("patch_mixing", "swiglu", "expert_choice", "masked_attention")
FP8 = {"head_dim": 16, "mixer_dim": 32, "depth": 2}


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("changes, fp8", [({}, False), ({"use_patch_mixer": False}, False), (FP8, True)], ids=str)
def test_one_trace_has_the_kernels_of_every_micro_batch(changes, fp8, mask_ratio):
    config = tiny_config(model=changes).model
    products, moved, flops = Counter(), Counter(), Counter()
    for sign, kernels in (
        (1, trace(config, mask_ratio, fp8).at(251)),
        (-1, Counter(seen.at(251) for seen in watch(config, 251, mask_ratio, fp8).seen)),
    ):
        for kernel, count in kernels.items():
            products[kernel.product] += sign * count
            moved[kernel.part, sign] += count * kernel.bytes
            flops[kernel.part, sign] += count * kernel.flops
    assert not any(products.values()) and None in products and len(products) > 10
    for part, _ in moved:  # norms have more programs an image for fewer images, and each program sums of its own
        rel = 0.1 if part == "patch_mixing" else 1e-9
        assert moved[part, 1] == pytest.approx(moved[part, -1], rel=rel) and flops[part, 1] == flops[part, -1], part


def test_matmuls_and_kernels_are_those_that_the_formulas_count():
    n = 256
    kernels = trace(xl_2(), 0.75).at(n)
    calls = kernel_calls(xl_2(), n, 0.75)
    attention = sum(call.count * call.forward_flops for call in calls if call.op.startswith("masked_attention"))
    products = sum(count * kernel.product.flops for kernel, count in kernels.items() if kernel.product)
    assert products == pytest.approx(n * training_flops(xl_2(), 0.75) - 3 * attention, rel=0.01)
    for op in OPS:  # what a kernel must move, and little more: docs/kernels.md
        least = sum(c.count * (c.forward_bytes() + c.backward_bytes()) for c in calls if c.op.startswith(op))
        moved = sum(count * kernel.bytes for kernel, count in kernels.items() if kernel.part == op)
        assert least < moved < 1.7 * least, op
    of_attention = sum(count * kernel.flops for kernel, count in kernels.items())
    assert 3 * attention < of_attention < 1.6 * 3.5 * attention  # seven products, and whole blocks of captions


def test_every_kernel_is_known_and_has_its_direction():
    kernels = [*trace(xl_2(), 0.75, fp8=True).at(64), *trace(xl_2(), 0.75).at(64)]
    assert IN_PLACE.keys() <= {kernel.name for kernel in kernels}
    assert {kernel.part for kernel in kernels} == {*OPS, "fp8_linear", "matmuls", PYTORCH}
    for kernel in kernels:
        assert (kernel.arguments > 0) == (kernel.part not in ("matmuls", PYTORCH)), kernel
        assert (kernel.part == "matmuls") == (kernel.name in MATMULS) == (kernel.product is not None)
        assert kernel.bytes > 0 and kernel.backward >= ("backward" in kernel.name)
    sizes = {kernel.product.itemsize for kernel in kernels if kernel.product}
    assert sizes == {1, 2}


def test_without_triton_it_is_one_line(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs Triton"):
        trace(tiny_config().model, 0.5)
