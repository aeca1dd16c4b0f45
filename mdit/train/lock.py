"""A lock that works on any file system: a file that names its holder, written again every few seconds while it lives.

POSIX locks are missing or without effect on many network file systems, so nothing here relies on them. On the machine
of the holder its process is looked up, and the answer is immediate. From any other machine the file is watched: a
change means that the holder lives, SILENCE seconds without one mean that it does not. No two clocks are compared.
"""

import errno
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.dist import logger
from mdit.documents import parse_json
from mdit.files import in_the_name_of

BEAT = 5.0  # seconds between two signs of life
SILENCE = 60.0  # longer than network file systems keep what they have read, and than most of them stall
SETTLE = 0.25  # in which processes that took over at the same moment have all done so; the last one holds the lock
LENGTH = 1024  # bytes of the file: always as many, so that it is never seen half written


class Lock:
    """A context manager: inside, this process holds the lock. Raises UserError naming the holder where another does."""

    def __init__(self, path: Path) -> None:
        self.path, self.token = path, uuid.uuid4().hex
        self._beats, self._stolen_by, self._ended = 0, "", threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="lock", daemon=True)

    def __enter__(self) -> "Lock":
        seen, deadline = None, 0.0
        while not self._create():
            found = self._read()
            if found is None:  # released a moment ago
                continue
            holder = _parse(found)
            if (alive := _lives_here(holder)) or (alive is None and seen not in (None, found)):
                raise UserError(f"{self.path.parent}: in use by {_describe(holder)}; wait for its end, or stop it")
            if alive is None and seen is None:
                logger.warning(f"{self.path}: held by {_describe(holder)}; watching it for {SILENCE:.0f} s")
                seen, deadline = found, time.monotonic() + SILENCE
            elif alive is not None or time.monotonic() > deadline:
                self._take_over(holder)
                break
            time.sleep(BEAT / 10)
        self._keeper.start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()
        self._keeper.join(BEAT)
        with suppress(OSError):
            if self._holder() == self.token:
                self.path.unlink()

    def check(self) -> None:
        """Raise UserError when another process has taken the lock over: nothing may be written from then on."""
        if self._stolen_by:
            raise UserError(
                f"{self.path.parent}: taken over by {self._stolen_by}, while this process showed no life for "
                f"{SILENCE:.0f} s; it stops, and what it has not saved is lost"
            )

    def _keep(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):  # a file system that stalls; others see the silence
                self._beat()
            if self._stolen_by:
                return

    def _beat(self) -> None:
        try:
            with open(self.path, "r+b", buffering=0) as file:
                found = file.read()
                if (holder := _parse(found)).get("token") in (self.token, None):
                    self._beats += 1
                    file.seek(0)
                    file.write(self._content())
                elif not self._ended.is_set():
                    self._stolen_by = _describe(holder)
        except FileNotFoundError:  # somebody has removed it by hand
            if not self._ended.is_set():
                self._create()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            with in_the_name_of(self.path), open(descriptor, "wb", buffering=0) as file:
                file.write(self._content())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, holder: dict[str, Any]) -> None:
        logger.warning(f"{self.path}: left behind by {_describe(holder)}; taken over")
        partial = self.path.with_name(f".{self.path.name}.{self.token}.partial")
        try:
            with in_the_name_of(self.path, partial):
                partial.write_bytes(self._content())
                partial.replace(self.path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
        time.sleep(SETTLE)
        if (found := self._holder()) != self.token:
            raise UserError(f"{self.path.parent}: another process ({found}) took the lock over at the same moment")

    def _holder(self) -> str | None:
        return _parse(self._read() or b"").get("token")

    def _read(self) -> bytes | None:
        """Opening a file anew shows, on network file systems too, what others have written into it."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return None
            raise

    def _content(self) -> bytes:
        pid = os.getpid()
        values = {"host": socket.gethostname(), "pid": pid, "time": now()}
        values |= {"token": self.token, "beats": self._beats, "machine": _machine(), "process_began": _began(pid)}
        return json.dumps(values).encode()[: LENGTH - 1].ljust(LENGTH - 1) + b"\n"


def now() -> str:
    """Time of day in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _parse(content: bytes) -> dict[str, Any]:
    """{} where there is no holder's description: a lock that is being written, or a file of other kind."""
    try:
        values = parse_json(content, "lock")
    except UserError:
        return {}
    return values if isinstance(values, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder.get('pid')} on {holder.get('host')} (last sign of life {holder.get('time')})"


def _lives_here(holder: dict[str, Any]) -> bool | None:
    """Whether the holder lives, None when it is, or may be, on another machine."""
    pid, machine = holder.get("pid"), _machine()
    if not machine or holder.get("machine") != machine or not isinstance(pid, int):
        return None
    return (began := _began(pid)) is not None and began == holder.get("process_began")


def _machine() -> str:
    """Among which processes a process number means something: the kernel since its start, and the container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> int | None:
    """When a process began, in the kernel's ticks; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in b"ZX" else int(fields[19])
