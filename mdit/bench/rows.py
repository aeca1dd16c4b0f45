"""Measured figures in one form, which bench_train, compare_baseline, cost and the plots read and write.

A report is {"schema", "environment", "command", "formula", "rows": [row, ...]}. A row is a dict of

    kind                "stage", "ladder", "baseline" or "profile"
    name                of a stage "256 px, mask 0.75" (8 pixels a latent), else the rung's or contender's
    recipe, images      its name; images of the whole stage
    parameters, latent_size, mask_ratio
    setting             gpus, micro_batch, global_batch, precision ("bf16", "fp32"), fp8, kernels (the ops in Triton),
                        compile, activation_checkpointing, zero_stage
    data                "made up", or the directories
    steps               optimizer steps measured
    images_per_second   of all GPUs: the global batch over the median step
    milliseconds        "step", the median one (of an even number the shorter of two), and what it was made of: "data"
                        (waiting for the batch), "forward", "backward", "optimizer" (and EMA); they add up to it.
                        "communication": in how much of a step a collective ran, beside or within these; None with one
                        process. Of the slowest rank; on a GPU by its own clock
    flops_per_image     mdit.costs.flops
    tflops, mfu         model TFLOP/s of a GPU, and their share of the peak: None in float8 or float32, without a peak
    peak_gib            that torch took of a GPU; on a CPU, of the process since it started
    memory_gib          by part (Trial.memory), or absent
    losses              of the first steps
    parity              None, or against the ladder's first row (mdit.bench.ladder)
    problem             None, or a line that says why the figures are None

A profile row has, instead of rates and milliseconds, what mdit.bench.profile found and the `work` of its roofline.
"""

import json
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mdit.config import TrainConfig, UserError
from mdit.costs.flops import training_flops
from mdit.costs.machines import MACHINES, Machine
from mdit.dist import World, cores
from mdit.documents import read_json
from mdit.files import write_text
from mdit.models import meta_model
from mdit.parallel.settings import RunSettings
from mdit.provenance import commit, package_versions

Row = dict[str, Any]

SCHEMA = "mdit-throughput/1"
KINDS = ("stage", "ladder", "baseline", "profile")
FORMULA = (
    "model TFLOP/s of a GPU = images/s x FLOPs of an image / GPUs / 10^12\n"
    "MFU = model TFLOP/s / the GPU's peak in dense bfloat16; none in float8 and float32\n"
    "FLOPs of an image: 2 a multiply-add of matmuls and attention, backward twice the forward; kept tokens only,\n"
    "experts at capacity, no recomputation, no dispatch (mdit/costs/flops.py)"
)
DEVICES = {  # as torch names them, of those whose data sheets mdit.costs.machines has
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}
PIXELS_OF_A_LATENT = 8
PHASES = ("data", "forward", "backward", "optimizer")
FIGURES = ("steps", "images_per_second", "milliseconds", "tflops", "mfu", "peak_gib")


def measured_row(*, measured: dict, parity: dict | None = None, **facts: Any) -> Row:
    """`measured` is what Trial.measure gives, and perhaps "memory_gib"; `facts` are the arguments of `facts_of`."""
    row = facts_of(**facts) | measured | {"parity": parity, "problem": None}
    row["tflops"] = model_tflops(row["images_per_second"], row["flops_per_image"], row["setting"]["gpus"])
    machine = machine_of(device_name(facts["world"].device))
    counts = row["setting"]["precision"] == "bf16" and not row["setting"]["fp8"] and machine is not None
    return row | {"mfu": mfu(row["tflops"], machine.peak / 1e12) if counts else None}


def problem_row(*, problem: str, **facts: Any) -> Row:
    """A row that says why there are no figures."""
    return facts_of(**facts) | dict.fromkeys(FIGURES) | {"losses": [], "parity": None, "problem": problem}


def facts_of(
    *,
    kind: str,
    name: str,
    config: TrainConfig,
    settings: RunSettings,
    ds_config: dict,
    world: World,
    kernels: list[str],
    data: str,
    images: int | None = None,
) -> Row:
    """What a row says of itself. `images`: of the whole stage, where the global batch measured is not the recipe's."""
    assert kind in KINDS, kind
    return {
        "kind": kind,
        "name": name,
        "recipe": config.name,
        "images": images or config.training.num_steps * config.training.global_batch_size,
        "parameters": sum(p.numel() for p in meta_model(config.model).parameters()),
        "latent_size": config.model.latent_size,
        "mask_ratio": config.training.mask_ratio,
        "setting": setting_of(settings, ds_config, world, kernels),
        "data": data,
        "flops_per_image": training_flops(config.model, config.training.mask_ratio),
    }


def setting_of(settings: RunSettings, ds_config: dict, world: World, kernels: list[str]) -> dict[str, Any]:
    return {
        "gpus": world.size,
        "micro_batch": ds_config["train_micro_batch_size_per_gpu"],
        "global_batch": ds_config["train_batch_size"],
        "precision": "bf16" if ds_config["bf16"]["enabled"] else "fp32",
        "fp8": settings.fp8,
        "kernels": sorted(kernels),
        "compile": settings.compile,
        "activation_checkpointing": settings.activation_checkpointing,
        "zero_stage": ds_config["zero_optimization"]["stage"],
    }


def stage_name(config: TrainConfig) -> str:
    return f"{PIXELS_OF_A_LATENT * config.model.latent_size} px, mask {config.training.mask_ratio:g}"


def model_tflops(images_per_second: float, flops_per_image: float, gpus: int) -> float:
    """Of a GPU."""
    return images_per_second * flops_per_image / gpus / 1e12


def mfu(tflops: float, peak_tflops: float) -> float:
    return tflops / peak_tflops


def dollars_per_million(row: Row, dollars_per_gpu_hour: float) -> float | None:
    """Of a million images; None where nothing was measured."""
    if row["images_per_second"] is None:
        return None
    return 1e6 / row["images_per_second"] / 3600 * row["setting"]["gpus"] * dollars_per_gpu_hour


def stage_dollars(row: Row, dollars_per_gpu_hour: float) -> float | None:
    """Of all images of the row's stage."""
    million = dollars_per_million(row, dollars_per_gpu_hour)
    return None if million is None else row["images"] / 1e6 * million


# Tables.


def table(rows: Sequence[Row], prices: Sequence[float]) -> str:
    """Markdown that a terminal of 160 columns shows well: a table for each setting under a line that says it, and what
    could not be measured. Dollars at each of `prices` for a GPU-hour. Profiles are left out."""
    parts = []
    for heading, group in groupby((row for row in rows if row["kind"] != "profile"), _heading):
        found = list(group)
        measured = [row for row in found if not row["problem"]]
        if measured:
            first = measured[0]["images_per_second"]
            columns = [[title, *(cell(row, prices, first) for row in measured)] for title, cell in COLUMNS.items()]
            parts += [f"{heading}:", _aligned([column for column in columns if any(column[1:])])]
        parts += ["\n".join(f"- {row['name']}, {_batch(row)}: {row['problem']}" for row in found if row["problem"])]
    return "\n\n".join(filter(None, parts))


def _heading(row: Row) -> str:
    """What rows have in common; those of a ladder and of contenders tell the rest by their names."""
    setting = row["setting"]
    processes = f"{setting['gpus']} process{'es' * (setting['gpus'] > 1)}"
    words = [processes, setting["precision"], f"ZeRO-{setting['zero_stage']}"]
    if setting["activation_checkpointing"] != "none":
        words.append(f"activation checkpointing {setting['activation_checkpointing']}")
    if row["kind"] == "stage":
        words += ["float8 matmuls"] if setting["fp8"] else []
        words += ["compiled"] if setting["compile"] else ["not compiled"]
        words += [f"in Triton {', '.join(setting['kernels']) or 'nothing'}"]
    return f"{row['recipe']}, " * (row["kind"] != "stage") + "; ".join([*words, f"data {row['data']}"])


def _batch(row: Row) -> str:
    setting = row["setting"]
    return f"{setting['micro_batch']} x {setting['global_batch'] // setting['micro_batch'] // setting['gpus']}"


def _rate(row: Row, prices: Sequence[float], first: float) -> str:
    rate, gpus = row["images_per_second"], row["setting"]["gpus"]
    if row["kind"] != "stage":
        return f"{rate:,.0f}, {rate / first:.2f}x"
    return f"{rate:,.0f}" + (f", {rate / gpus:,.0f} a GPU" if gpus > 1 else "")


def _step(row: Row, prices: Sequence[float], first: float) -> str:
    ms = row["milliseconds"]
    return f"{ms['step']:,.1f} = " + " + ".join(f"{ms[part]:,.1f}" for part in PHASES)


def _stage(row: Row, prices: Sequence[float], first: float) -> str:
    shown = (f"{stage_dollars(row, price):,.0f}" for price in prices)
    return " / ".join(shown) if row["kind"] == "stage" else ""


def _parity(row: Row, prices: Sequence[float], first: float) -> str:
    return f"{row['parity']['largest']:.1e} in {row['parity']['steps']}" if row["parity"] else ""


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Row, Sequence[float], float], str]] = {
    "": lambda row, prices, first: row["name"],
    "batch": lambda row, prices, first: _batch(row),
    "images/s": _rate,
    "ms a step = data + forw. + backw. + optim.": _step,
    "coll.": lambda row, prices, first: _or_nothing(row["milliseconds"]["communication"], ",.1f"),
    "TFLOP/s": lambda row, prices, first: f"{row['tflops']:.3g}",
    "MFU": lambda row, prices, first: _or_nothing(row["mfu"], ".1%"),
    "GiB": lambda row, prices, first: f"{row['peak_gib']:.1f}",
    "$ a million": lambda row, prices, first: " / ".join(f"{dollars_per_million(row, p):,.2f}" for p in prices),
    "$ the stage": _stage,
    "loss parity": _parity,
}


def _aligned(columns: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in columns]
    title, *lines = zip(*columns)
    lines = [title, ["-" * width for width in widths], *lines]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines)


# Reports.


def environment(world: World) -> dict[str, Any]:
    """Where and with what the rows of a report are measured."""
    name, versions = device_name(world.device), package_versions()
    machine = machine_of(name)
    return {
        "gpu": name,
        "cpu": f"{platform.machine()}, {cores()} cores",
        "gpus": world.size,
        "peak_tflops": machine.peak / 1e12 if machine else None,
        "bandwidth_gbs": machine.memory / 1e9 if machine else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": versions.get("triton", "not installed"),
        "deepspeed": versions.get("deepspeed", "not installed"),
        "commit": commit() or "unknown",
        "date": datetime.now(UTC).date().isoformat(),
    }


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def machine_of(name: str) -> Machine | None:
    return MACHINES[DEVICES[name]] if name in DEVICES else None


def save(path: Path, report: dict[str, Any]) -> None:
    """The whole report, or, should this be interrupted, the one that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(report, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    """Raises UserError for a file that is not there or is no report."""
    report = read_json(path, "the report")
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema = {schema!r}: expected {SCHEMA!r}, as tools/bench_train.py writes it")
    for part, kind in (("environment", dict), ("rows", list)):
        if not isinstance(report.get(part), kind):
            raise UserError(f"{path}: {part} = {report.get(part)!r}: not a report of tools/bench_train.py")
    return report


def same_measurement(one: Row, other: Row) -> bool:
    """Do two rows say the same of themselves, whatever they measured?"""
    keys = ("kind", "name", "recipe", "parameters", "latent_size", "mask_ratio", "setting", "data")
    return all(one[key] == other[key] for key in keys)
