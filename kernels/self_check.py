"""Does every kernel give here what its reference gives? Asked once, before step 0, where Triton was not asked for.

Small inputs, values and gradients, a loose tolerance: this finds a kernel that does not build or is plainly wrong with
this GPU, driver and version of Triton. How accurate the kernels are is the business of tests/kernels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mdit.config import UserError
from mdit.kernels import dispatch, expert_choice, fp8_linear, masked_attention, patch_mixing, swiglu

N, T, L, HEADS, E, F, OUTPUTS = 2, 40, 21, 3, 4, 80, 48
EPS = 1e-6


def disagreement(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None where kernel and reference agree, else what is wrong, in one line.

    Raises UserError where a kernel has left the GPU useless to this process.
    """
    if device.type == "cuda":  # a kernel runs on the current device, wherever its tensors are
        with torch.cuda.device(device):
            return _disagreement(op, device, dtype, head_dim)
    return _disagreement(op, device, dtype, head_dim)


def _disagreement(op: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    call, shapes = EXAMPLES[op]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes(HEADS * head_dim)]
    with dispatch.using():
        expected = _with_gradients(call, inputs)
    try:
        with dispatch.using(op):
            found = _with_gradients(call, inputs)
        worst = max(_relative_error(f, e) for f, e in zip(found, expected))
    except Exception as error:  # whatever the compiler, the driver or the launch may say
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if _is_lost(device):
            raise UserError(f"the kernels of {op} end in {reason}; MDIT_KERNELS=reference does without them") from None
        return reason
    tolerance = max(32 * torch.finfo(dtype).eps, 1e-4)  # bfloat16: a quarter
    return None if worst <= tolerance else f"its results are off by {worst:.1e} of their size"


def _is_lost(device: torch.device) -> bool:
    """After a write where none may be, every call to the GPU fails."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _attention(qkv_NTX: Tensor, q_NTA: Tensor, kv_NLX: Tensor) -> list[Tensor]:
    return [
        masked_attention.self_attention(qkv_NTX, HEADS, EPS),
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


def _swiglu(a: Tensor, b: Tensor, weight_DF: Tensor) -> list[Tensor]:
    return [swiglu.swiglu_linear(a, b, weight_DF)]


def _fp8(a_NTF: Tensor, b_NTF: Tensor, weight_OF: Tensor, h_EMF: Tensor, w_EFO: Tensor) -> list[Tensor]:
    weights_NEK = a_NTF.new_ones(N, E, T // N)
    return [
        fp8_linear.fp8_linear(a_NTF, weight_OF),
        fp8_linear.fp8_swiglu_linear(a_NTF, b_NTF, weight_OF),
        fp8_linear.fp8_bmm(h_EMF, w_EFO),
        fp8_linear.fp8_gelu_bmm(h_EMF, w_EFO, weights_NEK),
    ]


# The call, and the shapes of its inputs for a width.
EXAMPLES: dict[str, tuple[Callable[..., list[Tensor]], Callable[[int], list[tuple[int, ...]]]]] = {
    "masked_attention": (_attention, lambda d: [(N, T, 3 * d), (N, T, d), (N, L, 2 * d)]),
    "patch_mixing": (_mixing, lambda d: [(N, T, d), (N, T, d), (N, d), (d,), (N, d), (N, d)]),
    "expert_choice": (_experts, lambda d: [(N, T, d), (E, d, F), (E, F, d)]),
    "swiglu": (_swiglu, lambda d: [(N, T, F), (N, T, F), (d, F)]),
    "fp8_linear": (_fp8, lambda d: [(N, T, F), (N, T, F), (OUTPUTS, F), (E, T, F), (E, F, OUTPUTS)]),
}


def _with_gradients(call: Callable[..., list[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = call(*leaves)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected; infinite where something is not a number."""
    difference = (found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    return difference.nan_to_num(nan=torch.inf).item()
