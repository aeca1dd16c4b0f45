"""Shards that the paper's code wrote for MosaicML Streaming: of pictures, or of latents that need no encoding.

    index.json, 0/shard.00000.mds, ...    `mdit.sources.mds_shards` has the format

Each shard is one part. Of pictures, the columns are jpg (or another of PICTURES) and caption (or another of CAPTIONS,
or what the caption key names). Of latents they are, all raw little-endian fp16 but the caption:

    caption            text                   caption_latents    77 x 1,024, of the CLIP text tower of
    latents_256        4 x 32 x 32                               apple/DFN5B-CLIP-ViT-H-14-378
    latents_512        4 x 64 x 64            both of SDXL's autoencoder, times its scaling factor

Shards compressed with zstd need the package zstandard. The licence is that of the pictures.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mdit.config import UserError
from mdit.sources import Picture, Rejected, Source, captioned
from mdit.sources.mds_shards import MdsShard, open_shards, read_index

PICTURES = ("jpg", "jpeg", "png", "image")
CAPTIONS = ("caption", "caption_syn_pixart_llava15", "text", "prompt")
FILES, TEXTS = ("jpeg", "png", "bytes"), ("str", "json")  # encodings
CAPTION, EMBEDDING, EMBEDDING_SHAPE = "caption", "caption_latents", (77, 1024)
PIXELS_PER_LATENT = 8
BYTES_PER_VALUE = 2


class Latents(NamedTuple):
    """A sample that needs no encoding: `latent` (C, S, S), `embedding` (77, 1024), both fp16."""

    origin: str
    latent: np.ndarray
    embedding: np.ndarray
    caption: str


@dataclass(frozen=True)
class ShardOfPictures:
    name: str
    shard: MdsShard
    picture: str
    caption: str

    def __iter__(self) -> Iterator[Picture | Rejected]:
        for item in self.shard.read((self.picture, self.caption)):
            yield item if isinstance(item, Rejected) else self._sample(*item)

    def inputs(self) -> list[Path]:
        return [self.shard.path]

    def _sample(self, origin: str, columns: dict[str, bytes]) -> Picture | Rejected:
        try:
            return captioned(origin, columns[self.picture], self.shard.text(self.caption, columns[self.caption]))
        except ValueError:
            return Rejected(origin, "unreadable caption")


@dataclass(frozen=True)
class ShardOfLatents:
    """Latents of one image size. `latent_shape` is (C, S, S), `embedding_shape` (77, 1024)."""

    name: str
    shard: MdsShard
    column: str
    latent_shape: tuple[int, int, int]
    embedding_shape: tuple[int, int]

    @property
    def samples(self) -> int:
        return self.shard.samples

    def __iter__(self) -> Iterator[Latents | Rejected]:
        for item in self.shard.read((self.column, EMBEDDING, CAPTION)):
            yield item if isinstance(item, Rejected) else self._sample(*item)

    def inputs(self) -> list[Path]:
        return [self.shard.path]

    def _sample(self, origin: str, columns: dict[str, bytes]) -> Latents | Rejected:
        try:
            latent = np.frombuffer(columns[self.column], "<f2").reshape(self.latent_shape)
            embedding = np.frombuffer(columns[EMBEDDING], "<f2").reshape(self.embedding_shape)
            caption = self.shard.text(CAPTION, columns[CAPTION])
        except ValueError:
            return Rejected(origin, "unreadable latents")
        if not (caption := (caption or "").strip()):
            return Rejected(origin, "no caption")
        return Latents(origin, latent, embedding, caption)


def open_pictures(root: Path, caption_key: str | None) -> Source:
    shards = open_shards(root)
    captions = CAPTIONS if caption_key is None else (caption_key,)
    parts = [
        ShardOfPictures(shard.name, shard, _column(shard, PICTURES, FILES), _column(shard, captions, TEXTS))
        for shard in shards
    ]
    return Source(parts, sum(shard.samples for shard in shards))


def holds_latents(root: Path) -> bool:
    """Whether these are shards of latents. Raises UserError for an index.json that cannot be read."""
    return any(EMBEDDING in shard.encodings for shard in read_index(root))


def open_latents(root: Path, image_size: int) -> list[ShardOfLatents]:
    """The shards as parts, for pictures of `image_size` pixels; S is an eighth of it.

    Raises UserError when a column is missing, or when the first sample is not of 77 x 1,024 and of C x S x S in fp16.
    """
    shards, column, side = open_shards(root), f"latents_{image_size}", image_size // PIXELS_PER_LATENT
    for shard in shards:
        for name, encoding in ((column, "bytes"), (EMBEDDING, "bytes"), (CAPTION, "str")):
            _column(shard, (name,), (encoding,))
    samples = (item for shard in shards for item in shard.read((column, EMBEDDING)))
    first = next((item for item in samples if not isinstance(item, Rejected)), None)
    if first is None:
        raise UserError(f"{root}: none of the {len(shards)} shards has a sample that can be read")
    latent, embedding = len(first[1][column]), len(first[1][EMBEDDING])
    expected = BYTES_PER_VALUE * EMBEDDING_SHAPE[0] * EMBEDDING_SHAPE[1]
    if embedding != expected:
        raise UserError(f"{shards[0].path}: {EMBEDDING} has {embedding} bytes, expected {expected}: 77 x 1024 in fp16")
    channels, rest = divmod(latent, BYTES_PER_VALUE * side * side)
    if rest or not channels:
        raise UserError(f"{shards[0].path}: {column} has {latent} bytes, expected 4 x {side} x {side} in fp16")
    shape = (channels, side, side)
    return [ShardOfLatents(shard.name, shard, column, shape, EMBEDDING_SHAPE) for shard in shards]


def _column(shard: MdsShard, names: Sequence[str], encodings: Sequence[str]) -> str:
    """The first of these columns. Raises UserError naming those that are there."""
    for name in names:
        if shard.encodings.get(name) in encodings:
            return name
    there = ", ".join(f"{name} ({encoding})" for name, encoding in shard.encodings.items())
    wanted = f"{' or '.join(names)} ({' or '.join(encodings)})"
    raise UserError(f"{shard.path}: has no column {wanted}; its columns are {there}")
