"""A report's pictures: step_time.png and roofline.png. Colours: Okabe and Ito, told apart by the colour-blind too."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdit.bench.report import Environment, Report
from mdit.bench.row import BenchmarkRow as Row
from mdit.bench.row import Profile
from mdit.config import UserError

SKY, BLUE, ORANGE, GREEN, PINK, GOLD = "#56B4E9", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
PARTS = {"data": SKY, "forward": BLUE, "backward": ORANGE, "optimizer": GREEN}
MARKS = {  # of categories
    "matmuls": ("o", BLUE),
    "attention": ("^", GREEN),
    "norm and modulation": ("s", ORANGE),
    "SwiGLU": ("D", PINK),
    "experts": ("v", GOLD),
    "compiled elementwise": ("X", "black"),
    "optimizer": ("P", SKY),
}
BAR_INCHES, LINE_INCHES, SIDE = 0.42, 0.19, 6.4
NAME_WIDTH, PROBLEM_WIDTH, TITLE_LETTERS = 30, 90, 11  # letters; the last of an inch
IMAGES = 1000  # that a bar's milliseconds are for: stages have different batches
DOTS = 130  # an inch


def draw(report: Report, directory: Path) -> list[Path]:
    """The pictures that the report has rows for, written to `directory`. Rows with a problem are told, never drawn.

    Raises UserError where matplotlib is not installed.
    """
    Figure = _figure_class()
    directory.mkdir(parents=True, exist_ok=True)
    stages, ladder, profiles = (report.of_kind(kind) for kind in ("stage", "ladder", "profile"))
    drawn = []
    if stages or ladder:
        drawn.append(directory / "step_time.png")
        _step_time(Figure, stages, ladder, report.environment).savefig(drawn[-1], dpi=DOTS)
    if profiles:
        drawn.append(directory / "roofline.png")
        _roofline(Figure, profiles, report.environment).savefig(drawn[-1], dpi=DOTS)
    return drawn


def draw_losses(metrics: Sequence[dict[str, Any]], directory: Path, where: str) -> Path:
    """losses.png: training and validation losses over steps, of the lines of a run's metrics.jsonl.

    Raises UserError where matplotlib is not installed.
    """
    figure = _figure_class()(figsize=(SIDE, 0.6 * SIDE), layout="constrained")
    axes = figure.subplots()
    for key, colour, mark in (("loss", BLUE, ""), ("validation_loss", ORANGE, "o")):
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points), color=colour, marker=mark, markersize=4, label=key.replace("_", " "))
    axes.set_xlabel("step")
    axes.legend(fontsize=8, frameon=False)
    _finish(figure, f"Losses: {where}", [])
    path = directory / "losses.png"
    figure.savefig(path, dpi=DOTS)
    return path


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the plots need matplotlib: pip install 'mdit[bench]'") from None
    return Figure


def _heading(environment: Environment) -> str:
    device = environment.gpu if environment.gpu != "none" else f"CPU ({environment.cpu})"
    return f"{device}, {environment.date}, commit {environment.commit}"


def _missing(rows: Sequence[Row]) -> list[str]:
    """Lines about the rows without figures."""
    lines = []
    for row in rows:
        if row.problem:
            why = row.problem.removeprefix("not measured: ")
            lines += textwrap.wrap(f"{row.name}: not measured ({why})", PROBLEM_WIDTH)
    return lines


def _finish(figure, title: str, missing: list[str]) -> None:
    """A title above, what was not measured below; the axes get the rest."""
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, int(TITLE_LETTERS * width))
    below, above = LINE_INCHES * len(missing) / height, (0.2 + LINE_INCHES * len(lines)) / height
    figure.suptitle("\n".join(lines), fontsize=11, y=1 - 0.1 / height, va="top")
    if missing:
        figure.text(0.01, 0.05 / height, "\n".join(missing), fontsize=8, va="bottom", color="dimgray")
    figure.get_layout_engine().set(rect=(0, below, 1, 1 - below - above))


# --- step times


def _step_time(Figure, stages: list[Row], ladder: list[Row], environment: Environment):
    measured = [[row for row in rows if not row.problem] for rows in (stages, ladder)]
    panels = [(paint, rows) for paint, rows in zip((_stage_bars, _ladder_bars), measured) if rows]
    missing = _missing([*stages, *ladder])
    bars = max((len(rows) for _, rows in panels), default=0)
    height = 1.9 + BAR_INCHES * bars + LINE_INCHES * len(missing)
    figure = Figure(figsize=(SIDE * max(1, len(panels)), height), layout="constrained")
    for axes, (paint, rows) in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels):
        paint(axes, rows)
    if not panels:
        figure.axes[0].set_axis_off()
    _finish(figure, f"Training steps: {_heading(environment)}", missing)
    return figure


def _stage_bars(axes, rows: list[Row]) -> None:
    names = [_wrapped(row.name if row.data == "made up" else f"{row.name}, real data") for row in rows]
    left = [0.0] * len(rows)
    for part, colour in PARTS.items():
        widths = [getattr(row.figures.milliseconds, part) * IMAGES / row.setting.global_batch for row in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=part, height=0.6)
        left = [start + width for start, width in zip(left, widths)]
    labels = [f"{row.figures.images_per_second:,.0f} images/s{_mfu(row)}" for row in rows]
    _name_bars(axes, names, left, labels)
    axes.set_xlabel(f"ms for {IMAGES:,} images")
    axes.set_title("Stages", fontsize=10, pad=22)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(PARTS), fontsize=8, frameon=False)


def _ladder_bars(axes, rows: list[Row]) -> None:
    rates = [row.figures.images_per_second for row in rows]
    axes.barh(range(len(rows)), rates, color=BLUE, height=0.6)
    labels = [f"{rate:,.0f} ({rate / rates[0]:.2f}x){_mfu(row)}" for rate, row in zip(rates, rows)]
    _name_bars(axes, [_wrapped(row.name) for row in rows], rates, labels)
    axes.set_xlabel("images/s (times the first)")
    axes.set_title("Ladder: each line switches one thing on", fontsize=10, pad=22)


def _mfu(row: Row) -> str:
    return "" if row.mfu is None else f", MFU {100 * row.mfu:.0f} %"


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(name, NAME_WIDTH)[:2])


def _name_bars(axes, names: list[str], ends: list[float], labels: list[str]) -> None:
    """From the top down, each with its label behind its end; there is room for the longest."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(ends) * 1.55)
    for number, (end, label) in enumerate(zip(ends, labels)):
        axes.annotate(label, (end, number), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# --- roofline


def _roofline(Figure, rows: list[Row], environment: Environment):
    measured, missing = [row for row in rows if not row.problem], _missing(rows)
    across, down = min(2, max(1, len(measured))), max(1, -(-len(measured) // 2))
    figure = Figure(figsize=(SIDE * across + 0.6, 5.6 * down + LINE_INCHES * len(missing)), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, row in zip(panels, measured):
        _roofline_panel(axes, row, environment)
    for axes in panels[len(measured) :]:
        axes.set_axis_off()
    known = environment.peak_tflops and environment.bandwidth_gbs
    _finish(figure, f"Roofline: {_heading(environment)}{'' if known else '; no peak known, no roof'}", missing)
    return figure


def _roofline_panel(axes, row: Row, environment: Environment) -> None:
    """Categories whose work is known by formula, at what a GPU attained in their own time. Hollow marks: some of them
    lie upon each other."""
    points = roofline_points(row.profile)
    intensities = [flops_per_byte for _, flops_per_byte, _ in points] or [1.0]
    for name, x, y in points:
        mark, colour = MARKS[name]
        label = f"{name}: {y:,.3g} TFLOP/s, {1e3 * y / x:,.0f} GB/s"
        axes.plot(x, y, mark, color=colour, fillstyle="none", markersize=10, markeredgewidth=2, label=label)
    low, high = min(*intensities, 0.2) / 1.5, max(*intensities, 300.0) * 3
    axes.set(xscale="log", yscale="log", xlabel="FLOP for each byte that must be moved", ylabel="TFLOP/s of a GPU")
    peak, bandwidth = environment.peak_tflops, environment.bandwidth_gbs
    if peak and bandwidth:
        ridge = 1e3 * peak / bandwidth
        xs = [low, ridge, max(high, 2 * ridge)]
        ys = [min(peak, bandwidth * x / 1e3) for x in xs]
        label = f"roof: {peak:,.0f} TFLOP/s (bf16), {bandwidth:,.0f} GB/s"
        axes.plot(xs, ys, color="black", linewidth=1.2, zorder=0, label=label)
    else:
        axes.set_xlim(low, high)
    unknown = [name for name in row.profile.categories if name not in {name for name, _, _ in points}]
    left_out = textwrap.wrap(f"no formula: {', '.join(unknown)}", 70) if unknown else []
    axes.set_title("\n".join([row.name, *left_out]), fontsize=9)
    axes.grid(True, which="major", linewidth=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, fontsize=7, frameon=False)


def roofline_points(profile: Profile) -> list[tuple[str, float, float]]:
    """(category, FLOP / byte, TFLOP/s) of those that took time and have work known by formula
    (mdit.bench.roofline.category_work)."""
    points = []
    for name, work in profile.work.items():
        if ms := profile.categories.get(name):
            points.append((name, work.flops / work.bytes, work.flops / ms / 1e9))
    return points
