"""One run of the benchmark: which rows are still to be measured, and for which of them there is time."""

import time
from collections.abc import Sequence
from pathlib import Path

from mdit.bench.clock import largest
from mdit.bench.ladder import climb
from mdit.bench.plots import draw
from mdit.bench.profile import profile_step, summary
from mdit.bench.report import Report
from mdit.bench.roofline import category_work
from mdit.bench.row import OUT_OF_MEMORY, BenchmarkRow, Work, one_line
from mdit.bench.stages import Job, attempt
from mdit.config import UserError
from mdit.dist import World
from mdit.files import write_text

JSON, MARKDOWN = "throughput.json", "throughput.md"

PROFILED_STEPS = 1  # beside one that starts the profiler: a step has thousands of kernels


class Session:
    """Adds rows to `report` until `deadline` (of time.monotonic); what was left out for want of time is in `missing`.

    All of it is a collective of all ranks; rank 0 prints, and writes `directory`, if any, after every row.
    """

    def __init__(
        self, report: Report, world: World, deadline: float, *, directory: Path | None, prices: Sequence[float]
    ) -> None:
        self.report, self.world, self.deadline, self.directory, self.prices = report, world, deadline, directory, prices
        self.missing: list[str] = []

    def add(self, *rows: BenchmarkRow) -> None:
        self.report.add(*rows)
        self.write()

    def write(self) -> None:
        if self.directory is not None and self.world.is_first:
            self.report.save(self.directory / JSON)
            write_text(self.directory / MARKDOWN, self.report.markdown(self.prices))

    def stages(self, jobs: Sequence[Job], *, warm_up: int | None, steps: int, seconds: float) -> None:
        """A row for each job, and for half its micro-batch where there was no memory, and so on."""
        longest, waiting = 0.0, list(jobs)
        while waiting:
            job = waiting.pop(0)
            row = self.report.find(job.row(self.world))
            if row is None:
                left = self.left()
                if longest > left:
                    self.missing.append(f"{job.row(self.world).name}, micro-batch {job.micro_batch}")
                    continue
                row = attempt(job, self.world, warm_up=warm_up, steps=steps, seconds=seconds)
                self.add(row)
                longest = max(longest, left - self.left())
                self.tell(one_line(row))
            if row.ran_out_of_memory and (smaller := job.halved()):
                waiting.insert(0, smaller)

    def ladder(self, job: Job, *, parity_steps: int, steps: int, seconds: float) -> None:
        """From the paper's model to ours at a job's shapes, in the time that is left. Where the paper's model finds no
        memory, all of it is done with a smaller micro-batch: the others are compared with it."""
        earlier = [row for row in self.report.of_kind("ladder") if row.recipe == job.config.name]
        if earlier and not any(row.is_open for row in earlier):
            return
        warm_up, on_gpu = max(1, parity_steps // 5), self.world.device.type == "cuda"
        traced = "" if on_gpu else "; what is compiled is traced only, since a CPU's compiler takes minutes"
        self.tell(f"\nladder: the learning rate warms up over {warm_up} steps, so that losses move{traced}")
        told: set[str] = set()

        def save(rows: list[BenchmarkRow]) -> None:
            if rows[0].ran_out_of_memory and job.halved():
                raise _TooLarge
            self.add(*rows)
            for row in rows:
                if row.name not in told and not row.is_open:
                    told.add(row.name)
                    self.tell(one_line(row))

        while True:
            try:
                rows = climb(
                    job.learning(warm_up).config,
                    job.settings,
                    job.ds_config,
                    self.world,
                    steps=steps,
                    seconds=seconds,
                    parity_steps=min(10, parity_steps),
                    long_parity_steps=parity_steps,
                    budget_s=round(self.left()),
                    backend="inductor" if on_gpu else "eager",
                    save=save,
                )
                break
            except _TooLarge:
                self.tell(f"the paper's model: {OUT_OF_MEMORY} at micro-batch {job.micro_batch}")
                job = job.halved()
        self.missing += [f"{row.name} (ladder)" for row in rows if row.is_open]

    def profile(self, job: Job) -> None:
        """Where a step goes; the trace lies in the report's directory."""
        row = job.row(self.world, kind="profile")
        earlier = self.report.find(row)
        if earlier is not None:
            self.tell(summary(earlier))
            return
        if self.left() <= 0:
            self.missing.append(f"{row.name} (profile)")
            return
        directory = self.directory if self.world.is_first else None
        with job.trial(self.world) as trial:
            trial.losses(1)
            found = profile_step(trial.step, device=self.world.device, directory=directory, steps=PROFILED_STEPS)
        work = {name: Work(**one) for name, one in category_work(job.config, row.setting.model_dump()).items()}
        row = row.with_(profile=found.model_copy(update={"work": work}))
        self.add(row)
        self.tell("\n" + summary(row))

    def plots(self, directory: Path) -> None:
        if not self.world.is_first:
            return
        try:
            for path in draw(self.report, directory):
                self.tell(f"drawn: {path}")
        except UserError as error:
            self.tell(f"not drawn: {error}")

    def left(self) -> float:
        """Seconds until the deadline, the same on all ranks."""
        return -largest(time.monotonic() - self.deadline, self.world)

    def tell(self, text: str) -> None:
        if self.world.is_first:
            print(text, flush=True)


class _TooLarge(Exception):
    """The ladder's first rung found no memory."""
