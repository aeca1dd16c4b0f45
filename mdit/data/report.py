"""Counts of pictures written and rejected: report.json of a set, and that of each of its parts while it is made.

{"seen": 120, "written": 100, "captions": {"alt": 100, "recaption": 93},
 "rejected": {"too small": {"count": 20, "first": ["00000.tar/000000003", ...]}},
 "seconds": {"NVIDIA H100 80GB HBM3": 31.4}, "parts": {"00000.tar": {"seen": 60, ...}, ...}}

`seconds` says by device how long processes worked on the parts that are in the set, each part counted once; of sets
for several image sizes that were made together, each has its share of the pixels. Nothing else in a set depends on who
made it. Sets that were made before there was such a key have none. `captions` counts them by kind, in sets of several a
sample.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from mdit.captions import Caption
from mdit.config import NonNegativeInt, PositiveInt, Section
from mdit.data.manifest import read_section

REPORT = "report.json"
ORIGINS = 5  # of each reason


class Rejections(Section):
    count: PositiveInt
    first: tuple[str, ...] = Field(min_length=1)


class PartReport(Section, frozen=False):
    seen: NonNegativeInt
    written: NonNegativeInt
    captions: dict[str, PositiveInt] | None = None
    rejected: dict[str, Rejections]
    seconds: dict[str, float] | None = None

    def add(self, captions: Iterable[Caption]) -> None:
        """Count a sample that is written, and each of several captions of it."""
        self.written += 1
        for caption in captions:
            self.captions = {**(counted := self.captions or {}), caption.kind: counted.get(caption.kind, 0) + 1}

    def reject(self, reason: str, origins: Sequence[str], count: int = 1) -> None:
        """Count pictures that are left out for a reason; `origins` are the first of them."""
        if (before := self.rejected.get(reason)) is not None:
            origins, count = [*before.first, *origins], before.count + count
        # a file's name may be no text
        first = tuple(origin.encode(errors="backslashreplace").decode() for origin in origins[:ORIGINS])
        self.rejected[reason] = Rejections(count=count, first=first)

    @property
    def rejected_share(self) -> float:
        return 1 - self.written / self.seen if self.seen else 0.0

    def summary(self) -> str:
        """In a line: "100 of 120 pictures; rejected: 20 too small (00000.tar/000000003, ...)"."""
        clauses = [
            f"{found.count:,} {reason} ({found.first[0]}{', ...' if found.count > 1 else ''})"
            for reason, found in self.rejected.items()
        ]
        kinds = [f"{count:,} {kind}" for kind, count in (self.captions or {}).items()]
        captions = f" with {', '.join(kinds)} captions" if kinds else ""
        rejected = f"; rejected: {', '.join(clauses)}" if clauses else ""
        return f"{self.written:,} of {self.seen:,} pictures{captions}{rejected}"


class SetReport(PartReport):
    parts: dict[str, PartReport] | None = None


def new_report() -> PartReport:
    return PartReport(seen=0, written=0, rejected={})


def merge(parts: Mapping[str, PartReport]) -> SetReport:
    """The report of a set from those of its parts, reasons in alphabetical order. Without `seconds` when one of them
    has none."""
    timed = all(part.seconds is not None for part in parts.values())
    total, seconds, captions = SetReport(seen=0, written=0, rejected={}, parts=dict(parts)), {}, Counter()
    for part in parts.values():
        total.seen += part.seen
        total.written += part.written
        captions.update(part.captions or {})
        for reason, found in part.rejected.items():
            total.reject(reason, found.first, found.count)
        for device, spent in (part.seconds or {}).items():
            seconds[device] = seconds.get(device, 0.0) + spent
    total.captions = dict(sorted(captions.items())) or None
    total.seconds = seconds if timed else None
    total.rejected = dict(sorted(total.rejected.items()))
    return total


def read_report(directory: Path) -> SetReport | None:
    """The report of a finished set; None where there is none, as in sets that were brought. Raises UserError."""
    return read_section(SetReport, directory / REPORT)
