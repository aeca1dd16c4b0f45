"""Our model against another one, in one process: they train in turn, on the same batches and the same machine.

On a GPU contenders take turns of several steps, and the one that waits leaves the device: its weights wait in host
memory, masters and moments start anew with its next turn, so that each has all memory when it runs. On a CPU they take
turns step by step.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from mdit.bench.clock import Marks, median_step
from mdit.bench.contenders import PRECISIONS, Contender, in_one_line
from mdit.bench.report import Report, environment
from mdit.bench.row import OUT_OF_MEMORY, BenchmarkRow, Measured, StepTime, describe
from mdit.dist import World
from mdit.parallel.settings import RunSettings

OURS, BASELINE = "ours", "baseline"
FASTER = 1.02  # twice the micro-batch has to bring so much for the search to go on
SEARCHED = "search"  # the pairing of rows that stand alone
HEADER = (
    "| pairing | who | images | images/s | step ms | forward | backward | optimizer | GiB | TFLOP/s | MFU |\n"
    f"|{'---|' * 11}"
)


class Figures(NamedTuple):
    """Of the steps measured: `milliseconds` as in mdit.bench.row, and those of the `fastest` step, which tells more
    where other programs share the machine; `peak_gib` None on a CPU."""

    micro_batch: int
    steps: int
    milliseconds: dict[str, float]
    fastest: float
    peak_gib: float | None

    @property
    def images_per_second(self) -> float:
        return 1e3 * self.micro_batch / self.milliseconds["step"]


@dataclass(frozen=True)
class Pace:
    """Turns of each contender, in each so many steps that are not measured, and that are."""

    rounds: int
    warm_up: int
    steps: int


PACES = {"cuda": Pace(rounds=3, warm_up=2, steps=5), "cpu": Pace(rounds=5, warm_up=0, steps=1)}
SEARCH = Pace(rounds=1, warm_up=1, steps=3)


def alternate(
    turns: list[tuple[Contender, int]], pace: Pace, *, compiled: list[bool], backend: str | Callable = "inductor"
) -> list[Figures | str]:
    """Figures of each (contender, micro-batch), or why there are none: the others go on without it."""
    found: list[list[dict[str, float]]] = [[] for _ in turns]
    peaks, problems = [0.0] * len(turns), {}
    with ExitStack() as stack:
        for (contender, _), compile in zip(turns, compiled):
            if compile:
                stack.enter_context(contender.compiling(backend))
        for number in range(pace.rounds):
            order = range(len(turns)) if number % 2 == 0 else reversed(range(len(turns)))
            for i in order:
                if i in problems:
                    continue
                contender, micro_batch = turns[i]
                try:
                    steps, peak = turn(contender, micro_batch, pace, first=number == 0)
                    found[i] += steps
                    peaks[i] = max(peaks[i], peak)
                except torch.OutOfMemoryError:
                    problems[i] = f"{OUT_OF_MEMORY} at micro-batch {micro_batch}"
                except Exception as error:  # whatever a compiler or a driver may say: the others still count
                    problems[i] = in_one_line(error)
                if i in problems or contender.device.type == "cuda":
                    contender.leave()
    return [
        problems.get(i) or summed_up(micro_batch, found[i], peaks[i] or None)
        for i, (_, micro_batch) in enumerate(turns)
    ]


def summed_up(micro_batch: int, steps: list[dict[str, float]], peak_gib: float | None) -> Figures:
    fastest = min(sum(step.values()) for step in steps)
    return Figures(micro_batch, len(steps), median_step(steps), fastest, peak_gib)


def turn(contender: Contender, micro_batch: int, pace: Pace, *, first: bool) -> tuple[list[dict[str, float]], float]:
    """-> the milliseconds of every step measured, and the peak in GiB (0 on a CPU). What is compiled is compiled in the
    first turn, whose steps may be far from the median, so one more is not measured."""
    on_gpu, marks = contender.device.type == "cuda", Marks(contender.device)
    if contender.optimizer is None:
        contender.arrive()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(contender.device)
    for _ in range(pace.warm_up + first):
        contender.step(micro_batch, marks)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    marks.begin()
    for _ in range(pace.steps):
        contender.step(micro_batch, marks)
    steps = marks.end(wait)
    return steps, torch.cuda.max_memory_reserved(contender.device) / 2**30 if on_gpu else 0.0


def best_micro_batch(measure: Callable[[int], Figures | str], start: int, largest: int) -> Figures | None:
    """The fastest of `start` and its doubles up to `largest`, as long as each is faster than the one before; where
    `start` does not fit into memory, the first of its halves that does. None where nothing can be measured."""
    best, size = None, start
    while size >= 1:
        found = measure(size)
        if isinstance(found, str):
            if best is not None or not found.startswith(OUT_OF_MEMORY):
                return best
            size //= 2
            continue
        if best is not None and found.images_per_second < FASTER * best.images_per_second:
            return max(best, found, key=lambda figures: figures.images_per_second)
        best = found
        if size < start or 2 * size > largest:
            return best
        size *= 2
    return None


@dataclass
class Contest:
    """Pairings, searches, and a row for everything measured, which goes to `out`/baseline.json and to the screen.

    `kernels`: the ops of our model that run in Triton. In every mode of `modes` ("eager", "compiled") both are measured
    in turn at `micro_batch`, then each at its doubles up to `max_micro_batch` as long as that brings something; at last
    both in turn as each was fastest. Nothing is begun that would not end within `budget_s` seconds, as far as what was
    measured tells.
    """

    contenders: dict[str, Contender]
    world: World
    kernels: list[str]
    micro_batch: int
    max_micro_batch: int
    rounds: int
    modes: list[str]
    budget_s: float
    out: Path | None = None
    backend: str | Callable = "inductor"
    found: list[BenchmarkRow] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)
    longest: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def run(self) -> None:
        print(HEADER)
        for mode in self.modes:
            self.pair(f"same, {mode}", {who: (mode, self.micro_batch) for who in self.contenders})
            for who in (BASELINE, OURS):
                self.search(who, mode)
        best = {who: self.best(who) for who in self.contenders}
        same = [f"same, {mode}" for mode in self.modes if set(best.values()) == {(mode, self.micro_batch)}]
        if all(best.values()) and not same:
            self.pair("best", best)
        for line in [*ratios(self.found), *(f"best: as {name}" for name in same)]:
            print(line)

    def pair(self, pairing: str, turns: dict[str, tuple[str, int]]) -> None:
        """Measure contenders in turn, each in a mode and at a micro-batch."""
        pace = PACES[self.world.device.type]
        self.measure(pairing, turns, Pace(self.rounds, pace.warm_up, pace.steps))

    def search(self, who: str, mode: str) -> None:
        """Measure at larger micro-batches, where memory does not suffice at smaller ones."""

        def measure(size: int) -> Figures | str:
            for row in self.found:
                if (row.contender, mode_of(row), row.setting.micro_batch) == (who, mode, size):
                    return row.problem or figures_of(row)
            return self.measure(SEARCHED, {who: (mode, size)}, SEARCH)[0]

        best_micro_batch(measure, self.micro_batch, self.max_micro_batch)

    def best(self, who: str) -> tuple[str, int] | None:
        """(mode, micro-batch) that was the fastest so far."""
        measured = [row for row in self.found if row.contender == who and row.problem is None]
        row = max(measured, key=lambda row: row.figures.images_per_second, default=None)
        return row and (mode_of(row), row.setting.micro_batch)

    def measure(self, pairing: str, turns: dict[str, tuple[str, int]], pace: Pace) -> list[Figures | str]:
        before = time.perf_counter()
        compiled = [mode == "compiled" for mode, _ in turns.values()]
        contenders = [(self.contenders[who], size) for who, (_, size) in turns.items()]
        if before - self.started + self.longest[any(compiled)] > self.budget_s:
            figures = [f"no time was left of {self.budget_s:g} s"] * len(turns)
        else:
            figures = alternate(contenders, pace, compiled=compiled, backend=self.backend)
            self.longest[any(compiled)] = max(self.longest[any(compiled)], time.perf_counter() - before)
        for (who, (mode, size)), measured in zip(turns.items(), figures):
            self.found.append(self.row(pairing, who, mode, size, measured))
            print(line(self.found[-1]), flush=True)
        if self.out is not None:
            here = environment(self.world.device)
            Report(environment=here, command=" ".join(sys.argv), rows=self.found).save(self.out / "baseline.json")
        return figures

    def row(self, pairing: str, who: str, mode: str, micro_batch: int, measured: Figures | str) -> BenchmarkRow:
        contender = self.contenders[who]
        sizes = {"train_batch_size": micro_batch, "train_micro_batch_size_per_gpu": micro_batch}
        bf16 = {"enabled": contender.precision != "fp32"}
        row = describe(
            kind="baseline",
            name=f"{who}, {mode}",
            config=self.contenders[OURS].config,
            settings=RunSettings(compile=mode == "compiled"),
            ds_config=sizes | {"bf16": bf16, "zero_optimization": {"stage": 0}},
            world=self.world,
            kernels=self.kernels if who == OURS else [],
        )
        setting = row.setting.model_copy(update={"weights": PRECISIONS[contender.precision]})
        row = row.with_(setting=setting, parameters=contender.parameters, contender=who, pairing=pairing)
        if isinstance(measured, str):
            return row.with_(problem=measured)
        return row.with_(measured=measured_by(measured, contender.first_losses()))


def mode_of(row: BenchmarkRow) -> str:
    return "compiled" if row.setting.compile else "eager"


def measured_by(figures: Figures, losses: list[float]) -> Measured:
    return Measured(
        steps=figures.steps,
        images_per_second=figures.images_per_second,
        milliseconds=StepTime(**figures.milliseconds),
        fastest_ms=figures.fastest,
        peak_gib=figures.peak_gib,
        losses=tuple(losses),
    )


def figures_of(row: BenchmarkRow) -> Figures:
    found = row.figures
    milliseconds = found.milliseconds.model_dump(exclude_none=True)
    return Figures(row.setting.micro_batch, found.steps, milliseconds, found.fastest_ms, found.peak_gib)


def line(row: BenchmarkRow) -> str:
    cells = [row.pairing, row.name, str(row.setting.micro_batch)]
    if row.problem:
        return f"| {' | '.join([*cells, row.problem.replace('|', '/'), *['-'] * 7])} |"
    found, ms = row.figures, row.figures.milliseconds
    cells += [f"{found.images_per_second:,.2f}"]
    cells += [f"{part:,.1f}" for part in (ms.step, ms.forward, ms.backward, ms.optimizer)]
    cells += ["-" if found.peak_gib is None else f"{found.peak_gib:.1f}", f"{row.tflops:.3g}"]
    cells += ["-" if row.mfu is None else f"{row.mfu:.1%}"]
    return f"| {' | '.join(cells)} |"


def ratios(found: list[BenchmarkRow]) -> list[str]:
    """Our images/s over the baseline's, by the median and by the fastest steps: of every pairing that has both."""
    lines = []
    for pairing in dict.fromkeys(row.pairing for row in found if row.pairing != SEARCHED):
        pair = {row.contender: row for row in found if row.pairing == pairing}
        if any(row.problem for row in pair.values()):
            lines.append(f"{pairing}: no ratio, as one of them has no figures")
            continue
        ours, theirs = pair[OURS], pair[BASELINE]
        sizes = [row.setting.micro_batch for row in (ours, theirs)]
        ratio = ours.figures.images_per_second / theirs.figures.images_per_second
        fastest = sizes[0] / sizes[1] * theirs.figures.fastest_ms / ours.figures.fastest_ms
        sides = " against ".join(f"{row.name}, {size} images" for row, size in zip((ours, theirs), sizes))
        lines.append(
            f"{pairing}: {ratio:.2f} times the images/s of the baseline, {fastest:.2f} by fastest steps ({sides})"
        )
    return lines
