"""A report's pictures: step_time.png and roofline.png. Colours: Okabe and Ito, told apart by the colour-blind too."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdit.bench.report import Environment, Report
from mdit.bench.row import PHASES, BenchmarkRow, Profile
from mdit.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SKY, BLUE, ORANGE, GREEN, PINK, GOLD = "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
MARKS = {  # of categories
    "matmuls": ("o", BLUE),
    "attention": ("^", GREEN),
    "norm and modulation": ("s", ORANGE),
    "SwiGLU": ("D", PINK),
    "experts": ("v", GOLD),
    "compiled elementwise": ("X", "black"),
    "optimizer": ("P", SKY),
}
PANEL = 6.4  # inches
IMAGES = 1000  # that a bar's milliseconds are for: stages have different batches


def draw(report: Report, directory: Path) -> list[Path]:
    """The pictures that the report has rows for, written to `directory`. Rows with a problem are told, never drawn.

    Raises UserError where matplotlib is not installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    where = _where(report.environment)
    drawn = []
    if rows := report.of_kind("stage", "ladder"):
        drawn.append(directory / "step_time.png")
        panels = [(kind, [row for row in rows if row.kind == kind and not row.problem]) for kind in ("stage", "ladder")]
        panels = [(kind, found) for kind, found in panels if found]
        figure, axes = _figure(len(panels), 2.0 + 0.42 * max((len(found) for _, found in panels), default=0))
        for each, (kind, found) in zip(axes, panels):
            (_stage_bars if kind == "stage" else _ladder_bars)(each, found)
        _save(figure, drawn[-1], f"Training steps: {where}", rows)
    if rows := report.of_kind("profile"):
        drawn.append(directory / "roofline.png")
        profiles = [(row.name, row.profile) for row in rows if row.profile]
        figure, axes = _figure(len(profiles), 5.6)
        for each, (name, profile) in zip(axes, profiles):
            _roofline(each, name, profile, report.environment)
        _save(figure, drawn[-1], f"Roofline: {where}", rows)
    return drawn


def draw_losses(stages: Mapping[str, Sequence[dict[str, Any]]], path: Path, title: str) -> None:
    """Training and validation losses over steps, of the lines of a run's metrics.jsonl; of several stages, by name, one
    behind the other. Raises UserError where matplotlib is not installed."""
    figure, (axes,) = _figure(1, 0.6 * PANEL)
    began = 0
    for name, lines in stages.items():
        for key, colour, mark in (("loss", BLUE, ""), ("validation_loss", ORANGE, "o")):
            points = [(began + line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                label = key.replace("_", " ") if began == 0 else None
                axes.plot(*zip(*points), color=colour, marker=mark, markersize=4, label=label)
        if len(stages) > 1:
            axes.axvline(began, color="gray", linestyle=":", linewidth=0.8)
            axes.annotate(name, (began, 1), (3, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                          rotation=90, va="top", fontsize=7)  # fmt: skip
            axes.set_yscale("log")
        began += max((line["step"] for line in lines), default=0)
    axes.set_xlabel("step")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, path, title, [])


def draw_curves(curves: Mapping[str, Sequence[Sequence[float]]], baseline: str, path: Path, title: str) -> None:
    """Losses over steps and over FLOPs of an ablation's variants, (steps, FLOPs, ..., loss) each; the dotted line is
    the baseline's last loss. Raises UserError where matplotlib is not installed."""
    figure, panels = _figure(2, 0.8 * PANEL + 0.1 * len(curves))
    for number, (name, points) in enumerate(curves.items()):
        steps, flops, *_, losses = zip(*points)
        colour = "black" if name == baseline else (BLUE, ORANGE, GREEN, PINK, GOLD, SKY)[number % 6]
        line = ("-", "--", "-.", ":")[number // 6 % 4]
        for axes, x in zip(panels, (steps, [each / 1e12 for each in flops])):
            axes.plot(x, losses, line, color=colour, marker=".", markersize=3, linewidth=1, label=name)
    for axes, name in zip(panels, ("steps", "training TFLOP")):
        if baseline in curves:
            axes.axhline(curves[baseline][-1][-1], color="gray", linestyle=":", linewidth=0.8)
        axes.set(xlabel=name, yscale="log")
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter("{x:.3g}")
    panels[0].set_ylabel("validation loss")
    panels[1].legend(fontsize=7, frameon=False)
    _save(figure, path, title, [])


def draw_loss_over_length(points: Sequence[tuple[float, float]], others: Mapping[str, float], path: Path) -> None:
    """Losses over lengths of averages, (length, loss) each; dotted lines are the losses of `others`, by name. Raises
    UserError where matplotlib is not installed."""
    figure, (axes,) = _figure(1, 0.6 * PANEL)
    axes.plot(*zip(*points), color=BLUE, marker="o", markersize=4)
    for (name, loss), colour in zip(others.items(), (ORANGE, GREEN)):
        axes.axhline(loss, color=colour, linestyle=":", label=name)
    axes.set(xlabel="length of the average (sigma_rel)", ylabel="validation loss", xscale="log")
    axes.legend(fontsize=8, frameon=False)
    _save(figure, path, "Validation loss over the length of the weights' average", [])


def require_matplotlib() -> None:
    """Raise UserError where matplotlib is not installed, before the work whose pictures it draws."""
    _figure(0, 1.0)


def _where(environment: Environment) -> str:
    device = environment.gpu if environment.gpu != "none" else f"CPU ({environment.cpu})"
    return f"{device}, {environment.date}, commit {environment.commit}"


def _figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'mdit[bench]'") from None
    figure = Figure(figsize=(PANEL * max(1, panels), height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0]) if panels else []


def _save(figure: Figure, path: Path, title: str, rows: Sequence[BenchmarkRow]) -> None:
    """A title above, what was not measured below."""
    lines = [f"{row.name}: not measured ({row.problem.removeprefix('not measured: ')})" for row in rows if row.problem]
    width = int(11 * figure.get_figwidth())  # letters
    figure.suptitle(textwrap.fill(title, width), fontsize=11)
    if lines:
        figure.supxlabel("\n".join(textwrap.fill(line, width) for line in lines), fontsize=8, color="dimgray")
        figure.set_figheight(figure.get_figheight() + 0.19 * len(lines))
    figure.savefig(path, dpi=130)


def _stage_bars(axes: Axes, rows: list[BenchmarkRow]) -> None:
    ends = [0.0] * len(rows)
    for phase, colour in zip(PHASES, (SKY, BLUE, ORANGE, GREEN)):
        widths = [getattr(row.figures.milliseconds, phase) * IMAGES / row.setting.global_batch for row in rows]
        axes.barh(range(len(rows)), widths, left=ends, color=colour, label=phase, height=0.6)
        ends = [end + width for end, width in zip(ends, widths)]
    names = [row.name if row.data == "made up" else f"{row.name}, real data" for row in rows]
    _name_bars(axes, names, ends, [f"{row.figures.images_per_second:,.0f} images/s{_mfu(row)}" for row in rows])
    axes.set_xlabel(f"ms for {IMAGES:,} images")
    axes.set_title("Stages", fontsize=10, pad=22)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PHASES), fontsize=8, frameon=False)


def _ladder_bars(axes: Axes, rows: list[BenchmarkRow]) -> None:
    rates = [row.figures.images_per_second for row in rows]
    axes.barh(range(len(rows)), rates, color=BLUE, height=0.6)
    labels = [f"{rate:,.0f} ({rate / rates[0]:.2f}x){_mfu(row)}" for rate, row in zip(rates, rows)]
    _name_bars(axes, [row.name for row in rows], rates, labels)
    axes.set_xlabel("images/s (times the first)")
    axes.set_title("Ladder: each line switches one thing on", fontsize=10, pad=22)


def _mfu(row: BenchmarkRow) -> str:
    return "" if row.mfu is None else f", MFU {row.mfu:.0%}"


def _name_bars(axes: Axes, names: list[str], ends: list[float], labels: list[str]) -> None:
    """From the top down, each with its label behind its end; there is room for the longest."""
    axes.set_yticks(range(len(names)), [textwrap.fill(name, 30) for name in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.55)
    for number, (end, label) in enumerate(zip(ends, labels)):
        axes.annotate(label, (end, number), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _roofline(axes: Axes, title: str, profile: Profile, environment: Environment) -> None:
    """Categories whose work is known, at what a GPU attained in their own time. Hollow marks: some lie upon others."""
    points = roofline_points(profile)
    for name, x, y in points:
        mark, colour = MARKS[name]
        label = f"{name}: {y:,.3g} TFLOP/s, {1e3 * y / x:,.0f} GB/s"
        axes.plot(x, y, mark, color=colour, fillstyle="none", markersize=10, markeredgewidth=2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must be moved", ylabel="TFLOP/s of a GPU")
    roof = "no peak known, no roof"
    if (peak := environment.peak_tflops) and (bandwidth := environment.bandwidth_gbs):
        ridge = 1e3 * peak / bandwidth
        low, high = min([0.1, *(x / 2 for _, x, _ in points)]), max([2 * ridge, *(2 * x for _, x, _ in points)])
        label, roof = f"roof: {peak:,.0f} TFLOP/s (bf16), {bandwidth:,.0f} GB/s", ""
        axes.plot([low, ridge, high], [bandwidth * low / 1e3, peak, peak], "k", linewidth=1.2, zorder=0, label=label)
    unknown = [name for name in profile.categories if name not in {name for name, _, _ in points}]
    titles = [title, textwrap.fill(f"no formula: {', '.join(unknown)}", 70) if unknown else "", roof]
    axes.set_title("\n".join(filter(None, titles)), fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, fontsize=7, frameon=False)


def roofline_points(profile: Profile) -> list[tuple[str, float, float]]:
    """(category, FLOP / byte, TFLOP/s) of those that took time and have work known by formula."""
    return [
        (name, work.flops / work.bytes, work.flops / ms / 1e9)
        for name, work in profile.work.items()
        if (ms := profile.categories.get(name))
    ]
