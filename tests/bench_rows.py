"""Made-up rows of benchmarks, of the paper's recipes."""

from functools import cache

import torch

from mdit.bench.report import Environment
from mdit.bench.row import BenchmarkRow, Measured, StepTime
from mdit.bench.stages import Job
from mdit.config import CONFIGS, TrainConfig, load_config
from mdit.dist import World
from mdit.parallel.settings import Execution, RunSettings

VERSIONS = dict(torch="2.11.0+cu130", cuda="13.0", triton="3.6.0", deepspeed="0.19.8")
H100 = Environment(
    gpu="NVIDIA H100 80GB HBM3",
    cpu="x86_64, 16 cores",
    peak_tflops=989.0,
    bandwidth_gbs=3350.0,
    commit="abc1234",
    date="2026-12-01",
    **VERSIONS,
)
CPU = H100.model_copy(update={"gpu": "none", "peak_tflops": None, "bandwidth_gbs": None})


@cache
def recipe(name: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.toml")


@cache
def described(name: str, kind: str) -> BenchmarkRow:
    """A row of a recipe on one GPU, without figures."""
    ds_config = {"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 256}
    ds_config |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
    job = Job(recipe(name), Execution(RunSettings(), ds_config, frozenset(["swiglu"])))
    return job.row(World(0, 1, 0, torch.device("cpu")), kind).with_(peak_tflops=H100.peak_tflops)


def figures(rate: float, global_batch: int = 2048, **changes) -> Measured:
    """Figures at a rate of images per second."""
    step = 1e3 * global_batch / rate
    phases = {name: share * step for name, share in (("forward", 0.3), ("backward", 0.64), ("optimizer", 0.06))}
    milliseconds = StepTime(step=step, data=0.0, **phases)
    found = Measured(
        steps=9, images_per_second=rate, milliseconds=milliseconds, fastest_ms=step, peak_gib=61.5, losses=(1.0,)
    )
    return found.model_copy(update=changes)


def row(
    recipe: str = "res_256_pretrain",
    rate: float | None = None,
    kind: str = "stage",
    setting: dict | None = None,
    **changes,
) -> BenchmarkRow:
    """A row with figures where there is a rate. `setting` goes over the row's own."""
    base = described(recipe, kind)
    base = base.with_(setting=base.setting.model_copy(update=setting or {}))
    if rate is not None:
        base = base.with_(measured=figures(rate, base.setting.global_batch))
    return base.with_(**changes)
