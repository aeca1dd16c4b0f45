"""Shards in the format MDS, version 2, of MosaicML Streaming: of pictures, or of latents that need no encoding.

    index.json            {"version": 2, "shards": [{"raw_data": {"basename": ...}, "column_names": [...], ...}, ...]}
    shard.00000.mds       or 0/shard.00000.mds, where indexes were merged; compressed: shard.00000.mds.zstd, .gz, .bz2

A shard, all little-endian: uint32 n; uint32 offsets[n + 1]; JSON that repeats the index; sample i from byte offsets[i]
to offsets[i + 1]. A sample: the uint32 sizes of the columns whose size is not fixed, then the data of all columns.
(https://github.com/mosaicml/streaming, streaming/base/format/mds.)

Each shard is one part. Of pictures, the columns are jpg (or another of PICTURES) and caption (or another of CAPTIONS,
or what the caption key names; with --captions the kinds are columns). Of latents they are, all raw little-endian fp16
but the caption:

    caption            text                   caption_latents    77 x 1,024, of the CLIP text tower of
    latents_256        4 x 32 x 32                               apple/DFN5B-CLIP-ViT-H-14-378
    latents_512        4 x 64 x 64            both of SDXL's autoencoder, times its scaling factor

Shards compressed with zstd need the package zstandard. The licence is that of the pictures.
"""

import bz2
import gzip
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mdit.config import UserError
from mdit.dist import logger
from mdit.documents import parse_foreign_json, path_below
from mdit.sources import FilePart, Picture, Rejected, Source, captioned, not_found, part_name
from mdit.sources.archives import damaged
from mdit.sources.fields import CaptionFields, caption_fields, text
from mdit.sources.files import read_json
from mdit.sources.storage import LARGEST, opened

INDEX = "index.json"
HOW = "MosaicML Streaming's MDSWriter and the paper's code write it"
PICTURES = ("jpg", "jpeg", "png", "image")
CAPTIONS = ("caption", "caption_syn_pixart_llava15", "text", "prompt")
FILES, TEXTS = ("jpeg", "png", "bytes"), ("str", "json")  # encodings
CAPTION, EMBEDDING, EMBEDDING_SHAPE = "caption", "caption_latents", (77, 1024)
PIXELS_PER_LATENT = 8
BYTES_PER_VALUE = 2


def _open_zstd(file: BinaryIO) -> AbstractContextManager[BinaryIO]:
    import zstandard

    return zstandard.open(file)


UNPACKERS: dict[str, Callable[[Any], Any]] = {"": nullcontext, "gz": gzip.open, "bz2": bz2.open, "zstd": _open_zstd}


class Latents(NamedTuple):
    """A sample that needs no encoding: `latent` (C, S, S), `embedding` (77, 1024), both fp16."""

    origin: str
    latent: np.ndarray
    embedding: np.ndarray
    caption: str


@dataclass(frozen=True)
class MdsShard(FilePart):
    """One file of samples. `compression` is "" where the file is not compressed."""

    compression: str
    samples: int
    encodings: dict[str, str]  # of the columns, in their order
    sizes: tuple[int | None, ...]  # in bytes, of columns whose size is fixed

    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]] | Rejected]:
        """Origin and wanted columns of every sample; where the shard is damaged, a Rejected at the end."""
        try:
            with opened(self.path) as packed, UNPACKERS[self.compression](packed) as file:
                for index, sample in enumerate(self._samples(file)):
                    yield f"{self.name}/{index}", self._split(sample, wanted)
        except Exception as error:
            yield damaged(error, self.path, self.name)

    def value(self, column: str, data: bytes) -> Any:
        """Value of a column of the encoding "str" or "json". Raises ValueError."""
        return parse_foreign_json(data) if self.encodings[column] == "json" else data.decode()

    def _samples(self, file: BinaryIO) -> Iterator[bytes]:
        (count,) = np.frombuffer(_exactly(file, 4), "<u4")
        if count != self.samples:
            raise ValueError(f"holds {count} samples, but {INDEX} says {self.samples}")
        offsets = np.frombuffer(_exactly(file, 4 * (self.samples + 1)), "<u4").astype(np.int64)
        _exactly(file, int(offsets[0]) - 4 * (self.samples + 2))
        for size in np.diff(offsets):
            yield _exactly(file, int(size))
        if file.read(1):  # a compressed file is checked when it is read to its end
            raise ValueError("goes on behind its last sample")

    def _split(self, sample: bytes, wanted: Sequence[str]) -> dict[str, bytes]:
        unknown = self.sizes.count(None)
        given = iter(np.frombuffer(sample, "<u4", count=unknown).tolist())
        sizes = [next(given) if size is None else size for size in self.sizes]
        ends = (4 * unknown + np.cumsum(sizes)).tolist()
        if ends[-1] != len(sample):
            raise ValueError(f"a sample has {len(sample)} bytes, but its columns take {ends[-1]}")
        spans = zip(self.encodings, sizes, ends)
        return {name: sample[end - size : end] for name, size, end in spans if name in wanted}


@dataclass(frozen=True)
class ShardOfPictures(MdsShard):
    """`picture` is a column, and so are the fields of `captions`."""

    picture: str
    captions: CaptionFields

    def __iter__(self) -> Iterator[Picture | Rejected]:
        for item in self.read((self.picture, *self.captions.names)):
            yield item if isinstance(item, Rejected) else self._sample(*item)

    def _sample(self, origin: str, columns: dict[str, bytes]) -> Picture | Rejected:
        try:
            values = {name: self.value(name, columns[name]) for name in self.captions.names}
            return captioned(origin, columns[self.picture], self.captions.read(values))
        except ValueError:
            return Rejected(origin, "unreadable caption")


@dataclass(frozen=True)
class ShardOfLatents(MdsShard):
    """Latents (C, S, S) of one image size in `column`."""

    column: str
    latent_shape: tuple[int, int, int]

    def __iter__(self) -> Iterator[Latents | Rejected]:
        for item in self.read((self.column, EMBEDDING, CAPTION)):
            yield item if isinstance(item, Rejected) else self._sample(*item)

    def _sample(self, origin: str, columns: dict[str, bytes]) -> Latents | Rejected:
        try:
            latent = np.frombuffer(columns[self.column], "<f2").reshape(self.latent_shape)
            embedding = np.frombuffer(columns[EMBEDDING], "<f2").reshape(EMBEDDING_SHAPE)
            judged = captioned(origin, b"", text(self.value(CAPTION, columns[CAPTION])))
        except ValueError:
            return Rejected(origin, "unreadable latents")
        return judged if isinstance(judged, Rejected) else Latents(origin, latent, embedding, judged.caption)


def open_pictures(root: Path, caption_key: str | None, kinds: Sequence[str] | None) -> Source:
    shards, parts = open_shards(root), []
    for shard in shards:
        if kinds is None:
            captions = caption_fields(None, _column(shard, CAPTIONS if caption_key is None else (caption_key,), TEXTS))
        else:
            captions = caption_fields([_column(shard, (kind,), TEXTS) for kind in kinds], "")
        picture = _column(shard, PICTURES, FILES)
        parts.append(ShardOfPictures(**vars(shard), picture=picture, captions=captions))
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
    return [ShardOfLatents(**vars(shard), column=column, latent_shape=shape) for shard in shards]


def _column(shard: MdsShard, names: Sequence[str], encodings: Sequence[str]) -> str:
    """The first of these columns. Raises UserError naming those that are there."""
    for name in names:
        if shard.encodings.get(name) in encodings:
            return name
    there = ", ".join(f"{name} ({encoding})" for name, encoding in shard.encodings.items())
    wanted = f"{' or '.join(names)} ({' or '.join(encodings)})"
    raise UserError(f"{shard.path}: has no column {wanted}; its columns are {there}")


def open_shards(root: Path) -> list[MdsShard]:
    """The shards that are there, by name; a warning tells how many others the index lists. Raises UserError."""
    listed = read_index(root)
    shards = [shard for shard in listed if shard.path.is_file()]
    if not shards:
        raise not_found(root, f"shard that {INDEX} lists" if listed else INDEX, HOW)
    if len(shards) < len(listed):
        logger.warning(f"{root}: {len(listed) - len(shards)} of {len(listed)} shards are not there and are skipped")
    for shard in shards:
        if shard.compression not in UNPACKERS:
            raise UserError(
                f"{shard.path}: {shard.compression} is not read; unpack the shards, or write them with zstd"
            )
        if shard.compression == "zstd" and importlib.util.find_spec("zstandard") is None:
            raise UserError(f"{shard.path}: needs the package zstandard: pip install zstandard")
    return sorted(shards, key=lambda shard: shard.name)


def read_index(root: Path) -> list[MdsShard]:
    """All shards that are listed, there or not. Without an index.json those below count (0/index.json, ...), which the
    paper's code leaves when it ends before it has merged them. Raises UserError."""
    indexes = [root / INDEX] if (root / INDEX).is_file() else sorted(root.glob(f"*/{INDEX}"))
    shards = []
    for index in indexes:
        values = read_json(index)
        try:
            shards += [_shard(root, index.parent, entry) for entry in values["shards"]]
        except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError):
            raise UserError(f"{index}: is not the index of shards in the format mds, version 2") from None
    return shards


def _shard(root: Path, folder: Path, entry: dict) -> MdsShard:
    if entry["format"] != "mds" or entry["version"] != 2:
        raise ValueError
    encodings = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
    sizes = tuple(size for _, size in zip(encodings, entry["column_sizes"], strict=True))
    path, compression = path_below(folder, entry["raw_data"]["basename"]), ""
    if not path.is_file() and entry["zip_data"]:
        path, compression = path_below(folder, entry["zip_data"]["basename"]), entry["compression"].split(":")[0]
    return MdsShard(part_name(path, root), path, compression, int(entry["samples"]), encodings, sizes)


def _exactly(file: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= LARGEST or len(data := file.read(size)) < size:
        raise EOFError(f"ends early, or {size} bytes are no size")
    return data
