"""MS-COCO, validation pictures of 2014 (40,504) or 2017 (5,000), each with five captions: for evaluation.

From https://cocodataset.org/#download: val2014.zip (6 GB) and annotations_trainval2014.zip, both to be unpacked, or
those of 2017. Licence: captions CC BY 4.0; the pictures are of Flickr, each under its own licence.

    annotations/captions_val2014.json    {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    val2014/COCO_val2014_000000000042.jpg
    annotations/captions_val2017.json, val2017/000000000139.jpg    read when those of 2014 are not there

A picture's first caption counts, as in the paper's code; with --captions all five, of the kind "caption".
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mdit.sources import Source, not_found
from mdit.sources.fields import Found, of_kind, text
from mdit.sources.files import captioned_files

EXPECTED = '{"images": [...], "annotations": [...]} of COCO captions'
HOW = "get val2014.zip and annotations_trainval2014.zip from https://cocodataset.org/#download and unpack them"
SPLITS, KINDS = ("validation",), ("caption",)


def open_pictures(root: Path, kinds: Sequence[str] | None) -> Source:
    year = next((year for year in (2014, 2017) if (root / f"annotations/captions_val{year}.json").is_file()), None)
    if year is None:
        raise not_found(root, "annotations/captions_val2014.json", HOW)
    if not (root / f"val{year}").is_dir():
        raise not_found(root, f"val{year}/", HOW.replace("2014", str(year)))
    path = root / f"annotations/captions_val{year}.json"
    return captioned_files(path, root / f"val{year}", partial(_entries, kinds), EXPECTED)


def _entries(kinds: Sequence[str] | None, values: Any) -> Iterator[tuple[str, Found]]:
    captions = defaultdict(list)
    for entry in values["annotations"]:
        captions[entry["image_id"]].append(text(entry["caption"]))
    return ((image["file_name"], of_kind(kinds, *KINDS, captions[image["id"]])) for image in values["images"])
