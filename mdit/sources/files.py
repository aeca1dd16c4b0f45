"""Pictures in single files, named by captions in JSON."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mdit.config import UserError
from mdit.sources import Picture, Rejected, captioned


@dataclass(frozen=True)
class CaptionedFiles:
    """Random access to pictures below a directory; `entries` are (file, caption), and origins are the files."""

    directory: Path
    entries: Sequence[tuple[str, str | None]]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Picture | Rejected:
        file, caption = self.entries[index]
        return read_picture(self.directory / file, file, caption)

    def look(self, indices: Iterable[int]) -> bytes:
        return repr([self.entries[index] for index in indices]).encode()


def read_picture(path: Path, origin: str, caption: str | None) -> Picture | Rejected:
    try:
        return captioned(origin, path.read_bytes(), caption)
    except FileNotFoundError:
        return Rejected(origin, "missing picture")
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return Rejected(origin, "unreadable picture")


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """Open a file; raises UserError naming it when that, or reading it, fails."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None


def read_json(path: Path) -> Any:
    """Raises UserError naming the file."""
    with reading(path) as file:
        try:
            return json.load(file)
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {error}") from None


def read_object(line: bytes) -> dict | None:
    """One line of a .jsonl file; None when it is not a JSON object."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def text(value: Any) -> str | None:
    """A caption, or the first of several; None when it is neither."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, str) else None
