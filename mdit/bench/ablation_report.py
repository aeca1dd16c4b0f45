"""The report of an ablation: what each variant is worth beside the baseline, as a table, as JSON and as curves."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from mdit.bench.ablation import Ablation, VariantRun
from mdit.bench.ablation_result import RESULT, VariantResult, change
from mdit.bench.figures import REGION, fill_regions
from mdit.bench.plots import draw_curves
from mdit.bench.report import table
from mdit.bench.row import NOT_MEASURED
from mdit.config import UserError
from mdit.eval.distances import FRECHET
from mdit.files import write_json, write_text

SCHEMA = "mdit-ablation/1"
TERA = 1e12
COLUMNS: dict[str, tuple[Callable[[VariantResult], float | None], str]] = {  # figure of a result, its format
    "steps": (lambda result: result.curve[-1].step, ",.0f"),
    "TFLOP": (lambda result: result.curve[-1].flops / TERA, ",.3g"),
    "seconds": (lambda result: result.curve[-1].seconds, ",.0f"),
    "loss": (lambda result: result.curve[-1].loss, ".4f"),
    FRECHET: (lambda result: result.frechet_distance, ".1f"),
    "background": (lambda result: result.background, ".1%"),
    "object": (lambda result: result.object, ".1%"),
}
COUNTED = ("steps", "TFLOP")  # the same from every seed
COMPARED = ("loss", FRECHET, "background", "object")
WITHIN, UNKNOWN = "≈", "?"


class MeanPoint(NamedTuple):
    """A point of a curve: steps, FLOPs and seconds up to there, and the validation loss."""

    steps: float
    flops: float
    flops_with_optimizer: float
    seconds: float
    loss: float


@dataclass(frozen=True)
class VariantSummary:
    """A variant's results, seed by seed, all of one length."""

    name: str
    results: dict[int, VariantResult]

    def values(self, column: str) -> list[float]:
        """One figure of every seed; none where it is not measured."""
        found = [COLUMNS[column][0](result) for result in self.results.values()]
        return [value for value in found if value is not None]

    @cached_property
    def curve(self) -> list[MeanPoint]:
        """Means over the seeds. FLOPs differ where mask ratios are drawn."""
        points = zip(*(result.curve for result in self.results.values()))
        names = ("step", "flops", "flops_with_optimizer", "seconds", "loss")
        return [MeanPoint(*(statistics.fmean(getattr(each, name) for each in at) for name in names)) for at in points]

    @property
    def optimizer_flops(self) -> float:
        return self.curve[-1].flops_with_optimizer - self.curve[-1].flops if self.curve else 0.0

    def spread(self, column: str) -> float | None:
        """Standard deviation over the seeds; None of one."""
        values = self.values(column)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class AblationReport:
    """`summaries` of all variants in the file's order; of some nothing is measured yet."""

    ablation: Ablation
    summaries: dict[str, VariantSummary]

    @classmethod
    def load(cls, ablation: Ablation, out: Path) -> "AblationReport":
        """The report of all results in DIR. Raises UserError where one is of another recipe than the file's."""
        summaries = {}
        for variant, seeds in ablation.seeds.items():
            paths = {seed: VariantRun(variant, seed, ()).folder(out) / RESULT for seed in seeds}
            results = {seed: VariantResult.load(path) for seed, path in paths.items() if path.exists()}
            for seed in results:
                if why := change(ablation, ablation.recorded(variant, seed, results[seed].recipes), out):
                    raise UserError(f"{why}; --rerun runs it anew")
            summaries[variant] = VariantSummary(variant, results)
        return cls(ablation, summaries)

    @property
    def baseline(self) -> VariantSummary:
        return self.summaries[self.ablation.file.baseline]

    def reached(self, summary: VariantSummary) -> MeanPoint | None:
        """The point at which a variant's mean loss came down to the baseline's last one."""
        return crossing(summary.curve, self.baseline.curve[-1].loss) if self.baseline.curve else None

    def write(self, out: Path, command: str) -> list[Path]:
        """table.md, ablation.json and curves.png in DIR."""
        paths = [out / "table.md", out / "ablation.json"]
        write_text(paths[0], f"{self.markdown(command)}\n")
        write_json(paths[1], self.content(command))
        curves = {name: summary.curve for name, summary in self.summaries.items() if summary.curve}
        if curves:
            paths.append(out / "curves.png")
            draw_curves(curves, self.ablation.file.baseline, paths[-1], f"{self.ablation.file.name}: {self.source}")
        return paths

    def fill(self, document: Path, out: Path, command: str) -> None:
        """Put table and curves into a document's region of the ablation's name, and keep DIR's JSON and curves in
        the folder beside it that has the document's name. Raises UserError where there is no such region."""
        text, name = document.read_text(encoding="utf-8"), self.ablation.file.name
        folder = document.with_suffix("")
        content = f"{self.markdown(command)}\n\n![validation losses of {name}]({folder.name}/{name}.png)"
        if name not in [found[2] for found in REGION.finditer(text)]:
            raise UserError(f"{document}: has no region <!-- measured: {name} -->")
        folder.mkdir(exist_ok=True)
        for made, kept in (("ablation.json", f"{name}.json"), ("curves.png", f"{name}.png")):
            (folder / kept).write_bytes((out / made).read_bytes())
        write_text(document, fill_regions(text, lambda region: content if region == name else None))

    @property
    def source(self) -> str:
        """Machines, versions, days and commits of all results."""
        found = [result.environment for each in self.summaries.values() for result in each.results.values()]
        machines = {f"{e.cpu if e.gpu == 'none' else e.gpu}, torch {e.torch}": None for e in found}
        days, commits = (sorted({getattr(e, key) for e in found}) for key in ("date", "commit"))
        parts = ["; ".join(machines), " to ".join(dict.fromkeys([*days[:1], *days[-1:]]))]
        return ", ".join([*parts, f"commit {', '.join(commits)}"]) if found else NOT_MEASURED

    def markdown(self, command: str) -> str:
        """The table, and below it how to read it."""
        heads = ["variant", "seeds", *("validation loss" if name == "loss" else name for name in COLUMNS)]
        lines = [[*heads, "steps to the baseline's loss", "TFLOP to it", "seconds to it"]]
        lines += [self._line(summary) for summary in self.summaries.values()]
        cells = "".join(cell for line in lines for cell in line)
        marks = {
            "±": "standard deviation over the seeds",
            WITHIN: "differs from the baseline by no more than the larger of both deviations",
            UNKNOWN: "no deviation is known, neither its own nor the baseline's",
        }
        told = [f"`{mark}`: {meaning}" for mark, meaning in marks.items() if mark in cells]
        file, base = self.ablation.file, self.ablation.base.training
        if any(summary.optimizer_flops for summary in self.summaries.values()):
            told += ["TFLOP: the model's + the optimizer's"]
        told += [f"baseline: {file.baseline}, {base.num_steps:,} steps; equal for all: {file.budget.replace('_', ' ')}"]
        return "\n\n".join([table(lines), "; ".join(told) + ".", f"{self.source}: `{command}`"])

    def content(self, command: str) -> dict[str, Any]:
        """ablation.json: means, deviations and curves, with every seed's figures."""
        file, variants = self.ablation.file, {}
        for name, summary in self.summaries.items():
            figures = {}
            for column in COLUMNS:
                if values := summary.values(column):
                    by_seed = dict(zip(map(str, summary.results), values))
                    figures[column] = {"mean": statistics.fmean(values), "deviation": summary.spread(column), **by_seed}
            reached = self.reached(summary)
            ratios = [mine / whole for mine, whole in zip(reached, self.baseline.curve[-1])][:-1] if reached else None
            variants[name] = {
                "differences": file.variants[name],
                "figures": figures,
                "to_the_baselines_loss": reached and reached._asdict(),
                "of_what_the_baseline_took": ratios and dict(zip(MeanPoint._fields, ratios)),
                "curve": [point._asdict() for point in summary.curve],
            }
        facts = {"name": file.name, "recipe": file.recipe, "budget": file.budget, "baseline": file.baseline}
        return {"schema": SCHEMA, **facts, "command": command, "source": self.source, "variants": variants}

    def _line(self, summary: VariantSummary) -> list[str]:
        seeds = self.ablation.seeds[summary.name]
        done = f"{len(summary.results)}" + f" of {len(seeds)}" * (len(summary.results) < len(seeds))
        if not summary.results:
            return [summary.name, done, NOT_MEASURED, *[""] * (len(COLUMNS) + 2)]
        cells = [self._cell(summary, column) for column in COLUMNS]
        return [summary.name, done, *cells, *self._reach(summary)]

    def _cell(self, summary: VariantSummary, column: str) -> str:
        values, form = summary.values(column), COLUMNS[column][1]
        if not values:
            return ""
        mean, spread = statistics.fmean(values), summary.spread(column)
        if column == "TFLOP" and (more := summary.optimizer_flops):
            return f"{mean:{form}} + {more / TERA:{form}}"
        text = f"{mean:{form}}" + (f" ± {spread:{form}}" if spread is not None and column not in COUNTED else "")
        theirs = self.baseline.values(column)
        if column not in COMPARED or summary.name == self.baseline.name or not theirs:
            return text
        known = [each for each in (spread, self.baseline.spread(column)) if each is not None]
        if not known:
            return f"{text} {UNKNOWN}"
        return f"{text} {WITHIN}" if abs(mean - statistics.fmean(theirs)) <= max(known) else text

    def _reach(self, summary: VariantSummary) -> list[str]:
        if not self.baseline.curve:
            return [NOT_MEASURED, "", ""]
        if (found := self.reached(summary)) is None:
            return ["not reached", "", ""]
        whole, both = self.baseline.curve[-1], ""
        if summary.optimizer_flops or self.baseline.optimizer_flops:
            both = f"; {found.flops_with_optimizer / whole.flops_with_optimizer:.2f}x with the optimizer's"
        return [
            f"{found.steps:,.0f} ({found.steps / whole.steps:.2f}x)",
            f"{found.flops / TERA:.3g} ({found.flops / whole.flops:.2f}x{both})",
            f"{found.seconds:,.0f} ({found.seconds / whole.seconds:.2f}x)",
        ]


def crossing(curve: Sequence[MeanPoint], loss: float) -> MeanPoint | None:
    """The point at which a curve first comes down to `loss`, linear between its points; its first point where it begins
    below, None where it never comes there."""
    before = None
    for here in curve:
        if here.loss <= loss:
            if before is None:
                return here
            share = (before.loss - loss) / (before.loss - here.loss)
            return MeanPoint(*(a + share * (b - a) for a, b in zip(before, here)))
        before = here
    return None


def plan(ablation: Ablation) -> str:
    """A table of what would be run. Raises UserError for a budget of seconds, which is known when it runs."""
    if ablation.file.budget == "seconds":
        raise UserError(f"{ablation.path}: the steps of a budget of seconds are known when the time of one is taken")
    lines = [["variant", "seeds", "steps", "TFLOP", "differences"]]
    for run in ablation.runs(lambda variant, stage: 0.0):
        if run.seed == ablation.seeds[run.variant][0]:
            steps = " + ".join(f"{stage.config.training.num_steps:,}" for stage in run.stages)
            seeds, differences = ", ".join(map(str, ablation.seeds[run.variant])), ablation.differences(run.variant)
            lines.append([run.variant, seeds, steps, f"{run.flops / TERA:.3g}", differences])
    return table(lines)
