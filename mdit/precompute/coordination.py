"""A set in the making, shared by any number of processes on any machines that see its directory.

    data/cc12m/.256.partial    plan.json first, then the parts; becomes data/cc12m/256 when all of it is on disk
    data/cc12m/.256.lock       byte 0 is locked for planning, byte 1 + p for making part p, all bytes for finishing;
                               byte 1 + p is b"1" when part p is complete

The locks are POSIX record locks, which fall free with the process that holds them, however it ends. What is read and
written under them is up to date on network file systems too, where a look into a directory may not be.

A set that is there grows, or has parts made again, in the same way: .256.partial then begins with change.json and the
records of the parts that stay, and when the others are made, its files move to data/cc12m/256 under names that are new
there. Last, manifest.json is replaced. So there is the old set or the new one, and the files of the old one stay.
"""

import errno
import fcntl
import math
import os
import re
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdit.config import PositiveInt, Section, UserError
from mdit.data.manifest import MANIFEST, SampleLayout, read_manifest, read_section
from mdit.data.report import REPORT, PartReport, merge, new_report, read_report
from mdit.data.shards import INDEX, open_dataset
from mdit.data.writer import PartWriter, finish_set, is_written, take_over, written_parts
from mdit.descriptions import Encoders
from mdit.dist import logger
from mdit.documents import differences
from mdit.files import partial_name, sync, write_json, write_text

PLAN, CHANGE = "plan.json", "change.json"
COMPLETE = b"1"


class Plan(Section):
    """Everything that decides the bytes of a set. `parts` are the names of the source's parts with the fingerprints of
    what the source held (`mdit.sources.fingerprint`); `settings` are the producer's."""

    build_settings: dict[str, Any]
    encoders: Encoders
    layout: SampleLayout
    shard_bytes: PositiveInt
    settings: dict[str, Any]
    parts: dict[str, str]
    pictures_of_last_part: PositiveInt | None

    def plain(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_unset=True)


class Change(Section):
    """Content of change.json: the plan and the index of the set that is to be replaced, and which parts are made."""

    replaces: Plan
    index: str
    made: tuple[str, ...]

    @property
    def number(self) -> int:
        """1 for the first change of a set."""
        match = re.search(r"_(\d+)\.npy$", self.index)
        return int(match[1]) + 1 if match else 1


class TooManyRejected(UserError):
    """A set whose parts are complete, but with fewer samples than asked for."""


def is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def is_changing(directory: Path) -> bool:
    """Whether a finished set is being changed, or was when a process was killed."""
    return is_finished(directory) and (partial_name(directory) / PLAN).exists()


def plan_of_finished(directory: Path) -> Plan | None:
    """The plan that a finished set was made by; None for one that was brought."""
    return read_section(Plan, directory / PLAN)


def check_set(directory: Path, build_settings: dict[str, Any], owner: str) -> None:
    """Raise UserError when the set, finished or begun, is made from something else, or when other files are in its
    place. `owner` says where `build_settings` comes from: "the recipe's"."""
    try:
        if is_finished(directory):
            _remove_leftovers(directory)
            found, what = read_manifest(directory).fingerprint, f"{directory / MANIFEST}: was made with"
            _require_equal(found, build_settings, what, owner, f"remove {directory} to make it again")
        elif directory.is_dir() and any(directory.iterdir()):
            raise UserError(f"{directory}: holds files but no {MANIFEST}; remove it or choose another directory")
        elif plan := read_section(Plan, partial_name(directory) / PLAN):
            require_plan(directory, plan, plan.model_copy(update={"build_settings": build_settings}), owner)
    except OSError as error:
        raise UserError(f"{directory}: cannot look at what is there: {error}") from None


def require_plan(directory: Path, there: Plan, wanted: Plan, owner: str, finished: bool = False) -> None:
    """Raise UserError naming the first difference between the plan of a set that was begun and the one wanted; of a
    finished set the parts may differ."""
    found, asked = _hoisted(there), _hoisted(wanted)
    if finished:
        found["parts"] = asked["parts"]
        what, remedy = f"{directory / PLAN}: was made with", f"remove {directory} to make it again"
    else:
        work = partial_name(directory)
        what, remedy = f"{work / PLAN}: was begun with", f"remove {work} to start again"
    _require_equal(found, asked, what, owner, remedy)


class RecordLocks:
    """The lock file of a set, held open. Opening it waits for byte 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, 0)
            if not self.are_removed():
                return
            os.close(self.descriptor)  # removed while this process waited

    def are_removed(self) -> bool:
        """Whether another process has removed the file, as the last one does."""
        return os.fstat(self.descriptor).st_nlink == 0

    def acquire(self, start: int, length: int) -> bool:
        """Lock bytes, all to the end where `length` is 0; False where another process has one of them."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def release(self, start: int, length: int) -> None:
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN, length, start)


class SetInProgress:
    """This process's hand in making the set `directory` by `plan`, which is that of all processes. A context manager:
    leaving it lets go of all locks.

    `make_plan` is called by one process at a time. It takes what was stored by another, or None, and the plan of the
    finished set that is to be changed, or None; it returns the plan and the names of the parts to make, or raises
    UserError. When that or what follows fails and there was no plan, nothing is left.

    At most one in a process for each set, as a process's locks do not bind itself.
    """

    def __init__(
        self, directory: Path, make_plan: Callable[[Plan | None, Plan | None], tuple[Plan, Collection[str]]]
    ) -> None:
        self.directory, self.work = directory, partial_name(directory)
        self._held: set[int] = set()
        self._reports: dict[int, PartReport] = {}
        self._change: Change | None = None
        new = [path for path in directory.parents if not path.exists()]
        directory.parent.mkdir(parents=True, exist_ok=True)
        self._locks = RecordLocks(_lock_path(directory))
        begun = (self.work / PLAN).exists()
        try:
            self.plan = self._begun(make_plan) if begun else self._begin(make_plan)
        except BaseException:
            if not begun:
                shutil.rmtree(self.work, ignore_errors=True)
                self._locks.path.unlink(missing_ok=True)
                for path in new:
                    with suppress(OSError):  # another process has use for it
                        path.rmdir()
            os.close(self._locks.descriptor)
            raise
        self._locks.release(0, 1)

    def is_joined(self) -> bool:
        """Whether the parts' records are, or may be, gone into the manifest."""
        return self._locks.are_removed() or self._is_done() or (self.work / MANIFEST).exists()

    def writer(self, part: int) -> PartWriter:
        """A writer of a part that was claimed."""
        change = self._change
        suffix = f"_{change.number:04d}" if change and part < len(change.replaces.parts) else ""
        return PartWriter(self.work, part, self.plan.layout, self.plan.shard_bytes, suffix)

    def claim(self, part: int) -> bool:
        """Whether this process is to make the part: it is not complete, and nobody is at it. May be called by a thread
        beside the one that writes."""
        if part in self._held or not self._locks.acquire(1 + part, 1):
            return False
        if os.pread(self._locks.descriptor, 1, 1 + part) == COMPLETE or self.is_joined():
            self._locks.release(1 + part, 1)
            return False
        if is_written(self.work, part):  # by a process that was killed before it could say so; or it stays as it is
            self.complete(part)
            return False
        self._held.add(part)
        return True

    def complete(self, part: int) -> None:
        """Let go of a part that was claimed and made."""
        os.pwrite(self._locks.descriptor, COMPLETE, 1 + part)
        self._locks.release(1 + part, 1)
        self._held.discard(part)

    def left(self) -> int:
        """Number of parts that are not complete."""
        num_parts = len(self.plan.parts)
        return num_parts - os.pread(self._locks.descriptor, num_parts, 1).count(COMPLETE)

    def reports(self) -> dict[int, PartReport]:
        """Part -> report, of the complete ones, as far as another process has not joined them to a set meanwhile."""
        with suppress(FileNotFoundError):
            self._reports = written_parts(self.work, self._reports)
        return self._reports

    def finish(self, max_rejected: float) -> PartReport | None:
        """Give the set its name when all parts are complete and nobody else is at it. -> its report; None when it is
        not finished. Raises UserError, after removing what there is, when no picture was written; TooManyRejected,
        with all left as it is, when more than the share `max_rejected` of what was read for it was left out."""
        plan = self.plan
        if not self._locks.acquire(0, 0):
            return None
        try:
            if self._locks.are_removed():  # what there is now may be another process's next change
                return (read_report(self.directory) or new_report()) if is_finished(self.directory) else None
            if not self._is_done():
                if not self.is_joined():
                    reports = self.reports()
                    if len(reports) < len(plan.parts):
                        return None
                    self._judge({name: reports[part] for part, name in enumerate(plan.parts)}, max_rejected)
                index = INDEX if self._change is None else f"index_{self._change.number:04d}.npy"
                finish_set(self.work, len(plan.parts), plan.layout, plan.encoders, plan.build_settings, index)
                if self._change is None:
                    sync(self.work)
                    self.work.rename(self.directory)
                    sync(self.directory.parent)
                else:
                    self._replace()
            shutil.rmtree(self.work, ignore_errors=True)  # what a process left that was killed while it removed it
            self._locks.path.unlink(missing_ok=True)
            return read_report(self.directory) or new_report()
        finally:
            self._locks.release(0, 0)

    def __enter__(self) -> "SetInProgress":
        return self

    def __exit__(self, *error) -> None:
        os.close(self._locks.descriptor)

    def _begun(self, make_plan) -> Plan:
        stored, self._change = read_section(Plan, self.work / PLAN), read_section(Change, self.work / CHANGE)
        assert stored is not None, "it goes under the lock only"
        if self._change is not None and self.is_joined():
            return stored
        return make_plan(stored, self._change and self._change.replaces)[0]

    def _begin(self, make_plan) -> Plan:
        finished = is_finished(self.directory)
        before = plan_of_finished(self.directory) if finished else None
        plan, made = make_plan(None, before)
        if made or not finished:
            os.truncate(self._locks.descriptor, 0)
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            if before is not None:
                self._begin_change(before, made)
            write_json(self.work / PLAN, plan.plain())
        return plan

    def _begin_change(self, before: Plan, made: Collection[str]) -> None:
        dataset, report = open_dataset(self.directory), read_report(self.directory)
        reports = (report and report.parts) or {}
        for part, name in enumerate(before.parts):
            if name not in made:
                take_over(dataset, part, self.work, reports.get(name))
        self._change = Change(replaces=before, index=dataset.manifest.index.file, made=tuple(made))
        write_json(self.work / CHANGE, self._change.model_dump(mode="json", exclude_unset=True))

    def _judge(self, reports: dict[str, PartReport], max_rejected: float) -> None:
        """Write the report of the set, unless it is one to be refused."""
        report = merge(reports)
        if report.written == 0:
            shutil.rmtree(self.work)
            self._locks.path.unlink()
            raise UserError(f"{self.directory}: no picture can be used: {report.summary()}")
        made = report if self._change is None else merge({name: reports[name] for name in self._change.made})
        if (share := made.rejected_share) > max_rejected:
            raise TooManyRejected(
                f"{self.directory}: is not finished, as {share:.1%} is left out and --max_rejected is {max_rejected}: "
                f"{made.summary()}; all parts are made, and the same command with --max_rejected "
                f"{math.ceil(share * 100) / 100} finishes the set at once"
            )
        write_json(self.work / REPORT, report.model_dump(mode="json", exclude_none=True))

    def _replace(self) -> None:
        """Put the joined set into the place of the one that it changes; after a kill, again."""
        manifest = read_manifest(self.work)
        listed = [entry.file for entry in (manifest.index, *manifest.shards, *manifest.dali_indexes)]
        for file in listed:
            with suppress(FileNotFoundError):  # it was there before, or moved before a kill
                (self.work / file).replace(self.directory / file)
        sync(self.directory)
        for name in (REPORT, PLAN, MANIFEST):
            write_text(self.directory / name, (self.work / name).read_text(encoding="utf-8"))
        (self.work / PLAN).unlink()
        sync(self.work)
        files = sorted(path.name for path in self.directory.iterdir() if path.suffix in (".npy", ".tar", ".idx"))
        old = ", ".join(name for name in files if name not in {*listed})
        logger.info(f"{self.directory}: stay for runs that read the set as it was, to be removed after them: {old}")

    def _is_done(self) -> bool:
        return is_finished(self.directory) and not (self.work / PLAN).exists()


def _lock_path(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


def _remove_leftovers(directory: Path) -> None:
    """Remove what a process left that was killed when all was done but that. Another one may hold the lock."""
    with suppress(OSError):
        lock = os.open(_lock_path(directory), os.O_RDWR)
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_changing(directory):
                shutil.rmtree(partial_name(directory), ignore_errors=True)
                _lock_path(directory).unlink()
        finally:
            os.close(lock)


def _hoisted(plan: Plan) -> dict[str, Any]:
    """Content of a plan, with the settings as if they were its own keys."""
    values = plan.plain()
    build_settings, settings = values.pop("build_settings"), values.pop("settings")
    return values | build_settings | settings


def _require_equal(found: dict[str, Any], wanted: dict[str, Any], was: str, owner: str, remedy: str) -> None:
    for key, there, asked in differences(found, wanted):
        if key.startswith("captions.") and there and asked:  # weights, which no byte depends on
            remedy = f"data.captions of a recipe weighs the kinds anew without making the set again; or {remedy}"
        raise UserError(f"{was} {key} = {there!r}, but {owner} is {asked!r}; {remedy}, or choose another directory")
