"""Files that survive a power cut and can be trusted later: the one way to write them.

A file or directory gets its name when all of it is on disk, so a kill at any moment leaves the old one or the new one.
Some file systems (FUSE, SMB, exFAT, cloud drives) cannot sync a directory or make a link; that costs a promise about
power cuts, said once in a line, and never the run.
"""

import errno
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mdit.dist import logger
from mdit.documents import to_json

# What a file system answers to a request that it does not know.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM}
# Answers that will be the same at the next try; others may pass (a server that restarts, a stale handle).
DEFINITE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
PATIENCE = (0.1, 1.0, 3.0)  # seconds before each new try

T = TypeVar("T")


def checksum(path: Path) -> str:
    """xxh3 (64 bits) of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def patiently(read: Callable[[], T]) -> T:
    """What `read` returns, called again after a while where the file system fails (EIO, EACCES, ESTALE), before that
    is believed. That something is not there, or is no directory, is believed at once."""
    for pause in PATIENCE:
        try:
            return read()
        except DEFINITE:
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
    was there; leaving it by an exception removes it and changes nothing."""
    partial = partial_name(path)
    try:
        with _in_the_name_of(path, partial):
            yield partial
            sync(partial)
            partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def _in_the_name_of(path: Path, partial: Path) -> Iterator[None]:
    """An OSError that is about `partial` names `path`, which is what the user knows."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(path), 1)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, UTF-8, in place of what was there."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any) -> None:
    """Write a whole JSON file. Raises ValueError for NaN and infinities."""
    write_text(path, to_json(values))


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to fill. Leaving the block syncs all files in it and gives it its name, in place
    of what was there; leaving it by an exception removes it and changes nothing."""
    partial, replaced = partial_name(path), path.with_name(f".{path.name}.replaced")
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with _in_the_name_of(path, partial):
            partial.mkdir(parents=True)
            yield partial
            for file in (*partial.iterdir(), partial):
                sync(file)
            if path.exists():
                path.rename(replaced)
            partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that under its name all of it is there or nothing."""
    removed = path.with_name(f".{path.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    path.rename(removed)
    shutil.rmtree(removed)


def clean_leftovers(directory: Path) -> None:
    """Finish or undo what killed processes left half done in a directory with the functions of this module."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (match := re.fullmatch(r"\.(.+)\.(partial|replaced|removed)", path.name)):
            continue
        if match[2] == "replaced" and not (named := path.with_name(match[1])).exists():
            path.rename(named)  # between the two renames of `replacing_directory`
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def point_to(link: Path, name: str) -> None:
    """Make `link` a symbolic link to `name` beside it; a text file with that name where there are no links."""
    partial = partial_name(link)
    partial.unlink(missing_ok=True)
    try:
        partial.symlink_to(name)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say_once(f"{link.parent}: this file system has no symbolic links; {link.name} is a file that names {name}")
        partial.write_text(name + "\n", encoding="utf-8")
    partial.replace(link)
    sync(link.parent)


def follow(link: Path) -> Path:
    """The directory that `point_to` made `link` a name of; `link` itself where it is none."""
    if link.is_file():
        with suppress(OSError, ValueError):
            if (named := link.with_name(link.read_text(encoding="utf-8").strip())).is_dir():
                return named
    return link


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on disk. Others may read it as far as the umask lets them:
    safetensors itself makes files that only their owner can read. Raises OSError where it cannot be written."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    os.umask(mask := os.umask(0))
    with suppress(PermissionError):  # a file system without modes
        path.chmod(0o666 & ~mask)
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
            raise
        _say_once(f"{path.parent}: this file system cannot sync ({error.strerror}); a power cut may lose what is new")


@contextmanager
def optional(path: Path) -> Iterator[None]:
    """Around writing something that a run can do without: that it cannot be written is said once, and passed over."""
    try:
        yield
    except OSError as error:
        _say_once(f"{path}: cannot be written ({error.strerror or error}); the run goes on without")


@functools.cache
def _say_once(line: str) -> None:
    logger.warning(line)
