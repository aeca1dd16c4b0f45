"""Files that survive a power cut and can be trusted later: the one way to write them.

A file or directory gets its name when all of it is on disk, so a kill at any moment leaves the old one or the new one.
Some file systems (FUSE, SMB, exFAT, cloud drives) cannot sync a directory or make a link; that costs a promise about
power cuts, said once in a line, and never the run.
"""

import ctypes
import errno
import hashlib
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mdit.dist import logger
from mdit.documents import open_regular, to_json

# What a file system answers to a request that it does not know.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM}
# Answers that will be the same at the next try; others may pass (a server that restarts, a stale handle).
DEFINITE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
PATIENCE = (0.1, 1.0, 3.0)  # seconds before each new try

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux
LONGEST_NAME = 255  # bytes

_said: set[object] = set()
T = TypeVar("T")


def checksum(path: Path) -> str:
    """xxh3 (64 bits) of a file, in hexadecimal."""
    with open(open_regular(path), "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def measure(path: Path) -> dict[str, Any]:
    """Size and checksum of a file, as they are written down to know it again."""
    return {"bytes": path.stat().st_size, "xxh3": checksum(path)}


def patiently(read: Callable[[], T], definite: tuple[type[OSError], ...] = DEFINITE) -> T:
    """The result of `read`, called again after a while where the file system fails (EIO, EACCES, ESTALE), before that
    is believed. `definite` errors are believed at once: that something is not there, or is no directory."""
    for pause in PATIENCE:
        try:
            return read()
        except definite:
            raise
        except OSError:
            time.sleep(pause)
    return read()


def partial_name(path: Path) -> Path:
    """The name beside `path` that a file or directory has while it is written."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file at. Leaving the block syncs it and gives it its own name, in place of what
    was there; leaving it by an exception removes it and changes nothing. What is no file, as /dev/stdout or a pipe, is
    written to directly, and a link stays one."""
    if path.exists() and not path.is_file():
        yield path
        return
    path = _linked(path)
    partial = partial_name(path)
    try:
        with in_the_name_of(path, partial):
            partial.unlink(missing_ok=True)  # a link there would be written through
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, UTF-8, in place of what was there."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def append_line(path: Path, line: bytes) -> None:
    """Append a line, or several, to a text file; where the last one is torn (a kill, a full disk), behind its end."""
    with in_the_name_of(path), path.open("a+b") as file:
        if size := file.tell():
            file.seek(size - 1)
        torn = bool(size) and file.read(1) != b"\n"
        file.write(b"\n" * torn + line + b"\n")


def write_json(path: Path, values: Any) -> None:
    """Write a whole JSON file. Raises ValueError for NaN and infinities."""
    write_text(path, to_json(values))


def try_to_write(path: Path) -> None:
    """Raise the OSError that `replacing(path)` would end with, before the work whose result goes there is begun."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.exists() or path.is_file():
        path = _linked(path)
        partial = partial_name(path)
        with in_the_name_of(path, partial):
            partial.unlink(missing_ok=True)
            partial.touch()
            partial.unlink()


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to fill. Leaving the block syncs all files in it and gives it its name, in place
    of what was there; leaving it by an exception removes it and changes nothing.

    Where the system cannot exchange two names in one step, a kill between two renames leaves the old directory under
    its hidden name, from which the next call brings it back.
    """
    partial, replaced = partial_name(path), path.with_name(f".{path.name}.replaced")
    if replaced.exists() and not path.exists():
        replaced.rename(path)
    for leftover in (partial, replaced):
        _remove(leftover)
    try:
        with in_the_name_of(path, partial):
            partial.mkdir(parents=True)
            yield partial
            for file in (*partial.rglob("*"), partial):
                sync(file)
            old = _take_the_place_of(path, partial, replaced)
    except BaseException:
        _remove(partial)
        raise
    sync(path.parent)
    _remove(old)


def remove_directory(path: Path) -> None:
    """Remove a directory so that under its name all of it is there or nothing."""
    removed = path.with_name(f".{path.name}.removed")
    _remove(removed)
    path.rename(removed)
    if removed.is_symlink():
        removed.unlink()
    else:
        shutil.rmtree(removed)


LEFTOVERS = ("partial", "replaced", "removed")


def clean_leftovers(directory: Path, ours: Callable[[str], bool], kinds: Collection[str] = LEFTOVERS) -> None:
    """Finish or undo what killed processes left half done in a directory with the functions of this module, as far as
    it is of these kinds and was to have a name that is `ours`."""
    for path in directory.iterdir() if directory.is_dir() else ():
        match = re.fullmatch(r"\.(.+)\.([a-z]+)", path.name)
        if match is None or match[2] not in kinds or not ours(match[1]):
            continue
        if match[2] == "replaced" and not (named := path.with_name(match[1])).exists():
            path.rename(named)  # between the two renames of `replacing_directory`
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def point_to(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name` beside it; a text file with that name where there are no links. A directory
    in its place, as copies of a run on a drive without links have it, is kept as `<link>.old`."""
    partial = partial_name(link)
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(name)
    except OSError as error:  # a full or broken disk says so again when the file is written
        what = f"has no symbolic links ({error.strerror}); {link.name} is a file that names the newest"
        _say_of_file_system(link.parent, what)
        with in_the_name_of(link, partial):
            partial.write_text(name + "\n", encoding="utf-8")
            sync(partial)
    if link.is_dir() and not link.is_symlink():
        names = (link.with_name(f"{link.name}.old{i or ''}") for i in itertools.count())
        old = next(name for name in names if not name.exists())
        logger.warning(f"{link}: a directory where a link belongs; kept as {old.name}")
        link.rename(old)
    partial.replace(link)
    sync(link.parent)


def follow(link: Path) -> Path:
    """The directory that `point_to` made `link` a name of; `link` itself where it is none."""
    with suppress(OSError, ValueError):  # ValueError: not text, or no name
        if link.is_file() and link.stat().st_size <= LONGEST_NAME + 1:
            name = link.read_text(encoding="utf-8").strip()
            if name != ".." and (named := link.with_name(name)).is_dir():
                return named
    return link


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on disk. Others may read it as far as the umask lets them:
    safetensors itself makes files that only their owner can read. Raises OSError where safetensors has its own."""
    path.touch()  # with the mode that the umask gives: to ask for that one is to change it, for all threads
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
        raise
    try:
        path.chmod(mode & 0o777)
    except OSError as error:  # a file system without modes
        if error.errno not in UNSUPPORTED | {errno.EACCES}:
            raise
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on disk, as far as the file system can promise."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # EACCES: directories that cannot be opened, as on Windows' shares. A file was open a moment ago.
        if not (error.errno in UNSUPPORTED or (error.errno == errno.EACCES and path.is_dir())):
            error.filename = error.filename or str(path)
            raise
        _say_of_file_system(path, f"cannot sync ({error.strerror}); a power cut may lose what is new")


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """Around writing something that a run can do without: that it cannot be written is said once, and passed over."""
    try:
        yield
    except OSError as error:
        _say_once(f"{path}: cannot be written ({error.strerror or error}); the run goes on without")


def _remove(path: Path) -> None:
    """Remove what is under a name, as far as that is possible: a directory with all in it, of a link the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _linked(path: Path) -> Path:
    """The file that `path` is a link to, or would be; `path` where it is no link."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _take_the_place_of(path: Path, partial: Path, replaced: Path) -> Path:
    """Rename `partial` to `path`. -> the hidden name that what was there has now"""
    if path.exists():
        if _exchange(partial, path):
            return partial
        path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    return replaced


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False, and nothing done, where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other))
    return renameat2 is not None and renameat2(*names, RENAME_EXCHANGE) == 0


@contextmanager
def in_the_name_of(path: Path, partial: Path | None = None) -> Iterator[None]:
    """An OSError about `partial`, or about no file, as when a disk is full, names `path`, which the user knows."""
    try:
        yield
    except OSError as error:
        named = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(path)
        error.filename = named.replace(str(partial or path), str(path), 1)
        raise


def _say_once(line: str, key: object = None) -> None:
    """Log a line, unless one with this key (the line itself, by default) was logged before."""
    if (key := key or line) not in _said:
        _said.add(key)
        logger.warning(line)


def _say_of_file_system(path: Path, what: str) -> None:
    _say_once(f"{path.parent}: this file system {what}", (os.stat(path).st_dev, what))
