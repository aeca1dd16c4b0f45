"""Pictures in single files, named by captions in JSON."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.documents import parse_foreign_json, path_below
from mdit.sources import Picture, Rejected, Source, captioned, slices
from mdit.sources.archives import rejected_file
from mdit.sources.fields import Found
from mdit.sources.storage import opened, read_file

PICTURES_PER_PART = 4000
LARGEST_TABLE, TABLE_MEMORY = 2**30, 2**31  # bytes: of a set's captions in one JSON file, of what it becomes
PEEKED = 100  # objects in which a caption's key must be found


@dataclass(frozen=True)
class Entry:
    """A picture's file and caption, or captions, as they stand in `origin`."""

    origin: str
    file: str
    caption: Found


@dataclass(frozen=True)
class CaptionedFiles:
    """Random access to pictures below a directory. `there` is a file or directory that is there as long as they are."""

    directory: Path
    entries: Sequence[Entry]
    there: Path

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Picture | Rejected:
        entry = self.entries[index]
        return read_picture(self.directory, entry, self.there)

    def inputs(self, indices: Iterable[int]) -> bytes:
        return repr([(self.entries[index].file, self.entries[index].caption) for index in indices]).encode()


def captioned_files(
    captions: Path, directory: Path, pairs: Callable[[Any], Iterable[tuple[str, Found]]], expected: str
) -> Source:
    """The pictures of a directory whose files and captions are `pairs` of the JSON in `captions`. Raises UserError for
    JSON that is not as `expected`."""
    try:
        found = sorted(pairs(read_json(captions)), key=lambda pair: Path(pair[0]).as_posix())
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{captions}: expected {expected}") from None
    pictures = CaptionedFiles(directory, [Entry(file, file, caption) for file, caption in found], directory)
    return Source(slices(pictures, PICTURES_PER_PART), len(pictures))


def read_picture(directory: Path, entry: Entry, there: Path) -> Picture | Rejected:
    """A picture in a file of its own, which is below `directory`: a name that leads out of it is Rejected. `there` is a
    file or directory that is there as long as the storage is. Raises OSError when the machine fails."""
    try:
        path = path_below(directory, entry.file)
    except ValueError as error:
        return Rejected(entry.origin, "leads outside", str(error))
    try:
        return captioned(entry.origin, read_file(path), entry.caption)
    except Exception as error:
        return rejected_file(error, entry.origin, str(path), there)


def read_json(path: Path) -> Any:
    """Raises UserError naming the file."""
    try:
        with opened(path) as file:
            file.largest = LARGEST_TABLE
            return parse_foreign_json(file.read(), TABLE_MEMORY)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def parse_object(content: bytes) -> dict:
    """Raises ValueError for what is not a JSON object."""
    if not isinstance(values := parse_foreign_json(content), dict):
        raise ValueError("not a JSON object")
    return values


def read_object(content: bytes) -> dict | None:
    """None for what is not a JSON object."""
    try:
        return parse_object(content)
    except ValueError:
        return None
