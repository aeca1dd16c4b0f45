"""Where pictures and captions come from. One file each; every source is a deterministic function of its config."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from mdit.config import EmojiSource, FolderSource


@dataclass(frozen=True)
class Sample:
    """`key` is unique in its split and holds no dot; `image` is RGB, image_size x image_size."""

    key: str
    image: Image.Image
    caption: str


class Split(Protocol):
    """Samples made when asked for, in any order; `captions` needs no picture to be made."""

    captions: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class Source(Protocol):
    training: Split
    validation: Split


def open_source(config: EmojiSource | FolderSource, image_size: int) -> Source:
    """Raises UserError for everything that is wrong with the source, before the first sample is made."""
    if isinstance(config, EmojiSource):
        from mdit.sources.emoji import EmojiScenes

        return EmojiScenes(config, image_size)
    from mdit.sources.folder import PictureFolder

    return PictureFolder(config, image_size)
