"""DiffusionDB: pictures by Stable Diffusion with their prompts, 2 million PNGs (1.6 TB) or 14 million WebPs (6.5 TB).

From https://huggingface.co/datasets/poloclub/diffusiondb, any number of the zips of 1,000 pictures, and the table of
their ratings. Licence: CC0 1.0.

    2M       images/part-000001.zip                                              metadata.parquet
    Large    diffusiondb-large-part-1/part-000001.zip, ...-part-2/part-010001.zip    metadata-large.parquet

A zip holds the pictures and part-000001.json: {"UUID.png": {"p": prompt, ...}, ...}. A directory part-000001 with the
same content is taken instead of the zip of its name. images/ is read with metadata-large.parquet when there is no
metadata.parquet: the layout of the paper's code. It is not read beside Large, which holds the same pictures. As in the
paper's code, pictures are unsafe where image_nsfw or prompt_nsfw is above 0.2. Ten zips are one part. Needs pyarrow.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from mdit.config import UserError
from mdit.dist import logger
from mdit.sources import Picture, Rejected, Source, captioned, not_found
from mdit.sources.archives import ArchiveMember, is_picture, read_member, read_members, without_unpacked
from mdit.sources.fields import text
from mdit.sources.files import read_object

LARGE = ("diffusiondb-large-part-1", "diffusiondb-large-part-2")
SMALL_TABLE, LARGE_TABLE = "metadata.parquet", "metadata-large.parquet"
COLUMNS = ["image_name", "part_id", "image_nsfw", "prompt_nsfw"]
UNSAFE_ABOVE = float(np.float32(0.2))  # ratings are float32
ZIPS_PER_PART = 10
HOW = "get them from https://huggingface.co/datasets/poloclub/diffusiondb"


def open_pictures(root: Path) -> Source:
    folders = [root / name for name in LARGE if (root / name).is_dir()]
    tables = [LARGE_TABLE] if folders else [SMALL_TABLE, LARGE_TABLE]
    if folders and (root / "images").is_dir():
        logger.warning(f"{root}: images/ is not read beside {folders[0].name}/, which holds the same pictures")
    found = [path for folder in folders or [root / "images"] for path in folder.glob("part-*") if _number(path)]
    zips = without_unpacked((p for p in found if p.suffix == ".zip"), (p for p in found if p.is_dir()))
    if not zips:
        raise not_found(root, f"images/part-*.zip and no {LARGE[0]}/part-*.zip", HOW)
    table = next((root / name for name in tables if (root / name).is_file()), None)
    if table is None:
        raise not_found(root, f"{' and no '.join(tables)} with the ratings", HOW)
    _check(table)
    parts = []
    for ten, group in itertools.groupby(sorted(zips, key=_number), lambda path: (_number(path) - 1) // ZIPS_PER_PART):
        first, last = ZIPS_PER_PART * ten + 1, ZIPS_PER_PART * (ten + 1)
        parts.append(Zips(f"parts-{first:06d}-{last:06d}", tuple(group), table))
    return Source(parts, pictures=None)


@dataclass(frozen=True)
class Zips:
    name: str
    paths: Sequence[Path]
    table: Path

    def __iter__(self) -> Iterator[Picture | Rejected]:
        safe = read_ratings(self.table, [_number(path) for path in self.paths])
        for path in self.paths:
            prompts = read_object(read_member(path, f"{path.name.removesuffix('.zip')}.json") or b"") or {}
            for item in read_members(path, path.name, is_picture):
                yield self._judged(path, item, prompts, safe) if isinstance(item, ArchiveMember) else item

    def inputs(self) -> list[Path]:
        return [*self.paths, self.table]

    def _judged(self, path: Path, member: ArchiveMember, prompts: dict, safe: dict[str, bool]) -> Picture | Rejected:
        name = PurePosixPath(member.name).name
        origin = f"{path.name}/{name}"
        if name not in safe:
            return Rejected(origin, "not rated")
        if not safe[name]:
            return Rejected(origin, "unsafe")
        entry = prompts.get(name)
        return captioned(origin, member.data, text(entry.get("p")) if isinstance(entry, dict) else None)


def read_ratings(table: Path, numbers: Sequence[int]) -> dict[str, bool]:
    """Picture -> is it safe, for the zips with these numbers. One without a rating is not safe.

    The table is streamed, and of its row groups only those that may hold such rows. Raises UserError.
    """
    safe = {}
    with _opened(table) as (dataset, part):
        wanted = (part >= min(numbers)) & (part <= max(numbers)) & part.isin(list(numbers))
        for batch in dataset.to_batches(columns=COLUMNS, filter=wanted, batch_readahead=0, fragment_readahead=0):
            for row in batch.to_pylist():
                ratings = (row["image_nsfw"], row["prompt_nsfw"])
                rated = all(isinstance(rating, float | int) for rating in ratings)
                safe[row["image_name"]] = rated and max(ratings) <= UNSAFE_ABOVE
    return safe


@contextmanager
def _opened(table: Path) -> Iterator[tuple[Any, Any]]:
    """The table as a pyarrow.dataset, and its column part_id. Raises UserError, also for errors inside the block."""
    try:
        import pyarrow
        import pyarrow.dataset
    except ImportError:
        raise UserError("--source diffusiondb needs the package pyarrow: pip install pyarrow") from None
    try:
        yield pyarrow.dataset.dataset(table, format="parquet"), pyarrow.dataset.field("part_id")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{table}: cannot read the ratings: {error}") from None


def _check(table: Path) -> None:
    with _opened(table) as (dataset, _):
        names = dataset.schema.names
    if missing := [name for name in COLUMNS if name not in names]:
        raise UserError(f"{table}: has no column {missing[0]}; its columns are {', '.join(names)}")


def _number(path: Path) -> int:
    """1 for part-000001.zip and part-000001; 0 for anything else."""
    match = re.fullmatch(r"part-(\d+)(\.zip)?", path.name)
    return int(match[1]) if match else 0
