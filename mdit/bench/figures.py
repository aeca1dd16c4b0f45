"""Figures of one GPU, from the folder that tools/first_contact.py has left, and the text of documents that follows.

A region of a document is between `<!-- measured: NAME -->` and `<!-- /measured -->`. Its text follows from the figures
alone, and says "not measured" of what there is none for.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from mdit.bench.kernel_report import SCHEMA as KERNELS_SCHEMA
from mdit.bench.kernel_report import KernelReport, KernelRow
from mdit.bench.plots import draw, draw_losses
from mdit.bench.profile import summary
from mdit.bench.recipe_cost import Stage, choose_rows
from mdit.bench.report import SCHEMA, TINY, Environment, Report, table
from mdit.bench.row import COLUMNS, NOT_MEASURED, PRICES, BenchmarkRow, Setting, stage_name
from mdit.config import UserError, parse_section
from mdit.documents import parse_json, read_json
from mdit.files import write_json
from mdit.stages import paper_stages

REPORTS = {"throughput": SCHEMA, "kernels": KERNELS_SCHEMA, "reductions": "mdit-reductions/1"}
STATE, METRICS, SAMPLES, LOSSES = "first_contact.json", "metrics.jsonl", "samples.png", "losses.png"
REGION = re.compile(r"(<!-- measured: (\w+) -->)(.*?)(<!-- /measured -->)", re.S)


@dataclass(frozen=True)
class Figures:
    """The reports that were found, by name, and the lines of the training run's metrics."""

    environment: Environment | None = None
    throughput: Report | None = None
    kernels: KernelReport | None = None
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # all of them as JSON
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def source(self) -> str:
        """Hardware, versions, date and commit."""
        if (here := self.environment) is None:
            return NOT_MEASURED
        versions = f"torch {here.torch}, CUDA {here.cuda}, Triton {here.triton}, DeepSpeed {here.deepspeed}"
        return f"{here.gpu}, {versions}, {here.date}, commit `{here.commit}`"

    def stages(self) -> list[Stage]:
        """The paper's four stages, each with its fastest row in bfloat16."""
        configs = [stage.config for stage in paper_stages()]
        return choose_rows([("throughput.json", self.throughput)] if self.throughput else [], configs)[0]

    def of_kind(self, kind: str) -> list[BenchmarkRow]:
        return self.throughput.of_kind(kind) if self.throughput else []


def load(directory: Path) -> Figures:
    """Raises UserError for what is no figure of a GPU: of a CPU, of tiny shapes, of a rehearsal, of no known commit."""
    reports, throughput, kernels, environment = {}, None, None, None
    for name, schema in REPORTS.items():
        path = next((p for p in (directory / name / f"{name}.json", directory / f"{name}.json") if p.exists()), None)
        if path is None:
            continue
        report = read_json(path, "the report")
        if not isinstance(report, dict) or report.get("schema") != schema:
            raise UserError(f"{path}: no report of schema {schema!r}")
        here = parse_section(Environment, report.get("environment"), path)
        if why := _no_figures(report, here):
            raise UserError(f"{path}: {why}")
        if environment and (difference := here.difference(environment)):
            raise UserError(f"{path}: another report of {directory} has {difference}")
        reports[name], environment = report, environment or here
        if name == "throughput":
            throughput = Report.load(path)
        if name == "kernels":
            kernels = KernelReport.load(path)
    state = directory / STATE
    if state.exists() and read_json(state, "the state")["environment"].get("rehearsal"):
        raise UserError(f"{state}: of a rehearsal, whose figures are of no GPU")
    lines = next((p for p in (directory / "training" / METRICS, directory / METRICS) if p.exists()), None)
    told = lines.read_text(encoding="utf-8").splitlines() if lines and reports else []
    return Figures(environment, throughput, kernels, reports, [parse_json(line, lines) for line in told])


def _no_figures(report: dict[str, Any], environment: Environment) -> str | None:
    """The reason why a report's figures are none for the documents, if there is one."""
    settings = report.get("settings", {})
    if environment.gpu == "none":
        return "measured on a CPU; the documents' tables are of a GPU"
    tiny = any(str(row.get("recipe", "")).endswith(TINY) for row in report["rows"])
    if tiny or settings.get("tiny") or settings.get("preset") == "tiny":
        return "of tiny shapes, which say nothing of the recipes"
    if environment.commit == "unknown":
        return "of no known commit; measure with MDIT_COMMIT set where there is no git"
    return None


def keep(figures: Figures, source: Path, directory: Path) -> None:
    """Put what the documents are filled from, and its pictures, into `directory`, whose figures were others."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, report in figures.reports.items():
        write_json(directory / f"{name}.json", report)
    if figures.throughput:
        draw(figures.throughput, directory)
    if figures.metrics:
        lines = "".join(f"{json.dumps(line)}\n" for line in figures.metrics)
        (directory / METRICS).write_text(lines, encoding="utf-8")
        draw_losses({"": figures.metrics}, directory / LOSSES, f"Losses: {figures.source}")
    if grids := sorted((source / "training" / "samples").glob("*.png")):
        (directory / SAMPLES).write_bytes(grids[-1].read_bytes())


def fill(text: str, figures: Figures, beside: Path) -> str:
    """A document with the text of its regions; `beside` holds the pictures. Raises UserError for an unknown region."""

    def content(name: str) -> str:
        if name not in REGIONS:
            raise UserError(f"the document has a region {name!r}: expected one of {', '.join(REGIONS)}")
        return REGIONS[name](figures, beside)

    return fill_regions(text, content)


def fill_regions(text: str, content_of: Callable[[str], str | None]) -> str:
    """A document with the content of its regions by name; None leaves one as it is."""

    def region(found: re.Match) -> str:
        begin, name, before, end = found.groups()
        if (content := content_of(name)) is None:
            return found[0]
        return begin + (f"\n{content}\n" if before.startswith("\n") else content) + end

    return REGION.sub(region, text)


# Regions.

STEP = "ms a step = data + forw. + backw. + optim."
# Ways to run stage 1, by what a row's setting has to be.
WAYS: dict[str, Callable[[Setting], bool]] = {
    "ZeRO-1, kernels": lambda s: s.zero_stage == 1 and bool(s.kernels) and not s.fp8 and not s.compile,
    "the same, compiled": lambda s: s.zero_stage == 1 and bool(s.kernels) and not s.fp8 and s.compile,
    "plain PyTorch": lambda s: not s.kernels and not s.fp8 and not s.compile,
    "ZeRO-2, kernels": lambda s: s.zero_stage == 2 and bool(s.kernels) and not s.fp8 and not s.compile,
    "float8": lambda s: s.fp8,
}


def _status(figures: Figures, beside: Path) -> str:
    return f"run on one: {figures.source}" if figures.reports else "not yet run on one: no figure for a GPU is measured"


def _headline(figures: Figures, beside: Path) -> str:
    stages = figures.stages()
    best = stages[0].measured
    cells = _cells(best.row, "images/s", "MFU", "$ a million") if best else [NOT_MEASURED] * 3
    device = figures.environment.gpu if figures.environment else "one H100"
    lines = [[f"{device}, bfloat16, xl_2", "images/s", "MFU", "$ a million images at 3.75 / 2", "command"]]
    lines += [["256 px, mask 0.75", *cells, "`python tools/bench_train.py --report bench`"]]
    costs = ("the whole recipe, four stages: $", "", "", _recipe_dollars(stages))
    lines += [[*costs, "`python tools/cost.py bench/throughput.json`"]]
    released = ("times the released code, compiled", NOT_MEASURED, "", "")
    return table([*lines, [*released, "`python tools/compare_baseline.py --baseline ...`"]])


def _throughput(figures: Figures, beside: Path) -> str:
    if not figures.throughput:
        return f"Images/s, milliseconds a step, TFLOP/s, MFU, GiB and dollars of the four stages: {NOT_MEASURED}."
    stages, columns = figures.stages(), ("images/s", STEP, "TFLOP/s", "MFU", "GiB", "$ a million", "$ the stage")
    lines = [["bfloat16, xl_2, made-up data", "images at once", *columns]]
    for stage in stages:
        lines.append(_line(stage_name(stage.config), stage.measured and stage.measured.row, columns))
    images = ", ".join(f"{stage.images / 1e6:,.0f} M" for stage in stages)
    lines.append([f"the recipe: {images} images", *[""] * len(columns), _recipe_dollars(stages)])
    return f"{figures.source}.\n\n{table(lines)}"


def _settings(figures: Figures, beside: Path) -> str:
    if not figures.throughput:
        return f"Stage 1 under ZeRO-1 and ZeRO-2, compiled, in plain PyTorch, in float8: {NOT_MEASURED}."
    first, columns = stage_name(paper_stages()[0].config), ("images/s", STEP, "TFLOP/s", "GiB")
    lines = [[f"{first}, bfloat16", "images at once", *columns]]
    for way, fits in WAYS.items():
        found = [row for row in figures.of_kind("stage") if row.name == first and fits(row.setting)]
        lines += [_line(way, row, columns) for row in found or [None]]
    return table(lines)


def _line(name: str, row: BenchmarkRow | None, columns: Sequence[str]) -> list[str]:
    """A table's line: a row's micro-batch and cells, or why there are none."""
    size = f"{row.setting.micro_batch}" if row else ""
    if row is None or row.problem:
        return [name, size, (row and row.problem) or NOT_MEASURED, *[""] * (len(columns) - 1)]
    return [name, size, *_cells(row, *columns)]


def _cells(row: BenchmarkRow, *columns: str) -> list[str]:
    return [COLUMNS[column](row, PRICES) for column in columns]


def _recipe_dollars(stages: Sequence[Stage]) -> str:
    hours = [stage.gpu_hours for stage in stages if stage.gpu_hours is not None]
    return " / ".join(f"{sum(hours) * price:,.0f}" for price in PRICES) if len(hours) == len(stages) else NOT_MEASURED


def _profile(figures: Figures, beside: Path) -> str:
    for row in figures.of_kind("profile"):
        if row.profile:
            without_trace = row.with_(profile=row.profile.model_copy(update={"trace": None}))
            return f"```\n{summary(without_trace)}\n```" + _pictures(beside, "step_time.png", "roofline.png")
    return f"Where a step goes: {NOT_MEASURED}."


def _pictures(beside: Path, *names: str) -> str:
    """Links to those of the pictures that are there."""
    there = [name for name in names if (beside / name).exists()]
    links = "\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({beside.name}/{name})" for name in there)
    return f"\n\n{links}" if links else ""


def _kernels(figures: Figures, beside: Path) -> str:
    largest: dict[str, KernelRow] = {}
    for row in figures.kernels.by_share() if figures.kernels else ():
        if row.measured:
            largest.setdefault(row.op, row)
    if figures.kernels is None or not largest:
        return (
            "On a GPU: not measured. No kernel has run on one yet; `auto`, with its check, is what keeps a surprise "
            "away from a run."
        )
    report = figures.kernels
    ceilings = ", ".join(f"{value:,.0f} {name}" for name, value in report.ceilings.items())
    parts = [f"{figures.source}, {report.settings['dtype']}; the largest copy and matmul reach {ceilings}."]
    parts += [report.summary(), "The largest row of each op:"]
    return "\n\n".join([*parts, report.table_of(list(largest.values()))])


def _reductions(figures: Figures, beside: Path) -> str:
    if (report := figures.reports.get("reductions")) is None:
        return "Sums of weight gradients in float32 instead of bfloat16: not measured."
    reduced, exact = (sum(row["calls"] * row[way]["ms"] for row in report["rows"]) for way in ("reduced", "exact"))
    errors = [max(row[way]["error"] for row in report["rows"]) for way in ("reduced", "exact")]
    settings = report["settings"]
    return (
        f"Sums of weight gradients in float32 instead of bfloat16, {settings['micro_batch']} images of "
        f"`{settings['recipe']}`: {exact:.2f} ms a micro-batch instead of {reduced:.2f}; the largest error is "
        f"{errors[1]:.1e} instead of {errors[0]:.1e}."
    )


def _training(figures: Figures, beside: Path) -> str:
    losses = [line for line in figures.metrics if "loss" in line]
    if not losses:
        return "Training on emoji scenes: not measured."
    steps = [after - before for before, after in pairwise([0, *(line["step"] for line in losses)])]
    seconds = sum(line["step_seconds"] * count for line, count in zip(losses, steps))
    validation = [line["validation_loss"] for line in figures.metrics if "validation_loss" in line]
    told = f", validation loss {validation[0]:.4f} to {validation[-1]:.4f}" if validation else ""
    rate = max(line["images_per_second"] for line in losses)
    return (
        f"Training on emoji scenes (the model of `emoji_64`, 3,500 scenes of 200 objects): {sum(steps):,} steps in "
        f"{seconds:,.0f} s of training, {rate:,.0f} images/s at best{told}."
    ) + _pictures(beside, SAMPLES, "losses.png")


REGIONS: dict[str, Callable[[Figures, Path], str]] = {
    "status": _status,
    "headline": _headline,
    "throughput": _throughput,
    "settings": _settings,
    "profile": _profile,
    "kernels": _kernels,
    "reductions": _reductions,
    "training": _training,
}
