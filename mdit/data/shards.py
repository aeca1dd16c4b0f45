"""The on-disk format `mdit-latents/1`: latents and caption embeddings in plain tar shards. See docs/data.md.

    manifest.json          written last: shapes, encoders, every file's size and xxh3; without it there is no set
    index.npy              one row a sample, in the order of writing; index_0001.npy after the first change
    shard_00012_000.tar    KEY.emb.bin  KEY.lat.bin  KEY.txt, one after the other for every sample
    shard_00012_000.idx    where they are, as DALI's webdataset reader wants it

In a set of several captions a sample (`mdit-latents/2`) emb.bin has their embeddings one after the other, and
KEY.texts.json (`StoredCaptions`) is in the place of KEY.txt. Latents and texts are read and checked together, and of
the embeddings the one that is asked for.

Every file is written under a temporary name, synced and renamed. Only manifest.json is ever replaced: what a set was
before it grew stays readable to those who have opened it (`mdit.data.writer`, `mdit.precompute.coordination`).
"""

import errno
import functools
import itertools
import os
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from pydantic import ValidationError
from torch import Tensor

from mdit.captions import Caption, caption_draw, choose
from mdit.data.manifest import (
    MANIFEST,
    TAR_BLOCK,
    FileEntry,
    Manifest,
    SampleLayout,
    ShardError,
    StoredCaption,
    StoredCaptions,
    read_manifest,
)
from mdit.documents import open_regular
from mdit.files import checksum

INDEX = "index.npy"
MOST_TEXT_BYTES = 2**24  # of a sample
# Where a sample's first header is in its shard, the length of its caption in bytes, and the xxh3 of all bytes from that
# header to the caption's last. With several captions, their number; the length is that of texts.json, and the xxh3 is
# of all bytes behind the embeddings.
INDEX_DTYPE = np.dtype([("shard", "<i4"), ("text_bytes", "<i4"), ("offset", "<i8"), ("xxh3", "<u8")])
SEVERAL_DTYPE = np.dtype([*INDEX_DTYPE.descr, ("captions", "<i8")])
MOST_OPEN_SHARDS = 2048  # in this process; five sets that are mixed have 640 in use where windows meet
SECONDS_BETWEEN_CHECKS = 1.0  # at whether an open shard is still the file of that name


class SampleLocation(NamedTuple):
    """Location of a sample: its number in the set, and its row of the index."""

    sample: int
    shard: int
    text_bytes: int
    offset: int
    xxh3: int
    captions: int = 1


def index_dtype(layout: SampleLayout) -> np.dtype:
    """The dtype of a row of index.npy."""
    return INDEX_DTYPE if layout.captions is None else SEVERAL_DTYPE


class Index:
    """index.npy, read where it is needed: a map of it would end the process by a signal when the file is cut short."""

    def __init__(self, path: Path, dtype: np.dtype = INDEX_DTYPE) -> None:
        self.path, self.dtype = path, dtype
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # the parser of a header raises what its tokenizer raises
            raise ShardError(f"{path}: not a numpy file: {error}") from None
        if mapped.dtype != dtype or mapped.ndim != 1:
            raise ShardError(f"{path}: has rows of {mapped.dtype.descr}, expected {dtype.descr}")
        self._start, self._length = mapped.offset, len(mapped)
        self._file = open(open_regular(path), "rb", buffering=0)

    def __len__(self) -> int:
        return self._length

    def entries(self, samples: np.ndarray) -> np.ndarray:
        """(N,) sample numbers -> (N,) rows. Raises ShardError when the file is no longer whole."""
        size, descriptor = self.dtype.itemsize, self._file.fileno()
        try:
            found = b"".join([os.pread(descriptor, size, self._start + size * sample) for sample in samples.tolist()])
        except OSError as error:
            raise ShardError(f"{self.path}: cannot read the index: {error.strerror}") from None
        if len(found) != size * len(samples):
            raise ShardError(f"{self.path}: the index was cut short while it was in use")
        return np.frombuffer(found, self.dtype)

    def span(self, first: int, end: int) -> np.ndarray:
        """The rows of consecutive samples, read at once."""
        size = self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, end - first, offset=self._start + size * first)

    def close(self) -> None:
        self._file.close()


class OpenShard:
    """A file descriptor, closed with the last reference to it, and what the file looked like when it was opened."""

    descriptor = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = open_regular(path)
        self.identity = _identity(os.fstat(self.descriptor))
        self.checked = time.monotonic()

    def check_unchanged(self) -> None:
        """Raise ShardError when another file has taken the name, or this one was written to."""
        now = time.monotonic()
        if now - self.checked < SECONDS_BETWEEN_CHECKS:
            return
        self.checked = now
        try:
            found = _identity(os.stat(self.path))
        except OSError as error:
            raise ShardError(f"{self.path}: the shard has gone while it was in use: {error.strerror}") from None
        if found != self.identity:
            raise ShardError(f"{self.path}: the shard was replaced or written to while it was in use")

    def __del__(self, close=os.close) -> None:
        if self.descriptor >= 0:
            close(self.descriptor)


def most_open_shards() -> int:
    """MOST_OPEN_SHARDS, or half of what the process may have open, after raising that as far as it helps: sockets,
    pipes and libraries have the other half."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST_OPEN_SHARDS
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return MOST_OPEN_SHARDS if soft == resource.RLIM_INFINITY else min(MOST_OPEN_SHARDS, max(soft // 2, 1))


@functools.cache
def open_shards():
    """The cache of shards used last, those of all sets in this process and for all its threads: (set, path) ->
    OpenShard. One that is no longer kept is closed when its last reader is done."""
    return functools.lru_cache(most_open_shards())(lambda owner, path: OpenShard(path))


def open_shard(owner: int, path: Path) -> OpenShard:
    """A set's shard, opened where it is not open. Raises ShardError, also for an open one that changed."""
    try:
        try:
            shard = open_shards()(owner, path)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            open_shards().cache_clear()  # others have taken more than their half
            shard = open_shards()(owner, path)
    except OSError as error:
        raise ShardError(f"{path}: cannot open the shard: {error.strerror}") from None
    shard.check_unchanged()
    return shard


_owners = itertools.count()


class LatentSet:
    """One directory of shards: `layout`, `samples`, `encoders`, `fingerprint`, `shard_sizes` in samples, `weights` of
    the kinds of captions where samples have several."""

    def __init__(self, directory: Path, manifest: Manifest, index: Index) -> None:
        self.directory, self.manifest, self.index = directory, manifest, index
        self.layout = manifest.layout
        self.samples: int = manifest.samples
        self.shard_sizes = [shard.samples for shard in manifest.shards]
        self.latent_shape, self.embedding_shape = self.layout.latent_shape, self.layout.embedding_shape
        self.encoders, self.fingerprint = manifest.encoders.plain(), manifest.fingerprint
        self.weights = self.layout.captions
        self._shard_starts = np.cumsum([0, *self.shard_sizes])
        self._shard_bytes = np.array([shard.bytes for shard in manifest.shards])
        self._owner = next(_owners)

    def locate(self, samples: Iterable[int]) -> list[SampleLocation]:
        """Look up samples. Raises ShardError where the index says what cannot be."""
        samples = np.fromiter(samples, np.int64)
        rows = self.index.entries(samples)
        shards = np.searchsorted(self._shard_starts, samples, side="right") - 1
        last_offsets = self._shard_bytes[shards] - self._sample_bytes(rows)
        possible = (rows["shard"] == shards) & (rows["text_bytes"] >= 0) & (rows["text_bytes"] <= MOST_TEXT_BYTES)
        possible &= (rows["offset"] >= 0) & (rows["offset"] <= last_offsets)
        if self.weights is not None:
            possible &= (rows["captions"] > 0) & (rows["captions"] <= self._shard_bytes[shards])
        if not possible.all():
            wrong = int(np.argmin(possible))
            raise self._impossible(samples[wrong], shards[wrong], rows[wrong])
        fields = [samples.tolist(), *(rows[name].tolist() for name in rows.dtype.names or ())]
        return [SampleLocation(*values) for values in zip(*fields)]

    def read_row(self, location: SampleLocation, row: np.ndarray, draw: float = 0.0) -> str:
        """Read a sample's row into `row` (`layout.row_bytes` writable bytes), compare its checksum and return its
        caption: of several the one that `draw` in [0, 1) takes (`mdit.captions.choose`). From any number of threads.
        Raises ShardError."""
        if self.weights is None:
            text = bytearray(location.text_bytes)
            self._read(location, location.offset, [row.data, text], f"{location.xxh3:016x}", self.index.path.name)
            try:
                return text.decode()
            except UnicodeDecodeError:
                raise self._damaged(location, "the caption is not UTF-8") from None
        captions = self._read_rest(location, row)
        number = choose([caption.kind for caption in captions], self.weights, draw)
        self._read_embedding(location, row, number, captions[number])
        return captions[number].text

    def read_captions(self, location: SampleLocation) -> list[tuple[Caption, Tensor]]:
        """All captions of a sample with their embeddings (L, C), fp16; the kind of an only one is "". Raises
        ShardError."""
        row, found = np.empty(self.layout.row_bytes, np.uint8), []
        if self.weights is None:
            stored = [Caption("", self.read_row(location, row))]
        else:
            stored = self._read_rest(location, row)
        for number, caption in enumerate(stored):
            if isinstance(caption, StoredCaption):
                self._read_embedding(location, row, number, caption)
            _, embeddings = self.layout.split(torch.from_numpy(row)[None])
            found.append((Caption(caption.kind, caption.text), embeddings[0].clone()))
        return found

    def _read_rest(self, location: SampleLocation, row: np.ndarray) -> tuple[StoredCaption, ...]:
        """Read all of a sample with several captions but the embeddings; -> the captions."""
        text = bytearray(location.text_bytes)
        at, _ = self.layout.checked(location.text_bytes, location.captions)
        parts = [row.data[self.layout.rest_at :], text]
        self._read(location, location.offset + at, parts, f"{location.xxh3:016x}", self.index.path.name)
        try:
            captions = StoredCaptions.model_validate_json(bytes(text)).captions
        except ValidationError as error:
            raise self._damaged(location, f"texts.json: {' '.join(str(error).split())}") from None
        if len(captions) != location.captions:
            index = self.index.path.name
            raise self._damaged(location, f"has {len(captions)} captions, but {index} says {location.captions}")
        return captions

    def _read_embedding(self, location: SampleLocation, row: np.ndarray, number: int, caption: StoredCaption) -> None:
        size = self.layout.embedding_bytes
        at = location.offset + TAR_BLOCK + number * size
        parts = [row.data[TAR_BLOCK : TAR_BLOCK + size]]
        self._read(location, at, parts, caption.xxh3, "texts.json")

    def _read(self, location: SampleLocation, at: int, parts: list, xxh3: str, says: str) -> None:
        """Fill the `parts` from byte `at` of the sample's shard and compare the checksum of all of them."""
        shard = open_shard(self._owner, self.directory / self.manifest.shards[location.shard].file)
        wanted, digest = sum(map(len, parts)), xxhash.xxh3_64()
        try:
            found = os.preadv(shard.descriptor, parts, at)
        except OSError as error:
            raise self._damaged(location, str(error.strerror)) from None
        if found != wanted:
            raise self._damaged(location, f"{found} of {wanted} bytes are there")
        for part in parts:
            digest.update(part)
        if digest.hexdigest() != xxh3:
            raise self._damaged(location, f"xxh3 is {digest.hexdigest()}, but {says} says {xxh3}")

    def _sample_bytes(self, rows: np.ndarray) -> np.ndarray:
        """(N,) bytes of the samples of these rows of the index."""
        further = 0 if self.weights is None else self.layout.further_bytes(rows["captions"])
        return self.layout.row_bytes + further + rows["text_bytes"]

    def check_sizes(self) -> None:
        """Raise ShardError when a file is missing or not of its size, naming the first sample that is cut off."""
        for shard, entry in enumerate(self.manifest.shards):
            path = self.directory / entry.file
            if (found := _size(path, entry)) != entry.bytes:
                first, end = self._shard_starts[shard : shard + 2].tolist()
                rows = self.index.entries(np.arange(first, end))
                whole = int(np.sum(rows["offset"] + self._sample_bytes(rows) <= found))
                cut_off = f"; sample {first + whole} of the set is cut off" if first + whole < end else ""
                raise ShardError(f"{path}: has {found} bytes, but {MANIFEST} says {entry.bytes}{cut_off}")
        for entry in self.manifest.dali_indexes:
            _require_size(self.directory / entry.file, entry)

    def check_shard(self, shard: int) -> None:
        """Read a shard and its DALI index whole. Raises ShardError naming the first damaged sample, if it is one."""
        row = np.empty(self.layout.row_bytes, np.uint8)
        for location in self.locate(range(*self._shard_starts[shard : shard + 2])):
            if self.weights is None:
                self.read_row(location, row)
                continue
            for number, caption in enumerate(self._read_rest(location, row)):
                self._read_embedding(location, row, number, caption)
        for entry in (self.manifest.shards[shard], self.manifest.dali_indexes[shard]):
            _require_content(self.directory / entry.file, entry)

    def captions(self) -> int:
        """Number of captions of all samples."""
        if self.weights is None:
            return self.samples
        bounds = itertools.pairwise(self._shard_starts.tolist())
        return sum(int(self.index.span(first, end)["captions"].sum()) for first, end in bounds)

    def verify(self) -> None:
        """Read everything. Raises the ShardError of the first damaged shard."""
        for shard in range(len(self.shard_sizes)):
            self.check_shard(shard)

    def close(self) -> None:
        self.index.close()
        open_shards().cache_clear()  # other sets open theirs again

    def __del__(self) -> None:
        self.close()

    def _impossible(self, sample: int, shard: int, row: np.void) -> ShardError:
        entry, index = self.manifest.shards[shard], self.index.path.name
        return ShardError(
            f"{self.directory / entry.file}: sample {sample} of the set cannot be read: {index} says shard "
            f"{row['shard']}, byte {row['offset']} and {row['text_bytes']} bytes of caption, but {MANIFEST} says shard "
            f"{shard} of {entry.bytes} bytes"
        )

    def _damaged(self, location: SampleLocation, what: str) -> ShardError:
        path = self.directory / self.manifest.shards[location.shard].file
        return ShardError(f"{path}: sample {location.sample} of the set is damaged: {what}")


def open_dataset(directory: str | Path, *, check_sizes: bool = True) -> LatentSet:
    """Open a set after checking its manifest, the index and the size of every file. Raises ShardError naming the file
    and both values. Without `check_sizes`, shards are looked at no sooner than they are read."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    index_path = directory / manifest.index.file
    _require_content(index_path, manifest.index)
    index = Index(index_path, index_dtype(manifest.layout))
    shard_samples = sum(shard.samples for shard in manifest.shards)
    for what, found in (("rows in the index", len(index)), ("samples in its shards", shard_samples)):
        if found != manifest.samples:
            raise ShardError(f"{directory / MANIFEST}: samples is {manifest.samples}, but there are {found} {what}")
    dataset = LatentSet(directory, manifest, index)
    if check_sizes:
        dataset.check_sizes()
    return dataset


def read_samples(dataset: LatentSet, samples: Iterable[int]) -> tuple[Tensor, Tensor, list[str]]:
    """-> latents (N, C, H, W) fp16, caption embeddings (N, L, C) fp16, captions: of several of a sample always the same
    one, drawn by the weights. Raises ShardError."""
    locations = dataset.locate(samples)
    rows = np.empty((len(locations), dataset.layout.row_bytes), np.uint8)
    draws = [caption_draw(0, 0, location.sample) for location in locations]
    texts = [dataset.read_row(location, row, draw) for location, row, draw in zip(locations, rows, draws)]
    latents, captions = dataset.layout.split(torch.from_numpy(rows))
    return latents.contiguous(), captions.contiguous(), texts


def _size(path: Path, entry: FileEntry) -> int:
    try:
        return path.stat().st_size
    except OSError:
        raise ShardError(f"{path}: is missing, but {MANIFEST} lists it, of {entry.samples} samples") from None


def _require_size(path: Path, entry: FileEntry) -> None:
    if (found := _size(path, entry)) != entry.bytes:
        raise ShardError(f"{path}: has {found} bytes, but {MANIFEST} says {entry.bytes}")


def _require_content(path: Path, entry: FileEntry) -> None:
    _require_size(path, entry)
    if (found := checksum(path)) != entry.xxh3:
        raise ShardError(f"{path}: xxh3 is {found}, but {MANIFEST} says {entry.xxh3}")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
