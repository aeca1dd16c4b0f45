"""Pictures in single files, named by captions in JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.documents import parse_foreign_json
from mdit.sources import Picture, Rejected, captioned
from mdit.sources.archives import rejected_file
from mdit.sources.storage import opened, read_file

PEEKED = 100  # objects in which a caption's key must be found


@dataclass(frozen=True)
class CaptionedFiles:
    """Random access to pictures below a directory; `entries` are (file, caption), and origins are the files."""

    directory: Path
    entries: Sequence[tuple[str, str | None]]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Picture | Rejected:
        file, caption = self.entries[index]
        return read_picture(self.directory / file, file, caption, self.directory)

    def inputs(self, indices: Iterable[int]) -> bytes:
        return repr([self.entries[index] for index in indices]).encode()


def read_picture(path: Path, origin: str, caption: str | None, there: Path) -> Picture | Rejected:
    """A picture in a file of its own. `there` is a file or directory that is there as long as the storage is. Raises
    OSError when the machine fails."""
    try:
        return captioned(origin, read_file(path), caption)
    except Exception as error:
        return rejected_file(error, origin, str(path), there)


def read_json(path: Path) -> Any:
    """Raises UserError naming the file."""
    try:
        with opened(path) as file:
            return parse_foreign_json(file.read())
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None


def read_object(line: bytes) -> dict | None:
    """One line of a .jsonl file; None when it is not a JSON object."""
    try:
        values = parse_foreign_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def require_key(objects: Iterable[dict], key: str, where: object) -> None:
    """Raise UserError naming the keys that are there when none of the objects has `key` (and there are some)."""
    there: dict[str, None] = {}
    count = 0
    for values in objects:
        if key in values:
            return
        count += 1
        there |= dict.fromkeys(values)
    if count:
        raise UserError(
            f"{where}: no caption: none of the first {count} objects has the key {key}; the keys there are "
            f"{', '.join(map(str, there)) or 'none'}; name one by --caption_key"
        )


def text(value: Any) -> str | None:
    """A caption, or the first of several; None when it is neither."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, str) else None
