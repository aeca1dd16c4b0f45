"""Does every kernel give here what its reference gives? Asked once, before step 0, where Triton was not asked for.

Small inputs; every output and every gradient is judged alone, by the error that PyTorch itself makes in this dtype:
both are compared with the reference in float64. What is left out, scaled wrongly or written to another place is off by
several per cent, bfloat16 by a few tenths. So this finds a kernel that does not build or is wrong with this GPU, driver
and version of Triton. How accurate the kernels are is the business of tests/kernels.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from mdit.config import UserError
from mdit.kernels import dispatch, expert_choice, fp8_linear, masked_attention, patch_mixing, swiglu

N, T, L, HEADS, E, F, OUTPUTS = 2, 40, 77, 3, 4, 80, 48
LONG = 130  # tokens, for which attention takes other kernels
EPS = 0.5  # of LayerNorms: so large that its absence shows
WORSE = 4  # times PyTorch's own error are right
FINEST = 1e-5  # relative error that float32 may have: a GPU's exponentials and quotients are approximate


def compare_with_reference(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where kernel and reference agree, else what is wrong, in one line.

    Raises UserError where a kernel has left the GPU useless to this process.
    """
    call, shapes = EXAMPLES[op]
    inputs = _random([torch.Size(shape) for shape in shapes(HEADS * head_dim)], 0, device, dtype)
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        # First, so that what it never writes is not by chance what PyTorch left there. A kernel runs on the current
        # device, wherever its tensors are.
        with dispatch.using(op), current:
            found = _with_gradients(call, inputs, dtype)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever the compiler, the driver or the launch may say
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if is_lost(device):
            raise UserError(f"the kernels of {op} end in {reason}; MDIT_KERNELS=reference does without them") from None
        return reason
    with dispatch.using():
        plain = _with_gradients(call, inputs, dtype)
        exact = _with_gradients(call, [t.double() for t in inputs], dtype)
    names = [f"output {i + 1}" for i in range(len(found) - len(inputs))]
    names += [f"the gradient of input {i + 1}" for i in range(len(inputs))]
    complaints = (_complaint(*three, dtype) for three in zip(found, plain, exact, strict=True))
    return next((f"{name} {complaint}" for name, complaint in zip(names, complaints) if complaint), None)


def is_lost(device: torch.device) -> bool:
    """Whether every call to the GPU fails from now on, as after a write where none may be."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _attention(qkv_NTX: Tensor, q_NTA: Tensor, kv_NLX: Tensor, long_1TX: Tensor) -> list[Tensor]:
    angles = torch.linspace(-4, 4, LONG * q_NTA.shape[-1] // HEADS // 2, device=q_NTA.device).view(1, LONG, -1)
    rotary_1TC = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return [
        masked_attention.self_attention(long_1TX, HEADS, EPS),
        masked_attention.self_attention(long_1TX, HEADS, EPS, rotary_1TC),
        masked_attention.self_attention(qkv_NTX, HEADS, EPS),
        masked_attention.self_attention(qkv_NTX, HEADS, EPS, rotary_1TC[:, :T]),
        masked_attention.cross_attention(q_NTA, kv_NLX, HEADS, EPS),
    ]


def _mixing(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND) -> list[Tensor]:
    keep_NK = torch.arange(T - 1, 0, -2, device=x_NTD.device).expand(N, -1).contiguous()
    modulated = patch_mixing.add_norm_modulate(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, EPS)
    kept = patch_mixing.add_norm_modulate(x_NTD, y_NTD, gate_ND, weight_D, None, None, EPS, keep_NK)
    return [*modulated, *kept]


def _experts(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor) -> list[Tensor]:
    routing = expert_choice.route(2 * x_NTD[..., :E], T // 2)
    hidden = torch.bmm(expert_choice.gather_tokens(x_NTD, routing), w1_EDF)
    return [expert_choice.scatter_tokens(expert_choice.gelu_bmm(hidden, w2_EFD, routing.weights_NEK), routing)]


def _swiglu(ab_NTX: Tensor, weight_DF: Tensor) -> list[Tensor]:
    return [swiglu.swiglu_linear(ab_NTX, weight_DF)]


def _fp8(
    x_NTF: Tensor, weight_OF: Tensor, y_NTF: Tensor, z_NTF: Tensor, norm_F: Tensor, behind_OF: Tensor,
    weight_XF: Tensor, weight_FF: Tensor, tokens_NTF: Tensor, w1_EFO: Tensor, w2_EOF: Tensor,
) -> list[Tensor]:  # fmt: skip
    _, h_NTF = fp8_linear.fp8_add_norm_modulate(y_NTF, z_NTF, None, norm_F, None, None, EPS, None)
    routing = expert_choice.route(2 * tokens_NTF[..., :E], T // 2)
    return [
        fp8_linear.fp8_linear(x_NTF, weight_OF),
        fp8_linear.fp8_linear(h_NTF, behind_OF),
        fp8_linear.fp8_swiglu(h_NTF, weight_XF, None, weight_FF),
        fp8_linear.fp8_experts(tokens_NTF, w1_EFO, w2_EOF, routing),
    ]


# The call, and the shapes of its inputs for a width.
EXAMPLES: dict[str, tuple[Callable[..., list[Tensor]], Callable[[int], list[tuple[int, ...]]]]] = {
    "masked_attention": (_attention, lambda d: [(N, T, 3 * d), (N, T, d), (N, L, 2 * d), (1, LONG, 3 * d)]),
    "patch_mixing": (_mixing, lambda d: [(N, T, d), (N, T, d), (N, d), (d,), (N, d), (N, d)]),
    "expert_choice": (_experts, lambda d: [(N, T, d), (E, d, F), (E, F, d)]),
    "swiglu": (_swiglu, lambda d: [(N, T, 2 * F), (d, F)]),
    "fp8_linear": (
        _fp8,
        lambda d: [
            *[(N, T, F), (OUTPUTS, F)],
            *[(N, T, F), (N, T, F), (F,), (OUTPUTS, F), (2 * F, F), (F, F)],
            *[(N, T, F), (E, F, OUTPUTS), (E, OUTPUTS, F)],
        ],
    ),
}


def _with_gradients(call: Callable[..., list[Tensor]], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs, and the gradient of each input for cotangents that are the same numbers, of `dtype`, in every dtype."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    cotangents = _random([o.shape for o in outputs], 1, inputs[0].device, dtype)
    gradients = torch.autograd.grad(outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs)])
    return [*(o.detach() for o in outputs), *gradients]


def _random(shapes: list[torch.Size], seed: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _complaint(found: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> str:
    """Nothing where `found` is about as far from `exact` as `plain` is: in the mean, and at worst, which finds a single
    row or column."""
    if found.shape != exact.shape or found.dtype != plain.dtype:
        return f"is {found.dtype} {tuple(found.shape)}, expected {plain.dtype} {tuple(exact.shape)}"
    for size in (lambda t: t.square().mean().sqrt().item(), lambda t: t.abs().max().item()):
        off, own, whole = size(found.double() - exact), size(plain.double() - exact), size(exact)
        if not off <= WORSE * own + (torch.finfo(dtype).eps / 4 + FINEST) * whole:  # not: NaN is no less either
            return f"is off by {off / whole:.1e} of its size, PyTorch by {own / whole:.1e}"
    return ""
