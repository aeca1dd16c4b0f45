"""Your own pictures: a directory with a `captions.jsonl` of lines {"file": "a/b.png", "caption": "..."}."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash
from PIL import Image, ImageOps

from mdit.config import FolderSource, UserError
from mdit.dist import logger
from mdit.sources import Sample

CAPTIONS = "captions.jsonl"


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

    def __init__(self, config: FolderSource, image_size: int) -> None:
        folder = Path(config.path)
        entries = read_captions(folder)
        logger.info(f"{folder}: checking {len(entries)} pictures")
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(lambda entry: open_picture(folder, entry).close(), entries):
                pass
        validation = [entry for entry in entries if _uniform(entry.file) < config.validation_share]
        training = [entry for entry in entries if _uniform(entry.file) >= config.validation_share]
        for what, part in (("training", training), ("validation", validation)):
            if not part:
                raise UserError(
                    f"{folder / CAPTIONS}: data.prepare.source.validation_share = {config.validation_share} of "
                    f"{len(entries)} pictures leaves none for {what}"
                )
        self.training, self.validation = (Pictures(folder, part, image_size) for part in (training, validation))


class Pictures:
    """Pictures of one split, decoded when asked for; their key is the line in captions.jsonl."""

    def __init__(self, folder: Path, entries: list[Entry], image_size: int) -> None:
        self.folder, self.entries, self.image_size = folder, entries, image_size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self.entries[index]
        return Sample(f"{entry.line:09d}", crop(open_picture(self.folder, entry), self.image_size), entry.caption)

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


def open_picture(folder: Path, entry: Entry) -> Image.Image:
    """Decode a picture as RGB: upright, on white where it is transparent. Raises UserError naming file and line."""
    path, where = folder / entry.file, f"{folder / CAPTIONS}:{entry.line}"
    try:
        image = ImageOps.exif_transpose(Image.open(path))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{where}: there is no picture {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: cannot read the picture {path}: {error}") from None


def crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, as wide as the shorter side, resized to size x size."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def _uniform(file: str) -> float:
    """A number in [0, 1) that only the file's name decides."""
    return xxhash.xxh3_64_intdigest(file.encode()) / 2**64
