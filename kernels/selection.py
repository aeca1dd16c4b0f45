"""Triton or PyTorch: settled once, before a run, with its reason.

    reference   plain PyTorch, everywhere
    triton      the kernels, or an error that says why they cannot run here
    auto        on a GPU that the kernels are shaped for, those of every op that builds and agrees with its reference

The DeepSpeed JSON says which ("mdit": {"kernels": ...}); where it says "auto", the variable MDIT_KERNELS may.
"""

import importlib.util
import os
from pathlib import Path
from typing import Literal

import torch

from mdit.config import UserError
from mdit.kernels.dispatch import FP8, OPS, interpreted, set_triton_ops
from mdit.kernels.self_check import compare_with_reference

Choice = Literal["auto", "reference", "triton"]
OLDEST_GPU = (8, 0)  # Ampere: bfloat16 in the tensor cores
SHAPED_FOR = (9, 0)  # Hopper: what fits its registers and shared memory spills on an A100
HEAD_DIMS = (16, 32, 64, 128)  # that masked_attention has kernels for


def choose_kernels(
    wanted: Choice,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    path: str | Path = "the DeepSpeed JSON",
    fp8: bool = False,
) -> tuple[frozenset[str], str]:
    """Settle for this process -> the ops that run in Triton, and why. `dtype` is what the model computes in: kernels
    are checked in it, and run in no other. Without `fp8` those of float8 are not even looked at.

    Raises UserError, naming `path`, when the environment contradicts `wanted` or "triton" cannot run on this machine.
    """
    wanted, asked_for = _with_environment(wanted, path)
    hindrance = _hindrance(device, SHAPED_FOR if wanted == "auto" else OLDEST_GPU)
    missing, ops = _missing(head_dim), frozenset(op for op in OPS if fp8 or op != FP8)
    if wanted == "triton":
        if hindrance and not (interpreted() and _installed()):
            raise UserError(f"{asked_for}, but {hindrance}")
        if missing:
            raise UserError(f"{asked_for}, but {'; '.join(missing.values())}")
    if wanted == "auto" and not hindrance:
        found = {op: compare_with_reference(op, device, dtype, head_dim) for op in sorted(ops - missing.keys())}
        missing |= {op: f"{op} does not: {wrong}" for op, wrong in found.items() if wrong}
        chosen = ops - missing.keys()
        reason = "; ".join([f"they agree with PyTorch on {torch.cuda.get_device_name(device)}", *missing.values()])
    else:
        chosen = ops if wanted == "triton" else frozenset()
        reason = hindrance if wanted == "auto" else "asked for"
    set_triton_ops(*chosen, dtype=dtype)
    return chosen, reason


def _with_environment(wanted: Choice, path: str | Path) -> tuple[Choice, str]:
    """-> what is wanted, and who says so."""
    in_json, asked = f"{path}: mdit.kernels = {wanted!r}", os.environ.get("MDIT_KERNELS", "auto")
    if asked not in ("auto", "reference", "triton"):
        raise UserError(f'MDIT_KERNELS={asked}: expected "auto", "reference" or "triton"')
    if "auto" not in (wanted, asked) and wanted != asked:
        raise UserError(f"{in_json} contradicts MDIT_KERNELS={asked}")
    return (wanted, in_json) if asked == "auto" else (asked, f"MDIT_KERNELS={asked}")


def _hindrance(device: torch.device, oldest: tuple[int, int]) -> str:
    """Reason why Triton cannot run here, "" where it can."""
    if not _installed():
        return "the package triton is not installed"
    if device.type != "cuda":
        return "there is no GPU"
    if torch.cuda.get_device_capability(device) < oldest:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {oldest[0]}.{oldest[1]}"
    return ""


def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _missing(head_dim: int) -> dict[str, str]:
    """Ops whose kernels do not know this model's shapes."""
    if head_dim in HEAD_DIMS:
        return {}
    known = ", ".join(map(str, HEAD_DIMS))
    return {"masked_attention": f"masked_attention has kernels for head_dim {known}, and model.head_dim is {head_dim}"}
