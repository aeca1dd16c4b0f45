"""Your own pictures: a directory with a `captions.jsonl` of lines {"file": "a/b.png", "caption": "..."}.

A recipe wants every one of them: what is wrong is an error that names the line, before anything is written. By
`--source folder` what cannot be used is left out and reported, and the directory may hold millions.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import xxhash
from PIL import Image

from mdit.config import FolderSource, UserError
from mdit.dist import logger
from mdit.sources import Picture, Rejected, Source, not_found
from mdit.sources.files import read_object, read_picture, reading, text

CAPTIONS = "captions.jsonl"
LINES_PER_PART = 5000


def open_pictures(root: Path, caption_key: str | None) -> Source:
    """Counts the lines and reads none of them: a part does, and rejects what cannot be used."""
    path = root / CAPTIONS
    if not path.is_file():
        raise not_found(root, CAPTIONS, 'write it, a line {"file": ..., "caption": ...} for each picture')
    starts, offset, count = [], 0, 0
    with reading(path) as lines:
        for count, line in enumerate(lines, start=1):
            if count % LINES_PER_PART == 1:
                starts.append(offset)
            offset += len(line)
    if not starts:
        raise UserError(f"{path}: is empty; expected one caption a line")
    return Source(
        [Lines(f"{n:05d}", path, n, start, caption_key or "caption") for n, start in enumerate(starts)], count
    )


@dataclass(frozen=True)
class Lines:
    """The `number`-th LINES_PER_PART lines of captions.jsonl, from byte `start` on."""

    name: str
    captions: Path
    number: int
    start: int
    caption_key: str

    def __iter__(self) -> Iterator[Picture | Rejected]:
        with reading(self.captions) as lines:
            lines.seek(self.start)
            for number in range(LINES_PER_PART * self.number + 1, LINES_PER_PART * (self.number + 1) + 1):
                if not (line := lines.readline()):
                    return
                yield self._read(f"{CAPTIONS}:{number}", line)

    def look(self) -> list[bytes]:
        with reading(self.captions) as lines:
            lines.seek(self.start)
            return [b"".join(islice(lines, LINES_PER_PART))]

    def _read(self, origin: str, line: bytes) -> Picture | Rejected:
        if (values := read_object(line)) is None:
            return Rejected(origin, "unreadable caption")
        if not isinstance(values.get("file"), str) or not values["file"].strip():
            return Rejected(origin, "missing picture")
        return read_picture(self.captions.parent / values["file"], origin, text(values.get(self.caption_key)))


@dataclass(frozen=True)
class Entry:
    """One line of captions.jsonl; `line` counts from 1."""

    line: int
    file: str
    caption: str


class PictureFolder:
    """`training` and `validation` pictures. A picture's split depends on its file name alone.

    Raises UserError naming the line of captions.jsonl for everything that is wrong, pictures included: they are all
    decoded once here, so that a set is never half written when a broken one is met.
    """

    def __init__(self, config: FolderSource) -> None:
        folder = Path(config.path)
        entries = read_captions(folder)
        logger.info(f"{folder}: checking {len(entries)} pictures")
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda entry: check_picture(folder, entry), entries):
                pass
        validation = [entry for entry in entries if _uniform(entry.file) < config.validation_share]
        training = [entry for entry in entries if _uniform(entry.file) >= config.validation_share]
        for what, part in (("training", training), ("validation", validation)):
            if not part:
                raise UserError(
                    f"{folder / CAPTIONS}: data.prepare.source.validation_share = {config.validation_share} of "
                    f"{len(entries)} pictures leaves none for {what}"
                )
        self.training, self.validation = Pictures(folder, training), Pictures(folder, validation)


class Pictures:
    """Pictures of one split, read when asked for; their origin is the line in captions.jsonl."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        self.folder, self.entries = folder, entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Picture:
        entry = self.entries[index]
        where, path = f"{CAPTIONS}:{entry.line}", self.folder / entry.file
        try:
            return Picture(where, path.read_bytes(), entry.caption)
        except OSError as error:
            raise UserError(f"{self.folder / where}: cannot read the picture {path}: {error}") from None

    def look(self, indices: Iterable[int]) -> bytes:
        return repr([(self.entries[index].file, self.entries[index].caption) for index in indices]).encode()

    @property
    def captions(self) -> list[str]:
        return [entry.caption for entry in self.entries]


def read_captions(folder: Path) -> list[Entry]:
    """Every line of captions.jsonl. Keys other than "file" and "caption" are left alone. Raises UserError."""
    path = folder / CAPTIONS
    try:
        with open(path, encoding="utf-8") as lines:
            entries = [_entry(f"{path}:{number}", number, line) for number, line in enumerate(lines, start=1)]
    except OSError as error:
        raise UserError(f"{path}: cannot read the captions: {error.strerror}; see docs/data.md") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8: {error}") from None
    if not entries:
        raise UserError(f"{path}: is empty; expected one caption a line")
    return entries


def _entry(where: str, number: int, line: str) -> Entry:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f'{where}: expected {{"file": ..., "caption": ...}}, found {line.strip()[:60]}')
    for key in ("file", "caption"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise UserError(f"{where}: {key} is {values.get(key)!r}; expected a text")
    return Entry(number, values["file"], values["caption"].strip())


def check_picture(folder: Path, entry: Entry) -> None:
    """Decode a picture and forget it. Raises UserError naming file and line."""
    path, where = folder / entry.file, f"{folder / CAPTIONS}:{entry.line}"
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        raise UserError(f"{where}: there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot read the picture {path}: {error}") from None


def _uniform(file: str) -> float:
    """A number in [0, 1) that only the file's name decides."""
    return xxhash.xxh3_64_intdigest(file.encode()) / 2**64
