"""Sets in the layouts of the Hugging Face library `datasets`, with a column of pictures and one of captions.

    --root DIR          what `save_to_disk` wrote; or a directory of parquet files, such as a copy of a set of the hub;
                        or what img2dataset wrote (output_format parquet); or any other that `datasets` knows
    --root OWNER/NAME   a set of https://huggingface.co/datasets, which `datasets` downloads to its cache

The pictures are the first column of the type Image, or one of bytes that is called jpg (or another of PICTURES); their
files are taken as they are, not decoded. The captions are
the column that the caption key names, or the first of CAPTIONS; of a list the first. With --captions the kinds are
columns, and all of a list count. The licence is the set's own. Parquet files are read in place, each is one part; other
sets are cut in ranges of rows. Needs the package `datasets`.
"""

import inspect
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdit.config import UserError
from mdit.documents import plain_name
from mdit.sources import FilePart, Picture, Rejected, Source, captioned, check_split, part_name
from mdit.sources.archives import damaged
from mdit.sources.fields import CaptionFields, Found, caption_fields
from mdit.sources.files import Entry, read_json, read_picture
from mdit.sources.storage import is_damage

PICTURES = ("jpg", "jpeg", "png", "webp", "image")  # img2dataset names the column by its encode_format
CAPTIONS = ("caption", "text", "prompt", "reference_strs")
ROWS_PER_PART = 5000
ROWS_AT_ONCE = 64  # of a parquet file, in memory
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_pictures(root: Path, split: str, caption_key: str | None, kinds: Sequence[str] | None) -> Source:
    library = _library()
    asked = None if caption_key is None and kinds is None else caption_fields(kinds, caption_key or "")
    if not root.is_dir() and not HUB_ID.fullmatch(str(root)):
        raise UserError(f"{root}: there is no such directory, and no set of the Hugging Face hub has such a name")
    try:
        if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")):
            _check_names(root)
            saved = library.load_from_disk(str(root))
            splits = saved if isinstance(saved, library.DatasetDict) else {"train": saved}
            return _table_source(root, _of_split(root, splits, split), asked, own=True)
        if written := _of_img2dataset(root):
            return _parquet_files(root, _of_split(root, {"train": written}, split), asked)
        builder = library.load_dataset_builder(str(root), **_no_code_of_others(library.load_dataset_builder))
        if root.is_dir() and builder.name == "parquet":
            files = _of_split(root, {str(name): files for name, files in builder.config.data_files.items()}, split)
            return _parquet_files(root, [Path(file) for file in files], asked)
        loaded = library.load_dataset(str(root), split=split, **_no_code_of_others(library.load_dataset))
        return _table_source(root, loaded, asked)
    except UserError:
        raise
    except Exception as error:  # the library's own, those of the network, and any that damaged files bring about
        raise UserError(f"{root}: cannot open it as a set of Hugging Face's: {' '.join(str(error).split())}") from None


@dataclass(frozen=True)
class Columns:
    """`places` are the directories that pictures in files of their own may be in, the first that of relative names."""

    picture: str
    captions: CaptionFields
    places: tuple[Path, ...]

    @property
    def names(self) -> list[str]:
        return [self.picture, *self.captions.names]

    def read(self, origin: str, row: Mapping[str, Any]) -> Picture | Rejected:
        """A row whose picture is not decoded: {"bytes": ..., "path": ...}, where one may be None."""
        picture, caption = row.get(self.picture), self.captions.read(row)
        if isinstance(picture, Mapping) and picture.get("bytes") is None:
            if path := picture.get("path"):
                return self._in_a_file(str(path), origin, caption)
        elif picture is not None:
            data = picture["bytes"] if isinstance(picture, Mapping) else picture
            if not isinstance(data, bytes):
                return Rejected(origin, "unreadable picture")
            return captioned(origin, data, caption)
        return Rejected(origin, "missing picture")

    def _in_a_file(self, path: str, origin: str, caption: Found) -> Picture | Rejected:
        place = next((place for place in self.places if Path(path).is_relative_to(place)), self.places[0])
        name = os.path.relpath(path, place) if Path(path).is_relative_to(place) else path
        return read_picture(place, Entry(origin, name, caption), Path())


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a `datasets.Dataset` whose pictures are not decoded."""

    name: str
    dataset: Any
    indices: range
    columns: Columns

    def __iter__(self) -> Iterator[Picture | Rejected]:
        try:
            for index, row in zip(self.indices, self.dataset.select(self.indices)):
                yield self.columns.read(f"row {index}", row)
        except Exception as error:
            yield damaged(error, f"rows {self.name}", self.name)

    def inputs(self) -> list[bytes]:
        names = self.columns.captions.names
        captions = self.dataset.select_columns(names).select(self.indices)
        return [repr([row[name] for row in captions]).encode(errors="surrogatepass") for name in names]


@dataclass(frozen=True)
class ParquetFile(FilePart):
    columns: Columns

    def __iter__(self) -> Iterator[Picture | Rejected]:
        import pyarrow.parquet

        index = 0
        try:
            with pyarrow.parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=2**20) as file:
                for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=self.columns.names):
                    for row in range(batch.num_rows):
                        yield self._read(f"{self.name}:row {index}", batch, row)
                        index += 1
        except Exception as error:
            yield damaged(error, self.path, self.name)

    def _read(self, origin: str, batch: Any, row: int) -> Picture | Rejected:
        try:
            values = {name: batch[name][row].as_py() for name in batch.schema.names}
        except ValueError as error:  # not UTF-8
            return Rejected(origin, "unreadable caption", str(error))
        return self.columns.read(origin, values)


def _table_source(root: Path, dataset: Any, asked: CaptionFields | None, own: bool = False) -> Source:
    columns = _columns(root, dataset.features, asked, own)
    undecoded = dataset.select_columns(columns.names)
    undecoded = undecoded.cast_column(columns.picture, _library().Image(decode=False))
    starts = range(0, len(dataset), ROWS_PER_PART)
    parts = [
        Rows(f"{number:05d}", undecoded, range(start, min(start + ROWS_PER_PART, len(dataset))), columns)
        for number, start in enumerate(starts)
    ]
    return Source(parts, len(dataset))


def _check_names(root: Path) -> None:
    """Raise ValueError where what `save_to_disk` wrote names files that are not its own."""
    splits = read_json(root / "dataset_dict.json")["splits"] if (root / "dataset_dict.json").is_file() else None
    for folder in [root] if splits is None else [root / plain_name(split) for split in splits]:
        for file in read_json(folder / "state.json")["_data_files"]:
            plain_name(file["filename"])


def _parquet_files(root: Path, files: list[Path], asked: CaptionFields | None) -> Source:
    import pyarrow.parquet

    schema, pictures = None, 0
    for path in sorted(files):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                schema, pictures = schema or file.schema_arrow, pictures + file.metadata.num_rows
        except Exception as error:
            if not is_damage(error):
                raise
            continue  # its part says so
    if schema is None:
        raise UserError(f"{root}: none of its {len(files)} parquet files can be read")
    columns = _columns(root, _library().Features.from_arrow_schema(schema), asked, own=True)
    names = [os.path.relpath(path, root) for path in sorted(files)]
    return Source([ParquetFile(part_name(Path(name), Path()), root / name, columns) for name in names], pictures)


def _of_img2dataset(root: Path) -> list[Path]:
    """00000.parquet, ..., each beside a 00000_stats.json, which `datasets` would take for data. Without pictures in
    them, img2dataset put these into tars or folders."""
    tables = [path.with_name(path.name.replace("_stats.json", ".parquet")) for path in root.glob("*_stats.json")]
    return [path for path in tables if path.is_file()]


def _columns(root: Path, features: Mapping[str, Any], asked: CaptionFields | None, own: bool) -> Columns:
    """Pictures in files of their own are below `root`, and unless all is its `own` in the cache of the library. Raises
    UserError naming the columns that are there."""
    image = _library().Image
    # Files that were not written by `datasets` say only that a column holds bytes and paths.
    pictures = [name for name, kind in features.items() if isinstance(kind, image) or _holds_files(name, kind)]
    found = asked or next((caption_fields(None, name) for name in CAPTIONS if name in features), None)
    missing = [name for name in found.names if name not in features] if found else [" or ".join(CAPTIONS)]
    there = f"its columns are {', '.join(features)}"
    if not pictures:
        hint = "; are its pictures in tars or folders (--source webdataset or folder)?" if _of_img2dataset(root) else ""
        raise UserError(f"{root}: has no column of pictures; {there}{hint}")
    if found is None or missing:
        hint = "" if asked else "; name one by --caption_key"
        raise UserError(f"{root}: has no column {missing[0]} for captions; {there}{hint}")
    cache = Path(_library().config.HF_CACHE_HOME)  # what was downloaded, or unpacked from archives
    return Columns(pictures[0], found, (root.absolute(), root.resolve(), *([] if own else [cache.absolute()])))


def _holds_files(name: str, kind: Any) -> bool:
    if isinstance(kind, Mapping):
        return {*kind} == {"bytes", "path"}
    return name in PICTURES and getattr(kind, "dtype", None) in ("binary", "large_binary")


def _of_split(root: Path, splits: Mapping[str, Any], split: str) -> Any:
    check_split(split, splits, root)
    return splits[split]


def _no_code_of_others(load: Callable) -> dict[str, bool]:
    """Argument for versions of `datasets` that could run a script from the hub; later ones do not take it."""
    return {"trust_remote_code": False} if "trust_remote_code" in inspect.signature(load).parameters else {}


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError("--source huggingface needs the package datasets: pip install datasets") from None
    return datasets
