"""Rows, verdicts and tables of the kernels' benchmark (tools/bench_kernels.py): no clock and no device in here.

A row is what JSON holds of one op at one shape:

    op, shape, label   which; `stages` says how often a micro-batch of each stage calls it
    forward, both      the bytes it must move and the FLOPs it must do, {"bytes": ..., "flops": ...}
    bound_ms, share    the least time of forward and backward, and its largest share in that of a stage
    measured           {contender: {"forward_ms", "both_ms", "peak_mib"}, or a text that says why there are no numbers}
    error              of the kernels against the reference, relative
    rate, of_ceiling, speedup, verdict    what follows for the kernels, forward and backward
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.documents import read_json

Row = dict[str, Any]
Ceiling = dict[str, float]  # GB/s and TFLOP/s

SCHEMA = "mdit-kernels/1"
MAIN = ("eager", "compile", "triton")
NOT_MEASURED = "not measured"
WORTH_IT = 1.15  # times as fast as torch.compile

HEADER = (
    "| op | shape | calls | eager ms | compile ms | triton ms | others ms | rate, of ceiling | peak MiB | error "
    f"| x compile | >= {WORTH_IT} |\n|{'---|' * 12}"
)


def key(op: str, shape: dict[str, int]) -> str:
    return f"{op} {json.dumps(shape)}"


def plan(rows: list[Row], ceiling: Ceiling) -> None:
    """Complete rows that say nothing but which op it is and what it costs. One that no stage calls counts as one call
    of the largest stage."""
    totals: Counter = Counter()
    for row in rows:
        row |= {"bound_ms": bound(row["both"], ceiling)[0], "measured": {}, "error": None}
        row |= judge(row, ceiling)
        totals.update({stage: count * row["bound_ms"] for stage, count in row["stages"].items()})
    for row in rows:
        shares = [count * row["bound_ms"] / totals[stage] for stage, count in row["stages"].items()]
        row["share"] = max(shares, default=row["bound_ms"] / max(totals.values(), default=1))


def bound(cost: dict[str, int], ceiling: Ceiling) -> tuple[float, bool]:
    """-> the least milliseconds, and whether it is the matmuls that need them."""
    moving, computing = cost["bytes"] / ceiling["GB/s"] / 1e6, cost["flops"] / ceiling["TFLOP/s"] / 1e9
    return max(moving, computing), computing > moving


def judge(row: Row, ceiling: Ceiling) -> Row:
    """Rate of the kernels, its part of the ceiling, how many times as fast as torch.compile, and whether that pays."""
    triton, compiled = (ms_of(row, name) for name in ("triton", "compile"))
    found: Row = {"rate": None, "of_ceiling": None, "speedup": None, "verdict": NOT_MEASURED}
    if triton:
        least, computes = bound(row["both"], ceiling)
        rate = f"{row['both']['flops'] / triton / 1e9:,.0f} TFLOP/s"
        found |= {"rate": rate if computes else f"{row['both']['bytes'] / triton / 1e6:,.0f} GB/s"}
        found |= {"of_ceiling": least / triton}
    if triton and compiled:
        found |= {"speedup": compiled / triton, "verdict": "yes" if compiled / triton >= WORTH_IT else "no"}
    return found


def ms_of(row: Row, contender: str) -> float | None:
    """Forward and backward."""
    measured = row["measured"].get(contender)
    return measured["both_ms"] if isinstance(measured, dict) else None


def in_order(rows: list[Row]) -> list[Row]:
    """Rows to measure: of every op the one of the largest share, then the others by share. What failed once is last."""
    by_share, firsts = sorted(rows, key=lambda row: -row["share"]), {}
    for row in by_share:
        firsts.setdefault(row["op"], row)
    by_share.sort(key=lambda row: (bool(row["measured"]), firsts[row["op"]] is not row))  # stable
    return [row for row in by_share if not row["measured"] or any(map(_has_failed, row["measured"].values()))]


def _has_failed(measured: Any) -> bool:
    return isinstance(measured, str) and measured.startswith("failed")


def line(row: Row) -> str:
    """One line of the table."""

    def times(name: str) -> str:
        measured = row["measured"].get(name, NOT_MEASURED)
        if not isinstance(measured, dict):
            return measured.replace("|", "/")
        return " / ".join(f"{ms:.3f}" for ms in (measured["forward_ms"], measured["both_ms"]) if ms is not None)

    others = "; ".join(f"{name} {times(name)}" for name in row["measured"] if name not in MAIN)
    peaks = [found["peak_mib"] for name in MAIN if isinstance(found := row["measured"].get(name), dict)]
    memory = " / ".join(f"{peak:,.0f}" for peak in peaks if peak is not None)
    rate = row["rate"] and f"{row['rate']}, {100 * row['of_ceiling']:.0f} %"
    error = None if row["error"] is None else f"{row['error']:.1e}"
    speedup = row["speedup"] and f"{row['speedup']:.2f}"
    cells = [row["op"], row["label"], str(sum(row["stages"].values())), *map(times, MAIN), others or "-"]
    cells += [cell or NOT_MEASURED for cell in (rate, memory, error, speedup)]
    return f"| {' | '.join([*cells, row['verdict']])} |"


def summary(rows: list[Row]) -> str:
    """Milliseconds of a micro-batch's calls, forward and backward: of the rows that all contenders have."""
    names = [name for name in MAIN if any(ms_of(row, name) for row in rows)]
    lines = ["| stage | measured | eager ms | compile ms | triton ms | saved ms |", f"|{'---|' * 6}"]
    for stage in dict.fromkeys(stage for row in rows for stage in row["stages"]):
        called = [row for row in rows if stage in row["stages"]]
        whole = [row for row in called if all(ms_of(row, name) for name in names)]
        weight, known = (sum(row["stages"][stage] * row["bound_ms"] for row in part) for part in (called, whole))
        sums = {name: sum(row["stages"][stage] * ms_of(row, name) for row in whole) for name in names}
        sums |= {"saved": sums["compile"] - sums["triton"]} if {"compile", "triton"} <= sums.keys() else {}
        cells = [f"{sums[name]:.2f}" if name in sums else NOT_MEASURED for name in (*MAIN, "saved")]
        lines.append(f"| {stage} | {100 * known / weight if names else 0:.0f} % | {' | '.join(cells)} |")
    lines += ["", "Measured: the share of the calls, by the least time that they need. Saved: against compile."]
    left_out = Counter(row["op"] for row in rows if not row["measured"])
    if left_out:
        lines.append("Left out, for want of time: " + ", ".join(f"{n} of {op}" for op, n in left_out.items()) + ".")
    return "\n".join(lines)


def markdown(report: dict[str, Any]) -> str:
    facts = {**report["environment"], **report["settings"]}
    facts |= {name: f"{value:,.1f}" for name, value in report["ceilings"].items()}
    told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    rows = [line(row) for row in sorted(report["rows"], key=lambda row: -row["share"]) if row["measured"]]
    return "\n\n".join(["# Kernels", told, summary(report["rows"]), "\n".join([HEADER, *rows])]) + "\n"


def write(out: Path, report: dict[str, Any]) -> None:
    """OUT/kernels.json and OUT/kernels.md, each whole or as it was."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("kernels.json", json.dumps(report, indent=1)), ("kernels.md", markdown(report))):
        new = out / f"{name}.partial"
        new.write_text(text, encoding="utf-8")
        new.replace(out / name)


def take_over(out: Path, report: dict[str, Any], rows: list[Row]) -> list[Row]:
    """Into `rows` what an earlier run of the same program on the same machine measured. -> what it has besides"""
    path = out / "kernels.json"
    if not path.exists():
        return []
    before = read_json(path, "the earlier rows")
    if not (isinstance(before, dict) and isinstance(before.get("rows"), list)):
        raise UserError(f"{path}: no report of tools/bench_kernels.py")
    for name, value in {**report["environment"], **report["settings"]}.items():
        found = {**before.get("environment", {}), **before.get("settings", {})}.get(name)
        if found != value and name != "date":
            raise UserError(f"--resume: {path} has {name} {found!r}, here it is {value!r}; choose another --out")
    known = {key(row["op"], row["shape"]): row for row in before["rows"] if row["measured"]}
    for row in rows:
        found = known.pop(key(row["op"], row["shape"]), row)
        row |= {name: found[name] for name in ("measured", "error", "rate", "of_ceiling", "speedup", "verdict")}
    return list(known.values())
