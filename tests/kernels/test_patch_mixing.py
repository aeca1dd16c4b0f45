"""Gated add, LayerNorm and modulation in one op: in PyTorch against the formula, in Triton against PyTorch."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mdit.kernels import fp8_linear, patch_mixing
from mdit.kernels.fp8_linear.reference import quantise
from mdit.kernels.launch import recorded
from mdit.kernels.patch_mixing import reference
from tests.kernels.accuracy import (
    DEVICE,
    DTYPES,
    assert_as_accurate,
    assert_compiles,
    assert_equal,
    assert_same_bits_twice,
    gradients,
    in_dtype,
    in_triton,
    kept_for_backward,
    leaves,
    poisoned_memory,
)

triton = in_triton("patch_mixing", "fp8_linear")

EPS = 1e-6
# In the model: attention's result enters; cross-attention's; a first block's input; the mixer's exit; and the rest.
CASES = {
    "gate, modulation": ("y", "gate", "modulation"),
    "gate": ("y", "gate"),
    "y, modulation": ("y", "modulation"),
    "y": ("y",),
    "x, modulation": ("modulation",),
    "x": (),
    "kept of gate": ("y", "gate", "keep"),
    "kept of y, modulation": ("y", "modulation", "keep"),
    "kept of all": ("y", "gate", "modulation", "keep"),
    "kept of x": ("keep",),
}
SIZES = [(2, 1, 8), (1, 63, 72), (1, 77, 72), (1, 20, 768), (1, 9, 1152)]  # N, T, D


def mix(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, keep_NK, *, implementation=patch_mixing):
    return implementation.add_norm_modulate(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, EPS, keep_NK)


reference_mix = partial(mix, implementation=reference)


def inputs(case: str, n: int, t: int, d: int, kept: int | None = None) -> list[Tensor | None]:
    """Random arguments of `mix` in float64, None for those that the case has not; a third of the tokens is kept."""
    parts = CASES[case]
    keep_NK = torch.stack([torch.randperm(t)[: kept or -(-t // 3)] for _ in range(n)])

    def some(part: str, *shape: int) -> Tensor | None:
        return torch.randn(shape, dtype=torch.float64) if part in parts else None

    return [
        torch.randn(n, t, d, dtype=torch.float64) * 2 + 1,
        some("y", n, t, d),
        some("gate", n, d),
        1 + 0.2 * torch.randn(d, dtype=torch.float64),
        some("modulation", n, d),
        some("modulation", n, d),
        keep_NK if "keep" in parts else None,
    ]


@pytest.fixture(params=["reference", "triton"])
def function(request):
    if request.param == "reference":
        return reference_mix
    request.getfixturevalue("triton")
    return mix


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_formula(case):
    x, y, gate, weight, shift, scale, keep = arguments = inputs(case, 2, 5, 6)
    out_NKD, h_NKD = reference_mix(*arguments)
    for n in range(2):
        for k, t in enumerate(range(5) if keep is None else keep[n]):
            row = x[n, t].clone()
            if y is not None:
                row += y[n, t] if gate is None else gate[n] * y[n, t]
            h = (row - sum(row) / 6) / (sum((row - sum(row) / 6) ** 2) / 6 + EPS) ** 0.5 * weight
            if scale is not None:
                h = h * (1 + scale[n]) + shift[n]
            torch.testing.assert_close(out_NKD[n, k], row)
            torch.testing.assert_close(h_NKD[n, k], h)
    assert out_NKD.shape[1] == h_NKD.shape[1] == (5 if keep is None else 2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_reference(case):
    assert torch.autograd.gradcheck(reference_mix, leaves(inputs(case, 2, 4, 5)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_triton_is_as_accurate_as_pytorch(triton, case, dtype):
    assert_as_accurate(mix, reference_mix, inputs(case, 2, 11, 72), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, t, d", SIZES)
@pytest.mark.parametrize("case", ["gate, modulation", "kept of gate"])
def test_triton_at_odd_sizes(triton, case, n, t, d, dtype):
    assert_as_accurate(mix, reference_mix, inputs(case, n, t, d), dtype)


def test_triton_when_every_token_is_kept(triton):
    assert_as_accurate(mix, reference_mix, inputs("kept of all", 2, 11, 72, kept=11), torch.float32)


def test_triton_with_more_programs_than_their_sums_are_added_at_a_time(triton, monkeypatch):
    from mdit.kernels.patch_mixing import triton_impl

    monkeypatch.setattr(triton_impl, "WEIGHT_TILE", {"ROWS": 4, "COLUMNS": 16})
    monkeypatch.setattr(triton_impl, "IMAGE_ROWS", 2)
    monkeypatch.setattr(triton_impl, "IMAGE_TILE", 64)
    assert_as_accurate(mix, reference_mix, inputs("gate, modulation", 2, 40, 72), torch.float32)  # 2 * 5 programs


@pytest.mark.parametrize("n, t, d", [(256, 64, 1024), (256, 256, 768), (64, 256, 1024), (16, 1024, 768), (1, 77, 1024)])
def test_the_last_sums_are_one_wave_of_programs(monkeypatch, n, t, d):
    """In several each waits for the one before: 8,224 programs of 0.8 KB took eight ways to memory and back."""
    pytest.importorskip("triton")
    from mdit.kernels.patch_mixing import triton_impl

    started = []
    monkeypatch.setattr(triton_impl, "launch", lambda kernel, grid, *_, **constants: started.append((*grid, constants)))
    x, vectors = torch.empty(n, t, d, dtype=torch.bfloat16), torch.empty(n, d, dtype=torch.bfloat16)
    triton_impl._add_norm_modulate_backward(x, x, vectors, vectors[0], vectors, None, torch.empty(2, n, t), t, x, x)
    (programs, _), (finishing, constants) = started
    assert finishing <= 3 * 132 and constants["num_warps"] == 4
    turns = -(-programs // constants["ROWS"]), -(-programs // n // constants["IMAGE_ROWS"])
    assert max(turns) <= 2


@pytest.mark.parametrize("case", ["gate, modulation", "kept of all", "x, modulation"])
@pytest.mark.parametrize("used", [0, 1])
def test_triton_when_only_one_output_is_used(triton, case, used):
    def only(function, *arguments: Tensor | None) -> Tensor:
        anchors = sum(t.sum() for t in arguments if t is not None)  # what x' does not depend on has a gradient of zero
        return function(*arguments)[used] + 0 * anchors

    assert_as_accurate(partial(only, mix), partial(only, reference_mix), inputs(case, 2, 9, 72), torch.float32)


def strided(function, x_TND, y_NTX, vectors_NX, weight_2D, keep_NK):
    """x by tokens first, y a part of a wider tensor, gate, shift and scale chunks; a weight with a stride."""
    d = x_TND.shape[-1]
    gate, shift, scale = vectors_NX.chunk(3, dim=1)
    out, h = function(
        x_TND.transpose(0, 1), y_NTX[..., 8 : 8 + d], gate, weight_2D[::2], shift, scale, keep_NK.t().contiguous().t()
    )
    return out.transpose(1, 2), h.sum(1)  # cotangents that are transposed, and of stride zero


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_takes_strided_inputs_and_cotangents(triton, dtype):
    n, t, d = 2, 9, 72
    shapes = [(t, n, d), (n, t, d + 16), (n, 3 * d), (2 * d,)]
    keep_NK = torch.stack([torch.randperm(t)[:7] for _ in range(n)])
    arguments = [*(torch.randn(s, dtype=torch.float64) for s in shapes), keep_NK]
    assert_as_accurate(partial(strided, mix), partial(strided, reference_mix), arguments, dtype)


@pytest.mark.parametrize("case", ["gate, modulation", "kept of all"])
def test_triton_gives_the_same_bits_twice(triton, case):
    assert_same_bits_twice(mix, in_dtype(inputs(case, 3, 21, 72)))


def test_dropped_tokens_are_not_read_and_have_zero_gradients(function):
    x, y, *others, keep_NK = inputs("kept of all", 2, 9, 24)
    dropped = torch.ones(2, 9, dtype=torch.bool).scatter(1, keep_NK, False)
    x[dropped] = y[dropped] = torch.nan
    results = gradients(function, in_dtype([x, y, *others, keep_NK]))
    assert all(t.isfinite().all() for t in results)
    for gradient_NTD in results[2:4]:
        assert torch.equal((gradient_NTD == 0).all(-1), dropped.to(DEVICE))


def test_what_is_only_normalised_is_not_copied(function):
    x, *others = in_dtype(inputs("x, modulation", 1, 3, 8))
    assert function(x, *others)[0] is x


def test_without_a_gate_both_gradients_are_equal(function):
    _, _, dx, dy, _ = gradients(function, in_dtype(inputs("y", 1, 3, 8)))
    assert torch.equal(dx, dy)


def test_triton_reads_no_cotangent_of_an_output_that_nobody_used(triton):
    arguments = [t.float().requires_grad_() for t in inputs("gate, modulation", 1, 4, 8)[:-1]]
    with recorded() as launches:
        _, h = mix(*arguments, None)
        h.backward(torch.ones_like(h))
    (backward,) = [given for given in launches if given.kernel.__name__ == "_mix_backward"]
    given = dict(zip(backward.kernel.arg_names, backward.arguments))
    assert given["d_out_ptr"] is None and given["dh_ptr"] is not None


@pytest.mark.parametrize(
    "case, ours, pytorch",
    [("gate, modulation", 2, 3), ("y, modulation", 1, 2), ("gate", 2, 2), ("x, modulation", 1, 2)],
)
def test_what_backward_keeps(triton, case, ours, pytorch):
    """Tensors of a token's width: the sum and, for a gate, y. PyTorch keeps the norm for a scale, too."""
    arguments, width = in_dtype(inputs(case, 2, 16, 64)), 2 * 16 * 64 * 4
    for function, expected in ((mix, ours), (reference_mix, pytorch)):
        kept = kept_for_backward(function, arguments).values()
        assert [size for size in kept if size >= width] == [width] * expected


def test_triton_normalises_what_it_returns(triton):
    """x' rounded, as backward will find it; not the sum before rounding."""
    x, y, gate, weight, shift, scale, _ = in_dtype(inputs("gate, modulation", 2, 5, 72), torch.float16)
    out, h = mix(x, y, gate, weight, shift, scale, None)
    assert torch.equal(mix(out, None, None, weight, shift, scale, None)[1], h)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["gate, modulation", "x", "kept of gate"])
def test_float8_is_that_of_what_was_written(function, case, dtype):
    """The very bits of a pass of its own over h, with nothing else changed; in rows of very different sizes."""
    arguments = in_dtype(inputs(case, 2, 9, 72), dtype)
    *_, shift, scale, keep = arguments
    if shift is not None:
        shift[0], scale[0] = 300 * shift[0], 40 * scale[0]

    def plain(*arguments):
        out, (h, *_) = fp8_linear.fp8_add_norm_modulate(*arguments[:6], EPS, arguments[6])
        return out, h

    with poisoned_memory():
        _, (h, values, scales) = fp8_linear.fp8_add_norm_modulate(*arguments[:6], EPS, keep)
    expected = quantise(function(*arguments)[1])
    assert values.shape == h.shape and scales.shape == (*h.shape[:-1], 1)
    assert torch.equal(scales, expected.scale) and torch.equal(values.float(), expected.values.float())
    assert_equal(gradients(plain, arguments), gradients(function, arguments))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_float8_hides_no_infinity(function):
    x, _, _, weight, *_ = in_dtype(inputs("x", 2, 3, 16))
    x[1, 2, 3] = torch.inf
    scales = fp8_linear.fp8_add_norm_modulate(x, None, None, weight, None, None, EPS, None)[1].scale
    assert scales.isnan().flatten().tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("case", ["gate, modulation", "kept of y, modulation", "x"])
def test_triton_compiles_without_a_graph_break(triton, case):
    assert_compiles(mix, in_dtype(inputs(case, 2, 9, 24)))


@pytest.mark.parametrize("case", ["gate, modulation", "kept of y, modulation", "kept of x", "x", "x, modulation"])
def test_custom_ops_are_registered_as_torch_expects(triton, case):
    from mdit.kernels.patch_mixing import triton_impl

    *arguments, keep = leaves(in_dtype(inputs(case, 2, 5, 16)))
    arguments, op = (*arguments, EPS, keep), triton_impl._add_norm_modulate.op
    torch.library.opcheck(op, (*arguments, False))
    tests = "test_schema", "test_autograd_registration", "test_faketensor"  # the others would add up a tensor of float8
    torch.library.opcheck(op, (*arguments, True), test_utils=tests)


def test_misuse_is_an_assertion():
    x, d = torch.randn(1, 2, 4), torch.randn(1, 4)
    with pytest.raises(AssertionError, match="gate"):
        mix(x, None, d, d[0], None, None, None)
    with pytest.raises(AssertionError, match="together"):
        mix(x, None, None, d[0], None, d, None)
