"""One run of the benchmark: which rows are still to be measured, and for which of them there is time."""

import time
from collections.abc import Sequence
from pathlib import Path

from mdit.bench.clock import largest
from mdit.bench.ladder import climb
from mdit.bench.plots import draw
from mdit.bench.profile import profile_step, summary
from mdit.bench.report import Report, is_open
from mdit.bench.roofline import category_work
from mdit.bench.rows import Row, facts_of, problem_row
from mdit.bench.stages import OUT_OF_MEMORY, Job, attempt, ran_out_of_memory
from mdit.config import UserError
from mdit.dist import World

PROFILED_STEPS = 1  # beside one that starts the profiler: a step has thousands of kernels


class Session:
    """Puts rows into `report` until `deadline` (of time.monotonic); what was left out for want of time is in `missing`.

    All of it is a collective of all ranks; rank 0 prints.
    """

    def __init__(self, report: Report, world: World, deadline: float) -> None:
        self.report, self.world, self.deadline = report, world, deadline
        self.missing: list[str] = []

    def stages(self, jobs: Sequence[Job], *, warm_up: int | None, steps: int, seconds: float) -> None:
        """A row for each job, and for half its micro-batch where there was no memory, and so on."""
        longest, waiting = 0.0, list(jobs)
        while waiting:
            job = waiting.pop(0)
            facts = job.facts(self.world)
            row = self.report.find(problem_row(problem="", **facts))
            if row is None:
                left = self.left()
                if longest > left:
                    self.missing.append(f"{facts['name']}, micro-batch {job.micro_batch}")
                    continue
                row = attempt(job, self.world, warm_up=warm_up, steps=steps, seconds=seconds)
                self.report.add(row)
                longest = max(longest, left - self.left())
                self.tell(_told(row))
            if ran_out_of_memory(row) and (smaller := job.halved()):
                waiting.insert(0, smaller)

    def ladder(self, job: Job, *, parity_steps: int, steps: int, seconds: float) -> None:
        """From the paper's model to ours at a job's shapes, in the time that is left. Where the paper's model finds no
        memory, all of it is done with a smaller micro-batch: the others are compared with it."""
        earlier = [row for row in self.report.rows if row["kind"] == "ladder" and row["recipe"] == job.config.name]
        if earlier and not any(map(is_open, earlier)):
            return
        warm_up, on_gpu = max(1, parity_steps // 5), self.world.device.type == "cuda"
        traced = "" if on_gpu else "; what is compiled is traced only, since a CPU's compiler takes minutes"
        self.tell(f"\nladder: the learning rate warms up over {warm_up} steps, so that losses move{traced}")
        told: set[str] = set()

        def save(rows: list[Row]) -> None:
            if ran_out_of_memory(rows[0]) and job.halved():
                raise _TooLarge
            self.report.add(*rows)
            for row in rows:
                if row["name"] not in told and not is_open(row):
                    told.add(row["name"])
                    self.tell(_told(row))

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
        self.missing += [f"{row['name']} (ladder)" for row in rows if is_open(row)]

    def profile(self, job: Job) -> None:
        """Where a step goes; the trace lies in the report's directory."""
        facts = facts_of(**job.facts(self.world, kind="profile"))
        earlier = self.report.find(facts | {"problem": None})
        if earlier is not None:
            self.tell(summary(earlier))
            return
        if self.left() <= 0:
            self.missing.append(f"{facts['name']} (profile)")
            return
        directory = self.report.directory if self.world.is_first else None
        with job.trial(self.world) as trial:
            trial.losses(1)
            found = profile_step(trial.step, device=self.world.device, directory=directory, steps=PROFILED_STEPS)
        work = category_work(job.config, facts["setting"])
        row = facts | {"problem": None, "parity": None, "losses": [], "work": work} | found
        self.report.add(row)
        self.tell("\n" + summary(row))

    def plots(self, directory: Path) -> None:
        if not self.world.is_first:
            return
        try:
            for path in draw(self.report.content, directory):
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


def _told(row: Row) -> str:
    """A row as soon as it is there."""
    setting = row["setting"]
    which = f"{row['name']}, micro-batch {setting['micro_batch']} of {setting['global_batch']}"
    if row["problem"]:
        return f"{which}: {row['problem']}"
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    return f"{which}: {row['images_per_second']:,.0f} images/s, {row['milliseconds']['step']:,.1f} ms a step{mfu}"
