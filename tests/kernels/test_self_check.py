"""The self-check before a run: it passes the kernels as they are, and finds in bfloat16 what may plausibly be wrong.

Triton's interpreter truncates where it makes bfloat16 of float32, so that a faulty kernel is a faulty reference here.
"""

from functools import partial
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from mdit.config import UserError  # noqa: E402
from mdit.kernels import dispatch, fp8_linear, swiglu  # noqa: E402
from mdit.kernels.dispatch import OPS, using  # noqa: E402
from mdit.kernels.expert_choice import Routing  # noqa: E402
from mdit.kernels.self_check import EXAMPLES, E, T, _random, compare_with_reference  # noqa: E402

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = {op: import_module(f"mdit.kernels.{op}.triton_impl") for op in OPS}


def found_in(op: str, dtype: torch.dtype = torch.bfloat16) -> str | None:
    with using(off_gpu=True):
        return compare_with_reference(op, CPU, dtype, head_dim=32)


@pytest.fixture
def in_pytorch(monkeypatch):
    """Every kernel is its reference, until a test puts something else into its place."""
    for op, module in KERNELS.items():
        reference = import_module(f"mdit.kernels.{op}.reference")
        for name in vars(module).keys() & vars(reference).keys():
            if callable(getattr(reference, name)):
                monkeypatch.setattr(module, name, getattr(reference, name))
    return monkeypatch


def test_every_op_has_an_example_and_faults():
    assert EXAMPLES.keys() == KERNELS.keys() == {*OPS}
    assert {name.split(".")[0] for name, *_ in FAULTS} == {*OPS}


@pytest.mark.parametrize("op", OPS)
def test_kernels_as_they_are_pass(op):
    with using(off_gpu=True):
        assert compare_with_reference(op, DEVICE, torch.float32, head_dim=32) is None


@pytest.mark.parametrize("dtype", dispatch.DTYPES, ids=str)
def test_right_kernels_pass_in_every_dtype(in_pytorch, dtype):
    assert {op: found_in(op, dtype) for op in OPS} == dict.fromkeys(OPS)


# A fault is a function of the right kernel and its inputs.

# ---------------------------------------------------------------- faults: gradients, and places


class _Hook(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient.clone()), None


def hooked(change, position):
    """The gradient of the argument at `position` comes out changed."""

    def fault(right, *inputs):
        inputs, x = list(inputs), inputs[position]
        if isinstance(x, fp8_linear.InFloat8):
            inputs[position] = x._replace(plain=_Hook.apply(x.plain, change))
        elif x is not None:
            inputs[position] = _Hook.apply(x, change)
        return right(*inputs)

    return fault


def output(change, position=0):
    """The output at `position` comes out changed: the one, the router's weights, or what a norm writes in float8."""

    def fault(right, *inputs):
        found = right(*inputs)
        if isinstance(found, Tensor):
            return change(found)
        changed = [change(part) if i == position else part for i, part in enumerate(found)]
        return Routing(*changed) if isinstance(found, Routing) else changed

    return fault


def given(change):
    """The kernel gets something else than it was given."""
    return lambda right, *inputs: right(*change(*inputs))


def without_row(t: Tensor) -> Tensor:
    """The last row of the last image stays unwritten."""
    keep = torch.ones(t.shape[:-1], dtype=t.dtype)
    keep.view(-1)[-1] = 0
    return t * keep.unsqueeze(-1)


def without_column(t: Tensor) -> Tensor:
    """(Not the last: of one of the tensors its two numbers are near 0.)"""
    keep = torch.ones(t.shape[-1], dtype=t.dtype)
    keep[-2] = 0
    return t * keep


def exchanged(t: Tensor) -> Tensor:
    """The second half of the columns first."""
    return t.roll(t.shape[-1] // 2, dims=-1)


def without_first_half(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(t).chunk(2, dim=-1)[0], t.chunk(2, dim=-1)[1]], dim=-1)


def missing(t: Tensor) -> Tensor:
    return 0 * t


def first_alone(t: Tensor) -> Tensor:
    """The sums of one of two programs."""
    return t * torch.cat([torch.ones(len(t) // 2), torch.zeros(len(t) - len(t) // 2)]).to(t).view(-1, 1)


# ---------------------------------------------------------------- faults: attention


def attend(q, k, v, heads, eps, *, scale=None, norm=F.layer_norm, softmax=None):
    q, k = (norm(t, t.shape[-1:], eps=eps) for t in (q, k))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if softmax is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        out = softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5) @ v
    return out.transpose(1, 2).flatten(-2)


def self_attention(**changes):
    """Attention of tokens that are not turned."""

    def fault(right, qkv, heads, eps, table):
        return attend(*qkv.chunk(3, -1), heads, eps, **changes) if table is None else right(qkv, heads, eps, table)

    return fault


def turned_by_neighbours(qkv, heads, eps, table):
    return qkv, heads, eps, None if table is None else table.roll(1, dims=1)


def cross_attention(**changes):
    return lambda right, q, kv, heads, eps: attend(q, *kv.chunk(2, -1), heads, eps, **changes)


def norm_of_constants(x, shape, eps):
    """LayerNorm whose backward forgets that mean and variance depend on x."""
    mean, rstd = x.float().mean(-1, keepdim=True), (x.float().var(-1, keepdim=True, correction=0) + eps).rsqrt()
    return ((x.float() - mean.detach()) * rstd.detach()).to(x.dtype)


def norm_per_head(x, shape, eps):
    return F.layer_norm(x.unflatten(-1, (-1, 32)), (32,), eps=eps).flatten(-2)


def softmax_of_constant_sum(scores):
    """Whose backward forgets the sum over keys of p * dp."""
    return (scores.float() - scores.float().logsumexp(-1, keepdim=True).detach()).exp().to(scores.dtype)


ATTENTION = [
    ("scale dropped", dict(scale=1.0)),
    ("scale of the whole width", dict(scale=(3 * 32) ** -0.5)),
    ("norm of each head", dict(norm=norm_per_head)),
    ("LayerNorm's backward dropped", dict(norm=norm_of_constants)),
    ("sum of p * dp dropped", dict(softmax=softmax_of_constant_sum)),
]


# ---------------------------------------------------------------- faults: patch mixing, experts


def scale_without_one(x, y, gate, weight, shift, scale, eps, keep=None):
    return x, y, gate, weight, shift, None if scale is None else scale - 1, eps, keep


def neighbours_tokens(x, y, gate, weight, shift, scale, eps, keep=None):
    return x, y, gate, weight, shift, scale, eps, None if keep is None else keep.roll(1, dims=1)


def gradient_of_the_sum_halved(right, *inputs):
    x, h = right(*inputs)
    return x.detach() + (x - x.detach()) * 0.5, h


def softmax_of_three(right, logits, k):
    most = torch.cat([logits[..., :3], logits[..., 3:] - 100], -1)
    others, found = right(most, k), right(logits, k)
    return Routing(others.weights_NEK.gather(-1, torch.zeros_like(found.tokens_NEK)), *found[1:])


def with_relu(right, h, w2, weights_NEK):
    return torch.bmm(h.relu() * weights_NEK.transpose(0, 1).reshape(len(h), -1, 1).to(h.dtype), w2)


def last_expert_wins(right, y_EMD, found: Routing):
    """Rows are written over each other where they belong added up."""
    n, experts, k = found.tokens_NEK.shape
    out = y_EMD.new_zeros(*found.slots_NTE.shape[:2], y_EMD.shape[2])
    rows = y_EMD.unflatten(1, (n, k))
    for e in range(experts):
        index = found.tokens_NEK[:, e].unsqueeze(-1).expand_as(rows[e])
        out = out.scatter(1, index, rows[e])
    return out


# For every op: what each of its formulas may lose, a row and a column of what it writes, and each of its gradients.
FAULTS = [
    *((f"masked_attention.self_attention: {what}", self_attention(**how)) for what, how in ATTENTION),
    *((f"masked_attention.cross_attention: {what}", cross_attention(**how)) for what, how in ATTENTION),
    ("masked_attention.self_attention: eps dropped", given(lambda qkv, heads, eps, table: (qkv, heads, 0.0, table))),
    ("masked_attention.self_attention: not turned", given(lambda *inputs: (*inputs[:3], None))),
    ("masked_attention.self_attention: turned by the neighbour's angles", given(turned_by_neighbours)),
    ("masked_attention.self_attention: last row", output(without_row)),
    ("masked_attention.cross_attention: a column", output(without_column)),
    ("masked_attention.cross_attention: last key", given(lambda q, kv, *more: (q, kv[:, :-1], *more))),
    ("masked_attention.self_attention: gradient without its last row", hooked(without_row, 0)),
    ("masked_attention.cross_attention: no gradient of q", hooked(missing, 0)),
    ("masked_attention.cross_attention: no gradient of the last key", hooked(without_row, 1)),
    ("patch_mixing.add_norm_modulate: eps dropped", given(lambda *a: (*a[:6], 0.0, *a[7:]))),
    ("patch_mixing.add_norm_modulate: scale in place of 1 + scale", given(scale_without_one)),
    ("patch_mixing.add_norm_modulate: other tokens kept", given(neighbours_tokens)),
    ("patch_mixing.add_norm_modulate: gradient past the norm halved", gradient_of_the_sum_halved),
    ("patch_mixing.add_norm_modulate: last row", output(without_row)),
    ("patch_mixing.add_norm_modulate: a column", output(without_column)),
    *(
        (f"patch_mixing.add_norm_modulate: {what} of {name}", hooked(change, position))
        for position, name in enumerate(["x", "y", "gate", "weight", "shift", "scale"])
        for what, change in [("no gradient", missing), ("gradient without a column", without_column)]
    ),
    ("patch_mixing.add_norm_modulate: one image's sums of the gate", hooked(first_alone, 2)),
    ("expert_choice.route: the next token's weight", output(lambda w: w.roll(1, -1))),
    ("expert_choice.route: the next expert's weight", output(lambda w: w.roll(1, 1))),
    ("expert_choice.route: softmax of three of four experts", softmax_of_three),
    ("expert_choice.route: no gradient", output(lambda w: w.detach() + 0 * w)),
    ("expert_choice.gather_tokens: last row", output(without_row)),
    ("expert_choice.gather_tokens: no gradient", hooked(missing, 0)),
    ("expert_choice.gelu_bmm: ReLU for GELU", with_relu),
    ("expert_choice.gelu_bmm: weights dropped", given(lambda h, w, weights: (h, w, 1 + 0 * weights))),
    ("expert_choice.gelu_bmm: no gradient of the weights", hooked(missing, 2)),
    ("expert_choice.gelu_bmm: no gradient of h", hooked(missing, 0)),
    ("expert_choice.gelu_bmm: gradient of w2 without a column", hooked(without_column, 1)),
    ("expert_choice.scatter_tokens: the last expert's row alone", last_expert_wins),
    ("expert_choice.scatter_tokens: gradient's last row", hooked(without_row, 0)),
    ("swiglu.swiglu_linear: the halves exchanged", given(lambda ab, *more: (exchanged(ab), *more))),
    ("swiglu.swiglu_linear: last row", output(without_row)),
    ("swiglu.swiglu_linear: a column", output(without_column)),
    ("swiglu.swiglu_linear: no gradient of a", hooked(without_first_half, 0)),
    ("swiglu.swiglu_linear: the halves' gradients exchanged", hooked(exchanged, 0)),
    *((f"swiglu.swiglu_linear: a column of input {i}'s gradient", hooked(without_column, i)) for i in range(2)),
    *(
        (f"fp8_linear.{name}: {what}", fault)
        for name in ("fp8_linear", "fp8_swiglu", "fp8_experts")
        for what, fault in [
            ("scale twice as large", output(lambda out: 2 * out)),
            ("the next row's scale", output(lambda out: out * (1 + (torch.arange(out.shape[-2]) % 2)[:, None]))),
            ("last row", output(without_row)),
            ("the gradient's scale twice as large", hooked(lambda g: 2 * g, 0)),
            ("gradient of input 2 without a column", hooked(without_column, 1)),
        ]
    ),
    ("fp8_linear.fp8_add_norm_modulate: scale twice as large", output(lambda h: h._replace(scale=2 * h.scale), 1)),
    ("fp8_linear.fp8_swiglu: no gradient of w3", hooked(missing, 3)),
    ("fp8_linear.fp8_experts: no gradient of w2", hooked(missing, 2)),
]


@pytest.mark.parametrize("name, fault", FAULTS, ids=[name for name, _ in FAULTS])
def test_a_faulty_kernel_is_found_in_bfloat16(in_pytorch, name, fault):
    op, function = name.split(":")[0].split(".")
    in_pytorch.setattr(KERNELS[op], function, partial(fault, getattr(KERNELS[op], function)))
    found = found_in(op)
    assert found and "of its size, PyTorch by" in found


@pytest.mark.parametrize("fault", ["not a number", "does not build", "another shape", "another dtype"])
def test_what_is_plainly_wrong_is_said(in_pytorch, fault):
    def faulty(ab, weight, bias=None):
        if fault == "does not build":
            raise RuntimeError("ptxas died\nand said more")
        out = swiglu.reference.swiglu_linear(ab, weight, bias)
        return {"not a number": out * torch.nan, "another shape": out[:1], "another dtype": out.float()}[fault]

    in_pytorch.setattr(KERNELS["swiglu"], "swiglu_linear", faulty)
    expected = {
        "not a number": "output 1 is off by nan of its size, PyTorch by 3.0e-03",
        "does not build": "RuntimeError: ptxas died",
        "another shape": "output 1 is torch.bfloat16 (1, 40, 96), expected torch.bfloat16 (2, 40, 96)",
        "another dtype": "output 1 is torch.float32 (2, 40, 96), expected torch.bfloat16 (2, 40, 96)",
    }
    assert found_in("swiglu") == expected[fault]


def test_a_kernel_that_has_cost_the_process_its_gpu_ends_the_run(in_pytorch):
    def faulty(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand advice")

    in_pytorch.setattr(KERNELS["swiglu"], "swiglu_linear", faulty)
    in_pytorch.setattr("mdit.kernels.self_check.is_lost", lambda device: True)
    with pytest.raises(UserError, match="swiglu end in .*illegal memory access.*=reference does"):
        found_in("swiglu")


def test_the_routing_of_the_example_is_the_same_in_every_dtype():
    """No two tokens are so close that rounding could decide which of them an expert takes."""
    shapes = EXAMPLES["expert_choice"][1](96)
    logits = 2 * _random([torch.Size(shapes[0])], 0, CPU, torch.bfloat16)[0][..., :E]
    ordered = logits.double().softmax(-1).sort(dim=1, descending=True).values
    last, next = ordered[:, T // 2 - 1], ordered[:, T // 2]
    assert ((last - next) / last).min() > 1e-4
