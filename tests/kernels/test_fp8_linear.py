"""Matmuls of float8 operands: the reference against the format's own numbers, Triton against the reference."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mdit.kernels import fp8_linear
from mdit.kernels.expert_choice.reference import Routing, route
from mdit.kernels.fp8_linear import reference
from mdit.kernels.fp8_linear.reference import quantise
from tests.kernels.accuracy import (
    DEVICE,
    GPU,
    assert_same_bits_twice,
    gradients,
    in_dtype,
    in_triton,
    kept_for_backward,
    leaves,
    poisoned_memory,
    rms,
)

triton = in_triton("fp8_linear")

# On a GPU cuBLAS adds up in its own way, and in bfloat16 alone is it what a run does.
DTYPES = [torch.bfloat16] if GPU else [torch.float32, torch.float16]
DISTANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 2e-2}  # where a product is rounded otherwise
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
NUMBERS = CODES[CODES.isfinite()]
SHAPES = [(2, 5, 32, 48), (1, 33, 144, 16), (3, 7, 16, 272)]  # N, T, K, O

FUNCTIONS = ("fp8_linear", "fp8_swiglu", "fp8_experts")


def inputs(name: str, n: int, t: int, k: int, o: int, experts: int = 3) -> list[Tensor]:
    """In float64; rows of very different sizes. The last of fp8_experts are the router's logits."""
    draw = partial(torch.randn, dtype=torch.float64)
    x = 10 ** (4 * torch.rand(n, t, 1, dtype=torch.float64) - 2) * draw(n, t, k)
    return {
        "fp8_linear": lambda: [x, draw(o, k), draw(o)],
        "fp8_swiglu": lambda: [x, 0.02 * draw(2 * o, k), draw(2 * o), 0.05 * draw(k, o), draw(k)],
        "fp8_experts": lambda: [x, draw(experts, k, o), draw(experts, o, k), draw(n, t, experts)],
    }[name]()


def function_of(name: str, module=fp8_linear):
    """Of the module, with the experts' routing from the logits, half of the tokens for each."""
    if name != "fp8_experts":
        return getattr(module, name)

    def function(x, w1, w2, logits):
        return module.fp8_experts(x, w1, w2, route(logits, -(-x.shape[1] // 2)))

    return function


# The definition


def test_scales_are_the_least_powers_of_two_that_fit():
    x = torch.tensor([[448.0], [448.1], [1.0], [0.875], [0.876], [-3e38], [1e-30]])
    _, scale = quantise(x)
    found = torch.log2(scale.double()).squeeze(1).tolist()
    assert found == [0, 1, -8, -9, -8, 120, -108]  # 448 = 1.75 * 2 ** 8
    for value, exponent in zip(x.double().abs().squeeze(1), found):
        assert value / 2.0**exponent <= 448 < value / 2.0 ** (exponent - 1)


def test_values_are_the_nearest_that_float8_has():
    x = torch.cat([torch.randn(3, 500) * torch.exp(3 * torch.randn(3, 500)), torch.zeros(3, 1)], dim=1)
    values, scale = quantise(x)
    exact = x.double() / scale
    distance = (exact.unsqueeze(-1) - NUMBERS).abs().amin(-1)
    torch.testing.assert_close((values.double() - exact).abs(), distance, rtol=0, atol=0)


def test_ties_go_to_even_and_what_float8_holds_stays():
    x = torch.tensor([[448.0, 17.0, 19.0, -17.0, 2.0**-10, 3 * 2.0**-10]])
    assert quantise(x).values.tolist() == [[448.0, 16.0, 20.0, -16.0, 0.0, 2.0**-8]]
    again = torch.cat([NUMBERS.float(), torch.tensor([448.0])]).unsqueeze(0)
    values, scale = quantise(again)
    assert scale.item() == 1 and torch.equal(values.float(), again)


def test_rows_of_nothing_and_rows_of_no_number():
    values, scale = quantise(torch.tensor([[0.0, 0.0], [1.0, torch.inf], [torch.nan, 1.0], [-torch.inf, 0.0]]))
    assert (values[0].float() * scale[0] == 0).all()
    assert (values[1:].float() * scale[1:]).isnan().all()
    out = fp8_linear.fp8_linear(torch.tensor([[1.0] * 16, [torch.inf] * 16]), torch.eye(16))
    assert out[0].isfinite().all() and out[1].isnan().all()


def rounded(x: Tensor) -> Tensor:
    """What a row stands for once it is in float8, by search through the format's numbers."""
    scale = 2.0 ** torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448))
    nearest = (x.unsqueeze(-1) / scale.unsqueeze(-1) - NUMBERS).abs().argmin(-1)
    return NUMBERS[nearest] * scale


def test_reference_is_the_formula():
    x, weight, bias = inputs("fp8_linear", 2, 3, 16, 32)
    out, dx, dweight, dbias = gradients(reference.fp8_linear, [x, weight, bias])
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # as `gradients`
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(out, rounded(x) @ rounded(weight).t() + bias)
    close(dx, rounded(d_out) @ rounded(weight.t().contiguous()).t())
    close(dweight, d_out.flatten(0, 1).t() @ x.flatten(0, 1))  # not rounded
    close(dbias, d_out.sum((0, 1)))


def test_networks_are_made_of_it():
    x, weight, bias, w3, b3 = inputs("fp8_swiglu", 2, 3, 16, 32)
    a, b = reference.fp8_linear(x, weight, bias).chunk(2, dim=-1)
    expected = reference.fp8_linear(a * torch.sigmoid(a) * b, w3, b3)
    torch.testing.assert_close(reference.fp8_swiglu(x, weight, bias, w3, b3), expected)
    x, w1, w2, logits = inputs("fp8_experts", 2, 3, 16, 32)
    weights_NTE, out = logits.softmax(-1), torch.zeros_like(x)
    for n in range(2):
        for e in range(3):
            for t in weights_NTE[n, :, e].topk(2).indices:
                h = reference.fp8_linear(x[n, t : t + 1], w1[e].t())
                active = weights_NTE[n, t, e] * h * torch.special.ndtr(h)
                out[n, t] += reference.fp8_linear(active, w2[e].t()).squeeze(0)
    torch.testing.assert_close(function_of("fp8_experts", reference)(x, w1, w2, logits), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_four_bits(dtype):
    """Half a step of 1/8 at most, 1/16 to 1/32 of a number: as a root mean square about 1/38 of each operand."""
    x, weight, d_out = (t.to(dtype) for t in (torch.randn(64, 512), 0.02 * torch.randn(256, 512), torch.randn(64, 256)))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = fp8_linear.fp8_linear(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, d_out)]
    x, weight, d_out = (t.detach().double() for t in (x, weight, d_out))
    exact = [x @ weight.t(), d_out @ weight, d_out.t() @ x]
    errors = [rms(f.double() - e) / rms(e) for f, e in zip(found, exact)]
    assert all(0.025 < error < 0.045 for error in errors[:2]), errors
    assert errors[2] < 4 * torch.finfo(dtype).eps, errors


# Triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (3, 7, 80), (2, 4112), (2, 300, 20)])
def test_triton_quantises_to_the_same_numbers(triton, shape, dtype):
    from mdit.kernels.fp8_linear import triton_quantise

    x = torch.randn(shape) * torch.exp(2 * torch.randn(*shape[:-1], 1)).clamp(1e-2, 1e2)
    x[..., 0, :], x[..., 1, 3] = 0, 448 * x[..., 1, :].abs().amax(-1)  # a row and an element much larger than others
    x = x.to(DEVICE, dtype)
    found = [(triton_quantise.by_rows(x), quantise(x))]
    if len(x) * x.shape[-1] < 4096:  # columns are one program for 16 of them: slow when interpreted
        found.append((triton_quantise.by_columns(x), quantise(x.mT)))
    for ours, theirs in found:
        assert ours.values.shape == theirs.values.shape and ours.values.is_contiguous() and ours.scale.is_contiguous()
        assert torch.equal(ours.scale, theirs.scale)
        assert torch.equal(ours.values.float(), theirs.values.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_triton_hides_no_infinity(triton):
    from mdit.kernels.fp8_linear import triton_quantise

    x = torch.randn(4, 32, device=DEVICE, dtype=DTYPES[0])
    x[1, 3], x[2, 4], x[3, 5] = torch.inf, -torch.inf, torch.nan
    out = fp8_linear.fp8_linear(x, torch.randn(16, 32, device=DEVICE, dtype=DTYPES[0]))
    assert out[0].isfinite().all() and out[1:].isnan().all()
    assert triton_quantise.by_columns(x).scale.isnan().squeeze(1).nonzero().flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_gives_what_the_reference_gives(triton, name, shape, dtype):
    assert_alike(function_of(name), function_of(name, reference), in_dtype(inputs(name, *shape), dtype))


def assert_alike(ours, theirs, arguments: list[Tensor]) -> None:
    expected = gradients(theirs, arguments)
    with poisoned_memory():
        found = gradients(ours, arguments)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f.shape == e.shape and f.dtype == e.dtype, i
        error = rms(f.double() - e.double()) / rms(e.double())
        assert error <= DISTANCE[f.dtype], f"tensor {i}: {error:.1e}"


def strided(functions, x_NTX: Tensor, weight_KO: Tensor, w1_EKO: Tensor):
    """Half of a tensor, every other token, weights that are transposed; cotangents that are, and of stride zero."""
    x, _ = x_NTX.chunk(2, dim=-1)
    routing = route(x[:, ::2, :3].contiguous(), 2)
    return (
        functions.fp8_linear(x, weight_KO.t()).transpose(0, 1),
        functions.fp8_swiglu(x[:, ::2], torch.cat([weight_KO, weight_KO], dim=1).t(), None, weight_KO).sum(1),
        functions.fp8_experts(x[:, ::2], w1_EKO, w1_EKO.transpose(1, 2), routing).transpose(0, 1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_takes_strided_inputs_and_cotangents(triton, dtype):
    arguments = in_dtype([torch.randn(s, dtype=torch.float64) for s in ((2, 6, 96), (48, 32), (3, 48, 32))], dtype)
    assert_alike(partial(strided, fp8_linear), partial(strided, reference), arguments)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_gives_the_same_bits_twice(triton, name):
    assert_same_bits_twice(function_of(name), in_dtype(inputs(name, 2, 3, 32, 48), DTYPES[0]))


@pytest.mark.parametrize("name, hidden", [("fp8_linear", 0), ("fp8_swiglu", 2 * 3 * 96), ("fp8_experts", 3 * 4 * 48)])
def test_triton_keeps_its_inputs_and_a_hidden_layer(triton, name, hidden):
    arguments, function = in_dtype(inputs(name, 2, 3, 32, 48), DTYPES[0]), getattr(fp8_linear, name)
    if name == "fp8_experts":
        arguments[3:] = route(arguments[3], 2)
        function = lambda x, w1, w2, *routing: fp8_linear.fp8_experts(x, w1, w2, Routing(*routing))  # noqa: E731
    given = {t.data_ptr() for t in arguments}
    kept = kept_for_backward(function, arguments)
    assert sum(size for pointer, size in kept.items() if pointer not in given) == hidden * arguments[0].itemsize


@pytest.mark.parametrize("name", FUNCTIONS)
def test_triton_is_a_proper_torch_op(triton, name):
    from mdit.kernels.fp8_linear import triton_impl

    arguments = leaves(in_dtype(inputs(name, 1, 4, 16, 32), DTYPES[0]))
    if name == "fp8_experts":
        arguments[3:] = route(arguments[3].detach(), 2)
    else:
        arguments = [*arguments[:-1], None, None]  # without the last bias; x is not known in float8
    op = getattr(triton_impl, name.removeprefix("fp8"))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.op, arguments, test_utils=tests)


@pytest.mark.parametrize("name, operand", [("fp8_swiglu", "gated_gradient"), ("fp8_experts", "gelu_gradient")])
def test_triton_quantises_a_hidden_gradient_as_it_was_written(triton, monkeypatch, name, operand):
    """The very bits of a pass of its own: both forms are taken from the kernel, as they are multiplied."""
    from mdit.kernels.fp8_linear import triton_quantise

    seen, launch = [], triton_quantise.launch

    def watching(kernel, grid, *arguments, **constants):
        launch(kernel, grid, *arguments, **constants)
        if kernel.__name__ == f"_{operand}":
            plain = arguments[2] if name == "fp8_swiglu" else arguments[1]
            values, scale = (arguments[i] for i in ((3, 4) if name == "fp8_swiglu" else (5, 6)))
            seen.append((plain.clone(), values, scale))

    monkeypatch.setattr(triton_quantise, "launch", watching)
    gradients(function_of(name), in_dtype(inputs(name, 2, 5, 32, 48), DTYPES[0]))
    ((plain, values, scale),) = seen
    expected = quantise(plain)
    assert torch.equal(scale, expected.scale) and torch.equal(values.float(), expected.values.float())
    assert plain.abs().amax() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(4, 77, 1024, 2048), (16, 64, 768, 2304)], ids=str)
def test_triton_at_the_models_shapes_on_a_gpu(triton, name, shape):
    assert_alike(function_of(name), function_of(name, reference), in_dtype(inputs(name, *shape), torch.bfloat16))


def test_misuse_is_an_assertion():
    x, weight = torch.randn(3, 32), torch.randn(48, 32)
    for call in (
        lambda: fp8_linear.fp8_linear(x, weight.t()),
        lambda: fp8_linear.fp8_linear(x[:, :24], weight[:, :24]),
        lambda: fp8_linear.fp8_swiglu(x, weight, None, weight.t()),
        lambda: fp8_linear.fp8_experts(x.unsqueeze(0), *[weight.expand(2, -1, -1)] * 2, route(torch.ones(1, 3, 2), 1)),
    ):
        with pytest.raises(AssertionError):
            call()
