"""Files in tars, zips and directories, all read in the same way, one archive at a time."""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from mdit.dist import logger
from mdit.sources import Rejected

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
# What a file that is cut off, overwritten or not readable raises, depending on where it is hurt.
DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, tarfile.TarError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Member:
    """A file in an archive; `name` is its path there, without a leading "./"."""

    name: str
    data: bytes


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES)


def read_members(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[Member | Rejected]:
    """The files whose names are wanted: those of a tar in its own order, those of a zip or a directory by name.

    What cannot be read is Rejected: one file, or after all that comes before the damage the archive, as `origin`.
    """
    read = _read_directory if path.is_dir() else _read_zip if path.suffix == ".zip" else _read_tar
    try:
        yield from read(path, origin, wanted)
    except DAMAGE as error:
        logger.warning(f"{path}: damaged: {error}")
        yield Rejected(origin, "damaged archive")


def read_member(path: Path, name: str) -> bytes | None:
    """One file of a zip or a directory. None when it is not there or cannot be read."""
    try:
        if path.is_dir():
            return (path / name).read_bytes()
        with zipfile.ZipFile(path) as archive:
            return archive.read(name)
    except (*DAMAGE, KeyError):
        return None


def without_unpacked(archives: Iterable[Path], directories: Iterable[Path]) -> list[Path]:
    """Both, sorted, but no archive whose content already lies in a directory of its name (000.tgz and 000)."""
    directories = list(directories)
    unpacked = {directory.name for directory in directories}
    return sorted([path for path in archives if path.name.split(".")[0] not in unpacked] + directories)


class _TarInfo(tarfile.TarInfo):
    """tarfile takes any header it cannot read for the end of the archive; this one takes only the end mark for it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"at byte {archive.offset}: {error}") from None


def _read_tar(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[Member]:
    with tarfile.open(path, tarinfo=_TarInfo) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # it would remember every header
            name = str(PurePosixPath(entry.name))
            if entry.isfile() and wanted(name):
                yield Member(name, archive.extractfile(entry).read())
        # A download that was cut off may have left zeros, which look like an end: not more of them than tar pads with.
        rest = archive.fileobj.read(tarfile.RECORDSIZE + 1)
        if len(rest) > tarfile.RECORDSIZE or rest.strip(b"\0"):
            raise tarfile.ReadError(f"ends at byte {archive.offset}, but the file goes on")


def _read_zip(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[Member | Rejected]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith("/") and wanted(name):
                yield _read_file(name, origin, partial(archive.read, name))


def _read_directory(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[Member | Rejected]:
    for name in sorted(entry.name for entry in os.scandir(path) if entry.is_file() and wanted(entry.name)):
        yield _read_file(name, origin, (path / name).read_bytes)


def _read_file(name: str, origin: str, read: Callable[[], bytes]) -> Member | Rejected:
    try:
        return Member(name, read())
    except DAMAGE:
        return Rejected(f"{origin}/{name}", "unreadable picture")
