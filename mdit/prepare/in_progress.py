"""A set in the making, shared by any number of processes on any machines that see its directory.

    data/cc12m/.256.partial    plan.json first, then the parts; becomes data/cc12m/256 when all of it is on disk
    data/cc12m/.256.lock       byte 0 is locked for planning, byte 1 + p for making part p, all bytes for finishing;
                               byte 1 + p is b"1" when part p is complete

The locks are POSIX record locks, which fall free with the process that holds them, however it ends. What is read and
written under them is up to date on network file systems too, where a look into a directory may not be.
"""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.data.manifest import MANIFEST, Layout, read_manifest
from mdit.data.writer import finish_set, is_written, written_parts
from mdit.files import sync
from mdit.prepare.report import REPORT, Report, merge, new_report, read_report, summary

PLAN = "plan.json"
COMPLETE = b"1"

Plan = dict[str, Any]


def is_finished(directory: Path) -> bool:
    return (directory / MANIFEST).exists()


def read_plan(directory: Path) -> Plan | None:
    """Of the set that is to become `directory`; None when it has not been begun."""
    try:
        return json.loads((_work(directory) / PLAN).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_set(directory: Path, made_from: dict[str, Any], whose: str) -> None:
    """Raise UserError when the set, finished or begun, is made from something else, or when other files are in its
    place. `whose` says where `made_from` comes from: "the recipe's"."""
    try:
        _check_set(directory, made_from, whose)
    except OSError as error:
        raise UserError(f"{directory}: cannot look at what is there: {error}") from None


def _check_set(directory: Path, made_from: dict[str, Any], whose: str) -> None:
    if is_finished(directory):
        with suppress(OSError):  # left by a process that was killed after it gave the set its name
            _lock_path(directory).unlink(missing_ok=True)
        found, what = read_manifest(directory).fingerprint, f"{directory / MANIFEST}: was made with"
        _require_equal(found, made_from, what, whose, f"remove {directory} to make it again")
    elif directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory}: holds files but no {MANIFEST}; remove it or choose another directory")
    elif plan := read_plan(directory):
        require_plan(directory, plan, {**plan, "made_from": made_from}, whose)


def require_plan(directory: Path, begun: Plan, wanted: Plan, whose: str) -> None:
    """Raise UserError naming the first difference between the plan of a set that was begun and the one wanted."""
    begun, wanted = ({**plan, **plan["made_from"], "made_from": {}} for plan in (begun, wanted))
    work = _work(directory)
    _require_equal(begun, wanted, f"{work / PLAN}: was begun with", whose, f"remove {work} to start again")


class SetInProgress:
    """This process's hand in making the set `directory`. A context manager: leaving it lets go of all locks.

    At most one in a process for each set, as a process's locks do not bind itself.
    """

    def __init__(self, directory: Path, layout: Layout, made_from: dict[str, Any]) -> None:
        self.directory, self.layout, self.made_from = directory, layout, made_from
        self.work = _work(directory)
        self._lock_path = _lock_path(directory)
        self._lock: int | None = None
        self._held: set[int] = set()
        self._reports: dict[int, Report] = {}

    def agree(self, make_plan: Callable[[Plan | None], Plan]) -> Plan:
        """The plan of all processes. `make_plan` is called by one at a time; it takes what was stored by another, or
        None, and returns or raises UserError. When it raises and there was no plan, nothing is left behind."""
        new = [path for path in self.directory.parents if not path.exists()]
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        self._open_lock()
        stored = read_plan(self.directory)
        try:
            plan = make_plan(stored)
        except BaseException:
            if stored is None:
                self._lock_path.unlink(missing_ok=True)
                for path in new:
                    with suppress(OSError):  # another process has use for it
                        path.rmdir()
            raise
        if stored is None and not is_finished(self.directory):
            os.truncate(self._lock, 0)
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir()
            _write_json(self.work / PLAN, plan)
        self._unlock(0, 1)
        return plan

    def claim(self, part: int) -> bool:
        """Whether this process is to make the part: it is not complete, and nobody is at it. May be called by a thread
        beside the one that writes."""
        if part in self._held or not self._try_lock(1 + part, 1):
            return False
        if os.pread(self._lock, 1, 1 + part) == COMPLETE or self._is_joined():
            self._unlock(1 + part, 1)
            return False
        if is_written(self.work, part):  # by a process that was killed before it could say so
            self.complete(part)
            return False
        self._held.add(part)
        return True

    def complete(self, part: int) -> None:
        """Let go of a part that was claimed and made."""
        os.pwrite(self._lock, COMPLETE, 1 + part)
        self._unlock(1 + part, 1)
        self._held.discard(part)

    def left(self, num_parts: int) -> int:
        """How many parts are not complete."""
        return num_parts - os.pread(self._lock, num_parts, 1).count(COMPLETE)

    def reports(self) -> dict[int, Report]:
        """Part -> report, of the complete ones, as far as another process has not joined them to a set meanwhile."""
        with suppress(FileNotFoundError):
            self._reports = written_parts(self.work, self._reports)
        return self._reports

    def finish(self, plan: Plan) -> Report | None:
        """Give the set its name when all parts are complete and nobody else is at it. -> its report; None when it is
        not finished. Raises UserError, after removing what there is, when no picture was written."""
        if not self._try_lock(0, 0):
            return None
        try:
            num_parts = len(plan["parts"])
            if not self._is_joined():
                reports = self.reports()
                if len(reports) < num_parts:
                    return None
                report = merge(reports[part] for part in range(num_parts))
                if report["written"] == 0:
                    shutil.rmtree(self.work)
                    self._lock_path.unlink()
                    raise UserError(f"{self.directory}: no picture can be used: {summary(report)}")
                _write_json(self.work / REPORT, report)
            if not is_finished(self.directory):
                finish_set(self.work, num_parts, self.layout, plan["encoders"], self.made_from)
                sync(self.work)
                self.work.rename(self.directory)
                sync(self.directory.parent)
            self._lock_path.unlink(missing_ok=True)
            return read_report(self.directory) or new_report()
        finally:
            self._unlock(0, 0)

    def __enter__(self) -> "SetInProgress":
        return self

    def __exit__(self, *error) -> None:
        if self._lock is not None:
            os.close(self._lock)

    def _is_joined(self) -> bool:
        """Whether the parts' records are, or may be, gone into the manifest."""
        return (self.work / MANIFEST).exists() or is_finished(self.directory)

    def _open_lock(self) -> None:
        """Wait for the lock for planning, on the file that has the name."""
        while True:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, 0)
            if os.fstat(self._lock).st_nlink:
                return
            os.close(self._lock)  # removed while this process waited

    def _try_lock(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True

    def _unlock(self, start: int, length: int) -> None:
        fcntl.lockf(self._lock, fcntl.LOCK_UN, length, start)


def _work(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _lock_path(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.lock")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.rename(path)
    sync(path.parent)


def _require_equal(found: dict[str, Any], wanted: dict[str, Any], was: str, whose: str, remedy: str) -> None:
    found, wanted = _flat(found), _flat(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{was} {key} = {found.get(key)!r}, but {whose} is {wanted.get(key)!r}; {remedy}, or choose another "
                "directory"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}"""
    flat = {}
    for key, value in values.items():
        if isinstance(value, list | tuple):
            value = dict(enumerate(value))
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
