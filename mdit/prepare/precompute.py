"""From a source of pictures to sets of latent shards, one for each image size, at any scale.

Any number of processes may make the same sets at the same time: under deepspeed, torchrun or srun, or the same command
typed on several machines. Each takes a part of the source that nobody is at, makes it and takes the next; none waits
for another. A part's bytes depend on the part and the plan alone, whoever makes it and however often one was killed.
Pictures are written in the order of reading: training shuffles shards, and the samples of 64 shards at a time
(`mdit.data.order`).
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mdit.config import UserError
from mdit.data.manifest import Layout
from mdit.data.writer import SHARD_BYTES, NotFinite, PartWriter
from mdit.prepare.in_progress import Plan, SetInProgress, require_plan
from mdit.prepare.report import Report, new_report, reject
from mdit.prepare.towers import Claim, Samples, read
from mdit.sources import Part, Picture, Rejected, Source

FIT_CAPTIONS = 4096
NOT_FINITE = "not finite"


class Maker(Protocol):
    """What turns parts into samples: `mdit.prepare.towers.Towers`."""

    def layout(self, image_size: int, embeddings: str) -> Layout: ...

    def settle(self, stored: dict[str, Any] | None, captions: Callable[[], Sequence[str]]) -> None:
        """Take text statistics from stored descriptions of the encoders, or measure them on captions, where needed."""

    def encoders(self) -> dict[str, dict[str, Any]]:
        """Their descriptions, for the manifest."""

    def settings(self) -> dict[str, Any]:
        """What else decides the bytes."""

    def device_name(self) -> str:
        """Of what does the work, for the report: the GPU's name, or "cpu"."""

    def samples(self, claims: Iterable[Claim]) -> Generator[Samples, None, None]: ...


@dataclass(frozen=True)
class Job:
    """Sets to make: `sets` maps image sizes to directories. `made_from` holds the settings that decide what is in them
    (each manifest's fingerprint is that and the image size), `whose` says where these come from, for errors.
    `captions` are those to measure text statistics on; by default the first ones of the source. `limit` is a number of
    pictures."""

    source: Source
    sets: Mapping[int, Path]
    made_from: dict[str, Any]
    whose: str = "this command's"
    embeddings: str = "f16"
    shard_bytes: int = SHARD_BYTES
    limit: int | None = None
    captions: Callable[[], Sequence[str]] | None = None
    progress: bool = True


@dataclass(frozen=True)
class Outcome:
    """`finished` are the reports of the sets that are there; `left` says of the others how many parts are being made by
    other processes, which is 0 while they give the set its name."""

    finished: dict[Path, Report]
    left: dict[Path, int]


def precompute(job: Job, maker: Maker) -> Outcome:
    """Make all parts of the sets that are neither complete nor being made.

    Raises UserError when a set was begun from something else, cannot be written, or would be empty.
    """
    try:
        with ExitStack() as stack:
            sets, plans = {}, {}
            for size, directory in job.sets.items():
                layout, made_from = maker.layout(size, job.embeddings), {**job.made_from, "image_size": size}
                layout.check()
                sets[size] = stack.enter_context(SetInProgress(directory, layout, made_from))
            for size, unfinished in sets.items():
                plans[size] = unfinished.agree(partial(_plan, job, maker, unfinished, plans))
            _make_parts(job, maker, sets, plans[size])
            finished, left = {}, {}
            for size, unfinished in sets.items():
                if (report := unfinished.finish(plans[size])) is not None:
                    finished[unfinished.directory] = report
                else:
                    left[unfinished.directory] = unfinished.left(len(plans[size]["parts"]))
            return Outcome(finished, left)
    except OSError as error:
        raise UserError(f"{job.sets[size]}: cannot write the set: {error}") from None


def first_captions(source: Source, limit: int | None = None) -> list[str]:
    """Those of the first pictures."""
    pictures = islice(_pictures(source.parts), min(limit or FIT_CAPTIONS, FIT_CAPTIONS))
    return [picture.caption for picture in pictures]


def _plan(job: Job, maker: Maker, unfinished: SetInProgress, others: Mapping[int, Plan], stored: Plan | None) -> Plan:
    """What decides the bytes. `others` are the plans for other image sizes. Raises UserError when something else is
    stored."""
    maker.settle(stored and stored["encoders"], job.captions or partial(first_captions, job.source, job.limit))
    known = next(iter(others.values()), stored)
    if known is not None and job.limit is not None:
        num_parts, of_last_part = len(known["parts"]), known["pictures_of_last_part"]
    else:
        num_parts, of_last_part = _limited(job.source.parts, job.limit)
    plan = {
        "made_from": unfinished.made_from,
        "encoders": maker.encoders(),
        "layout": unfinished.layout.model_dump(mode="json"),
        "shard_bytes": job.shard_bytes,
        **maker.settings(),
        "parts": [part.name for part in job.source.parts[:num_parts]],
        "pictures_of_last_part": of_last_part,
    }
    if stored is not None:
        require_plan(unfinished.directory, stored, plan, job.whose)
    return plan


def _limited(parts: Sequence[Part], limit: int | None) -> tuple[int, int | None]:
    """How many parts hold the first `limit` pictures, and how many of the last part's pictures that takes."""
    if limit is not None:
        for number, part in enumerate(parts):
            found = sum(1 for _ in islice(_pictures([part]), limit))
            limit -= found
            if limit == 0:
                return number + 1, found
    return len(parts), None


def _pictures(parts: Iterable[Part]) -> Iterator[Picture]:
    for number, part in enumerate(parts):
        yield from (item for item in read(Claim(number, part)) if not isinstance(item, Rejected))


def _make_parts(job: Job, maker: Maker, sets: Mapping[int, SetInProgress], plan: Plan) -> None:
    bar, began = _Progress(job, sets, len(plan["parts"])), time.perf_counter()
    with bar, closing(maker.samples(_claims(job.source.parts, sets, plan))) as stream:
        for first in stream:
            with ExitStack() as stack:
                writers = {
                    size: stack.enter_context(
                        PartWriter(
                            sets[size].work, first.claim.number, sets[size].layout, job.shard_bytes, new_report()
                        )
                    )
                    for size in first.claim.image_sizes
                }
                for samples in chain([first], stream):
                    for size, writer in writers.items():
                        _write(samples, size, writer)
                    bar.update(samples.seen)
                    if samples.last:
                        break
                began = _note_seconds(writers, maker.device_name(), began)
            for size in first.claim.image_sizes:
                sets[size].complete(first.claim.number)
            bar.look_around()


def _note_seconds(writers: Mapping[int, PartWriter], device: str, began: float) -> float:
    """Report the time since the part before was done, shared out by pixels. -> the time now"""
    now, pixels = time.perf_counter(), sum(size**2 for size in writers)
    for size, writer in writers.items():
        writer.report["seconds"] = {device: (now - began) * size**2 / pixels}
    return now


def _claims(parts: Sequence[Part], sets: Mapping[int, SetInProgress], plan: Plan) -> Iterator[Claim]:
    """Parts for this process to make, until there is none that is neither complete nor claimed."""
    last, found = len(plan["parts"]) - 1, True
    while found:
        found = False
        for number in range(last + 1):
            if image_sizes := tuple(size for size, unfinished in sets.items() if unfinished.claim(number)):
                found = True
                limit = plan["pictures_of_last_part"] if number == last else None
                yield Claim(number, parts[number], limit, image_sizes)


def _write(samples: Samples, image_size: int, writer: PartWriter) -> None:
    report = writer.report
    report["seen"] += samples.seen
    for reason, origin in samples.rejected:
        reject(report, reason, origin)
    for sample in samples.samples:
        try:
            writer.write(sample.key, sample.latents[image_size], sample.embedding, sample.caption)
            report["written"] += 1
        except NotFinite:
            reject(report, NOT_FINITE, sample.origin)


class _Progress:
    """A bar of pictures, of this process and of others as far as their parts are complete."""

    def __init__(self, job: Job, sets: Mapping[int, SetInProgress], num_parts: int) -> None:
        self.sets, self.num_parts = sets, num_parts
        self.total = job.source.pictures if job.limit is None else job.limit
        done, _ = self._done()
        name = ", ".join(str(directory) for directory in job.sets.values())
        self.bar = tqdm(initial=done, total=self.total, desc=name, unit=" images", disable=not job.progress)

    def update(self, pictures: int) -> None:
        self.bar.update(pictures)

    def look_around(self) -> None:
        """At a moment when this process has completed all that it has counted."""
        done, parts = self._done()
        if self.total is None and parts:
            self.bar.total = round(done / parts * self.num_parts)
        self.bar.update(max(0, done - self.bar.n))

    def _done(self) -> tuple[int, int]:
        """Pictures and parts that are complete, of the set that is farthest behind."""
        reports = min((unfinished.reports() for unfinished in self.sets.values()), key=len)
        return sum(report["seen"] for report in reports.values()), len(reports)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()
