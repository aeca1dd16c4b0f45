"""Writing `mdit-latents` part by part: several processes may write parts of one set, and be killed at any moment.

A part's shards appear under their names as they fill; its record (part_00012.json and .npy) comes last and makes it
complete. `finish_set` joins the records to index.npy and manifest.json. Bytes depend on the samples alone.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from webdataset.writer import TarWriter

from mdit.captions import Caption
from mdit.config import Embeddings, Section, UserError, parse_section
from mdit.data.manifest import (
    FORMATS,
    MANIFEST,
    TAR_BLOCK,
    FileEntry,
    Manifest,
    MemberFormat,
    Members,
    SampleLayout,
    StoredCaption,
    StoredCaptions,
    read_manifest,
)
from mdit.data.quantise import quantise
from mdit.data.report import PartReport, new_report
from mdit.data.shards import INDEX, LatentSet, index_dtype
from mdit.descriptions import Encoders
from mdit.documents import parse_json, read_bytes
from mdit.files import measure, replacing, write_json, write_text

SHARD_BYTES = 10**9


class NotFinite(UserError):
    """A sample with a value that is not finite in fp16."""


class PartRecord(Section):
    """Content of part_00012.json."""

    report: PartReport
    shards: tuple[FileEntry, ...]
    dali_indexes: tuple[FileEntry, ...]


class PartWriter:
    """One part of a set. The part is complete once the `with` block has been left without an exception.

    A shard is closed when it reaches `shard_bytes`. `report` is kept in the part's record and may be filled until then.
    `suffix` is added to the shards' names, of a part that is made again. What a killed writer of the same part left is
    removed. Raises ValueError when the part is complete already.
    """

    def __init__(
        self,
        directory: str | Path,
        part: int,
        layout: SampleLayout,
        shard_bytes: int = SHARD_BYTES,
        suffix: str = "",
    ) -> None:
        layout.check()
        self.directory, self.part, self.layout, self.shard_bytes = Path(directory), part, layout, shard_bytes
        self.report, self._suffix = new_report(), suffix
        if is_written(self.directory, part):
            raise ValueError(f"{self.directory}: part {part} is complete")
        for left in [path for name in ("shard", "part") for path in self.directory.glob(f"*{name}_{part:05d}[_.]*")]:
            left.unlink()
        self._shards: list[FileEntry] = []
        self._dali_indexes: list[FileEntry] = []
        self._entries: list[tuple[int, ...]] = []  # rows of the index
        self._keys: list[str] = []  # of the open shard
        self._shard = ExitStack()  # the open shard's file and name
        self._tar: Any = None  # a webdataset.TarWriter

    def write(
        self,
        key: str,
        latent: np.ndarray,
        embedding: np.ndarray,
        caption: str | Sequence[Caption],
        features: np.ndarray | None = None,
    ) -> None:
        """Append one sample: latent (C, H, W), embedding (L, C) and, where the layout has them, features (T, C), of any
        float dtype; in a set of several captions a sample embeddings (k, L, C) of k captions. `key` is unique in the
        set and holds no dot. Raises NotFinite, with nothing written, when a value is not finite in fp16."""
        if "." in key:
            raise ValueError(f"key {key!r} holds a dot, which ends a key in a tar of samples")
        if isinstance(caption, str) != (self.layout.captions is None):
            raise ValueError(f"sample {key}: captions are {caption!r}, but weights are {self.layout.captions}")
        lat = self._half(key, "latents", latent, self.layout.latent_shape).tobytes()
        embs = [self._stored(key, each) for each in ([embedding] if isinstance(caption, str) else embedding)]
        if isinstance(caption, str):
            text = caption.encode()
        else:
            pairs = zip(caption, embs, strict=True)
            found = [StoredCaption(**each._asdict(), xxh3=xxhash.xxh3_64_hexdigest(emb)) for each, emb in pairs]
            text = StoredCaptions(captions=tuple(found)).model_dump_json().encode()
        content = {"emb.bin": b"".join(embs), "lat.bin": lat, self._text_member: text}
        if self.layout.features_shape is not None:
            assert features is not None
            content["rep.bin"] = quantise(self._half(key, "features", features, self.layout.features_shape))
        if self._tar is None:
            self._path = self.directory / f"shard_{self.part:05d}_{len(self._shards):03d}{self._suffix}.tar"
            partial = self._shard.enter_context(replacing(self._path))
            self._file = self._shard.enter_context(open(partial, "w+b"))
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
            self._shard.callback(self._tar.close)
        offset = self._tar.tarstream.offset
        # TarWriter sorts members by name: emb.bin, lat.bin, rep.bin, txt. Each is a header block and padded data.
        self._tar.write({"__key__": key, **content})
        self._keys.append(key)
        entry = len(self._shards), len(text), offset, 0
        self._entries.append(entry if self.layout.captions is None else (*entry, len(embs)))
        if self._tar.tarstream.offset >= self.shard_bytes:
            self._close_shard()

    def close(self) -> None:
        """Finish the last shard, then write the record."""
        if self._tar is not None:
            self._close_shard()
        record = PartRecord(report=self.report, shards=tuple(self._shards), dali_indexes=tuple(self._dali_indexes))
        _write_record(self.directory, self.part, record, np.array(self._entries, dtype=index_dtype(self.layout)))

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(OSError):  # a full disk may be why we are here
                self._shard.__exit__(kind, error, traceback)

    @property
    def _text_member(self) -> str:
        return "txt" if self.layout.captions is None else "texts.json"

    def _stored(self, key: str, embedding: np.ndarray) -> bytes:
        half = self._half(key, "caption embedding", embedding, self.layout.embedding_shape)
        return quantise(half) if self.layout.embeddings == "i8b64" else half.tobytes()

    def _half(self, key: str, what: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        if values.shape != shape:
            raise ValueError(f"sample {key}: {what} of shape {values.shape}, expected {shape}")
        with np.errstate(over="ignore"):
            stored = np.asarray(values, dtype="<f2")
        if not np.isfinite(stored).all():
            raise NotFinite(f"{self.directory}: sample {key}: {what} not finite in fp16")
        return stored

    def _close_shard(self) -> None:
        self._tar.close()
        samples, first = len(self._keys), len(self._entries) - len(self._keys)
        self._file.flush()
        for number in range(first, len(self._entries)):
            shard, text_bytes, offset, _, *captions = self._entries[number]
            at, size = self.layout.checked(text_bytes, *captions)
            digest = xxhash.xxh3_64_intdigest(os.pread(self._file.fileno(), size, offset + at))
            self._entries[number] = (shard, text_bytes, offset, digest, *captions)
        self._shard.close()
        self._shards.append(_entry(self._path, samples))
        dali_index = self._path.with_suffix(".idx")
        lines = "".join([f"v1.2 {samples}\n", *map(self._dali_line, self._keys, self._entries[first:])])
        write_text(dali_index, lines)
        self._dali_indexes.append(_entry(dali_index, samples))
        self._tar, self._keys = None, []

    def _dali_line(self, key: str, row: tuple[int, ...]) -> str:
        """`extension offset size name` of every member, as DALI's wds2idx writes them."""
        _, text_bytes, offset, _, captions = (*row, 1)[:5]
        layout, further = self.layout, self.layout.further_bytes(captions)
        members = [
            ("emb.bin", offset + TAR_BLOCK, captions * layout.embedding_bytes),
            ("lat.bin", offset + further + layout.latent_at, layout.latent_bytes),
            ("rep.bin", offset + further + layout.features_at, layout.features_bytes),
            (self._text_member, offset + further + layout.row_bytes, text_bytes),
        ]
        if layout.features_shape is None:
            del members[2]
        return " ".join(f"{extension} {at} {size} {key}.{extension}" for extension, at, size in members) + "\n"


def is_written(directory: str | Path, part: int) -> bool:
    """Whether the part is complete."""
    return _record_path(Path(directory), part).exists()


def written_parts(directory: str | Path, known: dict[int, PartReport] | None = None) -> dict[int, PartReport]:
    """Part -> its report, of the parts that are complete. What is `known` is not read again."""
    found = dict(known or {})
    for path in sorted(Path(directory).glob("part_[0-9]*.json")):
        if (part := int(path.stem.removeprefix("part_"))) not in found:
            found[part] = _read_record(path).report
    return found


def finish_set(
    directory: str | Path,
    num_parts: int,
    layout: SampleLayout,
    encoders: Encoders,
    fingerprint: dict[str, Any],
    index_name: str = INDEX,
) -> Manifest:
    """Join all parts to a set; after a kill, again. For one process at a time. Raises UserError for a set without
    samples."""
    directory = Path(directory)
    if not (directory / MANIFEST).exists():
        records = [_read_record(_record_path(directory, part)) for part in range(num_parts)]
        index = _join_indexes(directory, records, index_name, index_dtype(layout))
        several = layout.captions is not None
        manifest = Manifest(
            format=FORMATS[several],
            **({"captions": layout.captions} if several else {}),
            members=_members(layout),
            encoders=encoders,
            fingerprint=fingerprint,
            samples=index.samples,
            index=index,
            shards=tuple(shard for record in records for shard in record.shards),
            dali_indexes=tuple(entry for record in records for entry in record.dali_indexes),
        )
        write_json(directory / MANIFEST, manifest.model_dump(mode="json", exclude_unset=True))
    for path in [*directory.glob("part_*.json"), *directory.glob("part_*.npy")]:
        path.unlink()
    return read_manifest(directory)


def _members(layout: SampleLayout) -> Members:
    lat = MemberFormat(dtype="f16", shape=layout.latent_shape)
    emb = MemberFormat(dtype=layout.embeddings, shape=layout.embedding_shape)
    if layout.features_shape is None:
        return Members(lat=lat, emb=emb)
    return Members(lat=lat, emb=emb, rep=MemberFormat(dtype="i8b64", shape=layout.features_shape))


def take_over(dataset: LatentSet, part: int, into: Path, report: PartReport | None) -> None:
    """Make a part of a finished set a complete part of the set in the making `into`. Its shards stay where they are.

    Raises UserError unless the report has as many samples."""
    shards = dataset.manifest.shards
    numbers = [n for n, shard in enumerate(shards) if shard.file.startswith(f"shard_{part:05d}_")]
    first, end = (min(numbers), max(numbers) + 1) if numbers else (0, 0)
    samples = sum(dataset.shard_sizes[first:end])
    if report is None or report.written != samples:
        raise UserError(
            f"{dataset.directory}: part {part} has {samples} samples, but its report says {report and report.written}; "
            "make the set again"
        )
    start = sum(dataset.shard_sizes[:first])
    rows = dataset.index.span(start, start + samples)
    rows["shard"] -= first
    dali_indexes = dataset.manifest.dali_indexes[first:end]
    _write_record(into, part, PartRecord(report=report, shards=shards[first:end], dali_indexes=dali_indexes), rows)


class ShardWriter(PartWriter):
    """A whole set from one process, in a new directory. Leaving the `with` block by an exception leaves no manifest.

    Raises UserError when the directory already holds something.
    """

    def __init__(
        self,
        directory: str | Path,
        latent_shape: tuple[int, int, int],
        embedding_shape: tuple[int, int],
        encoders: dict[str, dict[str, Any]],
        fingerprint: dict[str, Any],
        shard_bytes: int = SHARD_BYTES,
        embeddings: Embeddings = "f16",
        features_shape: tuple[int, int] | None = None,
        captions: Mapping[str, float] | None = None,
    ) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"{directory}: is not empty, and shards are never rewritten; choose another directory")
        layout = SampleLayout(
            latent_shape=latent_shape,
            embedding_shape=embedding_shape,
            embeddings=embeddings,
            features_shape=features_shape,
            captions=None if captions is None else dict(captions),
        )
        self._encoders = parse_section(Encoders, encoders, f"{directory}: encoders")
        self._fingerprint = fingerprint
        super().__init__(directory, 0, layout, shard_bytes)

    def close(self) -> None:
        super().close()
        finish_set(self.directory, 1, self.layout, self._encoders, self._fingerprint)


def _join_indexes(directory: Path, records: list[PartRecord], name: str, dtype: np.dtype) -> FileEntry:
    samples = sum(shard.samples for record in records for shard in record.shards)
    if samples == 0:
        raise UserError(f"{directory}: not a single sample was written")
    with replacing(directory / name) as partial:
        with open(partial, "wb") as file:
            header = {"descr": dtype.descr, "fortran_order": False, "shape": (samples,)}
            np.lib.format.write_array_header_1_0(file, header)
            first_shard = 0
            for part, record in enumerate(records):
                rows = _read_entries(directory, part, record, dtype)
                rows["shard"] += first_shard
                file.write(rows.tobytes())
                first_shard += len(record.shards)
    return _entry(directory / name, samples)


def _record_path(directory: Path, part: int) -> Path:
    return directory / f"part_{part:05d}.json"


def _write_record(directory: Path, part: int, record: PartRecord, rows: np.ndarray) -> None:
    """The rows first: the record makes the part complete."""
    path = _record_path(directory, part)
    with replacing(path.with_suffix(".npy")) as partial, open(partial, "wb") as file:
        np.save(file, rows, allow_pickle=False)
    write_json(path, record.model_dump(mode="json", exclude_none=True))


def _read_record(path: Path) -> PartRecord:
    return parse_section(PartRecord, parse_json(read_bytes(path), path), path)


def _read_entries(directory: Path, part: int, record: PartRecord, dtype: np.dtype) -> np.ndarray:
    path = _record_path(directory, part).with_suffix(".npy")
    try:
        rows = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: not a numpy file: {error}") from None
    samples = sum(shard.samples for shard in record.shards)
    if (found := (rows.dtype, rows.shape)) != (dtype, (samples,)):
        raise UserError(f"{path}: has rows of {found[0].descr} {found[1]}, expected {samples} of {dtype.descr}")
    return rows


def _entry(path: Path, samples: int) -> FileEntry:
    return FileEntry(file=path.name, samples=samples, **measure(path))
