"""TextCaps: 21,953 photographs for training and 3,166 for validation, each with five captions that read its writing.

From https://textvqa.org/textcaps/dataset/: TextCaps_0.1_train.json, TextCaps_0.1_val.json and train_val_images.zip,
about 7 GB, to be unpacked; its pictures are from Open Images v3. Licence: captions CC BY 4.0, pictures CC BY 2.0.

    TextCaps_0.1_train.json    {"data": [{"image_id": ..., "image_name": ..., "reference_strs": [...], ...}, ...]}
    TextCaps_0.1_val.json
    train_images/0054c91397f2fe05.jpg    those of both splits

There is one entry for each caption; a picture's first entry counts, and its first caption, as in the paper's code: with
--captions all five, of the kind "caption". The paper's code trains on both splits. The copy
https://huggingface.co/datasets/HuggingFaceM4/TextCaps is read by `--source huggingface --root HuggingFaceM4/TextCaps`.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mdit.sources import Source, not_found
from mdit.sources.fields import Found, of_kind, texts
from mdit.sources.files import captioned_files

IMAGES = "train_images"
FILES = {"train": "TextCaps_0.1_train.json", "validation": "TextCaps_0.1_val.json"}
KINDS = ("caption",)
EXPECTED = '{"data": [{"image_name": ..., "reference_strs": [...]}, ...]}'
HOW = "get {} from https://textvqa.org/textcaps/dataset/"


def open_pictures(root: Path, split: str, kinds: Sequence[str] | None) -> Source:
    path = root / FILES[split]
    if not path.is_file():
        raise not_found(root, path.name, HOW.format("it"))
    if not (root / IMAGES).is_dir():
        raise not_found(root, f"{IMAGES}/", HOW.format("train_val_images.zip"))
    return captioned_files(path, root / IMAGES, partial(_entries, kinds), EXPECTED)


def _entries(kinds: Sequence[str] | None, values: Any) -> Iterable[tuple[str, Found]]:
    captions = {f"{entry['image_name']}.jpg": texts(entry.get("reference_strs")) for entry in reversed(values["data"])}
    return [(file, of_kind(kinds, *KINDS, found)) for file, found in captions.items()]
