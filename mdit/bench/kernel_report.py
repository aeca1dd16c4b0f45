"""The report of tools/bench_kernels.py: typed rows, verdicts and tables. No clock and no device in here."""

from collections import Counter
from pathlib import Path
from typing import Any

from mdit.bench.report import Environment, read_report, table
from mdit.bench.row import NOT_MEASURED
from mdit.config import Section, UserError, parse_section
from mdit.files import write_json, write_text

SCHEMA = "mdit-kernels/2"
MAIN = ("eager", "compile", "triton")
WORTH_IT = 1.15  # times as fast as torch.compile

Ceilings = dict[str, float]  # GB/s of a large copy and TFLOP/s of a large matmul


class Times(Section):
    """Milliseconds, and the memory at the peak above what was held before."""

    forward_ms: float
    both_ms: float | None = None  # forward and backward
    peak_mib: float | None = None


class KernelRow(Section):
    """One op at one shape. `stages`: calls in a micro-batch of each stage. `bytes` it must move and `flops` it must do,
    forward and backward. `measured`: of each contender, or why there are no numbers. `error`: the largest relative one
    of the kernels against the reference."""

    op: str
    shape: dict[str, bool | int]
    label: str
    stages: dict[str, int] = {}
    bytes: int
    flops: int
    measured: dict[str, Times | str] = {}
    error: float | None = None

    @property
    def key(self) -> str:
        return f"{self.op} {sorted(self.shape.items())}"

    @property
    def failed(self) -> bool:
        return any(isinstance(found, str) and found.startswith("failed") for found in self.measured.values())

    def both_ms(self, contender: str) -> float | None:
        found = self.measured.get(contender)
        return found.both_ms if isinstance(found, Times) else None

    @property
    def speedup(self) -> float | None:
        """Times as fast as torch.compile."""
        triton, compiled = self.both_ms("triton"), self.both_ms("compile")
        return compiled / triton if triton and compiled else None

    def bound_ms(self, ceilings: Ceilings) -> float:
        """The least milliseconds, forward and backward."""
        return max(self.bytes / ceilings["GB/s"] / 1e6, self.flops / ceilings["TFLOP/s"] / 1e9)

    def rate(self, ceilings: Ceilings) -> str | None:
        """Rate of the kernels in bytes or FLOPs, whichever bounds them, and their part of the ceiling."""
        if not (triton := self.both_ms("triton")):
            return None
        moving, computing = self.bytes / triton / 1e6, self.flops / triton / 1e9
        shares = moving / ceilings["GB/s"], computing / ceilings["TFLOP/s"]
        rate = f"{moving:,.0f} GB/s" if shares[0] >= shares[1] else f"{computing:,.0f} TFLOP/s"
        return f"{rate}, {100 * max(shares):.0f} %"

    def times(self, contender: str) -> str:
        found = self.measured.get(contender, NOT_MEASURED)
        if isinstance(found, str):
            return found.replace("|", "/")
        return " / ".join(f"{ms:.3f}" for ms in (found.forward_ms, found.both_ms) if ms is not None)

    def cells(self, ceilings: Ceilings) -> list[str]:
        """A line of the table under `HEAD`."""
        others = "; ".join(f"{name} {self.times(name)}" for name in self.measured if name not in MAIN)
        peaks = [found.peak_mib for name in MAIN if isinstance(found := self.measured.get(name), Times)]
        memory = " / ".join(f"{peak:,.0f}" for peak in peaks if peak is not None)
        error = "" if self.error is None else f"{self.error:.1e}"
        speedup, worth_it = f"{self.speedup or 0:.2f}", "yes" if (self.speedup or 0) >= WORTH_IT else "no"
        cells = [self.op, self.label, str(sum(self.stages.values())), *map(self.times, MAIN), others or "-"]
        more = (self.rate(ceilings), memory, error, *((speedup, worth_it) if self.speedup else ("", "")))
        return [*cells, *(cell or NOT_MEASURED for cell in more)]


HEAD = ["op", "shape", "calls", *(f"{name} ms" for name in MAIN), "others ms", "rate, of ceiling", "peak MiB", "error"]
HEAD += ["x compile", f">= {WORTH_IT}"]


class KernelReport(Section):
    """Rows of one machine and one program, as kernels.json holds them."""

    environment: Environment
    settings: dict[str, str | int]
    ceilings: Ceilings
    rows: list[KernelRow]

    @classmethod
    def load(cls, path: Path) -> "KernelReport":
        """Raises UserError, naming the file and the key, for what is missing or no report."""
        return parse_section(cls, read_report(path, SCHEMA, "tools/bench_kernels.py"), path)

    def save(self, out: Path) -> None:
        """Write OUT/kernels.json and OUT/kernels.md, each whole or as it was."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "kernels.json", {"schema": SCHEMA, **self.model_dump(mode="json")})
        write_text(out / "kernels.md", self.markdown())

    def take_over(self, path: Path) -> None:
        """Take the rows that an earlier run measured and this one lacks. Raises UserError where that was another
        program, machine or setting."""
        if not path.exists():
            return
        before = KernelReport.load(path)
        difference = self.environment.difference(before.environment)
        for name, here in self.settings.items():
            if (there := before.settings.get(name)) != here:
                difference = difference or f"{name} {there!r}, here it is {here!r}"
        if difference:
            raise UserError(f"--resume: {path} has {difference}; choose another --out")
        known = {row.key: row for row in before.rows if row.measured}
        for i, row in enumerate(self.rows):
            found = known.pop(row.key, row)
            self.rows[i] = row.model_copy(update={"measured": found.measured, "error": found.error})
        self.rows.extend(known.values())

    def shares(self) -> dict[str, float]:
        """Key of a row -> the largest part that its calls' least time has in a stage's. A row that no stage
        calls counts as one call of the largest stage."""
        bounds = {row.key: row.bound_ms(self.ceilings) for row in self.rows}
        totals: Counter[str] = Counter()
        for row in self.rows:
            totals.update({stage: count * bounds[row.key] for stage, count in row.stages.items()})
        whole = max(totals.values(), default=1)
        shares = {row.key: [n * bounds[row.key] / totals[s] for s, n in row.stages.items()] for row in self.rows}
        return {key: max(found, default=bounds[key] / whole) for key, found in shares.items()}

    def by_share(self) -> list[KernelRow]:
        shares = self.shares()
        return sorted(self.rows, key=lambda row: -shares[row.key])

    def to_measure(self) -> list[KernelRow]:
        """Rows in order: of every op that of the largest share, the others by share, and those that failed."""
        rows = self.by_share()
        firsts = {row.op: row.key for row in reversed(rows)}
        rows.sort(key=lambda row: (bool(row.measured), firsts[row.op] != row.key))  # stable
        return [row for row in rows if not row.measured or row.failed]

    def summary(self) -> str:
        """Milliseconds of a micro-batch's calls, forward and backward: of the rows that all contenders have."""
        names = [name for name in MAIN if any(row.both_ms(name) for row in self.rows)]
        lines = [["stage", "measured", *(f"{name} ms" for name in (*MAIN, "saved"))]]
        for stage in dict.fromkeys(stage for row in self.rows for stage in row.stages):
            calls = [(row, row.stages[stage]) for row in self.rows if stage in row.stages]
            whole = [(row, n) for row, n in calls if all(row.both_ms(name) for name in names)]
            weight, known = (sum(n * row.bound_ms(self.ceilings) for row, n in part) for part in (calls, whole))
            sums = {name: sum(n * (row.both_ms(name) or 0) for row, n in whole) for name in names}
            sums |= {"saved": sums["compile"] - sums["triton"]} if {"compile", "triton"} <= sums.keys() else {}
            cells = [f"{sums[name]:.2f}" if name in sums else NOT_MEASURED for name in (*MAIN, "saved")]
            lines.append([stage, f"{100 * known / weight if names else 0:.0f} %", *cells])
        told = ["", "Measured: the share of the calls, by the least time that they need. Saved: against compile."]
        left_out = Counter(row.op for row in self.rows if not row.measured)
        if left_out:
            told.append("Left out, for want of time: " + ", ".join(f"{n} of {op}" for op, n in left_out.items()) + ".")
        return "\n".join([table(lines), *told])

    def table_of(self, rows: list[KernelRow]) -> str:
        return table([HEAD, *(row.cells(self.ceilings) for row in rows)])

    def markdown(self) -> str:
        facts: dict[str, Any] = {**self.environment.model_dump(exclude_none=True), **self.settings}
        facts |= {name: f"{value:,.1f}" for name, value in self.ceilings.items()}
        told = "\n".join(f"- {name}: {value}" for name, value in facts.items())
        measured = [row for row in self.by_share() if row.measured]
        return "\n\n".join(["# Kernels", told, self.summary(), self.table_of(measured)]) + "\n"
