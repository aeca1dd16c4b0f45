"""Your own pictures: a directory with a `captions.jsonl` of lines {"file": "a/b.png", "caption": "..."}.

A recipe wants every one of them: what is wrong is an error that names the line, before anything is written. By
`--source folder` what cannot be used is left out and reported, and the directory may hold millions; without a
`captions.jsonl` it may also hold, at any depth, KEY.jpg (or another of archives.PICTURES) beside KEY.txt or KEY.json,
as img2dataset writes them with output_format files (`mdit.sources.samples`).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import xxhash

from mdit.config import FolderSource, UserError
from mdit.dist import logger
from mdit.documents import parse_foreign_json
from mdit.sources import Picture, Rejected, Source, captioned, not_found, part_name
from mdit.sources.archives import is_picture, rejected_file, walk
from mdit.sources.fields import CaptionFields, all_texts, caption_fields, check_kinds, require_fields
from mdit.sources.files import PEEKED, CaptionedFiles, Entry, read_object, read_picture
from mdit.sources.pictures import open_header, room_for, upright_rgb
from mdit.sources.samples import SampleFiles, require_caption
from mdit.sources.storage import opened

CAPTIONS, CAPTION = "captions.jsonl", caption_fields(None, "caption")
LINES_PER_PART = 5000

T = TypeVar("T")


def open_pictures(root: Path, caption_key: str | None, kinds: Sequence[str] | None) -> Source:
    """Counts the lines and reads only the first: a part reads its own, and rejects what cannot be used."""
    path, fields = root / CAPTIONS, caption_fields(kinds, caption_key or "caption")
    if not path.is_file():
        return _open_pairs(root, fields, text_first=caption_key is None)
    starts, objects, offset, count = [], [], 0, 0
    with opened(path) as lines:
        for count, line in enumerate(lines, start=1):
            if count % LINES_PER_PART == 1:
                starts.append(offset)
            if count <= PEEKED and (values := read_object(line)) is not None:
                objects.append(values)
            offset += len(line)
    if not starts:
        raise UserError(f"{path}: is empty; expected one caption a line")
    require_fields(objects, fields, path)
    return Source([Lines(f"{n:05d}", path, n, start, fields) for n, start in enumerate(starts)], count)


def _open_pairs(root: Path, fields: CaptionFields, text_first: bool) -> Source:
    parts = [
        SampleFiles(part_name(folder, root), folder, fields, text_first)
        for folder, names in walk(root)
        if any(map(is_picture, names))
    ]
    if not parts:
        how = 'write it, a line {"file": ..., "caption": ...} for each picture, or put KEY.txt beside each KEY.jpg'
        raise not_found(root, CAPTIONS, how)
    parts.sort(key=lambda part: part.name)
    require_caption(parts)
    return Source(parts, pictures=None)


@dataclass(frozen=True)
class Lines:
    """The `number`-th LINES_PER_PART lines of captions.jsonl, from byte `start` on."""

    name: str
    captions: Path
    number: int
    start: int
    fields: CaptionFields

    def __iter__(self) -> Iterator[Picture | Rejected]:
        with opened(self.captions) as lines:
            lines.seek(self.start)
            first = LINES_PER_PART * self.number + 1
            for number, line in enumerate(islice(lines, LINES_PER_PART), start=first):
                entry = parse_line(number, line, self.fields)
                if isinstance(entry, Entry):
                    entry = read_picture(self.captions.parent, entry, self.captions)
                yield entry

    def inputs(self) -> list[bytes]:
        with opened(self.captions) as lines:
            lines.seek(self.start)
            return [b"".join(islice(lines, LINES_PER_PART))]


def parse_line(number: int, line: bytes, fields: CaptionFields = CAPTION) -> Entry | Rejected:
    """A line of captions.jsonl, counted from 1. Keys other than "file" and those of captions are left alone."""
    origin, keys = f"{CAPTIONS}:{number}", fields.names
    try:
        values = parse_foreign_json(line)
    except ValueError as error:
        return Rejected(origin, "unreadable caption", f"not valid JSON: {error}")
    if not isinstance(values, dict):
        expected = f'{{"file": ..., "{keys[0]}": ...}}'
        return Rejected(origin, "unreadable caption", f"expected {expected}, found {values!r}")
    file = values.get("file")
    if not isinstance(file, str) or not file.strip():
        return Rejected(origin, "missing picture", f"file is {file!r}; expected a text")
    judged = captioned(origin, b"", fields.read(values))
    if isinstance(judged, Picture):
        return Entry(origin, file, [*judged.captions] or judged.caption)
    there = " and ".join(f"{key} is {values.get(key)!r}" for key in keys)
    detail = f"{there}; expected a text" if judged.reason == "no caption" else judged.detail
    return Rejected(origin, judged.reason, detail)


class PictureFolder:
    """`training` and `validation` pictures. A picture's split depends on its file name alone.

    Raises UserError naming the line of captions.jsonl for everything that is wrong, pictures included: they are all
    decoded once here, so that a set is never half written when a broken one is met.
    """

    def __init__(self, config: FolderSource, kinds: Sequence[str] | None = None) -> None:
        folder = Path(config.path)
        entries = read_captions(folder, caption_fields(kinds, "caption"))
        logger.info(f"{folder}: checking {len(entries)} pictures")
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(Pictures(folder, entries).check, range(len(entries))):
                pass
        splits: dict[bool, list[Entry]] = {False: [], True: []}
        for entry in entries:
            splits[_uniform(entry.file) < config.validation_share].append(entry)
        self.training, self.validation = Pictures(folder, splits[False]), Pictures(folder, splits[True])
        for what, split in (("training", self.training), ("validation", self.validation)):
            if not len(split):
                raise UserError(
                    f"{folder / CAPTIONS}: data.precompute.source.validation_share = {config.validation_share} of "
                    f"{len(entries)} pictures leaves none for {what}"
                )


class Pictures(CaptionedFiles):
    """Pictures of one split, read when asked for. Raises UserError naming the line for what is wrong."""

    def __init__(self, folder: Path, entries: list[Entry]) -> None:
        super().__init__(folder, entries, there=folder / CAPTIONS)

    def __getitem__(self, index: int) -> Picture:
        return _required(self.directory, super().__getitem__(index))

    @property
    def captions(self) -> list[str]:
        return [text for entry in self.entries for text in all_texts(entry.caption)]

    def check(self, index: int) -> None:
        """Decode a picture and forget it."""
        try:
            image = open_header(self[index].image)
            with room_for(image):
                upright_rgb(image)
        except Exception as error:
            entry = self.entries[index]
            file = str(self.directory / entry.file)
            _required(self.directory, rejected_file(error, entry.origin, file, directory=None))


def read_captions(folder: Path, fields: CaptionFields) -> list[Entry]:
    """Every line of captions.jsonl. Raises UserError for the first one that is wrong, and for a kind of captions that
    none has."""
    path = folder / CAPTIONS
    if not path.is_file():
        raise UserError(f"{path}: cannot read the captions: there is no such file; see docs/data.md")
    with opened(path) as lines:
        entries = [_required(folder, parse_line(number, line, fields)) for number, line in enumerate(lines, start=1)]
    if not entries:
        raise UserError(f"{path}: is empty; expected one caption a line")
    if fields.several:
        there = {caption.kind for entry in entries if isinstance(entry.caption, list) for caption in entry.caption}
        check_kinds(fields.fields, sorted(there), str(path))
    return entries


def _required(folder: Path, item: T | Rejected) -> T:
    if isinstance(item, Rejected):
        raise UserError(f"{folder / item.origin}: {item.detail}")
    return item


def _uniform(file: str) -> float:
    """A number in [0, 1) that only the file's name decides."""
    return xxhash.xxh3_64_intdigest(file.encode(errors="surrogateescape")) / 2**64
