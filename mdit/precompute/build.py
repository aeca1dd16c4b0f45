"""From a source of pictures to sets of latent shards, one for each image size, at any scale.

Any number of processes may make the same sets at the same time: under deepspeed, torchrun or srun, or the same command
typed on several machines. Each takes a part of the source that nobody is at, makes it and takes the next; none waits
for another. A part's bytes depend on the part and the plan alone, whoever makes it and however often one was killed.
Pictures are written in the order of reading: training shuffles shards, and the samples of 64 shards at a time
(`mdit.data.order`).
"""

import difflib
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdit.config import Embeddings, UserError, parse_section
from mdit.data.manifest import SampleLayout
from mdit.data.report import SetReport
from mdit.data.writer import SHARD_BYTES, NotFinite, PartWriter
from mdit.descriptions import Encoders
from mdit.dist import logger
from mdit.precompute.coordination import (
    Plan,
    SetInProgress,
    TooManyRejected,
    plan_of_finished,
    require_plan,
)
from mdit.precompute.pipeline import SampleProducer, Samples, WorkItem, read
from mdit.sources import Part, Picture, Rejected, Source
from mdit.sources.fingerprint import fingerprint

FIT_CAPTIONS = 4096
MAX_REJECTED = 0.5
LOOKED_AT_ONCE = 16  # parts
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class BuildJob:
    """Sets to make: `sets` maps image sizes to directories. `build_settings` decide what is in them (each manifest's
    fingerprint is that and the image size), `owner` says where these come from, for errors.
    `captions` are those to measure text statistics on; by default the first ones of the source. `weights` are those of
    the kinds of captions, where the source gives several of a picture. `limit` is a number of pictures. `max_rejected`
    is the share of what is read that may be left out.

    Of a set that is there, `extend` makes the parts that are new or changed in the source, `remake` those of these
    names; all others stay as they are."""

    source: Source
    sets: Mapping[int, Path]
    build_settings: dict[str, Any]
    owner: str = "this command's"
    embeddings: Embeddings = "f16"
    weights: Mapping[str, float] | None = None
    shard_bytes: int = SHARD_BYTES
    limit: int | None = None
    captions: Callable[[], Sequence[str]] | None = None
    progress: bool = True
    max_rejected: float = MAX_REJECTED
    extend: bool = False
    remake: Sequence[str] = ()

    def layout(self, producer: SampleProducer, image_size: int) -> SampleLayout:
        layout = producer.layout(image_size, self.embeddings)
        return layout if self.weights is None else layout.model_copy(update={"captions": dict(self.weights)})


@dataclass(frozen=True)
class Outcome:
    """`finished` are the reports of the sets that are there; `left` says of the others how many parts are being made by
    other processes, which is 0 while they give the set its name."""

    finished: dict[Path, SetReport]
    left: dict[Path, int]


def build_sets(job: BuildJob, producer: SampleProducer) -> Outcome:
    """Make all parts of the sets that are neither complete nor being made.

    Raises UserError when a set was begun from something else, cannot be written, would be empty, or has more left out
    than it may.
    """
    try:
        with ExitStack() as stack:
            for size in job.sets:
                job.layout(producer, size).check()
            fingerprints, sets = Fingerprints(job.source, job.limit), {}
            for size, directory in job.sets.items():
                make_plan = partial(_plan, job, producer, fingerprints, size, sets)
                sets[size] = stack.enter_context(SetInProgress(directory, make_plan))
            _make_parts(job, producer, sets)
            finished, left, refused = {}, {}, []
            for size in sets:
                unfinished = sets[size]
                try:
                    report = unfinished.finish(job.max_rejected)
                except TooManyRejected as error:  # the other sets may be better
                    refused.append(error)
                    continue
                if report is not None:
                    finished[unfinished.directory] = report
                else:
                    left[unfinished.directory] = unfinished.left()
            if refused:
                raise refused[0]
            return Outcome(finished, left)
    except OSError as error:
        raise UserError(f"{job.sets[size]}: cannot write the set: {error}") from None


def first_captions(source: Source, limit: int | None = None) -> list[str]:
    """Captions of the first pictures, at most FIT_CAPTIONS."""
    pictures = islice(_pictures(source.parts), min(limit or FIT_CAPTIONS, FIT_CAPTIONS))
    return [text for picture in pictures for text in picture.texts]


class Fingerprints(dict[str, str]):
    """The fingerprints of a source's parts by their names: of all parts, looked at side by side, or with a limit of
    those that are asked for. Raises UserError for parts that cannot be read."""

    def __init__(self, source: Source, limit: int | None) -> None:
        self.parts = {part.name: part for part in source.parts}
        if limit is None:
            with ThreadPoolExecutor(LOOKED_AT_ONCE) as pool:
                self.update(zip(self.parts, pool.map(self._look, self.parts)))

    def __missing__(self, name: str) -> str:
        return self.setdefault(name, self._look(name))

    def _look(self, name: str) -> str:
        try:
            return fingerprint(self.parts[name], read(WorkItem(0, self.parts[name])))
        except OSError as error:
            raise UserError(f"part {name} of the source cannot be read: {error}") from None

    def new(self, plan: Plan) -> list[str]:
        """The parts that a set does not have."""
        return [name for name in self.parts if name not in plan.parts]

    def changed(self, plan: Plan) -> list[str]:
        """The parts that are no longer what a set was made from. Those that are gone do not count."""
        return [name for name, was in plan.parts.items() if name in self.parts and self[name] != was]


def check_source(source: Source, directory: Path, limit: int | None) -> None:
    """Raise UserError when a finished set was made from another source of the same name; log what is new there."""
    if (plan := plan_of_finished(directory)) is None:
        return  # it was brought
    fingerprints = Fingerprints(source, limit)
    if changed := fingerprints.changed(plan):
        raise _is_another(directory, changed)
    new = fingerprints.new(plan) if limit is None else []
    if new and not plan.parts.keys() & fingerprints.parts.keys():
        raise UserError(
            f"{directory}: was made when the source held other parts ({_some([*plan.parts])}) and none of the "
            f"{_some(new)} that are there now; --extend adds these, or choose another directory"
        )
    if new:
        logger.info(f"{directory}: lacks {_some(new)} of the source; --extend adds them")


def _is_another(directory: Path, changed: Sequence[str]) -> UserError:
    return UserError(
        f"{directory}: was made when the source held something else in {_some(changed)}; --extend makes all of them "
        "again, --remake one; or choose another directory"
    )


def _some(names: Sequence[str]) -> str:
    """ "3 parts (00000.tar, 00001.tar, ...)"."""
    return f"{len(names)} part{'s' * (len(names) > 1)} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"


def _plan(
    job: BuildJob,
    producer: SampleProducer,
    fingerprints: Fingerprints,
    size: int,
    others: Mapping[int, SetInProgress],
    stored: Plan | None,
    before: Plan | None,
) -> tuple[Plan, Collection[str]]:
    """The plan of a set, and the parts to make. `others` are the sets of other image sizes. Raises UserError when
    something else is stored."""
    if before is not None and stored is None and not (job.extend or job.remake):
        return before, ()
    directory, known = job.sets[size], stored or before
    producer.settle(known and known.encoders.plain(), job.captions or partial(first_captions, job.source, job.limit))
    if before is None:
        parts, of_last_part = _first_parts(job, fingerprints, next((other.plan for other in others.values()), known))
        made: Collection[str] = parts
    else:
        parts, made = _changes(job, fingerprints, directory, before)
        of_last_part = None
    plan = Plan(
        build_settings={**job.build_settings, "image_size": size},
        encoders=parse_section(Encoders, producer.encoders(), directory),
        layout=job.layout(producer, size),
        shard_bytes=job.shard_bytes,
        settings=producer.settings(),
        parts=parts,
        pictures_of_last_part=of_last_part,
    )
    if known is not None:
        require_plan(directory, known, plan, job.owner, finished=stored is None)
    return plan, made


def _first_parts(job: BuildJob, fingerprints: Fingerprints, known: Plan | None) -> tuple[dict[str, str], int | None]:
    """The parts up to the limit, and how many pictures of the last one that takes."""
    parts, of_last_part, left = job.source.parts, None, job.limit
    if left is not None and known is not None:
        parts, of_last_part = parts[: len(known.parts)], known.pictures_of_last_part
    elif left is not None:
        for number, part in enumerate(parts, 1):
            found = sum(1 for _ in islice(_pictures([part]), left))
            left -= found
            if left == 0:
                parts, of_last_part = parts[:number], found
                break
    return {part.name: fingerprints[part.name] for part in parts}, of_last_part


def _changes(
    job: BuildJob, fingerprints: Fingerprints, directory: Path, before: Plan
) -> tuple[dict[str, str], Collection[str]]:
    """The parts of a set when it is changed, old ones first and in their order, and those to make."""
    for name in job.remake:
        if name not in before.parts:
            nearest = difflib.get_close_matches(name, before.parts, n=1) or list(before.parts)[:1]
            raise UserError(f"--remake {name}: {directory} has no such part (did you mean {nearest[0]}?)")
        if name not in fingerprints.parts:
            raise UserError(f"--remake {name}: {directory} has this part, but the source has it no longer")
    changed = fingerprints.changed(before)
    if not job.extend and (others := [name for name in changed if name not in job.remake]):
        raise _is_another(directory, others)
    made = {*job.remake, *(fingerprints.new(before) + changed if job.extend else ())}
    names = [*before.parts, *(name for name in fingerprints.new(before) if name in made)]
    parts = {name: fingerprints[name] if name in made else before.parts[name] for name in names}
    return parts, [name for name in names if name in made]


def _pictures(parts: Iterable[Part]) -> Iterator[Picture]:
    for number, part in enumerate(parts):
        yield from (item for item in read(WorkItem(number, part)) if not isinstance(item, Rejected))


def _make_parts(job: BuildJob, producer: SampleProducer, sets: Mapping[int, SetInProgress]) -> None:
    """Make parts until there is none for this process. A bar counts pictures, of others as far as their parts are
    complete."""
    plan = next(iter(sets.values())).plan  # all have the same parts
    total = job.source.pictures if job.limit is None else job.limit
    name, began = ", ".join(str(directory) for directory in job.sets.values()), time.perf_counter()
    bar = tqdm(initial=_done(sets)[0], total=total, desc=name, unit=" images", disable=not job.progress)
    with bar, closing(producer.samples(_work(job.source.parts, sets, plan))) as stream:
        for first in stream:
            with ExitStack() as stack:
                writers = {
                    size: stack.enter_context(sets[size].writer(first.item.number)) for size in first.item.image_sizes
                }
                for samples in chain([first], stream):
                    for size, writer in writers.items():
                        _write(samples, size, writer)
                    bar.update(samples.seen)
                    if samples.last:
                        break
                # The time since the part before was done, shared out by pixels.
                spent, pixels = time.perf_counter() - began, sum(size**2 for size in writers)
                began += spent
                for size, writer in writers.items():
                    writer.report.seconds = {producer.device_name(): spent * size**2 / pixels}
            for size in first.item.image_sizes:
                sets[size].complete(first.item.number)
            done, parts = _done(sets)
            if total is None and parts:
                bar.total = round(done / parts * len(plan.parts))
            bar.update(max(0, done - bar.n))  # by now all that was counted here is complete


def _work(parts: Sequence[Part], sets: Mapping[int, SetInProgress], plan: Plan) -> Iterator[WorkItem]:
    """Parts for this process to make, until there is none that is neither complete nor claimed."""
    by_name, found = {part.name: part for part in parts}, True
    while found:
        found = False
        for number, name in enumerate(plan.parts):
            if image_sizes := tuple(size for size, unfinished in sets.items() if unfinished.claim(number)):
                found = True
                limit = plan.pictures_of_last_part if number == len(plan.parts) - 1 else None
                yield WorkItem(number, by_name[name], limit, image_sizes)


def _write(samples: Samples, image_size: int, writer: PartWriter) -> None:
    report = writer.report
    report.seen += samples.seen
    for reason, origin in samples.rejected:
        report.reject(reason, [origin])
    for sample in samples.samples:
        try:
            encodings = sample.latents[image_size], sample.embedding, (captions := sample.captions)
            writer.write(sample.key, *encodings, sample.features.get(image_size))
            report.add(() if isinstance(captions, str) else captions)
        except NotFinite:
            report.reject(NOT_FINITE, [sample.read.origin])


def _done(sets: Mapping[int, SetInProgress]) -> tuple[int, int]:
    """Pictures and parts that are complete, whoever made them, of the set that is farthest behind."""
    reports = min((unfinished.reports() for unfinished in sets.values()), key=len)
    return sum(report.seen for report in reports.values()), len(reports)
