"""Figures of one GPU, from the folder that tools/first_contact.py has left, and the text of documents that follows.

A region of a document is between `<!-- measured: NAME -->` and `<!-- /measured -->`. Its text follows from the figures
alone, and says "not measured" of what there is none for.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mdit.bench.plots import draw, draw_losses
from mdit.bench.profile import summary
from mdit.bench.recipe_cost import Stage, choose_rows
from mdit.bench.report import SCHEMA, TINY, Report
from mdit.bench.row import COLUMNS, BenchmarkRow, Setting, stage_name
from mdit.bench.stages import STAGES
from mdit.config import CONFIGS, UserError, load_config
from mdit.documents import parse_json, read_json
from mdit.files import write_json
from mdit.kernels import comparison

Row = dict[str, Any]

PRICES = (3.75, 2.0)
NOT_MEASURED = "not measured"
REPORTS = {"throughput": SCHEMA, "kernels": comparison.SCHEMA, "reductions": "mdit-reductions/1"}
STATE, METRICS, SAMPLES = "first_contact.json", "metrics.jsonl", "samples.png"
SAME = ("gpu", "torch", "triton", "cuda", "commit")  # of all reports of a folder
VERSIONS = {"torch": "torch", "cuda": "CUDA", "triton": "Triton", "deepspeed": "DeepSpeed"}
REGION = re.compile(r"(<!-- measured: (\w+) -->)(.*?)(<!-- /measured -->)", re.S)


@dataclass(frozen=True)
class Figures:
    """The reports that were found, by name, and the lines of the training run's metrics."""

    throughput: Report | None = None
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)  # all of them as JSON
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, Any]:
        return next((report["environment"] for report in self.reports.values()), {})

    def rows(self, report: str) -> list[Row]:
        return self.reports.get(report, {"rows": []})["rows"]

    def measured(self, kind: str) -> list[BenchmarkRow]:
        return self.throughput.of_kind(kind) if self.throughput else []


def load(directory: Path) -> Figures:
    """Raises UserError for what is no figure of a GPU: of a CPU, of tiny shapes, of a rehearsal, of no known commit."""
    reports, throughput = {}, None
    for name, schema in REPORTS.items():
        path = next((p for p in (directory / name / f"{name}.json", directory / f"{name}.json") if p.exists()), None)
        if path is None:
            continue
        report = read_json(path, "the report")
        if not isinstance(report, dict) or report.get("schema") != schema:
            raise UserError(f"{path}: no report of schema {schema!r}")
        if why := _no_figures(report):
            raise UserError(f"{path}: {why}")
        reports[name] = report
        if name == "throughput":
            throughput = Report.load(path)
    state = directory / STATE
    if state.exists() and read_json(state, "the state")["environment"].get("rehearsal"):
        raise UserError(f"{state}: of a rehearsal, whose figures are of no GPU")
    for key in SAME:
        found = {name: report["environment"].get(key) for name, report in reports.items()}
        if len({*found.values()}) > 1:
            raise UserError(
                f"{directory}: {key} differs: " + ", ".join(f"{name} has {v!r}" for name, v in found.items())
            )
    lines = next((p for p in (directory / "training" / METRICS, directory / METRICS) if p.exists()), None)
    told = lines.read_text(encoding="utf-8").splitlines() if lines and reports else []
    return Figures(throughput, reports, [parse_json(line, lines) for line in told])


def _no_figures(report: dict[str, Any]) -> str | None:
    environment, settings = report["environment"], report.get("settings", {})
    if environment.get("gpu", "none") == "none":
        return "measured on a CPU; the documents' tables are of a GPU"
    tiny = any(str(row.get("recipe", "")).endswith(TINY) for row in report["rows"])
    if tiny or settings.get("tiny") or settings.get("preset") == "tiny":
        return "of tiny shapes, which say nothing of the recipes"
    if environment.get("commit", "unknown") == "unknown":
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
        (directory / METRICS).write_text("".join(map(_line, figures.metrics)), encoding="utf-8")
        draw_losses(figures.metrics, directory, _where(figures))
    if grids := sorted((source / "training" / "samples").glob("*.png")):
        (directory / SAMPLES).write_bytes(grids[-1].read_bytes())


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"


def fill(text: str, figures: Figures, beside: Path) -> str:
    """A document with the text of its regions; `beside` holds the pictures. Raises UserError for an unknown region."""

    def region(found: re.Match) -> str:
        begin, name, before, end = found.groups()
        if name not in REGIONS:
            raise UserError(f"the document has a region {name!r}: expected one of {', '.join(REGIONS)}")
        content = REGIONS[name](figures, beside)
        return begin + (f"\n{content}\n" if before.startswith("\n") else content) + end

    return REGION.sub(region, text)


# Regions.


def _status(figures: Figures, beside: Path) -> str:
    if not figures.reports:
        return "not yet run on one: no figure for a GPU is measured"
    return f"run on one: {_where(figures)}"


def _where(figures: Figures) -> str:
    """Hardware, versions, date and commit."""
    facts: dict[str, Any] = {}
    for report in figures.reports.values():
        facts = report["environment"] | facts
    versions = (f", {title} {facts[name]}" for name, title in VERSIONS.items() if name in facts)
    return f"{facts['gpu']}{''.join(versions)}, {facts['date']}, commit `{facts['commit']}`"


def _stages(figures: Figures) -> list[Stage]:
    """The four stages, each with its fastest row in bfloat16."""
    configs = [load_config(CONFIGS / f"{name}.toml") for name in STAGES]
    reports = [("throughput.json", figures.throughput)] if figures.throughput else []
    return choose_rows(reports, configs)[0]


def _recipe_dollars(stages: Sequence[Stage]) -> str:
    if not all(stage.measured for stage in stages):
        return NOT_MEASURED
    hours = sum(stage.gpu_hours for stage in stages)
    return " / ".join(f"{hours * price:,.0f}" for price in PRICES)


def _cells(row: BenchmarkRow, *columns: str) -> list[str]:
    return [COLUMNS[column](row, PRICES) for column in columns]


def _table(*lines: Sequence[str]) -> str:
    head, *others = lines
    return "\n".join(
        "".join(f"| {cell} " if cell else "| " for cell in line) + "|" for line in (head, ["---"] * len(head), *others)
    )


def _headline(figures: Figures, beside: Path) -> str:
    stages = _stages(figures)
    best = stages[0].measured
    cells = _cells(best.row, "images/s", "MFU", "$ a million") if best else [NOT_MEASURED] * 3
    device = figures.environment.get("gpu", "one H100")
    return _table(
        [f"{device}, bfloat16, xl_2", "images/s", "MFU", "$ a million images at 3.75 / 2", "command"],
        ["256 px, mask 0.75", *cells, "`python tools/bench_train.py --report bench`"],
        [
            "the whole recipe, four stages: $",
            "",
            "",
            _recipe_dollars(stages),
            "`python tools/cost.py bench/throughput.json`",
        ],
        [
            "times the released code, compiled",
            NOT_MEASURED,
            "",
            "",
            "`python tools/compare_baseline.py --baseline ...`",
        ],
    )


STEP = "ms a step = data + forw. + backw. + optim."


def _throughput(figures: Figures, beside: Path) -> str:
    stages = _stages(figures)
    columns = ("images/s", STEP, "TFLOP/s", "MFU", "GiB", "$ a million", "$ the stage")
    device = figures.environment.get("gpu", "one H100")
    head = [f"{device}, bfloat16, xl_2, made-up data", "images at once", *columns]
    lines = []
    for stage in stages:
        name = stage_name(stage.config)
        if stage.measured is None:
            lines.append([name, "", NOT_MEASURED, *[""] * (len(columns) - 1)])
            continue
        row = stage.measured.row
        lines.append([name, f"{row.setting.micro_batch}", *_cells(row, *columns)])
    images = ", ".join(f"{stage.images / 1e6:,.0f} M" for stage in stages)
    lines.append([f"the recipe: {images} images", *[""] * len(columns), _recipe_dollars(stages)])
    found = _table(head, *lines)
    return f"{_where(figures)}.\n\n{found}" if figures.throughput else found


# Ways to run stage 1: what a row's setting has to be.
WAYS: dict[str, Callable[[Setting], bool]] = {
    "ZeRO-1, kernels": lambda s: s.zero_stage == 1 and bool(s.kernels) and not s.fp8 and not s.compile,
    "the same, compiled": lambda s: s.zero_stage == 1 and bool(s.kernels) and not s.fp8 and s.compile,
    "plain PyTorch": lambda s: not s.kernels and not s.fp8 and not s.compile,
    "ZeRO-2, kernels": lambda s: s.zero_stage == 2 and bool(s.kernels) and not s.fp8 and not s.compile,
    "float8": lambda s: s.fp8,
}


def _settings(figures: Figures, beside: Path) -> str:
    first = stage_name(load_config(CONFIGS / f"{STAGES[0]}.toml"))
    found = [row for row in figures.measured("stage") if row.name == first]
    columns = ("images/s", STEP, "TFLOP/s", "GiB")
    lines = []
    for way, fits in WAYS.items():
        of_way = [row for row in found if fits(row.setting)]
        if not of_way:
            lines.append([way, "", NOT_MEASURED, *[""] * (len(columns) - 1)])
        for row in of_way:
            size = f"{row.setting.micro_batch}"
            told = [row.problem, "", "", ""] if row.problem else _cells(row, *columns)
            lines.append([way, size, *told])
    return _table([f"{first}, bfloat16", "images at once", *columns], *lines)


def _profile(figures: Figures, beside: Path) -> str:
    found = [row for row in figures.measured("profile") if row.profile]
    if not found:
        return f"Where a step goes: {NOT_MEASURED}."
    pictures = [name for name in ("step_time.png", "roofline.png") if (beside / name).exists()]
    shown = "\n".join(f"![{name.removesuffix('.png').replace('_', ' ')}]({beside.name}/{name})" for name in pictures)
    profile = found[0].profile.model_copy(update={"trace": None})
    return f"```\n{summary(found[0].with_(profile=profile))}\n```" + (f"\n\n{shown}" if shown else "")


def _kernels(figures: Figures, beside: Path) -> str:
    measured = [row for row in figures.rows("kernels") if row["measured"]]
    if not measured:
        return (
            "On a GPU: not measured. No kernel has run on one yet; `auto`, with its check, is what keeps a surprise "
            "away from a run."
        )
    largest: dict[str, Row] = {}
    for row in sorted(measured, key=lambda row: -row["share"]):
        largest.setdefault(row["op"], row)
    report = figures.reports["kernels"]
    ceilings = ", ".join(f"{value:,.0f} {name}" for name, value in report["ceilings"].items())
    return "\n\n".join(
        [
            f"{_where(figures)}, {report['settings']['dtype']}; the largest copy and matmul reach {ceilings}.",
            comparison.summary(report["rows"]),
            "The largest row of each op:",
            "\n".join([comparison.HEADER, *map(comparison.line, largest.values())]),
        ]
    )


def _reductions(figures: Figures, beside: Path) -> str:
    found = figures.rows("reductions")
    if not found:
        return "Sums of weight gradients in float32 instead of bfloat16: not measured."
    reduced, exact = (sum(row["calls"] * row[way]["ms"] for row in found) for way in ("reduced", "exact"))
    errors = [max(row[way]["error"] for row in found) for way in ("reduced", "exact")]
    settings = figures.reports["reductions"]["settings"]
    return (
        f"Sums of weight gradients in float32 instead of bfloat16, {settings['micro_batch']} images of "
        f"`{settings['recipe']}`: {exact:.2f} ms a micro-batch instead of {reduced:.2f}; the largest error is "
        f"{errors[1]:.1e} instead of {errors[0]:.1e}."
    )


def _training(figures: Figures, beside: Path) -> str:
    losses = [line for line in figures.metrics if "loss" in line]
    if not losses:
        return "Training on emoji scenes: not measured."
    seconds = sum(line["step_seconds"] * steps for line, steps in zip(losses, _steps(losses)))
    validation = [line["validation_loss"] for line in figures.metrics if "validation_loss" in line]
    told = f", validation loss {validation[0]:.4f} to {validation[-1]:.4f}" if validation else ""
    pictures = [name for name in (SAMPLES, "losses.png") if (beside / name).exists()]
    shown = "\n".join(f"![training on emoji scenes]({beside.name}/{name})" for name in pictures)
    rate, steps = max(line["images_per_second"] for line in losses), losses[-1]["step"]
    return (
        f"Training on emoji scenes (the model of `emoji_64`, 4,000 scenes of 200 objects): {steps:,} steps in "
        f"{seconds:,.0f} s of training, {rate:,.0f} images/s at best{told}." + (f"\n\n{shown}" if shown else "")
    )


def _steps(losses: Sequence[dict[str, Any]]) -> list[int]:
    """Steps that each line is the report of."""
    numbers = [line["step"] for line in losses]
    return [number - before for number, before in zip(numbers, [0, *numbers])]


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
