"""Reports of measured rows: the environment that they were measured in, tables, and the JSON file that holds them."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from mdit.bench.row import COLUMNS, FORMULA, BenchmarkRow, device_name, machine_of
from mdit.config import Section, UserError, parse_section
from mdit.dist import cores
from mdit.documents import read_json
from mdit.files import write_json
from mdit.provenance import commit, package_versions

SCHEMA = "mdit-throughput/2"
TINY = "_tiny"  # ends the names of recipes with shapes for a CPU


class Environment(Section):
    """Hardware, versions, commit and day. `peak_tflops`: of the GPU, in dense bfloat16."""

    gpu: str = "none"
    cpu: str
    gpus: int = 1
    peak_tflops: float | None = None
    bandwidth_gbs: float | None = None
    torch: str
    cuda: str
    triton: str
    deepspeed: str
    commit: str
    date: str

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.model_dump(exclude_none=True).items())

    def difference(self, other: "Environment") -> str | None:
        """One field, but the date, in which another environment differs, with both values; None if there is none."""
        for name, there in other.model_dump(exclude={"date"}).items():
            if (here := getattr(self, name)) != there:
                return f"{name} {there!r}, here it is {here!r}"
        return None


def environment(device: torch.device, gpus: int = 1) -> Environment:
    """The environment of this process; `gpus` share the work."""
    machine, versions = machine_of(device), package_versions()
    return Environment(
        gpu=device_name(device),
        cpu=f"{cpu_model()}, {cores()} cores",
        gpus=gpus,
        peak_tflops=machine.peak / 1e12 if machine else None,
        bandwidth_gbs=machine.memory / 1e9 if machine else None,
        torch=torch.__version__,
        cuda=torch.version.cuda or "none",
        triton=versions.get("triton", "not installed"),
        deepspeed=versions.get("deepspeed", "not installed"),
        commit=commit() or "unknown",
        date=datetime.now(UTC).date().isoformat(),
    )


def cpu_model() -> str:
    """The CPU's name, on Linux; elsewhere its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def read_report(path: Path, schema: str, tool: str) -> dict[str, Any]:
    """Content of a report that `tool` wrote, less its schema. Raises UserError where that is not `schema`."""
    content = read_json(path, "the report")
    found = content.pop("schema", None) if isinstance(content, dict) else None
    if found != schema:
        raise UserError(f"{path}: schema = {found!r}: expected {schema!r}, as {tool} writes it")
    return content


class Report(Section):
    """Rows of one environment, as bench_train's throughput.json and compare_baseline's baseline.json hold them."""

    environment: Environment
    command: str
    rows: list[BenchmarkRow] = []

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Raises UserError, naming the file and the key, for what is missing or no report."""
        content = read_report(path, SCHEMA, "tools/bench_train.py")
        content.pop("formula", None)
        return parse_section(cls, content, path)

    def save(self, path: Path) -> None:
        """Write the whole report; interrupted, the file stays as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"schema": SCHEMA, "formula": FORMULA, **self.model_dump(mode="json", exclude_defaults=True)})

    def of_kind(self, *kinds: str) -> list[BenchmarkRow]:
        return [row for row in self.rows if row.kind in kinds]

    @property
    def tiny(self) -> bool:
        return any(row.recipe.endswith(TINY) for row in self.rows)

    def add(self, *rows: BenchmarkRow) -> None:
        """Append rows. One of the same measurement as an earlier row takes its place, unless it has less to tell."""
        for row in rows:
            place = next((i for i, other in enumerate(self.rows) if other.key == row.key), None)
            if place is None:
                self.rows.append(row)
            elif not row.is_open or self.rows[place].is_open:
                self.rows[place] = row

    def find(self, row: BenchmarkRow) -> BenchmarkRow | None:
        """An earlier row of the same measurement that is settled: measured, or found to be impossible."""
        return next((other for other in self.rows if other.key == row.key and not other.is_open), None)

    def markdown(self, prices: Sequence[float]) -> str:
        facts = {**self.environment.model_dump(), "command": f"`{self.command}`"}
        told = "\n".join(f"- {name}: {'unknown' if value is None else value}" for name, value in facts.items())
        return "\n\n".join(["# Training throughput", told, self.tables(prices)]) + "\n"

    def tables(self, prices: Sequence[float]) -> str:
        """Markdown that a terminal of 160 columns shows well; dollars at each of `prices` for a GPU-hour."""
        parts = ["Tiny shapes: these figures say nothing of the recipes whose names they bear." if self.tiny else ""]
        for heading, group in groupby((row for row in self.rows if row.kind != "profile"), _heading):
            parts += _group(heading, list(group), prices)
        return "\n\n".join(filter(None, [*parts, _memory(self.rows), FORMULA]))


def earlier_rows(path: Path, here: Environment) -> list[BenchmarkRow]:
    """Rows of an earlier run's report, if there is one. Raises UserError where that was in another environment."""
    if not path.exists():
        return []
    before = Report.load(path)
    if difference := here.difference(before.environment):
        raise UserError(f"--resume: {path} has {difference}; choose another directory")
    return before.rows


def _heading(row: BenchmarkRow) -> str:
    """Facts that rows have in common; those of a ladder and of contenders tell the rest by their names."""
    setting = row.setting
    processes = f"{setting.gpus} process{'es' * (setting.gpus > 1)}"
    words = [processes, setting.precision, f"ZeRO-{setting.zero_stage}"]
    if setting.activation_checkpointing != "none":
        words.append(f"activation checkpointing {setting.activation_checkpointing}")
    if row.kind == "stage":
        words += ["float8 matmuls"] if setting.fp8 else []
        words += ["compiled"] if setting.compile else ["not compiled"]
        words += [f"in Triton {', '.join(setting.kernels) or 'nothing'}"]
    return f"{row.recipe}, " * (row.kind != "stage") + "; ".join([*words, f"data {row.data}"])


def _group(heading: str, rows: Sequence[BenchmarkRow], prices: Sequence[float]) -> list[str]:
    """The table of rows under one heading, and lines for those without figures."""
    measured = [row for row in rows if not row.problem]
    parts = []
    if measured:
        columns = [[title, *(cell(row, prices) for row in measured)] for title, cell in COLUMNS.items()]
        if measured[0].kind != "stage":
            first = measured[0].figures.images_per_second
            columns.insert(3, ["times", *(f"{row.figures.images_per_second / first:.2f}" for row in measured)])
        parts = [f"{heading}:", table(list(zip(*(column for column in columns if any(column[1:])))))]
    return [*parts, "\n".join(f"- {row.name}, {row.batch}: {row.problem}" for row in rows if row.problem)]


def _memory(rows: Sequence[BenchmarkRow]) -> str:
    lines = [
        f"- {row.name}, micro-batch {row.setting.micro_batch}: "
        + ", ".join(f"{part} {gib:.2f}" for part, gib in row.measured.memory_gib.items())
        for row in rows
        if row.measured and row.measured.memory_gib
    ]
    return "\n".join(["GiB by part, and the peak:", *lines]) if lines else ""


def table(lines: Sequence[Sequence[Any]], *, markdown: bool = True) -> str:
    """A table of aligned columns whose first line is its head. Plain: numbers' columns, all but the first, to the
    right, and lines may end early."""
    cells = [[str(cell) for cell in line] for line in lines]
    widths = [max((len(line[i]) for line in cells if i < len(line)), default=0) for i in range(len(cells[0]))]
    if markdown:
        cells.insert(1, ["-" * width for width in widths])
        return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in cells)
    aligned = ([(str.rjust if i else str.ljust)(line[i], widths[i]) for i in range(len(line))] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in aligned)
