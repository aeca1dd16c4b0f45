"""Cost of a whole recipe, from measured rows alone: GPU-hours of its stages and of its sets, on any number of nodes.

A stage's rate is that of the fastest row that was measured of it: the same number of parameters, latent size and mask
ratio, in bfloat16, on a GPU. Nothing stands in for a row that is missing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdit.bench.report import Environment, Report
from mdit.bench.row import BenchmarkRow
from mdit.config import TrainConfig, UserError
from mdit.costs.layouts import Layout
from mdit.costs.machines import Machine
from mdit.costs.prediction import predict
from mdit.data.manifest import read_manifest
from mdit.data.report import SetReport, read_report
from mdit.masking import constant_parts
from mdit.parallel.settings import count_parameters

HOUR = 3600


@dataclass(frozen=True)
class MeasuredRow:
    """A row with where it comes from: the report's file and its environment."""

    row: BenchmarkRow
    path: str
    environment: Environment

    @property
    def rate(self) -> float:
        """Images per second and GPU."""
        return self.row.figures.images_per_second / self.row.setting.gpus

    @property
    def source(self) -> str:
        """256 px, mask 0.75 (bf16, micro-batch 256, made up data; 2026-11-23, commit 1234567, DIR/throughput.json)"""
        setting, environment = self.row.setting, self.environment
        how = [setting.precision, f"micro-batch {setting.micro_batch}", f"{self.row.data} data"]
        how += ["compiled"] if setting.compile else []
        where = f"{environment.date}, commit {environment.commit}, {self.path}"
        return f"{self.row.name} ({', '.join(how)}; {where})"


@dataclass(frozen=True)
class Stage:
    """A recipe, or the share of its steps with one mask ratio, and the row that says how fast it trains, or None."""

    config: TrainConfig
    measured: MeasuredRow | None
    share: float = 1.0

    @property
    def name(self) -> str:
        """The recipe's, with the mask ratio where that is not the only one."""
        return self.config.name if self.share == 1 else f"{self.config.name}, mask {self.config.training.mask_ratio:g}"

    @property
    def images(self) -> int:
        return round(self.share * self.config.training.num_steps * self.config.training.global_batch_size)

    @property
    def gpu_hours(self) -> float | None:
        return self.images / self.measured.rate / HOUR if self.measured else None


def choose_rows(
    reports: Iterable[tuple[str, Report]], configs: Sequence[TrainConfig], gpu: str | None = None
) -> tuple[list[Stage], list[str]]:
    """-> the stages with the rows that count, one for each mask ratio, and a line for each stage row that does not.

    `reports` are (file, report); `gpu` is a part of the name of the device whose rows count. Raises UserError where
    rows of several devices would count.
    """
    parts = [part for config in configs for part in constant_parts(config)]
    shapes = [(count_parameters(c.model), c.model.latent_size, c.training.fixed_mask_ratio) for _, c in parts]
    fastest: dict[tuple, MeasuredRow] = {}
    devices, left_out = set(), []
    for path, report in reports:
        for row in report.of_kind("stage"):
            if why := _does_not_count(row, report.environment.gpu, shapes, gpu):
                left_out.append(f"{row.name} ({path}): {why}")
                continue
            devices.add(report.environment.gpu)
            found = MeasuredRow(row, path, report.environment)
            fastest[row.shape] = max(fastest.get(row.shape, found), found, key=lambda each: each.rate)
    if len(devices) > 1:
        raise UserError(f"the reports have rows of {' and '.join(sorted(devices))}: choose one of them with --gpu")
    stages = [Stage(config, fastest.get(shape), share) for (share, config), shape in zip(parts, shapes)]
    return stages, left_out


def _does_not_count(row: BenchmarkRow, device: str, shapes: Sequence[tuple], gpu: str | None) -> str | None:
    setting, sizes = row.setting, {parameters for parameters, *_ in shapes}
    if row.problem:
        return row.problem
    if device == "none":
        return "measured on a CPU"
    if gpu is not None and gpu.lower() not in device.lower():
        return f"measured on {device}"
    if row.parameters not in sizes:
        have = " and ".join(f"{size:,}" for size in sorted(sizes))
        return f"a model of {row.parameters:,} parameters; the recipe's has {have}"
    if setting.precision != "bf16" or setting.fp8:
        return f"in {'fp8' if setting.fp8 else setting.precision}, not bf16"
    return None if row.shape in shapes else "no stage of the recipe"


# --- on many GPUs


def scaled(stages: Sequence[Stage], gpus: int, machine: Machine) -> tuple[float, float] | None:
    """(hours, mean efficiency) of the whole recipe on so many GPUs; None where a stage was not measured or cannot be
    shared. A stage's efficiency: the predicted rate of a GPU among them, as a share of that of one alone, in the
    setting of its row. The mean is weighted with GPU-hours."""
    alone = there = 0.0
    for stage in stages:
        if stage.measured is None or stage.config.training.global_batch_size % gpus:
            return None
        hours = stage.images / stage.measured.rate / HOUR
        rates = [_predicted_rate(stage.config, stage.measured.row, count, machine) for count in (1, gpus)]
        alone, there = alone + hours, there + hours * rates[0] / rates[1]
    return there / gpus, alone / there


def _predicted_rate(config: TrainConfig, row: BenchmarkRow, gpus: int, machine: Machine) -> float:
    """Images per second and GPU; with fewer images at once where a GPU's share of the batch is smaller."""
    setting, share = row.setting, config.training.global_batch_size // gpus
    micro_batch = max(size for size in range(1, min(share, setting.micro_batch) + 1) if share % size == 0)
    layout = Layout(
        gpus,
        setting.zero_stage,
        micro_batch,
        share // micro_batch,
        checkpointing=setting.activation_checkpointing,
        triton=bool(setting.kernels),
    )
    return predict(config, layout, machine).images_per_second / gpus


# --- the sets


@dataclass(frozen=True)
class SetTime:
    """Time that making sets of one image size took: GPU-seconds of `written` pictures, or `problem` says why none."""

    image_size: int
    written: int = 0
    seconds: float = 0.0
    problem: str | None = None

    def gpu_hours(self, pictures: float) -> float | None:
        return None if self.problem else pictures * self.seconds / self.written / HOUR


def set_times(directories: Sequence[Path], image_sizes: Iterable[int], device: str | None) -> list[SetTime]:
    """One for each image size that the recipe needs: of all finished sets of that size, if all were made on `device`
    (None: on any GPU). Raises UserError for a set of another size."""
    found: dict[int, list[tuple[Path, SetReport | None]]] = {size: [] for size in sorted(image_sizes)}
    for directory in directories:
        size = read_manifest(directory).fingerprint.get("image_size")
        if size not in found:
            raise UserError(f"{directory}: is of {size} px; the recipe has {' and '.join(map(str, found))}")
        found[size].append((directory, read_report(directory)))
    return [_set_time(size, reports, device) for size, reports in found.items()]


def _set_time(image_size: int, reports: list[tuple[Path, SetReport | None]], device: str | None) -> SetTime:
    if not reports:
        return SetTime(image_size, problem="no set of this size was given")
    written = seconds = 0
    for directory, report in reports:
        if report is None or not report.seconds:
            return SetTime(image_size, problem=f"{directory}: made before times were recorded")
        if others := [name for name in report.seconds if name == "cpu" or name != (device or name)]:
            return SetTime(image_size, problem=f"{directory}: made on {' and '.join(others)}")
        written, seconds = written + report.written, seconds + sum(report.seconds.values())
    return SetTime(image_size, written, seconds)
