"""The on-disk format `mdit-latents/1`: fp16 latents and caption embeddings in plain tar shards. See docs/data.md.

    manifest.json        written last: shapes, encoders, every file's size and xxh3; without it there is no set
    index.npy            one INDEX_DTYPE row a sample, in the order of writing
    shard_00000.tar      KEY.emb.bin  KEY.lat.bin  KEY.txt, one after the other for every sample

Every file is written under a temporary name, synced and renamed, and never changed afterwards.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset
from torch import Tensor

from mdit.config import NonNegativeInt, PositiveInt, Section, UserError, parse_section
from mdit.files import checksum, sync

FORMAT = "mdit-latents/1"
MANIFEST, INDEX = "manifest.json", "index.npy"
DTYPE = "<f2"
TAR_BLOCK = 512
# Byte offsets of each member's data in its shard, and the caption's length in bytes.
INDEX_DTYPE = np.dtype(
    [("shard", "<i4"), ("text_bytes", "<i4"), ("embedding", "<i8"), ("latent", "<i8"), ("text", "<i8")]
)
MAX_OPEN_SHARDS = 256


class ShardError(UserError):
    """Shards that are not what their manifest says."""


class Member(Section):
    dtype: Literal["<f2"]
    shape: tuple[PositiveInt, ...]


class Members(Section):
    lat: Member
    emb: Member


class FileEntry(Section):
    file: str
    samples: NonNegativeInt
    bytes: NonNegativeInt
    xxh3: str


class Manifest(Section):
    """What manifest.json holds. `encoders` says how to embed a new caption and how to decode latents; `fingerprint`
    holds the settings that the set was made from."""

    format: Literal["mdit-latents/1"]
    members: Members
    encoders: dict[str, dict[str, Any]]
    fingerprint: dict[str, Any]
    samples: NonNegativeInt
    index: FileEntry
    shards: tuple[FileEntry, ...]


class ShardWriter:
    """Writes one set into a new directory. Leaving the `with` block by an exception leaves no manifest.

    Latents are (C, H, W) and embeddings (L, C), both stored as little-endian fp16. A shard is closed when it reaches
    `shard_bytes`. Raises UserError when the directory already holds something.
    """

    def __init__(
        self,
        directory: str | Path,
        latent_shape: Sequence[int],
        embedding_shape: Sequence[int],
        encoders: dict[str, dict[str, Any]],
        fingerprint: dict[str, Any],
        shard_bytes: int = 10**9,
    ) -> None:
        self.directory = Path(directory)
        self.latent_shape, self.embedding_shape = tuple(latent_shape), tuple(embedding_shape)
        self.encoders, self.fingerprint, self.shard_bytes = encoders, fingerprint, shard_bytes
        self._shards: list[FileEntry] = []
        self._rows: list[tuple[int, ...]] = []
        self._tar: webdataset.TarWriter | None = None
        self._shard_samples = 0
        self.directory.mkdir(parents=True, exist_ok=True)
        if any(self.directory.iterdir()):
            raise UserError(f"{self.directory}: is not empty, and shards are never rewritten; choose another directory")

    def write(self, key: str, latent: np.ndarray, embedding: np.ndarray, caption: str) -> None:
        """Append one sample. `key` is unique and holds no dot. Raises UserError when a value is not finite in fp16."""
        if "." in key:
            raise ValueError(f"key {key!r} holds a dot, which ends a key in a tar of samples")
        latent = self._stored(key, "latents", latent, self.latent_shape)
        embedding = self._stored(key, "caption embedding", embedding, self.embedding_shape)
        text = caption.encode()
        if self._tar is None:
            self._file = open(self.directory / f"{self._shard_name}.tmp", "wb")
            self._tar = webdataset.TarWriter(self._file, encoder=False, mtime=0)
        start = self._tar.tarstream.offset
        # TarWriter sorts members by name: emb.bin, lat.bin, txt. Each is a header block and data padded to blocks.
        self._tar.write({"__key__": key, "emb.bin": embedding, "lat.bin": latent, "txt": text})
        embedding_at = start + TAR_BLOCK
        latent_at = embedding_at + _padded(len(embedding)) + TAR_BLOCK
        text_at = latent_at + _padded(len(latent)) + TAR_BLOCK
        self._rows.append((len(self._shards), len(text), embedding_at, latent_at, text_at))
        self._shard_samples += 1
        if text_at + _padded(len(text)) >= self.shard_bytes:
            self._close_shard()

    def close(self) -> None:
        """Finish the last shard, then write index and manifest."""
        if self._tar is not None:
            self._close_shard()
        index = np.array(self._rows, dtype=INDEX_DTYPE)
        with open(self.directory / f"{INDEX}.tmp", "wb") as file:
            np.save(file, index, allow_pickle=False)
            entry = self._publish(file, INDEX, len(index))
        manifest = Manifest(
            format=FORMAT,
            members=Members(
                lat=Member(dtype=DTYPE, shape=self.latent_shape), emb=Member(dtype=DTYPE, shape=self.embedding_shape)
            ),
            encoders=self.encoders,
            fingerprint=self.fingerprint,
            samples=len(index),
            index=entry,
            shards=tuple(self._shards),
        )
        with open(self.directory / f"{MANIFEST}.tmp", "wb") as file:
            file.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode())
            self._publish(file, MANIFEST, len(index))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        elif self._tar is not None:
            with suppress(OSError), self._file:  # a full disk may be why we are here
                self._tar.close()

    @property
    def _shard_name(self) -> str:
        return f"shard_{len(self._shards):05d}.tar"

    def _stored(self, key: str, what: str, values: np.ndarray, shape: tuple[int, ...]) -> bytes:
        if values.shape != shape:
            raise ValueError(f"sample {key}: {what} of shape {values.shape}, expected {shape}")
        with np.errstate(over="ignore"):
            stored = np.asarray(values, dtype=DTYPE)
        if not np.isfinite(stored).all():
            raise UserError(f"{self.directory}: sample {key}: {what} not finite in fp16")
        return stored.tobytes()

    def _close_shard(self) -> None:
        self._tar.close()
        with self._file:
            self._shards.append(self._publish(self._file, self._shard_name, self._shard_samples))
        self._tar, self._shard_samples = None, 0

    def _publish(self, file, name: str, samples: int) -> FileEntry:
        """Sync the file that is open under its temporary name, then give it its own."""
        file.flush()
        os.fsync(file.fileno())
        temporary = self.directory / f"{name}.tmp"
        entry = FileEntry(file=name, samples=samples, bytes=temporary.stat().st_size, xxh3=checksum(temporary))
        temporary.rename(self.directory / name)
        sync(self.directory)
        return entry


class LatentSet:
    """One directory of shards: `samples`, `latent_shape` (C, H, W), `embedding_shape` (L, C), `encoders`,
    `fingerprint`, `shard_sizes` in samples. Not for several threads at once."""

    def __init__(self, directory: Path, manifest: Manifest, index: np.ndarray) -> None:
        self.directory, self.manifest, self.index = directory, manifest, index
        self.samples: int = manifest.samples
        self.shard_sizes = [shard.samples for shard in manifest.shards]
        self.latent_shape, self.embedding_shape = manifest.members.lat.shape, manifest.members.emb.shape
        self.encoders, self.fingerprint = manifest.encoders, manifest.fingerprint
        self._descriptors: dict[int, int] = {}  # of open shards, the least recently used first

    def read_into(self, sample: int, latent: np.ndarray, embedding: np.ndarray) -> str:
        """Read a sample into two contiguous fp16 arrays and return its caption. Raises ShardError."""
        row = self.index[sample]
        text = bytearray(int(row["text_bytes"]))
        # One request for the three members and the padding and headers between them.
        gap = int(row["latent"]) - int(row["embedding"]) - embedding.nbytes
        second_gap = int(row["text"]) - int(row["latent"]) - latent.nbytes
        if gap < 0 or second_gap < 0:
            raise self._damaged(sample, "the index has overlapping members")
        parts = [embedding, bytearray(gap), latent, bytearray(second_gap), text]
        wanted = int(row["text"]) + len(text) - int(row["embedding"])
        found = os.preadv(self._descriptor(int(row["shard"])), parts, int(row["embedding"]))
        if found != wanted:
            raise self._damaged(sample, f"{found} of {wanted} bytes are there")
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self._damaged(sample, "the caption is not UTF-8") from None

    def verify(self) -> None:
        """Read every file again and compare its checksum. Raises ShardError naming the file and both values."""
        for entry in (self.manifest.index, *self.manifest.shards):
            path = self.directory / entry.file
            if (found := checksum(path)) != entry.xxh3:
                raise ShardError(f"{path}: xxh3 is {found}, but {MANIFEST} says {entry.xxh3}")

    def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, shard: int) -> int:
        if (descriptor := self._descriptors.pop(shard, None)) is None:
            if len(self._descriptors) == MAX_OPEN_SHARDS:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            path = self.directory / self.manifest.shards[shard].file
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path}: cannot open the shard: {error.strerror}") from None
        self._descriptors[shard] = descriptor
        return descriptor

    def _damaged(self, sample: int, what: str) -> ShardError:
        path = self.directory / self.manifest.shards[int(self.index[sample]["shard"])].file
        return ShardError(f"{path}: sample {sample} of the set is damaged: {what}")


def open_dataset(directory: str | Path) -> LatentSet:
    """Open a set after checking manifest, sizes and index. Raises ShardError naming the file and both values."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    for entry in (manifest.index, *manifest.shards):
        path = directory / entry.file
        if not path.is_file():
            raise ShardError(f"{path}: is missing, but {MANIFEST} lists it with {entry.samples} samples")
        if (size := path.stat().st_size) != entry.bytes:
            raise ShardError(f"{path}: has {size} bytes, but {MANIFEST} says {entry.bytes}")
    index_path = directory / manifest.index.file
    try:
        index = np.load(index_path, mmap_mode="r", allow_pickle=False).view(np.ndarray)  # plain rows are faster
    except (ValueError, OSError) as error:
        raise ShardError(f"{index_path}: not a numpy file: {error}") from None
    if index.dtype != INDEX_DTYPE:
        raise ShardError(f"{index_path}: has rows of {index.dtype.descr}, expected {INDEX_DTYPE.descr}")
    shard_samples = sum(shard.samples for shard in manifest.shards)
    for what, found in (("rows in the index", len(index)), ("samples in its shards", shard_samples)):
        if found != manifest.samples:
            raise ShardError(f"{directory / MANIFEST}: samples is {manifest.samples}, but there are {found} {what}")
    return LatentSet(directory, manifest, index)


def read_manifest(directory: str | Path) -> Manifest:
    path = Path(directory) / MANIFEST
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ShardError(f"{path}: cannot read the manifest of a set: {error.strerror}; see docs/data.md") from None
    except ValueError as error:
        raise ShardError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else values
        raise ShardError(f"{path}: format is {found!r}, expected {FORMAT!r}")
    try:
        return parse_section(Manifest, values, path)
    except UserError as error:
        raise ShardError(str(error)) from None


def read_samples(dataset: LatentSet, samples: Sequence[int]) -> tuple[Tensor, Tensor, list[str]]:
    """-> latents (N, C, H, W) fp16, caption embeddings (N, L, C) fp16, captions. Raises ShardError."""
    latents = torch.empty(len(samples), *dataset.latent_shape, dtype=torch.float16)
    captions = torch.empty(len(samples), *dataset.embedding_shape, dtype=torch.float16)
    rows = zip(samples, latents.numpy(), captions.numpy())
    return latents, captions, [dataset.read_into(sample, latent, caption) for sample, latent, caption in rows]


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK
