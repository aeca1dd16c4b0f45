"""Files in tars, zips and directories, all read in the same way, one archive at a time."""

import bz2
import gzip
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from mdit.dist import logger
from mdit.sources import Rejected
from mdit.sources.storage import (
    LARGEST,
    NOT_THERE,
    OF_ONE_NAME,
    Bounded,
    Unpacked,
    UnpackedXz,
    is_damage,
    opened,
    read_file,
)

# In the order in which they are taken where a sample has several.
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jfif", ".jp2", ".ppm")
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": UnpackedXz}  # by how they begin
ENCRYPTED = 1  # a flag of zip
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what zipfile unpacks of the others it does not bound
LARGEST_HEADER, LARGEST_LISTING = 2**20, 2**25  # bytes: of a member in a tar, of all members of a zip


@dataclass(frozen=True)
class ArchiveMember:
    """A file in an archive; `name` is its path there, without a leading "./"."""

    name: str
    data: bytes


def is_picture(name: str) -> bool:
    return name.lower().endswith(PICTURES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Such as the "._a.jpg" that macOS packs beside each a.jpg."""
    return name.rpartition("/")[2].startswith(".")


def read_members(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[ArchiveMember | Rejected]:
    """The files whose names are wanted: those of a tar in its own order, those of a zip or a directory by name.

    What cannot be read is Rejected: one file, or after all that comes before the damage the archive, as `origin`. All
    files that are wanted come, one way or the other. Raises OSError when the machine fails.
    """
    try:
        if path.is_dir():
            yield from _read_directory(path, origin, wanted)
        else:
            with opened(path) as file:
                yield from (_read_zip if path.suffix == ".zip" else _read_tar)(file, origin, wanted)
    except Exception as error:
        yield damaged(error, path, origin)


def damaged(error: Exception, what: object, origin: str) -> Rejected:
    """The reject for the rest of a file or archive, which is logged as `what`. Raises what is the machine's fault."""
    if not is_damage(error):
        raise error
    logger.warning(f"{what}: damaged: {error}")
    return Rejected(origin, "damaged archive", str(error))


def read_member(path: Path, name: str) -> bytes | None:
    """One file of a zip or a directory. None when it is not there or damaged. Raises OSError."""
    try:
        if path.is_dir():
            return read_file(path / name)
        with opened(path) as file, _opened_zip(file) as archive:
            info = archive.getinfo(name)
            return None if _judged(info, "", name) else archive.read(info)
    except Exception as error:
        if not (is_damage(error) or (path.is_dir() and getattr(error, "errno", None) in OF_ONE_NAME)):
            raise
        return None


def walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """The directories below and their files' names; nothing where there is no `root`. Raises OSError, where os.walk
    would leave out what it cannot read. Links are followed, each directory is visited once, and none that `root` itself
    is in."""

    def fail(error: OSError) -> None:
        raise error

    if root.is_dir():
        seen = {_identity(folder) for folder in root.resolve().parents}
        for folder, below, names in os.walk(root, onerror=fail, followlinks=True):
            below.sort()  # which of two links to one directory counts
            if (identity := _identity(Path(folder))) in seen:
                below.clear()
                continue
            seen.add(identity)
            yield Path(folder), names


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


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
        except tarfile.EOFHeaderError:  # pyright: ignore[reportAttributeAccessIssue]: not in its stub
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"at byte {archive.offset}: {error}") from None


def _read_tar(file: Bounded, origin: str, wanted: Callable[[str], bool]) -> Iterator[ArchiveMember | Rejected]:
    begins = file.peek(8)
    unpack = next((unpack for magic, unpack in COMPRESSED.items() if begins.startswith(magic)), None)
    content = file if unpack is None else Bounded(Unpacked(unpack(file), os.fstat(file.fileno()).st_size))
    content.largest = LARGEST_HEADER
    with tarfile.open(fileobj=content, mode="r:", tarinfo=_TarInfo) as archive:
        before = -1
        while (entry := archive.next()) is not None:
            archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]: it would remember every header
            if archive.offset <= before:
                raise tarfile.ReadError(f"at byte {before}: a member of {entry.size} bytes")
            before = archive.offset
            name = str(PurePosixPath(entry.name))
            if entry.isdir() or not wanted(name):
                continue
            where = f"{origin}/{name}"
            if entry.islnk() or entry.issym():
                yield Rejected(where, "link", f"{name} is a link to {entry.linkname}", name)
            elif not entry.isfile() or entry.issparse() or entry.size > LARGEST:
                what = f"has {entry.size} bytes" if entry.isfile() and not entry.issparse() else "is no regular file"
                yield Rejected(where, "unreadable picture", f"{name} {what}", name)
            else:
                data = archive.extractfile(entry)
                assert data is not None  # a file has data
                content.largest = LARGEST
                yield ArchiveMember(name, data.read())
                content.largest = LARGEST_HEADER
        # A download that was cut off may have left zeros, which look like an end: not more of them than tar pads with.
        rest = content.read(tarfile.RECORDSIZE + 1)
        if len(rest) > tarfile.RECORDSIZE or rest.strip(b"\0"):
            raise tarfile.ReadError(f"ends at byte {archive.offset}, but the file goes on")


def _opened_zip(file: Bounded) -> zipfile.ZipFile:
    file.largest = LARGEST_LISTING
    archive = zipfile.ZipFile(file)
    file.largest = LARGEST
    return archive


def _judged(info: zipfile.ZipInfo, origin: str, name: str) -> Rejected | None:
    """The reject for a member that must not be unpacked."""
    if info.flag_bits & ENCRYPTED:
        return Rejected(origin, "encrypted", f"{name} is encrypted", name)
    if stat.S_ISLNK(info.external_attr >> 16):
        return Rejected(origin, "link", f"{name} is a link", name)
    if info.file_size > LARGEST:
        return Rejected(origin, "unreadable picture", f"{name} has {info.file_size} bytes", name)
    if info.compress_type not in METHODS:
        return Rejected(origin, "unreadable picture", f"{name} is packed by method {info.compress_type}", name)
    return None


def _read_zip(file: Bounded, origin: str, wanted: Callable[[str], bool]) -> Iterator[ArchiveMember | Rejected]:
    with _opened_zip(file) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            name = info.filename
            if info.is_dir() or not wanted(name):
                continue
            yield _judged(info, f"{origin}/{name}", name) or _read_one(name, origin, partial(archive.read, info))


def _read_directory(path: Path, origin: str, wanted: Callable[[str], bool]) -> Iterator[ArchiveMember | Rejected]:
    with os.scandir(path) as entries:
        names = sorted(entry.name for entry in entries if wanted(entry.name) and not entry.is_dir())
    for name in names:
        yield _read_one(name, origin, partial(read_file, path / name), path)


def _read_one(
    name: str, origin: str, read: Callable[[], bytes], directory: Path | None = None
) -> ArchiveMember | Rejected:
    try:
        return ArchiveMember(name, read())
    except Exception as error:
        return rejected_file(error, f"{origin}/{name}", name, directory)


def rejected_file(error: Exception, origin: str, name: str, directory: Path | None) -> Rejected:
    """The reject for one file that could not be read. Raises what is the machine's fault; so is a file that is not
    there when its directory is not there any more."""
    number = getattr(error, "errno", None)
    if not (is_damage(error) or (directory is not None and number in OF_ONE_NAME)):
        raise error
    if number in NOT_THERE and directory is not None:
        directory.stat()
        return Rejected(origin, "missing picture", f"there is no picture {name}", name)
    reason = getattr(error, "strerror", None) or str(error)
    return Rejected(origin, "unreadable picture", f"cannot read the picture {name}: {reason}", name)
