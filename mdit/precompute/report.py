"""Counts of pictures written and rejected: report.json of a set, and that of each of its parts while it is made.

{"seen": 120, "written": 100, "rejected": {"too small": {"count": 20, "first": ["00000.tar/000000003", ...]}},
 "seconds": {"NVIDIA H100 80GB HBM3": 31.4}, "parts": {"00000.tar": {"seen": 60, ...}, ...}}

`seconds` says by device how long processes worked on the parts that are in the set, each part counted once; of sets
for several image sizes that were made together, each has its share of the pixels. Nothing else in a set depends on who
made it. Sets that were made before there was such a key have none.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from mdit.config import NonNegativeInt, PositiveInt, Section, parse_section
from mdit.documents import parse_json

REPORT = "report.json"
ORIGINS = 5  # of each reason

Report = dict[str, Any]


class Rejections(Section):
    count: PositiveInt
    first: tuple[str, ...] = Field(min_length=1)


class PartReport(Section):
    seen: NonNegativeInt
    written: NonNegativeInt
    rejected: dict[str, Rejections]
    seconds: dict[str, float] | None = None


class SetReport(PartReport):
    parts: dict[str, PartReport] | None = None


def new_report() -> Report:
    return {"seen": 0, "written": 0, "rejected": {}}


def check_report(values: Any, source: object, kind: type[PartReport] = PartReport) -> Report:
    """The report as it was given. Raises UserError naming `source` and the key for anything else."""
    return parse_section(kind, values, source).model_dump(mode="json", exclude_unset=True)


def reject(report: Report, reason: str, origin: str) -> None:
    """Count one."""
    _add(report, reason, 1, [origin.encode(errors="backslashreplace").decode()])  # a file's name may be no text


def merge(reports: Iterable[Report]) -> Report:
    """The report of all, reasons in alphabetical order. Without `seconds` when one of them has none."""
    reports, total = list(reports), new_report()
    if all("seconds" in report for report in reports):
        total["seconds"] = {}
    for report in reports:
        total["seen"] += report["seen"]
        total["written"] += report["written"]
        for reason, rejected in report["rejected"].items():
            _add(total, reason, rejected["count"], rejected["first"])
        for device, seconds in report["seconds"].items() if "seconds" in total else ():
            total["seconds"][device] = total["seconds"].get(device, 0.0) + seconds
    return {**total, "rejected": dict(sorted(total["rejected"].items()))}


def merge_parts(reports: Mapping[str, Report]) -> Report:
    """The report of a set from those of its parts, by their names."""
    return {**merge(reports.values()), "parts": dict(reports)}


def read_report(directory: Path) -> Report | None:
    """The report of a finished set; None where there is none, as in sets that were brought. Raises UserError."""
    path = directory / REPORT
    try:
        return check_report(parse_json(path.read_bytes(), path), path, SetReport)
    except FileNotFoundError:
        return None


def rejected_share(report: Report) -> float:
    return 1 - report["written"] / report["seen"] if report["seen"] else 0.0


def summary(report: Report) -> str:
    """In a line: "100 of 120 pictures; rejected: 20 too small (00000.tar/000000003, ...)"."""
    text = f"{report['written']:,} of {report['seen']:,} pictures"
    clauses = [
        f"{rejected['count']:,} {reason} ({rejected['first'][0]}{', ...' if rejected['count'] > 1 else ''})"
        for reason, rejected in report["rejected"].items()
    ]
    return text + (f"; rejected: {', '.join(clauses)}" if clauses else "")


def _add(report: Report, reason: str, count: int, origins: list[str]) -> None:
    rejected = report["rejected"].setdefault(reason, {"count": 0, "first": []})
    rejected["count"] += count
    rejected["first"] += origins[: ORIGINS - len(rejected["first"])]
