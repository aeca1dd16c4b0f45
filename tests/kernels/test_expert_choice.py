"""The layer that moves tokens by index against the one-hot definition: values and every gradient, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mdit.kernels import expert_choice
from mdit.kernels.expert_choice.reference import expert_choice as one_hot_expert_choice

from mdit.models.moe import ExpertChoice

MULTIPLE_OF = 8


def layer(num_experts: int, capacity_factor: float, dim: int = 6) -> ExpertChoice:
    moe = ExpertChoice(dim, 8, MULTIPLE_OF, num_experts, capacity_factor).double()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter)
    return moe


def assert_equals_one_hot_form(moe: ExpertChoice, x_NTD: torch.Tensor) -> None:
    x_NTD = x_NTD.requires_grad_()
    inputs = (x_NTD, moe.gate.weight, moe.w1, moe.w2)
    ours, definition = moe(x_NTD), one_hot_expert_choice(*inputs, moe.tokens_per_expert(x_NTD.shape[1]))
    torch.testing.assert_close(ours, definition, rtol=1e-5, atol=1e-5)
    cotangent = torch.randn_like(definition)
    expected = torch.autograd.grad(definition, inputs, cotangent)
    for gradient, wanted in zip(torch.autograd.grad(ours, inputs, cotangent), expected):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * (1 + wanted.abs().max().item()))


@st.composite
def shapes(draw):
    """(N, T, E, capacity_factor) with 1 <= K <= T, K = T included."""
    n, tokens, experts = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    per_expert = draw(st.integers(1, tokens))
    return n, tokens, experts, min((per_expert + 0.01) * experts / tokens, experts)


@given(shapes())
def test_layer_equals_the_one_hot_form_with_all_gradients(shape):
    n, tokens, experts, capacity_factor = shape
    assert_equals_one_hot_form(layer(experts, capacity_factor), torch.randn(n, tokens, 6, dtype=torch.float64))


def test_every_expert_takes_all_tokens_when_capacity_is_the_number_of_experts():
    moe = layer(num_experts=4, capacity_factor=4.0)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    assert moe.tokens_per_expert(7) == 7
    probabilities = torch.softmax(x @ moe.gate.weight.T, dim=-1)
    dense = torch.stack([torch.nn.functional.gelu(x @ moe.w1[e]) @ moe.w2[e] for e in range(4)], dim=-1)
    torch.testing.assert_close(moe(x), (dense * probabilities.unsqueeze(2)).sum(-1), rtol=1e-5, atol=1e-5)
    assert_equals_one_hot_form(moe, x)


def test_a_token_gets_the_sum_over_experts_that_chose_it_and_zero_when_none_did():
    """Probabilities by hand, K = 2: expert 0 takes tokens 0 and 1, expert 1 takes 0 and 2, expert 2 takes 2 and 1."""
    probabilities = torch.tensor(
        [[0.45, 0.45, 0.10], [0.40, 0.10, 0.50], [0.05, 0.40, 0.55], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64
    )
    moe = layer(num_experts=3, capacity_factor=1.5)
    with torch.no_grad():
        moe.gate.weight.copy_(torch.eye(3, 6))
    x = torch.cat([probabilities.log(), torch.randn(4, 3, dtype=torch.float64)], dim=1)
    out = moe(x.unsqueeze(0))[0]
    for token, chosen_by in enumerate([(0, 1), (0, 2), (1, 2), ()]):
        expected = torch.zeros(6, dtype=torch.float64)
        for e in chosen_by:
            hidden = x[token] @ moe.w1[e]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
            expected = expected + probabilities[token, e] * (hidden @ moe.w2[e])
        torch.testing.assert_close(out[token], expected, rtol=1e-5, atol=1e-5)
    assert not out[3].any()


def test_route_returns_the_largest_probabilities_in_descending_order():
    logits_NTE = torch.randn(3, 11, 4)
    weights_NEK, index_NEK = expert_choice.route(logits_NTE, 5)
    probabilities = logits_NTE.exp() / logits_NTE.exp().sum(-1, keepdim=True)
    for n in range(3):
        for e in range(4):
            best = sorted(range(11), key=lambda t: -probabilities[n, t, e])[:5]
            assert index_NEK[n, e].tolist() == best
            torch.testing.assert_close(weights_NEK[n, e], probabilities[n, best, e])


def test_images_of_a_batch_do_not_compete_for_experts():
    moe = layer(num_experts=4, capacity_factor=2.0)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    alone = torch.cat([moe(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(moe(x), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_in_low_precision_is_at_most_twice_that_of_the_one_hot_form(dtype):
    """With K = T, so that rounding cannot change who is chosen."""
    moe = layer(num_experts=4, capacity_factor=4.0, dim=32)
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    weights = (moe.gate.weight, moe.w1, moe.w2)
    exact = one_hot_expert_choice(x, *weights, 16)
    plain = one_hot_expert_choice(x.to(dtype), *(w.to(dtype) for w in weights), 16)
    ours = moe.to(dtype)(x.to(dtype))
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_number_of_tokens_per_expert_is_rounded_down():
    assert layer(num_experts=8, capacity_factor=2.0).tokens_per_expert(64) == 16
    assert layer(num_experts=3, capacity_factor=1.0).tokens_per_expert(65) == 21
