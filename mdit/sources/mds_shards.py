"""The format MDS, version 2, of MosaicML Streaming: shards of samples with named columns, and an index.json.

    index.json            {"version": 2, "shards": [{"raw_data": {"basename": ...}, "column_names": [...], ...}, ...]}
    shard.00000.mds       or 0/shard.00000.mds, where indexes were merged; compressed: shard.00000.mds.zstd, .gz, .bz2

A shard, all little-endian: uint32 n; uint32 offsets[n + 1]; JSON that repeats the index; sample i from byte offsets[i]
to offsets[i + 1]. A sample: the uint32 sizes of the columns whose size is not fixed, then the data of all columns.
(https://github.com/mosaicml/streaming, streaming/base/format/mds.)
"""

import bz2
import gzip
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mdit.config import UserError
from mdit.dist import logger
from mdit.documents import parse_foreign_json
from mdit.sources import Rejected, not_found, part_name
from mdit.sources.archives import damaged
from mdit.sources.files import read_json, text
from mdit.sources.storage import LARGEST, opened

INDEX = "index.json"
HOW = "MosaicML Streaming's MDSWriter and the paper's code write it"
COMPRESSIONS = ("", "zstd", "gz", "bz2")


@dataclass(frozen=True)
class MdsShard:
    """One file of samples. `compression` is "" where the file is not compressed."""

    name: str
    path: Path
    compression: str
    samples: int
    encodings: dict[str, str]  # of the columns, in their order
    sizes: tuple[int | None, ...]  # in bytes, of columns whose size is fixed

    def read(self, wanted: Sequence[str]) -> Iterator[tuple[str, dict[str, bytes]] | Rejected]:
        """Origin and wanted columns of every sample; where the shard is damaged, a Rejected at the end."""
        try:
            with opened(self.path) as packed, self._unpacked(packed) as file:
                for index, sample in enumerate(self._samples(file)):
                    yield f"{self.name}/{index}", self._split(sample, wanted)
        except Exception as error:
            yield damaged(error, self.path, self.name)

    def text(self, column: str, data: bytes) -> str | None:
        """Text of a column of the encoding "str" or "json". Raises ValueError."""
        return text(parse_foreign_json(data)) if self.encodings[column] == "json" else data.decode()

    def _unpacked(self, file: BinaryIO) -> AbstractContextManager[BinaryIO]:
        if self.compression == "zstd":
            import zstandard

            return zstandard.open(file)
        unpack: Any = {"": nullcontext, "gz": gzip.open, "bz2": bz2.open}[self.compression]
        return unpack(file)

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


def open_shards(root: Path) -> list[MdsShard]:
    """The shards that are there, by name; a warning tells how many others the index lists. Raises UserError."""
    listed = read_index(root)
    shards = [shard for shard in listed if shard.path.is_file()]
    if not shards:
        raise not_found(root, f"shard that {INDEX} lists" if listed else INDEX, HOW)
    if len(shards) < len(listed):
        logger.warning(f"{root}: {len(listed) - len(shards)} of {len(listed)} shards are not there and are skipped")
    for shard in shards:
        if shard.compression not in COMPRESSIONS:
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
    path, compression = folder / entry["raw_data"]["basename"], ""
    if not path.is_file() and entry["zip_data"]:
        path, compression = folder / entry["zip_data"]["basename"], entry["compression"].split(":")[0]
    return MdsShard(part_name(path, root), path, compression, int(entry["samples"]), encodings, sizes)


def _exactly(file: BinaryIO, size: int) -> bytes:
    if not 0 <= size <= LARGEST or len(data := file.read(size)) < size:
        raise EOFError(f"ends early, or {size} bytes are no size")
    return data
