"""AdamW in three implementations against its formula, what each needs, and the learning rate."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from mdit.config import OptimConfig, UserError, load_config
from mdit.parallel.settings import Execution, RunSettings
from mdit.train.optim import build_optimizer, check_implementation, learning_rate, moments, set_moments, step_count
from tests.recipes import tiny_config
from tests.training import REPOSITORY

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OFFLOADED = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
IMPLEMENTATIONS = {
    "torch": ("torch", {"stage": 2}),
    "deepspeed": ("deepspeed", {"stage": 2}),
    "deepspeed in host memory": ("deepspeed", OFFLOADED),
    "apex": ("apex", {"stage": 2}),
}


def execution(zero=None) -> Execution:
    return Execution(RunSettings(), {"zero_optimization": zero or {"stage": 1}})


def optim_config(**changes) -> OptimConfig:
    return tiny_config(optim=changes).optim


# The step


def adamw(w, g, m, v, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One step in place, in the dtype of what it is given."""
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    unbiased = m / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    w.sub_(lr * (unbiased[0] / (unbiased[1].sqrt() + eps) + weight_decay * w))


def new_weights(device=CPU) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (300,), (1,)]
    return [torch.nn.Parameter(0.3 * torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def gradients(step: int) -> list[torch.Tensor]:
    """From large to far below eps."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(w.shape, generator=generator) * 10.0 ** -(step % 5) for w in new_weights()]


def rate(step: int) -> float:
    return 1e-2 / (step + 1)


def take_steps(optimizer, weights, first: int, last: int) -> None:
    for step in range(first, last):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for w, gradient in zip(weights, gradients(step), strict=True):
            w.grad = gradient.to(w.device)
        optimizer.step()


def build(name: str, parameters, **changes) -> torch.optim.Optimizer:
    implementation, zero = IMPLEMENTATIONS[name]
    return build_optimizer(
        parameters, optim_config(implementation=implementation, **changes), offloaded=zero is OFFLOADED
    )


def assert_steps_are_those_of_the_formula(name: str, device: torch.device) -> None:
    for eps in (1e-8, 1e-2):  # the second shows whether eps stands outside of the root, behind the bias correction
        weights = new_weights(device)
        take_steps(build(name, weights, eps=eps, betas=(0.8, 0.99)), weights, 0, 10)
        exact = [[w.double(), torch.zeros_like(w).double(), torch.zeros_like(w).double()] for w in new_weights()]
        for step in range(10):
            for (w, m, v), g in zip(exact, gradients(step), strict=True):
                adamw(w.data, g.double(), m, v, step + 1, rate(step), (0.8, 0.99), eps, 0.1)
        for ours, (expected, _, _) in zip(weights, exact, strict=True):
            torch.testing.assert_close(ours.detach().cpu().double(), expected.detach(), rtol=0, atol=1e-6)


def assert_it_goes_on_from_set_moments(name: str, device: torch.device, atol: float = 0) -> None:
    expected = new_weights(device)
    take_steps(build(name, grouped(expected)), expected, 0, 10)

    weights = new_weights(device)
    first = build(name, grouped(weights))
    take_steps(first, weights, 0, 5)
    again = build(name, grouped(weights))
    for w in weights:
        kept = {key: tensor.clone() for key, tensor in moments(first, w).items()}
        set_moments(again, w, **kept, step=5)
    take_steps(again, weights, 5, 10)
    for ours, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def grouped(weights) -> list[dict]:
    return [
        {"params": weights[:2], "name": "dense"},
        {"params": weights[2:], "name": "experts", "moe": True},
    ]


@pytest.mark.parametrize(
    "name", ["torch", *(pytest.param(name, marks=pytest.mark.gpu) for name in IMPLEMENTATIONS if name != "torch")]
)
def test_ten_steps_are_those_of_the_formula_and_five_and_five_more(name):
    """On a GPU where there is one; what DeepSpeed compiles, or apex, where a machine has what it needs."""
    implementation, zero = IMPLEMENTATIONS[name]
    device = GPU if torch.cuda.is_available() and zero is not OFFLOADED else CPU
    try:
        check_implementation(optim_config(implementation=implementation), GPU, "recipe", execution(zero))
    except UserError as error:
        pytest.skip(str(error))
    assert_steps_are_those_of_the_formula(name, device)
    assert_it_goes_on_from_set_moments(name, device, atol=1e-7 if zero is OFFLOADED else 0)  # see set_moments


def test_moments_and_steps_are_the_optimizers_own():
    weights = new_weights()
    optimizer = build("torch", grouped(weights), lr=0.5)
    assert [(group["name"], group.get("moe"), group["lr"]) for group in optimizer.param_groups] == [
        ("dense", None, 0.5),
        ("experts", True, 0.5),
    ]
    assert moments(optimizer, weights[0]) == {} and step_count(optimizer, weights[0]) == 0
    given = torch.full_like(weights[0], 0.5), torch.full_like(weights[0], 0.25)
    set_moments(optimizer, weights[0], *given, step=3)
    assert list(moments(optimizer, weights[0])) == ["exp_avg", "exp_avg_sq"] and moments(optimizer, weights[1]) == {}
    take_steps(optimizer, weights, 3, 4)
    torch.testing.assert_close(given[0], 0.9 * 0.5 + 0.1 * gradients(3)[0])
    torch.testing.assert_close(given[1], 0.999 * 0.25 + 0.001 * gradients(3)[0] ** 2)
    assert all(given[i] is tensor for i, tensor in enumerate(moments(optimizer, weights[0]).values()))
    assert [step_count(optimizer, w) for w in weights] == [4, 1, 1]


# What an implementation needs


def refusal(implementation: str, device=CPU, zero=None) -> str:
    with pytest.raises(UserError) as caught:
        check_implementation(optim_config(implementation=implementation), device, "recipe.toml", execution(zero))
    message = str(caught.value)
    assert message.startswith(f"recipe.toml: optim.implementation = '{implementation}': ")
    assert message.endswith('or use "torch"') and "\n" not in message
    return message


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """A machine with all that compiling takes, made of empty commands; nvcc is CUDA 13.0's, as torch's is."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for command in ("ninja", "c++", "nvcc"):
        (folder / command).write_text("#!/bin/sh\necho release 13.0, V13.0.88\n")
        (folder / command).chmod(0o755)
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    return folder


def test_deepspeed_takes_a_machine_that_can_compile(tools):
    for device, zero in ((CPU, None), (GPU, {"stage": 3}), (GPU, OFFLOADED)):
        check_implementation(optim_config(implementation="deepspeed"), device, "recipe.toml", execution(zero))


def test_deepspeed_names_all_that_is_missing(tools, tmp_path):
    for missing in (tools / "ninja", tools / "c++", tmp_path / "Python.h"):
        missing.unlink()
    message = refusal("deepspeed")
    assert "to compile DeepSpeed's fused_adam this machine lacks ninja" in message
    assert all(part in message for part in ("c++", str(tmp_path / "Python.h")))
    assert "cpu_adam" in refusal("deepspeed", GPU, OFFLOADED)


def test_the_compiler_is_the_one_that_the_environment_names(tools, monkeypatch):
    monkeypatch.setenv("CXX", "clang++-99 --std=c++20")
    assert "the C++ compiler clang++-99;" in refusal("deepspeed")


def test_a_gpu_wants_nvcc_of_torchs_cuda(tools, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "nvcc of CUDA 12.8 (CUDA_HOME has 13.0)" in refusal("deepspeed", GPU)
    (tools / "nvcc").unlink()
    assert "nvcc of CUDA 12.8 (or CUDA_HOME)" in refusal("deepspeed", GPU)
    check_implementation(
        optim_config(implementation="deepspeed"), GPU, "recipe.toml", execution(OFFLOADED)
    )  # steps on the CPU


def test_what_was_compiled_with_deepspeed_needs_no_tools(tools, monkeypatch):
    (tools / "ninja").unlink()
    installed = sys.modules["deepspeed.git_version_info"].installed_ops
    monkeypatch.setitem(installed, "fused_adam", True)
    check_implementation(optim_config(implementation="deepspeed"), GPU, "recipe.toml", execution())
    refusal("deepspeed", GPU, OFFLOADED)


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """-> a way to put files into a folder where Python looks for packages. Whoever imports one of them is caught."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(*names: str) -> None:
        for name in names:
            path = Path(tmp_path, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("raise AssertionError('imported')")

    return write


NVIDIAS = ("apex/__init__.py", "apex/optimizers/fused_adam.py", "apex/multi_tensor_apply/__init__.py")
build_apex = partial(optim_config, implementation="apex")


def test_apex_that_is_not_there(packages):
    message = refusal("apex", GPU)
    assert "NVIDIA's apex is not installed (git clone https://github.com/NVIDIA/apex && " in message
    assert "pip install apex" not in message


def test_another_package_called_apex(packages, tmp_path):
    packages("apex/__init__.py", "apex/forms.py")
    message = refusal("apex", GPU)
    assert f"the installed apex in {tmp_path / 'apex'} is not NVIDIA's" in message
    assert "pip uninstall apex" in message and "https://github.com/NVIDIA/apex" in message


def test_apex_without_its_extensions(packages):
    packages(*NVIDIAS)
    message = refusal("apex", GPU)
    assert "built without its CUDA extensions" in message and "APEX_CUDA_EXT=1" in message


def test_apex_with_its_extensions_is_for_gpus_and_for_zero_1_and_2(packages):
    packages(*NVIDIAS, "amp_C.py")
    for zero in (None, {"stage": 1}, {"stage": 2}):
        check_implementation(build_apex(), GPU, "recipe.toml", execution(zero))
    assert "this run is on cpu" in refusal("apex", CPU)
    assert "zero_optimization.offload_optimizer" in refusal("apex", GPU, OFFLOADED)
    assert "zero_optimization.stage = 3" in refusal("apex", GPU, {"stage": 3})


# The learning rate


def test_paper_stage_1():
    config = load_config(REPOSITORY / "configs" / "res_256_pretrain.toml")

    def rate(step):
        return learning_rate(step, config.training.num_steps, config.optim)

    assert rate(0) == pytest.approx(2.4e-4 / 2500)
    assert rate(1249) == pytest.approx(1.2e-4)
    assert rate(2500) == pytest.approx(2.4e-4)
    middle = 2500 + (250_000 - 2500) // 2
    assert rate(middle) == pytest.approx(2.4e-4 * (0.33 + 0.67 / 2), rel=1e-4)
    assert rate(249_999) == pytest.approx(0.33 * 2.4e-4, rel=1e-4)


def test_constant_after_warm_up():
    config = tiny_config(optim={"schedule": "constant", "final_lr_ratio": 1.0, "warmup_steps": 4, "lr": 1.0}).optim
    assert [learning_rate(step, 8, config) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("shape, left", [("linear", [0, 0.25, 0.5, 0.75]), ("1-sqrt", [0, 0.5, 2**-0.5, 0.75**0.5])])
def test_wsd_stays_at_its_peak_and_falls_in_its_last_share(shape, left):
    changes = {"schedule": "wsd", "decay_share": 0.4, "decay_shape": shape, "final_lr_ratio": 0.1, "warmup_steps": 2}
    config = tiny_config(optim={**changes, "lr": 2.0}).optim
    falling = [2 * (1 - 0.9 * part) for part in left]
    assert [learning_rate(step, 10, config) for step in range(10)] == pytest.approx([1, 2, 2, 2, 2, 2, *falling])
    assert learning_rate(10, 10, config) == pytest.approx(0.2)


def test_cosine_never_rises_after_warm_up():
    config = tiny_config(optim={"warmup_steps": 3}).optim
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] > config.lr * config.final_lr_ratio and math.isclose(max(rates), config.lr)
