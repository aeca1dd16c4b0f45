"""Reading files of other people's: which errors are those of the bytes, and which of the machine.

Bytes that are not what they should be are left out and counted. When the machine fails (a server is gone, a disk has an
error, too many files are open, a permission has run out), reading stops, and what was not read is read by the next try.
Libraries do not keep the two apart: tarfile and zipfile take a read that fails for a damaged archive. So each file is
opened here, and what the operating system answered is raised again, whatever became of it on the way.
"""

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdit.documents import UserError

LARGEST = 2**30  # bytes read at once; damaged sizes ask for any number
BUFFER = 2**17
NOT_THERE = {errno.ENOENT, errno.ENOTDIR}
# What the operating system answers for one name, while others can be read. Not EACCES: credentials run out for all.
OF_ONE_NAME = {*NOT_THERE, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def is_damage(error: Exception) -> bool:
    """Whether an exception says that bytes are not what they should be. Parsers raise nearly anything on such bytes; an
    OSError with an errno is the operating system's."""
    if isinstance(error, OSError):
        return error.errno is None
    return not isinstance(error, MemoryError | ImportError | UserError)


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file to read from. Raises OSError for what the machine did, also where a library that reads the file
    has made another error of it, or none; ValueError for pipes and devices."""
    with _File(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no regular file")
        try:
            yield _Buffered(file, BUFFER)
        except Exception:
            if file.failure is not None:
                raise file.failure from None
            raise
        if file.failure is not None:
            raise file.failure


def read_file(path: Path) -> bytes:
    """Raises OSError and ValueError."""
    with opened(path) as file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise ValueError(f"has more than {LARGEST} bytes")
        return file.read()


class _File(io.FileIO):
    """Remembers the first error of the operating system."""

    def __init__(self, path: Path) -> None:
        self.failure: OSError | None = None
        self.path = str(path)
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # pipes do not block

    def readinto(self, buffer) -> int | None:
        with self._remembering():
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with self._remembering():
            return super().readall()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = error.filename or self.path
            self.failure = self.failure or error
            raise


class _Buffered(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LARGEST:
            raise ValueError(f"asks for {size} bytes")
        return super().read(size)
