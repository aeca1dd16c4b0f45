"""Time of the phases of optimizer steps: marks that a step leaves as it goes, read when all steps are done."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from mdit.bench.row import PHASES, Measured, Phase, StepTime
from mdit.dist import World, gather

FLUSH_BYTES = 2**28  # several times the L2 cache
HEAD_START_CYCLES = 3 * 10**6  # 1.6 milliseconds of GPU time in which the host can queue the work
StepPhases = dict[Phase, float]  # milliseconds of one step


class PhaseTimer:
    """Milliseconds of each phase of steps. On a GPU by events that nobody waits for until all steps are done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Phase, Any]] | None = None  # events of a GPU, or seconds

    def mark(self, phase: Phase) -> None:
        """A phase begins, and the one before it ends; a step begins with "data"."""
        if self.marks is None:
            return
        self.marks.append((phase, _now(self.device)))

    def time_steps(
        self, step: Callable[[], object], *, steps: int, seconds: float = 0.0, world: World | None = None
    ) -> list[StepPhases]:
        """Phases of as many steps as `seconds` have room for, at least `steps`; on all ranks equally many."""
        self.wait()
        marks = self.marks = []
        started, done, more = time.perf_counter(), 0, True
        while more:
            step()
            done += 1
            fits = (time.perf_counter() - started) * (done + 1) / done <= seconds
            more = done < steps or fits
            if world is not None:
                more = bool(largest(more, world))
        self.mark("data")
        self.marks = None
        self.wait()
        found: list[StepPhases] = []
        for (phase, begin), (_, end) in pairwise(marks):
            if phase == "data":
                found.append(dict.fromkeys(PHASES, 0.0))
            found[-1][phase] += _milliseconds(begin, end)
        return found

    def wait(self) -> None:
        """Block until the device has done all that was queued."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _now(device: torch.device) -> Any:
    """An event of a GPU, or seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _milliseconds(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


def median_milliseconds(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Milliseconds of a call, the median of `repeats`. On a GPU the L2 cache is full of what nobody needs before each,
    and the host is ahead."""
    on_gpu, times = device.type == "cuda", []
    unneeded = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64, device=device) if on_gpu else torch.empty(0)
    for _ in range(repeats):
        if on_gpu:
            unneeded.sum()  # reads only: what a write left in the cache would be written back while `function` is timed
            torch.cuda._sleep(HEAD_START_CYCLES)
        begin = _now(device)
        function()
        end = _now(device)
        if on_gpu:
            end.synchronize()
        times.append(_milliseconds(begin, end))
    return statistics.median(times)


def summarize(
    steps: Sequence[StepPhases],
    global_batch: int,
    *,
    world: World | None = None,
    communication: float | None = None,
    peak_gib: float | None = None,
    losses: Iterable[float] = (),
) -> Measured:
    """Figures of timed steps, of the slowest rank. A collective, on the CPU, where several ranks are given."""
    lengths = [sum(step.values()) for step in steps]
    middle = lengths.index(statistics.median_low(lengths))
    own = [lengths[middle], min(lengths), *(steps[middle][phase] for phase in PHASES)]
    slowest, fastest, *phases = max(gather(own, world)) if world else own
    return Measured(
        steps=len(steps),
        images_per_second=1e3 * global_batch / slowest,
        milliseconds=StepTime(step=slowest, **dict(zip(PHASES, phases)), communication=communication),
        fastest_ms=fastest,
        peak_gib=peak_gib,
        losses=tuple(losses),
    )


def largest(value: float, world: World) -> float:
    """The largest of all ranks' values. A collective, on the CPU: a GPU goes on undisturbed."""
    found = torch.tensor(value, dtype=torch.float64)
    if world.size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found.item()


def length_of_union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of a line that some span covers."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the expected norm, in float32."""
    difference, norm = found.float() - expected.float(), expected.float().norm().clamp_min(1e-30)
    return (difference.norm() / norm).item()
