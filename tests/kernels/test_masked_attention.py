"""LayerNorm of q and k, then attention: in PyTorch against the formula, in Triton against PyTorch."""

from functools import partial

import pytest
import torch
from torch import Tensor

from mdit.kernels import masked_attention
from mdit.kernels.masked_attention import reference
from tests.kernels.accuracy import (
    DEVICE,
    DTYPES,
    assert_as_accurate,
    assert_compiles,
    assert_same_bits_twice,
    gradients,
    in_dtype,
    in_triton,
    kept_for_backward,
    leaves,
    poisoned_memory,
    rms,
)

triton = in_triton("masked_attention")

EPS = 1e-6
# Up to 64 tokens are one block. From 65 keys on the forward pass has a tail, from 81 a loop over keys, and from 129 on
# backward has several blocks of keys, from 257 on parts; from 257 queries on several programs share held keys. Widths
# that are no power of two.
SELF_SHAPES = [(3, 16, 1), (2, 32, 16), (3, 32, 63), (2, 64, 64), (1, 64, 77), (1, 128, 77), (2, 32, 130), (1, 64, 130)]
CROSS_SHAPES = [(2, 32, 1, 1), (3, 16, 63, 77), (1, 64, 64, 77), (2, 32, 100, 16), (1, 128, 40, 150), (1, 32, 270, 70)]


def normal(*shape: int) -> Tensor:
    """Neither centred nor of variance one, so that LayerNorm has something to do."""
    return 2 * torch.randn(shape, dtype=torch.float64) + 0.5


def self_inputs(N: int, T: int, heads: int, head_dim: int) -> list[Tensor]:
    return [normal(N, T, 3 * heads * head_dim)]


def cross_inputs(N: int, T: int, L: int, heads: int, head_dim: int) -> list[Tensor]:
    return [normal(N, T, heads * head_dim), normal(N, L, 2 * heads * head_dim)]


def both(function: str, heads: int) -> tuple:
    """The public function and its reference, of the inputs alone."""
    arguments = dict(num_heads=heads, eps=EPS)
    return tuple(partial(getattr(module, function), **arguments) for module in (masked_attention, reference))


def formula(q_TA: Tensor, k_LA: Tensor, v_LA: Tensor, heads: int) -> Tensor:
    """One image, number by number."""

    def normalised(x: Tensor) -> Tensor:
        return (x - x.mean()) / (((x - x.mean()) ** 2).mean() + EPS).sqrt()

    q_TA, k_LA = (torch.stack([normalised(row) for row in x]) for x in (q_TA, k_LA))
    out, head_dim = torch.zeros_like(q_TA), q_TA.shape[1] // heads
    for head in range(heads):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        for t, q in enumerate(q_TA[:, columns]):
            weights = torch.stack([torch.exp((q * k).sum() / head_dim**0.5) for k in k_LA[:, columns]])
            out[t, columns] = sum(w * v for w, v in zip(weights, v_LA[:, columns])) / weights.sum()
    return out


def angles(N: int, T: int, head_dim: int) -> Tensor:
    """A table of cosines and sines, float32."""
    random = 3 * torch.randn(N, T, head_dim // 2)
    return torch.cat([random.cos(), random.sin()], dim=-1)


def turning(function, table_NTC: Tensor):
    return lambda qkv_NTX: function(qkv_NTX, rotary_NTC=table_NTC.to(qkv_NTX.device))


def test_reference_turns_pairs_of_each_head_as_complex_numbers():
    (qkv_NTX,), table_NTC = self_inputs(2, 5, 2, 4), angles(2, 5, 4)
    ours = reference.self_attention(qkv_NTX, 2, EPS, table_NTC)
    phase_NT1P = torch.complex(*table_NTC.double().chunk(2, -1)).unsqueeze(2)
    q, k, v = qkv_NTX.chunk(3, dim=-1)
    turned = []
    for x in (q, k):
        x = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()).unflatten(
            -1, (2, 4)
        )
        points = torch.complex(x[..., :2], x[..., 2:]) * phase_NT1P
        turned.append(torch.cat([points.real, points.imag], -1).transpose(1, 2))
    q, k, v = *turned, v.unflatten(-1, (2, 4)).transpose(1, 2)
    expected = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
    torch.testing.assert_close(ours, expected.transpose(1, 2).flatten(2))


def test_reference_is_the_formula():
    (qkv_NTX,), (q_NTA, kv_NLX) = self_inputs(2, 5, 2, 3), cross_inputs(2, 4, 5, 2, 3)
    ours, across = reference.self_attention(qkv_NTX, 2, EPS), reference.cross_attention(q_NTA, kv_NLX, 2, EPS)
    for n in range(2):
        torch.testing.assert_close(ours[n], formula(*qkv_NTX[n].chunk(3, dim=-1), 2))
        torch.testing.assert_close(across[n], formula(q_NTA[n], *kv_NLX[n].chunk(2, dim=-1), 2))


def test_gradients_of_the_reference():
    assert torch.autograd.gradcheck(both("self_attention", 2)[1], leaves(self_inputs(2, 3, 2, 2)))
    assert torch.autograd.gradcheck(both("cross_attention", 2)[1], leaves(cross_inputs(2, 2, 3, 2, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim, tokens", SELF_SHAPES)
def test_triton_self_attention_is_as_accurate_as_pytorch(triton, heads, head_dim, tokens, dtype):
    assert_as_accurate(*both("self_attention", heads), self_inputs(2, tokens, heads, head_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads, head_dim, tokens, images", [(3, 16, 5, 1), (2, 32, 63, 2), (1, 64, 77, 1), (1, 32, 130, 2), (1, 16, 260, 1)]
)
def test_triton_turned_self_attention_is_as_accurate_as_pytorch(triton, heads, head_dim, tokens, images, dtype):
    table, functions = angles(images, tokens, head_dim), both("self_attention", heads)
    assert_as_accurate(*(turning(f, table) for f in functions), self_inputs(2, tokens, heads, head_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, head_dim, tokens, length", CROSS_SHAPES)
def test_triton_cross_attention_is_as_accurate_as_pytorch(triton, heads, head_dim, tokens, length, dtype):
    assert_as_accurate(*both("cross_attention", heads), cross_inputs(2, tokens, length, heads, head_dim), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_at_a_width_beyond_the_largest_power_of_two(triton, dtype):
    assert_as_accurate(*both("cross_attention", 18), cross_inputs(1, 7, 9, 18, 64), dtype)


@pytest.mark.parametrize("tokens, length", [(70, 130), (20, 300)])
def test_triton_where_a_program_adds_up_the_parts_of_several_blocks_of_keys(triton, tokens, length):
    inputs = cross_inputs(2, tokens, length, 1, 32)
    assert_as_accurate(*both("cross_attention", 1), inputs, torch.bfloat16 if DEVICE == "cuda" else torch.float16)


def strided(function, qkv_TNX):
    """Tokens outermost; cotangents that are transposed, and of stride zero."""
    out = function(qkv_TNX.transpose(0, 1))
    return out.transpose(1, 2), out.sum((0, 2))


def by_columns(function, qkv_NXT):
    """The last dimension is not dense."""
    return function(qkv_NXT.transpose(1, 2))


def of_one_tensor(function, x_NTX):
    """q and kv views of the same rows, neither of which starts on 16 bytes."""
    _, q, kv = x_NTX.split([1, 64, 128], dim=-1)
    return function(q, kv)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "view, function, shape",
    [
        (strided, "self_attention", (70, 2, 192)),
        (by_columns, "self_attention", (2, 192, 19)),
        (of_one_tensor, "cross_attention", (2, 19, 193)),
    ],
)
def test_triton_takes_strided_inputs_and_cotangents(triton, view, function, shape, dtype):
    assert_as_accurate(*(partial(view, f) for f in both(function, 2)), [normal(*shape)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [20, 140])
def test_triton_with_scores_beyond_what_exp_can_take(triton, length, dtype):
    """Most of the norm in one number: scores near A / sqrt(head_dim) = 128, known to 128 eps, and so are their exp."""
    inputs = in_dtype(cross_inputs(1, 20, length, 16, 64), dtype)
    for t in inputs:
        t[..., 3] *= 100
    ours, theirs = both("cross_attention", 16)
    with poisoned_memory():
        found = gradients(ours, inputs)
    for f, expected in zip(found, gradients(theirs, [t.double() for t in inputs]), strict=True):
        assert rms(f.double() - expected) <= 256 * torch.finfo(dtype).eps * rms(expected)


@pytest.mark.parametrize("tokens", [40, 140])
def test_triton_gives_the_same_bits_twice(triton, tokens):
    assert_same_bits_twice(both("self_attention", 2)[0], in_dtype(self_inputs(1, tokens, 2, 32)))
    assert_same_bits_twice(both("cross_attention", 1)[0], in_dtype(cross_inputs(2, 30, tokens, 1, 32)))


@pytest.mark.parametrize("tokens", [20, 140])
def test_triton_keeps_statistics_alone(triton, tokens):
    """Two numbers a row, one a row and head, the output beyond a block of keys; PyTorch keeps q and k normalised."""
    ours, theirs = both("self_attention", 2)
    (qkv,) = in_dtype(self_inputs(2, tokens, 2, 32))
    kept = kept_for_backward(ours, [qkv])
    output = 2 * tokens * 64 if tokens > 64 else 0
    assert sum(kept.values()) == 4 * (qkv.numel() + (2 * 2 + 2) * 2 * tokens + output)
    assert sum(kept_for_backward(theirs, [qkv]).values()) >= 4 * (2 * 64 * 2 * tokens)


def test_triton_compiles_without_a_graph_break(triton):
    def function(qkv_NTX: Tensor, kv_NLX: Tensor) -> Tensor:
        out_NTA = masked_attention.self_attention(qkv_NTX, 2, EPS)
        return masked_attention.cross_attention(out_NTA, kv_NLX, 2, EPS)

    assert_compiles(function, in_dtype([*self_inputs(2, 19, 2, 32), normal(2, 70, 128)]))


def test_custom_ops_are_registered_as_torch_expects(triton):
    from mdit.kernels.masked_attention import triton_impl

    inputs = leaves(in_dtype([*self_inputs(2, 5, 2, 32), *cross_inputs(2, 5, 70, 2, 32)]))
    for arguments in ((inputs[0], None, 2, EPS, angles(1, 5, 32).to(DEVICE)), (*inputs[1:], 2, EPS, None)):
        torch.library.opcheck(triton_impl._attention.op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(16, 32), (12, 64), (16, 64)], ids=str)
@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_triton_at_the_shapes_of_the_paper(triton, tokens, heads, dtype):
    assert_as_accurate(*both("self_attention", heads[0]), self_inputs(2, tokens, *heads), dtype)
    assert_as_accurate(*both("cross_attention", heads[0]), cross_inputs(2, tokens, 77, *heads), dtype)


def test_misuse_is_an_assertion():
    q, kv = torch.randn(2, 3, 8), torch.randn(2, 5, 16)
    wrong = [(q, kv, 3), (q[:1], kv, 2), (q, kv[..., :8], 2), (q, kv.double(), 2), (q, kv[:, :0], 2)]
    for arguments in wrong:
        with pytest.raises(AssertionError):
            masked_attention.cross_attention(*arguments, EPS)
    with pytest.raises(AssertionError):
        masked_attention.self_attention(q, 2, EPS)
