"""Optimizers whose state has one form here: AdamW in three implementations, Muon beside the first of them
(`mdit.train.muon`); and the learning rate as a function of the step.

    torch      torch.optim.AdamW(fused=True): everywhere
    deepspeed  DeepSpeed's FusedAdam, or its DeepSpeedCPUAdam where the optimizer is kept in host memory; their C++ or
               CUDA is compiled at the first use on a machine
    apex       FusedAdam of NVIDIA's apex: on GPUs, where somebody has built it

All three take the same step (Loshchilov & Hutter 2019, algorithm 2, decay times the learning rate) to rounding:

    m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2
    w = w - lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)
"""

import importlib
import importlib.util
import math
import os
import shlex
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension

from mdit.config import OptimConfig, UserError
from mdit.dist import logger
from mdit.parallel.muon import misfit, takes_muon
from mdit.parallel.settings import Execution
from mdit.train.muon import MuonAdamW

GET_APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)


def learning_rate(step: int, num_steps: int, config: OptimConfig) -> float:
    """Learning rate of the step to `step + 1`: linear warm-up, then constant, or a fall to final_lr_ratio: a cosine
    from the warm-up's end on, or that of "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395; 1 - sqrt:
    Haegele et al. 2024, arXiv 2405.18392)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    falling = config.decay_share * num_steps if config.decay_share else num_steps - config.warmup_steps
    progress = min(1.0, max(0.0, (step - (num_steps - falling)) / max(1, falling)))
    if config.schedule == "cosine":
        left = (1 + math.cos(math.pi * progress)) / 2
    else:
        left = 1 - (progress if config.decay_shape == "linear" else math.sqrt(progress))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)


def parameter_groups(named: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Groups of the optimizer, AdamW's first. "peak": what their learning rate is at most, as a share of optim.lr."""
    parameters = dict(named)
    of_muon = [name for name, p in parameters.items() if config.muon and takes_muon(name, p.shape)]
    groups = [{"name": "adamw", "peak": 1.0, "params": [p for name, p in parameters.items() if name not in of_muon]}]
    if config.muon:
        options = config.muon.model_dump() | {"peak": config.muon.lr / config.lr}
        groups.append(options | {"name": "muon", "params": [parameters[name] for name in of_muon]})
    return groups


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter] | list[dict], config: OptimConfig, *, offloaded: bool = False
) -> torch.optim.Optimizer:
    """AdamW of `config.implementation`, or Muon, which `check_implementation` has found possible.

    `parameters` may be groups, dicts with "params" and keys of others, which stay; all that are not Muon's are stepped
    alike, as the paper decays every parameter. `offloaded` keeps the optimizer in host memory.
    """
    options: dict[str, Any] = dict(lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
    if config.name == "muon":
        return MuonAdamW(parameters, **options, fused=True)
    if config.implementation == "torch":
        return torch.optim.AdamW(parameters, **options, fused=True)
    if config.implementation == "apex":
        fused = importlib.import_module("apex.optimizers").FusedAdam
        return fused(parameters, **options, adam_w_mode=True)

    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    logger.info(
        f"DeepSpeed's optimizer is compiled at its first use, in {folder}; should that hang, a build was killed there: "
        "remove the file `lock` that it left"
    )
    if offloaded:
        return DeepSpeedCPUAdam(parameters, **options, adamw_mode=True)
    return FusedAdam(parameters, **options, adam_w_mode=True)


# The state, one form for all.


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """{"exp_avg": m, "exp_avg_sq": v} of a parameter, the optimizer's own tensors, without v where it is Muon's; empty
    before its first step."""
    state = optimizer.state.get(parameter, {})
    return {name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}


def step_count(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """The t of the formula above: steps that the optimizer has taken on a parameter, the last of its group (DeepSpeed's
    FusedAdam counts for no other)."""
    if parameter not in optimizer.state:
        return 0
    state = optimizer.state[parameter]
    return int(state["step"] if "step" in state else _group_of(optimizer, parameter)["step"])


def has_second_moment(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """False for Muon's."""
    return not (isinstance(optimizer, MuonAdamW) and parameter in optimizer.exchanges)


def set_moments(
    optimizer: torch.optim.Optimizer, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor | None, step: int
) -> None:
    """Put a parameter's state as if `step` steps were done. The optimizer goes on in these tensors: it does not copy.
    Muon's parameters have no `exp_avg_sq` and count no steps.

    Give the parameters of a group the same step: apex has one count for each group, the others one for each parameter
    (torch as a float32 tensor beside the parameter, DeepSpeed as an int; its FusedAdam reads the last parameter's).
    The steps that follow are those of an optimizer that was not interrupted, bit for bit; to rounding in DeepSpeed's
    C++ for CPUs, which multiplies beta^t along from step to step and cannot be put at a step in the same bits.
    """
    assert exp_avg.shape == parameter.shape, (exp_avg.shape, parameter.shape)
    if exp_avg_sq is None:
        optimizer.state[parameter] = {"exp_avg": exp_avg}
        return
    assert exp_avg_sq.shape == parameter.shape, (exp_avg_sq.shape, parameter.shape)
    state: dict[str, Any] = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    package = type(optimizer).__module__.partition(".")[0]
    if isinstance(optimizer, torch.optim.AdamW):
        state["step"] = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
    elif package == "deepspeed":
        state["step"] = step
    else:
        _group_of(optimizer, parameter)["step"] = step
    optimizer.state[parameter] = state


def _group_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict:
    (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return group


# What an implementation needs, found out without compiling or importing it.


def check_implementation(config: OptimConfig, device: torch.device, source: object, execution: Execution) -> None:
    """Raise UserError, naming the recipe `source`, when `config.implementation` cannot step a model that is on `device`
    on this machine, or Muon not in this layout."""
    if config.name == "muon" and (why := misfit(execution)):
        raise UserError(f"{source}: optim.name = 'muon': {why}")
    problem = ""
    if config.implementation == "deepspeed":
        problem = _deepspeed_problem(device, execution.offloads_optimizer)
    elif config.implementation == "apex":
        problem = _apex_problem() or _apex_misfit(device, execution)
    if problem:
        raise UserError(f'{source}: optim.implementation = {config.implementation!r}: {problem}; or use "torch"')


def _deepspeed_problem(device: torch.device, host_memory: bool) -> str:
    from deepspeed.git_version_info import installed_ops

    op, missing = "cpu_adam" if host_memory else "fused_adam", []
    if installed_ops.get(op):  # compiled when DeepSpeed was installed
        return ""
    if not cpp_extension.is_ninja_available():
        missing.append("ninja (pip install ninja) on the PATH")
    compiler = shlex.split(cpp_extension.get_cxx_compiler())[0]
    if shutil.which(compiler) is None:
        missing.append(f"the C++ compiler {compiler}")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        missing.append(f"Python's headers ({header})")
    if device.type == "cuda" and not host_memory and torch.version.cuda:
        missing += _cuda_compiler_missing(torch.version.cuda)
    return f"to compile DeepSpeed's {op} this machine lacks {', '.join(missing)}" if missing else ""


def _cuda_compiler_missing(wanted: str) -> list[str]:
    """nvcc, of the major version of torch's CUDA: torch refuses any other."""
    from deepspeed.ops.op_builder.builder import MissingCUDAException, installed_cuda_version

    try:
        major, minor = installed_cuda_version()
    except MissingCUDAException:
        return [f"nvcc of CUDA {wanted} (or CUDA_HOME)"]
    return [] if wanted.split(".")[0] == str(major) else [f"nvcc of CUDA {wanted} (CUDA_HOME has {major}.{minor})"]


def _apex_problem() -> str:
    """Reason why apex cannot be used, "" where it can. PyPI's apex is a web toolkit, whose import may even work."""
    spec = importlib.util.find_spec("apex")  # finds a top-level package without running it
    if spec is None:
        return f"NVIDIA's apex is not installed ({GET_APEX})"
    root = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin or "")
    if not all((root / part).exists() for part in ("optimizers/fused_adam.py", "multi_tensor_apply")):
        return (
            f"the installed apex in {root} is not NVIDIA's, but another package of that name; "
            f"pip uninstall apex, then build NVIDIA's ({GET_APEX})"
        )
    if importlib.util.find_spec("amp_C") is None:
        return f"the installed apex in {root} was built without its CUDA extensions; build it again ({GET_APEX})"
    return ""


def _apex_misfit(device: torch.device, execution: Execution) -> str:
    if device.type != "cuda":
        return f"it runs on GPUs only, and this run is on {device.type}"
    if execution.offloads_optimizer:
        return "it runs on GPUs only, and zero_optimization.offload_optimizer keeps the optimizer in host memory"
    if execution.zero.stage == 3:
        # It counts a step of its group whenever it is called, and ZeRO 3 calls it once for each part of a group.
        return "it would miscount its steps under zero_optimization.stage = 3"
    return ""
