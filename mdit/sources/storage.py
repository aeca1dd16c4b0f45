"""Reading files of other people's: which errors are those of the bytes, and which of the machine.

Bytes that are not what they should be are left out and counted. When the machine fails (a server is gone, a disk has an
error, too many files are open, a permission has run out), reading stops, and what was not read is read by the next try.
Libraries do not keep the two apart: tarfile and zipfile take a read that fails for a damaged archive. So each file is
opened here, and what the operating system answered is raised again, whatever became of it on the way.
"""

import errno
import io
import lzma
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mdit.documents import UserError

LARGEST = 2**28  # bytes read at once; damaged sizes ask for any number
LONGEST_LINE = 2**24  # of a file of captions
UNPACKED, TIMES = 2**28, 100  # bytes that anything may unpack to, and times its size; pictures do not compress
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
def opened(path: Path) -> Iterator["Bounded"]:
    """A regular file to read from. Raises OSError for what the machine did, also where a library that reads the file
    has made another error of it, or none; ValueError for pipes and devices."""
    with _File(path) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no regular file")
        try:
            yield Bounded(file)
        except Exception:
            if file.failure is not None:
                raise file.failure from None
            raise
        if file.failure is not None:
            raise file.failure


def read_file(path: Path) -> bytes:
    """Raises OSError and ValueError."""
    with opened(path) as file:
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


class Bounded(io.BufferedReader):
    """Gives at most `largest` bytes at once, all that is left included: raises ValueError for more, and UserError for
    a line beyond LONGEST_LINE."""

    def __init__(self, raw: Any) -> None:
        super().__init__(raw, BUFFER)
        self.largest = LARGEST

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size >= 0:
            if size > self.largest:
                raise ValueError(f"asks for {size} bytes")
            return super().read(size)
        found = super().read(self.largest + 1)
        if len(found) > self.largest:
            raise ValueError(f"has more than {self.largest} bytes")
        return found

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(LONGEST_LINE + 1)
        if len(line) > LONGEST_LINE:
            raise UserError(f"{getattr(self.raw, 'path', 'a file')}: has a line of more than {LONGEST_LINE} bytes")
        return line

    def __next__(self) -> bytes:
        if line := self.readline():
            return line
        raise StopIteration


class Unpacked(io.RawIOBase):
    """Content of a compressed file, read from its begin to its end. Raises ValueError where that is many times the
    file: a few kilobytes can be terabytes of nothing."""

    def __init__(self, stream: Any, packed_bytes: int) -> None:
        self.stream, self.most, self.position = stream, UNPACKED + TIMES * packed_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        count = self.stream.readinto(buffer)
        self.position += count
        if self.position > self.most:
            raise ValueError(f"unpacks to more than {self.most} bytes")
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        wanted = offset + (self.position if whence == io.SEEK_CUR else 0)
        if whence == io.SEEK_END or wanted < self.position:
            raise io.UnsupportedOperation("a compressed file is read forwards")
        skipped = memoryview(bytearray(BUFFER))
        while self.position < wanted and self.readinto(skipped[: wanted - self.position]):
            pass
        return self.position


class UnpackedXz(io.RawIOBase):
    """lzma.open's, for files that need no more memory than LARGEST: a dictionary may be of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.decoder = file, lzma.LZMADecompressor(memlimit=LARGEST)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self.decoder.eof:  # another stream may follow
                rest = self.decoder.unused_data.lstrip(b"\0") or self.file.read(BUFFER).lstrip(b"\0")
                if not rest:
                    return 0
                self.decoder = lzma.LZMADecompressor(memlimit=LARGEST)
                data = self.decoder.decompress(rest, len(buffer))
            else:
                more = self.file.read(BUFFER) if self.decoder.needs_input else b""
                if self.decoder.needs_input and not more:
                    raise EOFError("ends before its end mark")
                data = self.decoder.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)
