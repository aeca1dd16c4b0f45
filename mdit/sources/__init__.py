"""Sources of pictures and captions: one file for each set, all of them read in the same way.

A source gives its pictures in parts, in an order that no file system and no chance decides. What cannot be used is not
left out in silence but comes as a `Rejected` with a reason.
"""

import importlib
import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from mdit.captions import Caption
from mdit.config import EmojiSource, FolderSource, UserError, near_key
from mdit.documents import explain
from mdit.sources.fields import Found, check_kinds

SOURCES = (
    "sa1b",
    "cc12m",
    "textcaps",
    "journeydb",
    "diffusiondb",
    "monet",
    "fine_t2i",
    "coco",
    "huggingface",
    "webdataset",
    "folder",
    "mds",
    "emoji",
)

Reason = Literal[
    "no caption",  # there is none, or it is blank
    "unreadable caption",  # not the text or the JSON that it should be
    "missing picture",  # the captions name it, but it is not there
    "unreadable picture",  # its file or archive member cannot be read
    "link",  # an archive holds no picture or caption there, but the name of another file
    "leads outside",  # the captions name a file outside of the set's folder
    "encrypted",  # a member of a zip
    "name twice",  # files of one name, and it cannot be told which of them belong together
    "unsafe",  # rated above the limit (diffusiondb)
    "not rated",  # it may be unsafe (diffusiondb)
    "unreadable latents",  # not as many bytes as they should have (mds)
    "damaged archive",  # what comes behind the damage is lost
]


@dataclass(frozen=True)
class Picture:
    """`image` holds an encoded file's bytes (JPEG, PNG, WebP, ...) or is a decoded RGB picture. `caption` is stripped
    and never empty. `origin` says in reports where the picture comes from: "00012.tar/000120003". `captions`, where
    kinds of them were asked for, are all that there are of those, of which `caption` is the first."""

    origin: str
    image: bytes | Image.Image
    caption: str
    captions: tuple[Caption, ...] = ()

    @property
    def texts(self) -> list[str]:
        return [caption.text for caption in self.captions] or [self.caption]


@dataclass(frozen=True)
class Rejected:
    """`detail` says in a few words what is wrong. `member` is the name in the archive, where this is about one file."""

    origin: str
    reason: Reason
    detail: str = field(default="", compare=False)
    member: str | None = field(default=None, compare=False)


class Part(Protocol):
    """A piece of a source that one process reads from beginning to end, in bounded memory. Iterating again gives the
    same. `name` is unique in the source. See `mdit.sources.fingerprint` for how it is known again."""

    @property
    def name(self) -> str: ...

    def __iter__(self) -> Iterator[Picture | Rejected]: ...


@dataclass(frozen=True)
class FilePart:
    """A part that is one file, archive or directory."""

    name: str
    path: Path

    def inputs(self) -> Sequence[Path]:
        return [self.path]


@dataclass(frozen=True)
class Source:
    """Parts in a fixed order; a part that is there keeps its name when more of the set is downloaded. `pictures` is
    how many the parts give and reject in all, where that is known without reading everything."""

    parts: Sequence[Part]
    pictures: int | None


class RandomAccess(Protocol):
    """Pictures in any order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Picture | Rejected: ...


class Split(RandomAccess, Protocol):
    """Pictures for sets that a recipe makes, none rejected; `captions`, all of them, needs no picture to be made."""

    @property
    def captions(self) -> Sequence[str]: ...

    def __getitem__(self, index: int, /) -> Picture: ...


class RecipeSource(Protocol):
    @property
    def training(self) -> Split: ...

    @property
    def validation(self) -> Split: ...


def open_source(
    config: EmojiSource | FolderSource, image_size: int, kinds: Sequence[str] | None = None
) -> RecipeSource:
    """All captions of `kinds` are handed on; without kinds one a picture. Raises UserError for everything that is wrong
    with the source, before the first picture is made."""
    if isinstance(config, EmojiSource):
        from mdit.sources.emoji import KINDS, EmojiScenes

        check_kinds(kinds or (), KINDS, "emoji")
        return EmojiScenes(config, image_size, several=kinds is not None)
    from mdit.sources.folder import PictureFolder

    try:
        return PictureFolder(config, kinds)
    except OSError as error:
        raise UserError(f"{config.path}: cannot read it: {explain(error)}") from None


def open_named_source(
    name: str,
    root: Path | None,
    *,
    split: str = "train",
    caption_key: str | None = None,
    kinds: Sequence[str] | None = None,
) -> Source:
    """Open one of SOURCES as it was downloaded to `root` (for "huggingface" also a hub id, for "emoji" None).

    `split` is "train" or "validation". `caption_key` names the field or column with the caption where there may be
    several. Of `kinds` all captions are handed on; they are the source's own (KINDS of its module) or, where
    `caption_key` is taken too, names of fields or columns. Raises UserError for what the source does not take, and when
    files are missing, naming where they were looked for and how to get them.
    """
    check_split(split, splits_of(name), name)
    module = importlib.import_module(f"mdit.sources.{name}")
    takes = inspect.signature(module.open_pictures).parameters
    if caption_key is not None and "caption_key" not in takes:
        raise UserError(f"--caption_key {caption_key}: {name} has one caption a picture and takes no key")
    if kinds is not None and "kinds" not in takes:
        raise UserError(f"--captions: {name} has one caption a picture and takes no kinds ({', '.join(kinds)})")
    if kinds is not None and caption_key is not None:
        raise UserError(f"--caption_key {caption_key}: goes without --captions, which name the fields")
    if (known := getattr(module, "KINDS", None)) is not None:
        check_kinds(kinds or (), known, name)
    if (root is not None) != ("root" in takes):
        raise UserError(f"--source {name} {'needs --root' if root is None else 'is drawn and takes no --root'}")
    given = {"root": root, "split": split, "caption_key": caption_key, "kinds": kinds}
    try:
        return module.open_pictures(**{key: value for key, value in given.items() if key in takes})
    except OSError as error:
        raise UserError(f"--source {name}: cannot read {root}: {explain(error)}") from None


def splits_of(name: str) -> tuple[str, ...]:
    """The splits that one of SOURCES can be asked for. Raises UserError for another name."""
    check_name(name)
    module = importlib.import_module(f"mdit.sources.{name}")
    takes = inspect.signature(module.open_pictures).parameters
    return getattr(module, "SPLITS", ("train", "validation") if "split" in takes else ("train",))


def check_name(name: str) -> None:
    """Raise UserError for what is none of SOURCES."""
    if name not in SOURCES:
        hint = near_key(name, SOURCES) or f"; there are {', '.join(SOURCES)}"
        raise UserError(f"--source {name}: is not known{hint}")


def check_split(split: str, splits: Collection[str], of: object) -> None:
    """Raise UserError for what is none of the splits."""
    if split not in splits:
        raise UserError(f"--split {split}: {of} has no such split; it has {' and '.join(splits)}")


def captioned(origin: str, image: bytes | Image.Image, found: Found) -> Picture | Rejected:
    """A picture, unless all its captions are missing or blank, or half of a surrogate pair is in one, which JSON can
    bring."""
    if isinstance(found, list):
        captions = tuple(Caption(kind, each.strip()) for kind, each in found if each.strip())
        texts = [caption.text for caption in captions]
    else:
        captions, texts = (), [(found or "").strip()]
    if not any(texts):
        return Rejected(origin, "no caption", "caption is missing or blank")
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            return Rejected(origin, "unreadable caption", f"caption is not Unicode text: {text[:60]!r}")
    return Picture(origin, image, texts[0], captions)


def part_name(path: Path, root: Path) -> str:
    """The name of a part that is a file or directory below `root`: text, whatever bytes the path is made of."""
    return path.relative_to(root).as_posix().encode(errors="backslashreplace").decode()


def slices(split: RandomAccess, per_part: int, seed: int | None = None) -> Sequence[Part]:
    """A random-access split cut in parts of at most `per_part`, nearly equal; shuffled when there is a seed."""
    order = np.arange(len(split)) if seed is None else np.random.default_rng(seed).permutation(len(split))
    pieces = np.array_split(order, -(-len(split) // per_part)) if len(split) else []
    return [Slice(f"{number:05d}", split, piece) for number, piece in enumerate(pieces)]


@dataclass(frozen=True, eq=False)
class Slice:
    name: str
    split: RandomAccess
    indices: np.ndarray

    def __iter__(self) -> Iterator[Picture | Rejected]:
        return (self.split[int(index)] for index in self.indices)

    @property
    def drawn(self) -> bool:
        """Whether settings decide all that its pictures show, so that there is nothing to look at."""
        return getattr(self.split, "drawn", False)

    def inputs(self) -> Sequence[bytes]:
        inputs = getattr(self.split, "inputs", None)
        return [self.indices.tobytes(), *([inputs(int(index) for index in self.indices)] if inputs else [])]


def not_found(root: Path, what: str, how: str) -> UserError:
    """The error for a directory that does not hold what a source needs: what it looked for, and how to get it."""
    what = f"found no {what}" if root.is_dir() else "there is no such directory"
    return UserError(f"{root}: {what}; {how} (see docs/data.md)")
