"""Description of a set: manifest.json, and the layout of its samples. See `mdit.data.shards` for the format."""

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from mdit.captions import CaptionWeights
from mdit.config import AnySection, Embeddings, NonNegativeInt, PositiveInt, Section, UserError, parse_section
from mdit.data.quantise import BLOCK, dequantise, stored_bytes
from mdit.descriptions import Encoders
from mdit.documents import parse_json, plain_name, read_bytes, read_json

FORMATS = ("mdit-latents/1", "mdit-latents/2")  # with one caption a sample, with several
MANIFEST = "manifest.json"
TAR_BLOCK = 512
MOST_ROW_BYTES = 2**28  # of a sample: a T5-XXL embedding of 512 tokens is 4 MiB


class ShardError(UserError):
    """Shards that are not what their manifest says."""


class MemberFormat(Section):
    """`f16` is little-endian IEEE half; `i8b64` is described in `mdit.data.quantise`."""

    dtype: Embeddings
    shape: tuple[PositiveInt, ...]


class Members(Section):
    """`rep`: a vision tower's features of the picture's patches, in sets that have some."""

    lat: MemberFormat
    emb: MemberFormat
    rep: MemberFormat | None = None


class SampleLayout(Section):
    """Layout of a sample: latents (C, H, W) in fp16, a caption embedding (L, C) in fp16 or 8 bits; in some sets also a
    vision tower's features of T patches (T, C), in 8 bits.

    A *row* is the part of a sample that all samples of a set share in length: from its first tar header to the caption,
    headers and padding included. So one read and one checksum cover everything.

    With `captions`, weights by kind, samples have one or more of them, with an embedding each. A row then has the one
    that is asked for in the place of the only one, so that what makes tensors of rows knows no difference.
    """

    latent_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    embedding_shape: tuple[PositiveInt, PositiveInt]
    embeddings: Embeddings = "f16"
    features_shape: tuple[PositiveInt, PositiveInt] | None = None
    captions: CaptionWeights | None = None

    @cached_property
    def embedding_bytes(self) -> int:
        length, channels = self.embedding_shape
        return stored_bytes(length, channels) if self.embeddings == "i8b64" else 2 * length * channels

    @cached_property
    def latent_bytes(self) -> int:
        channels, height, width = self.latent_shape
        return 2 * channels * height * width

    @cached_property
    def rest_at(self) -> int:
        """Offset in a row of the header behind the embedding, which comes first."""
        return TAR_BLOCK + padded(self.embedding_bytes)

    @cached_property
    def latent_at(self) -> int:
        """Offset of the latents' first byte in a row."""
        return self.rest_at + TAR_BLOCK

    @cached_property
    def features_bytes(self) -> int:
        return stored_bytes(*self.features_shape) if self.features_shape else 0

    @cached_property
    def features_at(self) -> int:
        """Offset of the features' first byte in a row of a set that has some."""
        return self.latent_at + padded(self.latent_bytes) + TAR_BLOCK

    @cached_property
    def row_bytes(self) -> int:
        latents_end = self.latent_at + padded(self.latent_bytes)
        return (self.features_at + padded(self.features_bytes) if self.features_shape else latents_end) + TAR_BLOCK

    def checked(self, text_bytes: int, captions: int | None = None) -> tuple[int, int]:
        """Offset in a sample, and length, of what the xxh3 in the index is of: with several captions all that is behind
        their embeddings, else everything."""
        if captions is None:
            return 0, self.row_bytes + text_bytes
        return self.rest_at + self.further_bytes(captions), self.row_bytes - self.rest_at + text_bytes

    def further_bytes(self, captions: Any) -> Any:
        """Bytes that a sample of so many captions (int or array) has in its shard beyond a row and its text."""
        return padded(captions * self.embedding_bytes) - padded(self.embedding_bytes)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(N, row_bytes) uint8 -> latents (N, C, H, W) and caption embeddings (N, L, C), both fp16, on the device of
        the rows. Views of the rows, but for embeddings in 8 bits."""
        stored = rows[:, TAR_BLOCK : TAR_BLOCK + self.embedding_bytes]
        latents = rows[:, self.latent_at : self.latent_at + self.latent_bytes].view(torch.float16)
        if self.embeddings == "i8b64":
            captions = dequantise(stored, *self.embedding_shape)
        else:
            captions = stored.view(torch.float16).unflatten(1, self.embedding_shape)
        return latents.unflatten(1, self.latent_shape), captions

    def features(self, rows: Tensor) -> Tensor:
        """(N, row_bytes) uint8 -> the patches' features (N, T, C) fp16, on the device of the rows."""
        assert self.features_shape is not None
        stored = rows[:, self.features_at : self.features_at + self.features_bytes]
        return dequantise(stored, *self.features_shape)

    def check(self) -> None:
        """Raise UserError when 8-bit blocks do not fit, or a sample takes more than MOST_ROW_BYTES."""
        if self.row_bytes > MOST_ROW_BYTES:
            raise UserError(f"a sample takes {self.row_bytes} bytes, more than the {MOST_ROW_BYTES} that are read")
        patches, width = self.features_shape or (0, 0)
        if patches * width % BLOCK:
            raise UserError(
                f"features of {patches} patches in {width} channels are {patches * width} values, which the blocks of "
                f"{BLOCK} that they are stored in do not fit"
            )
        if self.embeddings == "i8b64" and self.embedding_shape[1] % BLOCK:
            raise UserError(
                f"embeddings = 'i8b64' has blocks of {BLOCK} values, which do not fit "
                f"{self.embedding_shape[1]} channels"
            )


class StoredCaption(Section):
    """A caption of several, and the checksum of its embedding's bytes."""

    kind: str
    text: str
    xxh3: str


class StoredCaptions(Section):
    """Content of KEY.texts.json, in the order of the embeddings in KEY.emb.bin."""

    captions: Annotated[tuple[StoredCaption, ...], Field(min_length=1)]


class FileEntry(Section):
    file: Annotated[str, AfterValidator(plain_name)]
    samples: PositiveInt
    bytes: NonNegativeInt
    xxh3: str


class Manifest(Section):
    """Content of manifest.json. `encoders` says how to embed a new caption and how to decode latents; `fingerprint`
    holds the settings that the set was made from; `dali_indexes` belong to the shards in their order; `captions` are
    the weights by kind in a set of several captions a sample."""

    format: Literal["mdit-latents/1", "mdit-latents/2"]
    members: Members
    captions: CaptionWeights | None = None
    encoders: Encoders
    fingerprint: dict[str, Any]
    samples: PositiveInt
    index: FileEntry
    shards: tuple[FileEntry, ...]
    dali_indexes: tuple[FileEntry, ...]

    @property
    def layout(self) -> SampleLayout:
        lat, emb, rep = self.members.lat, self.members.emb, self.members.rep
        shapes = {"latent_shape": lat.shape, "embedding_shape": emb.shape}
        shapes |= {"features_shape": rep.shape} if rep else {}
        return SampleLayout.model_validate({**shapes, "embeddings": emb.dtype, "captions": self.captions})


def read_manifest(directory: str | Path) -> Manifest:
    """Raises ShardError for what is not a whole manifest."""
    path = Path(directory) / MANIFEST
    try:
        values = read_json(path, "the manifest of a set (see docs/data.md)")
        if (found := values.get("format") if isinstance(values, dict) else values) not in FORMATS:
            raise UserError(f"{path}: format is {found!r}, expected {' or '.join(map(repr, FORMATS))}")
        manifest = parse_section(Manifest, values, path)
    except UserError as error:
        raise ShardError(error) from None
    try:
        manifest.layout.check()
    except UserError as error:
        raise ShardError(f"{path}: {error}") from None
    if len(manifest.shards) != len(manifest.dali_indexes):
        raise ShardError(f"{path}: has {len(manifest.shards)} shards, but {len(manifest.dali_indexes)} DALI indexes")
    return manifest


def read_section(section: type[AnySection], path: Path) -> AnySection | None:
    """A document of a set; None where there is no such file. Raises UserError naming the file, or OSError."""
    try:
        return parse_section(section, parse_json(read_bytes(path), path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def padded(size: Any) -> Any:
    """To whole blocks of a tar; an int, or an array of them."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK
