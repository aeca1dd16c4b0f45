"""How long the phases of a step take: marks that a step leaves as it goes, read when all steps are done."""

import os
import statistics
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from mdit.bench.row import PHASES
from mdit.config import TrainConfig
from mdit.dist import World
from mdit.models import MicroDiT
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution
from mdit.train.engine import Engine


class Marks:
    """When each phase began, of all steps between `begin` and `end`; each step begins with "data"."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu, self.running = device.type == "cuda", False
        self.marks: list[tuple[str, torch.cuda.Event | float]] = []

    def begin(self) -> None:
        self.marks, self.running = [], True

    def put(self, phase: str) -> None:
        if not self.running:
            return
        if self.on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def end(self, wait: Callable[[], None]) -> list[dict[str, float]]:
        """-> for every step the milliseconds of each phase. `wait` waits for the device."""
        self.put("end")
        self.running = False
        wait()
        steps: list[dict[str, float]] = []
        for (phase, start), (_, end) in pairwise(self.marks):
            if phase == "data":
                steps.append(dict.fromkeys(PHASES, 0.0))
            steps[-1][phase] += start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
        self.marks = []
        return steps


class MarkedEngine(Engine):
    """An Engine that tells a clock when each phase begins, and notes the memory that its first forward pass takes."""

    def __init__(self, model: MicroDiT, config: TrainConfig, execution: Execution, plan: ParallelPlan, marks: "Marks"):
        super().__init__(model, config, execution, plan)
        self.marks, self.forward_bytes = marks, None

    def __call__(self, *args, **kwargs) -> Tensor:
        if self.forward_bytes is not None:
            return super().__call__(*args, **kwargs)
        before = held_bytes(self.world.device)
        output = super().__call__(*args, **kwargs)
        self.forward_bytes = held_bytes(self.world.device) - before
        return output

    def backward(self, loss: Tensor) -> None:
        self.marks.put("backward")
        super().backward(loss)
        self.marks.put("forward")  # of the next micro-batch

    def step(self) -> None:
        self.marks.put("optimizer")
        super().step()


def median_step(steps: list[dict[str, float]]) -> dict[str, float]:
    """The step of median length (the shorter of two) with its phases, which add up to it."""
    lengths = [sum(step.values()) for step in steps]
    middle = lengths.index(statistics.median_low(lengths))
    return {"step": lengths[middle], **steps[middle]}


def slowest(milliseconds: dict[str, float], world: World) -> dict[str, float]:
    """Those of the rank whose step is the longest. A collective, on the CPU."""
    own = torch.tensor(list(milliseconds.values()), dtype=torch.float64)
    of_all = [torch.empty_like(own) for _ in range(world.size)]
    torch.distributed.all_gather(of_all, own)
    return dict(zip(milliseconds, max(of_all, key=lambda row: row[0]).tolist()))


def largest(value: float, world: World) -> float:
    """Of all ranks. A collective, on the CPU: a GPU goes on undisturbed."""
    if world.size == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def length_of_union(spans: Iterable[tuple[float, float]]) -> float:
    """How much of a line some span covers."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def held_bytes(device: torch.device) -> int:
    """What torch's tensors take of a GPU now; of a CPU, this process's resident memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
