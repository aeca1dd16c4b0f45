"""Pace of each rank: what it takes for its own work, and who holds the others up."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SLOW = 1.25  # times the median
SHARE = 0.1  # of the time, that a slow rank costs at least
SHORTEST = 10.0  # seconds that are looked at together: shorter ones say little


class Stopwatch:
    """Seconds in which the device is inside `running`; of a GPU by its own clock, read when it is idle anyway."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._seconds = device.type == "cuda", 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            before = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - before

    def take(self) -> float:
        """The seconds since the last call. The device has to be idle."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds, self._events = 0.0, []
        return seconds


@dataclass(frozen=True)
class RankPace:
    """A rank's seconds between two reports: its forward passes, and its wait for data."""

    host: str
    forward: float
    data: float

    @property
    def own(self) -> float:
        return self.forward + self.data


def spread(paces: Sequence[RankPace]) -> float:
    """The slowest rank's own seconds over the median's; 1 where all are alike."""
    middle = statistics.median_low(pace.own for pace in paces)
    return max(pace.own for pace in paces) / middle if middle else 1.0


def slow_ranks(paces: Sequence[RankPace], seconds: float) -> list[str]:
    """ "rank 3 on node7 holds the others up: its own work takes 1.41 times the median; it waits for data" of
    each rank that does. `seconds` is what all took together."""
    middle = statistics.median_low(pace.own for pace in paces)
    found = []
    for rank, pace in enumerate(paces):
        lost = pace.own - middle
        if seconds >= SHORTEST and pace.own > SLOW * middle and lost > SHARE * seconds:
            of_data = pace.data - statistics.median_low(each.data for each in paces)
            why = "it waits for data" if of_data > lost / 2 else "its forward passes are slow"
            takes = f"its own work takes {pace.own / max(middle, 1e-9):.2f} times the median"
            found.append(f"rank {rank} on {pace.host} holds the others up: {takes}; {why}")
    return found
