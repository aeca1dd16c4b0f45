"""From the paper's model to ours, one technique after the other: what each brings, and what it changes.

Every step of the ladder is a BenchmarkRun of its own, from the same weights, on the same batches and random numbers.
From `+ OP` on a step keeps what the steps before it added; what fails or cannot run here is left out of the steps after
it. Its parity says how far its losses are from those of the first step.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from mdit.bench.row import NOT_MEASURED, BenchmarkRow, Measured, Parity
from mdit.bench.run import BenchmarkRun
from mdit.bench.stages import Job, attempt
from mdit.bench.timing import largest
from mdit.config import ModelConfig, UserError
from mdit.dist import World, logger
from mdit.kernels.dispatch import FP8
from mdit.kernels.selection import choose_kernels
from mdit.parallel.fp8 import check_fp8

ORDER = ("patch_mixing", "swiglu", "expert_choice", "masked_attention")  # in which ops are switched to Triton
SHORT_PARITY = 10  # steps
WARM_UP = 2  # steps before those measured, beside the steps of the parity
BUILD_S = 5.0  # torch.compile of one block, forward and backward, until a step has shown how long it takes; assumed
NEEDS_A_GPU = "needs a GPU"


@dataclass(frozen=True)
class LadderStep:
    """`adds`: what it brings to the step before it, and what later ones do without where that fails; "" for the four
    that stand for themselves. `plain`: the paper's model, nothing fused. `times`: the micro-batch."""

    name: str
    adds: str = ""
    plain: bool = False
    kernels: tuple[str, ...] = ()
    compile: bool = False
    times: int = 1
    fp8: bool = False

    def without(self, lost: set[str]) -> "LadderStep":
        kept = tuple(op for op in self.kernels if op not in lost)
        compile = self.compile and not (self.adds and "compile" in lost)
        return replace(self, kernels=kept, compile=compile, times=1 if "micro-batch" in lost else self.times)

    def of(self, job: Job) -> Job:
        """The job as this step runs it; `job` gives activation checkpointing, which the plain model does without."""
        job, changes = job.enlarged(self.times), {"fp8": self.fp8, "compile": self.compile}
        changes |= {"activation_checkpointing": "none"} if self.plain else {}
        settings = job.execution.settings.model_copy(update=changes)
        return replace(job, execution=replace(job.execution, settings=settings, triton_ops=frozenset(self.kernels)))


LADDER = (
    LadderStep("as published", plain=True),
    LadderStep("as published, compiled", plain=True, compile=True),
    LadderStep("experts by index"),  # fused in PyTorch
    LadderStep("experts by index, compiled", compile=True),
    *(LadderStep(f"+ {op} in Triton", op, kernels=ORDER[: i + 1]) for i, op in enumerate(ORDER)),
    LadderStep("+ torch.compile", "compile", kernels=ORDER, compile=True),
    LadderStep("+ micro-batch x 2", "micro-batch", kernels=ORDER, compile=True, times=2),
    LadderStep("+ float8", FP8, kernels=(*ORDER, FP8), compile=True, times=2, fp8=True),
)
FIRST = LADDER[0]


def in_measuring_order() -> list[LadderStep]:
    """Steps in order: those that need a compiler come last, as it takes minutes; of them our own model first."""
    return sorted(LADDER, key=lambda step: (step.times, step.compile, step.compile and not step.kernels))


@dataclass
class Ladder:
    """The ladder of a job. A collective of all ranks.

    A step is measured over `steps` optimizer steps, more where `seconds` have room for them, after those in which its
    losses are compared: `parity_steps` for the first step and those with all kernels, SHORT_PARITY at most for the
    others. Where the first step finds no memory, all are measured with a smaller micro-batch: they are compared with
    it. Raises UserError for experts or tensors that are spread over processes.
    """

    job: Job
    world: World
    steps: int = 5
    seconds: float = 5.0
    parity_steps: int = 10
    backend: str | Callable = "inductor"
    lost: set[str] = field(default_factory=set)
    first_losses: Sequence[float] = ()

    def __post_init__(self) -> None:
        execution = self.job.execution
        if execution.settings.expert_parallel > 1 or execution.settings.tensor_parallel > 1:
            raise UserError("the ladder measures whole blocks: expected expert_parallel = 1 and tensor_parallel = 1")
        options = self.world.device, execution.dtype, self.job.config.model.head_dim, "the ladder", True
        self.triton_ops, self.kernels_reason = choose_kernels("auto", *options)

    def climb(self, budget_s: float = float("inf")) -> Iterator[list[BenchmarkRow]]:
        """The rows of all steps, in LADDER's order, whenever one has changed.

        No step is begun that would not end within `budget_s` seconds, as far as those before it tell; the first one
        that is compiled is taken to need BUILD_S a block besides. On one process a step that is not done by then is
        broken off.
        """
        problem = f"{NOT_MEASURED}: no time was left of {budget_s:g} s"
        rows = {step: self.row(step).with_(problem=problem) for step in LADDER}
        started, longest = time.perf_counter(), {}
        try:
            for step in in_measuring_order():
                before = time.perf_counter()
                left = budget_s - largest(before - started, self.world)
                if expected_seconds(step, longest, self.job.config.model) > left:
                    continue
                with no_longer_than(left if self.world.size == 1 else float("inf")):
                    rows[step] = self.measure(step)
                taken = largest(time.perf_counter() - before, self.world)
                longest[step.compile] = max(longest.get(step.compile, 0.0), taken)
                yield list(rows.values())
        except _TimeIsUp:
            pass  # its row says so, and all that are left
        yield list(rows.values())

    def row(self, step: LadderStep) -> BenchmarkRow:
        return step.of(self.job).row(self.world, "ladder", step.name)

    def measure(self, step: LadderStep) -> BenchmarkRow:
        """The row of a step, which says whatever goes wrong in it."""
        reduced = step.without(self.lost)
        row = self.row(reduced)
        if problem := self.hindrance(step):
            row = row.with_(problem=problem)
        else:
            row = attempt(row, lambda: self.figures(reduced), self.world, alone=True)
        if step == FIRST and row.ran_out_of_memory and (smaller := self.job.halved()):
            logger.info(f"{step.name}: {row.problem}")
            self.job = smaller
            return self.measure(step)
        if row.problem:
            self.lost |= {step.adds} - {""}
        return row

    def hindrance(self, step: LadderStep) -> str | None:
        """The reason why a step cannot be measured on this machine, if any."""
        if self.world.device.type != "cuda" and step.kernels and step.adds != "micro-batch":
            return NEEDS_A_GPU
        if step.adds in ORDER and step.adds not in self.triton_ops:
            return self.kernels_reason
        if step.fp8:
            execution = step.of(self.job).execution
            bf16 = execution.dtype == torch.bfloat16
            try:
                check_fp8(execution.settings, self.world.device, bf16, self.triton_ops, "the ladder")
            except UserError as error:
                return str(error)
        return None

    def figures(self, step: LadderStep) -> Measured:
        """Figures with their parity. A larger global batch is another training: there float8, which changes what is
        computed, is compared at the first micro-batch, uncompiled, and the micro-batch not at all."""
        long = step == FIRST or set(ORDER) <= set(step.kernels)
        parity_steps = self.parity_steps if long else min(SHORT_PARITY, self.parity_steps)
        comparable = step.of(self.job).execution.global_batch == self.job.execution.global_batch
        losses: Sequence[float] = ()
        if step.fp8 and not comparable:
            with self.run(replace(step, compile=False, times=1)) as run:
                losses = run.losses(parity_steps)
        with self.run(step) as run:
            losses = run.losses(parity_steps) if comparable else losses
            measured = run.measure(warm_up=WARM_UP, steps=self.steps, seconds=self.seconds)
        if step == FIRST:
            self.first_losses = losses
        found = parity(losses, self.first_losses) if losses and self.first_losses else None
        return measured.model_copy(update={"losses": tuple(losses), "parity": found})

    def run(self, step: LadderStep) -> BenchmarkRun:
        return step.of(self.job).run(self.world, plain=step.plain, backend=self.backend)


def expected_seconds(step: LadderStep, longest: dict[bool, float], model: ModelConfig) -> float:
    """As the longest step of its kind, compiled or not. `longest` has no entry for a kind that was not measured."""
    if step.compile in longest or not step.compile:
        return longest.get(step.compile, 0.0)
    blocks = model.depth + (model.mixer_depth if model.use_patch_mixer else 0)
    return longest.get(False, 0.0) + BUILD_S * blocks


class _TimeIsUp(BaseException):
    """No Exception: a compiler would make its own of it, and a step a problem of its row."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Inside, _TimeIsUp is raised when so many seconds are over. Only the main thread can be interrupted."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_) -> None:
        raise _TimeIsUp

    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def parity(losses: Sequence[float], reference: Sequence[float]) -> Parity:
    """Parity of losses with reference losses, over as many steps as both have."""
    steps = min(len(losses), len(reference))
    ours, theirs = np.array(losses[:steps]), np.array(reference[:steps])
    first, last = slice(max(1, steps // 10)), slice(-max(1, steps // 4), None)
    means = [abs(ours[part].mean() / theirs[part].mean() - 1) for part in (first, last)]
    return Parity(
        steps=steps, largest=float(max(abs(ours / theirs - 1))), mean_first=float(means[0]), mean_last=float(means[1])
    )
