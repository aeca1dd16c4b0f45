"""The layer that moves tokens by index against the plain one, in PyTorch and in Triton; each op by itself."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdit.kernels import expert_choice
from mdit.kernels.expert_choice import Routing, reference
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.fuse import fuse
from tests.kernels.accuracy import (
    DEVICE,
    DTYPES,
    assert_as_accurate,
    assert_compiles,
    assert_same_bits_twice,
    gradients,
    in_triton,
    kept_for_backward,
    leaves,
)

triton = in_triton("expert_choice")

MULTIPLE_OF = 8


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def layer(num_experts: int, capacity_factor: float) -> ExpertChoiceMoE:
    """The plain one, which moves tokens by one-hot products."""
    moe = ExpertChoiceMoE(6, 8, MULTIPLE_OF, num_experts, capacity_factor).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe.to(DEVICE)


def of_layer(moe: ExpertChoiceMoE):
    """The layer as a function of its input and weights, and its weights."""
    weights = {name: parameter.detach() for name, parameter in moe.named_parameters()}

    def function(x_NTD, *values):
        return torch.func.functional_call(moe, dict(zip(weights, values)), x_NTD)

    return function, list(weights.values())


@st.composite
def shapes(draw):
    """(N, T, E, capacity_factor) with 1 <= K <= T, K = T included."""
    n, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    per_expert = draw(st.integers(1, tokens))
    return n, tokens, experts, min((per_expert + 0.01) * experts / tokens, experts)


@given(shapes())
def test_fused_layer_equals_the_plain_one_with_all_gradients(shape):
    n, tokens, experts, capacity_factor = shape
    moe = layer(experts, capacity_factor)
    (plain, weights), (fused, _) = of_layer(moe), of_layer(fuse(deepcopy(moe)))
    inputs = [randn(n, tokens, 6), *weights]
    for found, wanted in zip(gradients(fused, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * (1 + wanted.abs().max().item()))


def test_number_of_tokens_per_expert_is_rounded_down():
    assert layer(num_experts=8, capacity_factor=2.0).tokens_per_expert(64) == 16
    assert layer(num_experts=3, capacity_factor=1.0).tokens_per_expert(65) == 21


# Both implementations, through the public functions.


@pytest.fixture(params=["reference", "triton"])
def implementation(request):
    return request.getfixturevalue("triton") if request.param == "triton" else None


SHAPES = [(1, 63, 8, 16), (1, 77, 3, 77), (3, 1, 3, 1), (2, 20, 1, 7), (1, 9, 18, 2)]  # N, T, E, K


def assert_consistent(routing, num_tokens):
    """Every slot leads to its token and back; K different tokens for every image and expert."""
    weights_NEK, tokens_NEK, slots_NTE = (part.cpu() for part in routing)
    n, experts, k = tokens_NEK.shape
    assert weights_NEK.shape == tokens_NEK.shape and slots_NTE.shape == (n, num_tokens, experts)
    assert (weights_NEK.dtype, tokens_NEK.dtype, slots_NTE.dtype) == (torch.float32, torch.int64, torch.int32)
    expected = torch.full((n, num_tokens, experts), -1, dtype=torch.int32)
    for i in range(n):
        for e in range(experts):
            assert len(set(tokens_NEK[i, e].tolist())) == k
            expected[i, tokens_NEK[i, e], e] = torch.arange(k, dtype=torch.int32)
    assert torch.equal(slots_NTE, expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("n, tokens, experts, k", SHAPES)
def test_route_takes_the_largest_probabilities_in_descending_order(n, tokens, experts, k):
    logits_NTE = randn(n, tokens, experts, dtype=torch.float32)
    routing = expert_choice.route(logits_NTE, k)
    assert_consistent(routing, tokens)
    probabilities = logits_NTE.double().exp() / logits_NTE.double().exp().sum(-1, keepdim=True)
    for i in range(n):
        for e in range(experts):
            chosen = probabilities[i, routing.tokens_NEK[i, e], e]
            torch.testing.assert_close(routing.weights_NEK[i, e].double(), chosen, rtol=1e-6, atol=0)
            assert (routing.weights_NEK[i, e].diff() <= 0).all()
            if experts > 1:  # with one expert every probability is 1
                assert chosen.min() >= probabilities[i, :, e].sort(descending=True).values[k - 1] * (1 - 1e-6)


@pytest.mark.usefixtures("triton")
def test_equal_probabilities_go_to_the_lower_token():
    logits_NTE = torch.zeros(2, 40, 3, device=DEVICE)
    logits_NTE[0, [31, 7], 1] = 1.0
    tokens_NEK = expert_choice.route(logits_NTE, 5).tokens_NEK.tolist()
    assert tokens_NEK[1] == [[0, 1, 2, 3, 4]] * 3
    assert tokens_NEK[0] == [[0, 1, 2, 3, 4], [7, 31, 0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.usefixtures("triton")
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")  # of numpy, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_logits_still_choose_different_tokens(bad):
    logits_NTE = randn(2, 21, 2, dtype=torch.float32)
    logits_NTE[0, 4] = bad
    logits_NTE[1] = bad
    assert_consistent(expert_choice.route(logits_NTE, 21), 21)
    some = expert_choice.route(logits_NTE, 6)
    assert_consistent(some, 21)
    assert some.weights_NEK[0, :, 0].isnan().all()  # as in torch, NaN comes first


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, tokens, experts, k", SHAPES)
def test_route_is_as_accurate_as_pytorch(n, tokens, experts, k, dtype):
    # One logit in low precision, so that it is the order of the tokens which is the same in every dtype.
    order = torch.stack([torch.randperm(n * tokens).view(n, tokens) for _ in range(experts)], dim=-1)
    logits_NTE = order / 64 + 0.01 * torch.randn(n, tokens, experts)
    logits_NTE = logits_NTE.to(dtype).double()
    assert_as_accurate(
        lambda logits: expert_choice.route(logits, k), lambda logits: reference.route(logits, k), [logits_NTE], dtype
    )


@pytest.mark.usefixtures("implementation")
def test_gather_and_scatter_move_each_row_where_it_belongs():
    routing = expert_choice.route(randn(3, 9, 4, dtype=torch.float32), 3)
    x_NTD, y_EMD = randn(3, 9, 6, dtype=torch.float32), randn(4, 3 * 3, 6, dtype=torch.float32)
    chosen_EMD, sums_NTD = expert_choice.gather_tokens(x_NTD, routing), torch.zeros(3, 9, 6, device=DEVICE)
    assert chosen_EMD.shape == y_EMD.shape
    for e in range(4):
        for n in range(3):
            for k, token in enumerate(routing.tokens_NEK[n, e].tolist()):
                assert torch.equal(chosen_EMD[e, n * 3 + k], x_NTD[n, token])
                sums_NTD[n, token] += y_EMD[e, n * 3 + k]
    torch.testing.assert_close(expert_choice.scatter_tokens(y_EMD, routing), sums_NTD)


MOVES = [(2, 20, 4, 7, 72), (1, 5, 3, 5, 1152), (3, 1, 1, 1, 1), (2, 18, 5, 17, 264)]  # N, T, E, K, D


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, tokens, experts, k, width", MOVES)
def test_moving_tokens_is_as_accurate_as_pytorch(n, tokens, experts, k, width, dtype):
    routing = reference.route(randn(n, tokens, experts, dtype=torch.float32), k)
    for ours, plain, shape in (
        (expert_choice.gather_tokens, reference.gather_tokens, (n, tokens, width)),
        (expert_choice.scatter_tokens, reference.scatter_tokens, (experts, n * k, width)),
    ):
        assert_as_accurate(partial(ours, routing=routing), partial(plain, routing=routing), [randn(*shape)], dtype)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_token_are_added_in_the_order_of_the_experts_and_rounded_once(dtype):
    """Bit for bit. Capacity is so large that most tokens are chosen by several experts."""
    routing = reference.route(randn(2, 16, 6, dtype=torch.float32), 11)
    assert ((routing.slots_NTE >= 0).sum(-1) >= 3).sum() > 16
    y_EMD = randn(6, 2 * 11, 40, dtype=dtype)
    expected = torch.zeros(2, 16, 40, device=DEVICE)
    for e in range(6):
        for n in range(2):
            expected[n, routing.tokens_NEK[n, e]] += y_EMD[e, n * 11 : (n + 1) * 11].float()
    assert torch.equal(expert_choice.scatter_tokens(y_EMD, routing), expected.to(dtype))
    x_NTD = torch.zeros(2, 16, 40, device=DEVICE, dtype=dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(expert_choice.gather_tokens(x_NTD, routing), x_NTD, y_EMD)
    assert torch.equal(gradient, expected.to(dtype))


@pytest.mark.usefixtures("triton")
def test_rows_that_nobody_chose_are_not_read():
    routing = reference.route(randn(2, 12, 3, dtype=torch.float32), 4)
    routing = routing._replace(slots_NTE=routing.slots_NTE.clone())
    routing.slots_NTE[..., 1] = -1  # as though expert 1 had chosen nobody
    y_EMD = randn(3, 2 * 4, 8, dtype=torch.float32)
    y_EMD[1] = float("nan")
    assert expert_choice.scatter_tokens(y_EMD, routing).isfinite().all()


@pytest.mark.usefixtures("implementation")
def test_gelu_bmm_is_the_formula():
    h, w2, weights = randn(3, 2 * 4, 10), randn(3, 10, 5), torch.rand(2, 3, 4, dtype=torch.float64).to(DEVICE)
    found = expert_choice.gelu_bmm(h.float(), w2.float(), weights.float())
    gelu = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    expected = torch.stack([(weights[:, e].reshape(8, 1) * gelu[e]) @ w2[e] for e in range(3)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n, experts, k, inner, width", [(2, 3, 7, 72, 16), (1, 1, 13, 300, 8), (3, 5, 1, 9, 1)])
def test_gelu_bmm_is_as_accurate_as_pytorch(n, experts, k, inner, width, dtype):
    weights_NEK = torch.rand(n, experts, k, dtype=torch.float64)
    inputs = [randn(experts, n * k, inner), randn(experts, inner, width), weights_NEK]
    assert_as_accurate(expert_choice.gelu_bmm, reference.gelu_bmm, inputs, dtype)


@pytest.mark.usefixtures("triton")
@pytest.mark.filterwarnings("ignore:overflow")  # of numpy, in the interpreter
def test_gelu_is_exact_from_one_tail_to_the_other():
    h = torch.linspace(-9, 9, 4096, device=DEVICE).view(1, 1, -1)
    h[..., :4] = torch.tensor([-1e30, -40.0, 40.0, 1e30])

    def of_each(function, h, one):
        h = h.detach().requires_grad_()
        value = function(h, torch.eye(4096, device=DEVICE, dtype=h.dtype).unsqueeze(0), one)
        return value.detach(), *torch.autograd.grad(value.sum(), h)

    one = torch.ones(1, 1, 1, device=DEVICE)
    exact = of_each(reference.gelu_bmm, h.double(), one.double())
    for found, expected in zip(of_each(expert_choice.gelu_bmm, h, one), exact):
        torch.testing.assert_close(found.double(), expected, rtol=3e-7, atol=2e-7)
    negative = of_each(expert_choice.gelu_bmm, h, one)[0][h < -0.5].double()
    torch.testing.assert_close(negative[negative < -1e-7], exact[0][h < -0.5][negative < -1e-7], rtol=1e-3, atol=0)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_layer_is_as_accurate_as_the_plain_one(dtype):
    moe = layer(num_experts=3, capacity_factor=3.0)  # K = T: rounding cannot change who is chosen
    (plain, weights), (fused, _) = of_layer(moe), of_layer(fuse(deepcopy(moe)))
    assert_as_accurate(fused, plain, [randn(2, 10, 6), *weights], dtype)


def whole_layer(k, logits_NTE, x_NTD, w1_EDF, w2_EFD):
    routing = expert_choice.route(logits_NTE, k)
    hidden_EMF = torch.bmm(expert_choice.gather_tokens(x_NTD, routing), w1_EDF)
    return expert_choice.scatter_tokens(expert_choice.gelu_bmm(hidden_EMF, w2_EFD, routing.weights_NEK), routing)


def layer_inputs(dtype=torch.float64):
    """N, T, E, D, F = 2, 12, 3, 8, 16"""
    return [randn(*shape, dtype=dtype) for shape in [(2, 12, 3), (2, 12, 8), (3, 8, 16), (3, 16, 8)]]


@pytest.mark.usefixtures("triton")
def test_same_bits_on_every_run():
    """K = 9 of 12: most tokens are chosen by several experts."""
    assert_same_bits_twice(partial(whole_layer, 9), layer_inputs(torch.float32))


def test_gradients_of_the_reference():
    assert torch.autograd.gradcheck(partial(whole_layer, 5), leaves(layer_inputs()))


@pytest.mark.usefixtures("triton")
def test_moved_tokens_and_cotangents_of_any_stride():
    routing = reference.route(randn(2, 12, 3, dtype=torch.float32), 5)
    for move, plain, shape in (
        (expert_choice.gather_tokens, reference.gather_tokens, (2, 12, 8)),
        (expert_choice.scatter_tokens, reference.scatter_tokens, (3, 10, 8)),
    ):
        x = randn(*shape, dtype=torch.float32)
        wide = torch.cat([x, x], dim=1)[:, : shape[1]]
        turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
        for same in (wide, turned):
            assert torch.equal(move(same, routing), move(x, routing))
        turned = Routing(*(part.permute(2, 1, 0).contiguous().permute(2, 1, 0) for part in routing))
        assert torch.equal(move(x, turned), move(x, routing))
        x.requires_grad_()
        (ours,) = torch.autograd.grad(move(x, routing).sum(), x)  # an expanded cotangent
        (expected,) = torch.autograd.grad(plain(x, routing).sum(), x)
        assert torch.equal(ours, expected)
    h, w2, weights = randn(3, 10, 16), randn(3, 16, 8), torch.rand(3, 5, 2, dtype=torch.float64).permute(2, 0, 1)
    h = h.mT.contiguous().mT
    assert not h.is_contiguous() and not weights.is_contiguous()
    assert_as_accurate(expert_choice.gelu_bmm, reference.gelu_bmm, [h, w2, weights], torch.float32)


@pytest.mark.usefixtures("triton")
def test_what_is_kept_for_backward():
    """To move tokens none of them; of GELU and its matmul the inputs."""
    logits, x, w1, w2 = layer_inputs(torch.float32)
    routing = expert_choice.route(logits, 5)
    indices = {routing.tokens_NEK.data_ptr(), routing.slots_NTE.data_ptr()}
    chosen = expert_choice.gather_tokens(x, routing)
    assert kept_for_backward(partial(expert_choice.gather_tokens, routing=routing), [x]).keys() <= indices
    assert kept_for_backward(partial(expert_choice.scatter_tokens, routing=routing), [chosen]).keys() <= indices
    inputs = [torch.bmm(chosen, w1), w2, routing.weights_NEK]
    assert kept_for_backward(expert_choice.gelu_bmm, inputs).keys() == {t.data_ptr() for t in inputs}


@pytest.mark.usefixtures("triton")
def test_it_compiles_into_one_graph():
    assert_compiles(partial(whole_layer, 5), layer_inputs(torch.float32))


@pytest.mark.usefixtures("triton")
def test_the_operators_are_registered_as_torch_wants_them():
    from mdit.kernels.expert_choice import triton_impl

    logits, x, _, w2 = layer_inputs(torch.float32)
    weights, *indices = reference.route(logits, 5)
    y, h = randn(3, 10, 8, dtype=torch.float32), randn(3, 10, 16, dtype=torch.float32)
    for operator, arguments in (
        (triton_impl._gather_op, [x, *indices]),
        (triton_impl._scatter_op, [y, *indices]),
        (triton_impl.gelu_bmm, [h, w2, weights]),
    ):
        torch.library.opcheck(operator.op, leaves(arguments))
    torch.library.opcheck(triton_impl._route_op.op, (*leaves([logits]), 5))
