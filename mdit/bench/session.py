"""One run of the benchmark: which rows are still to be measured, and for which of them there is time."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdit.bench.ladder import Ladder
from mdit.bench.plots import draw
from mdit.bench.profile import profile_step, summary
from mdit.bench.report import Report
from mdit.bench.roofline import category_work
from mdit.bench.row import BenchmarkRow, one_line
from mdit.bench.stages import Job, attempt
from mdit.bench.timing import largest
from mdit.dist import World
from mdit.files import write_text

JSON, MARKDOWN = "throughput.json", "throughput.md"


@dataclass
class Session:
    """Adds rows to `report` until `deadline` (of time.monotonic); what was left out for want of time is in `missing`.

    All of it is a collective of all ranks; rank 0 prints, and writes `directory`, if any, after every row.
    """

    report: Report
    world: World
    deadline: float
    directory: Path | None
    prices: Sequence[float]
    missing: list[str] = field(default_factory=list)

    def add(self, *rows: BenchmarkRow) -> None:
        self.report.add(*rows)
        self.write()

    def write(self) -> None:
        if self.directory is not None and self.world.is_rank_zero:
            self.report.save(self.directory / JSON)
            write_text(self.directory / MARKDOWN, self.report.markdown(self.prices))

    def stages(self, jobs: Sequence[Job], *, warm_up: int | None, steps: int, seconds: float) -> None:
        """A row for each job, and for half its micro-batch where there was no memory, and so on."""
        longest, waiting = 0.0, list(jobs)
        while waiting:
            job = waiting.pop(0)
            row = job.row(self.world)
            if (settled := self.report.find(row)) is None:
                left = self.left()
                if longest > left:
                    self.missing.append(f"{row.name}, micro-batch {job.micro_batch}")
                    continue
                settled = measure_stage(job, self.world, warm_up=warm_up, steps=steps, seconds=seconds)
                self.add(settled)
                longest = max(longest, left - self.left())
                print_rank0(self.world, one_line(settled))
            if settled.ran_out_of_memory and (smaller := job.halved()):
                waiting.insert(0, smaller)

    def ladder(self, job: Job, *, parity_steps: int, steps: int, seconds: float) -> None:
        """From the paper's model to ours at a job's shapes, in the time that is left."""
        earlier = [row for row in self.report.of_kind("ladder") if row.recipe == job.config.name]
        if earlier and not any(row.is_open for row in earlier):
            return
        warm_up, on_gpu = max(1, parity_steps // 5), self.world.device.type == "cuda"
        traced = "" if on_gpu else "; what is compiled is traced only, since a CPU's compiler takes minutes"
        print_rank0(
            self.world, f"\nladder: the learning rate warms up over {warm_up} steps, so that losses move{traced}"
        )
        ladder = Ladder(
            job.learning(warm_up),
            self.world,
            steps=steps,
            seconds=seconds,
            parity_steps=parity_steps,
            backend="inductor" if on_gpu else "eager",
        )
        printed: set[str] = set()
        rows: list[BenchmarkRow] = []
        for rows in ladder.climb(round(self.left())):
            self.add(*rows)
            for row in rows:
                if row.name not in printed and not row.is_open:
                    printed.add(row.name)
                    print_rank0(self.world, one_line(row))
        self.missing += [f"{row.name} (ladder)" for row in rows if row.is_open]

    def profile(self, job: Job) -> None:
        """Profile a step; the trace lies in the report's directory."""
        row = job.row(self.world, kind="profile")
        earlier = self.report.find(row)
        if earlier is None and self.left() <= 0:
            self.missing.append(f"{row.name} (profile)")
            return
        if earlier is None:
            directory = self.directory if self.world.is_rank_zero else None
            with job.run(self.world) as run:
                run.losses(1)
                found = profile_step(run.step, device=self.world.device, directory=directory)
            work = category_work(job.config, row.setting)
            earlier = row.with_(profile=found.model_copy(update={"work": work}))
            self.add(earlier)
        print_rank0(self.world, "\n" + summary(earlier))

    def left(self) -> float:
        """Seconds until the deadline, the same on all ranks."""
        return -largest(time.monotonic() - self.deadline, self.world)


def measure_stage(job: Job, world: World, *, warm_up: int | None, steps: int, seconds: float) -> BenchmarkRow:
    """The row of a job, with its memory by part."""
    if warm_up is None:  # a step of several micro-batches has seen all shapes
        warm_up = 2 if job.share == job.micro_batch else 1

    def measure():
        with job.run(world) as run:
            measured = run.measure(warm_up=warm_up, steps=steps, seconds=seconds)
            return measured.model_copy(update={"memory_gib": run.memory()})

    return attempt(job.row(world), measure, world)


def print_plots(report: Report, directory: Path) -> None:
    """Draw the report's pictures, and name them. Raises UserError where matplotlib is not installed."""
    print(*(f"drawn: {path}" for path in draw(report, directory)), sep="\n", flush=True)


def print_rank0(world: World, text: str) -> None:
    if world.is_rank_zero:
        print(text, flush=True)
