"""TextCaps and COCO in their official layouts: JSON with several captions a picture, and a directory of files."""

import json
import shutil

import pytest

from mdit.config import UserError
from mdit.sources import open_named_source
from tests.unit.test_sources import encoded, read, write_files

# --- TextCaps


def textcaps_entries(image, captions):
    """One entry for each caption, each with all captions of the picture, as in the official files."""
    shared = {"image_id": image, "image_name": image, "image_path": f"train/{image}.jpg", "reference_strs": captions}
    return [{**shared, "caption_id": i, "caption_str": text, "set_name": "train"} for i, text in enumerate(captions)]


def write_textcaps(root):
    captions = {"c3": ["it says stop", "a sign"], "a1": ["a book by X", "a book", "red"], "b2": ["five"]}
    data = [entry for image, texts in captions.items() for entry in textcaps_entries(image, texts)]
    validation = textcaps_entries("d4", ["a bottle of Y"])
    write_files(root / "train_images", {f"{image}.jpg": encoded(ord(image[0])) for image in (*captions, "d4", "other")})
    for name, entries in (("train", data), ("val", validation)):
        (root / f"TextCaps_0.1_{name}.json").write_text(json.dumps({"dataset_type": name, "data": entries}))
    return root


def test_textcaps(tmp_path):
    root = write_textcaps(tmp_path)
    source = open_named_source("textcaps", root)
    pictures, rejected = read(source)
    assert source.pictures == 3 and not rejected
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        "a1.jpg": ("a book by X", encoded(ord("a"))),
        "b2.jpg": ("five", encoded(ord("b"))),
        "c3.jpg": ("it says stop", encoded(ord("c"))),
    }
    pictures, _ = read(open_named_source("textcaps", root, split="validation"))
    assert [(origin, picture.caption) for origin, picture in pictures.items()] == [("d4.jpg", "a bottle of Y")]


def test_textcaps_with_pictures_missing_or_captions_empty(tmp_path):
    root = write_textcaps(tmp_path)
    (root / "train_images/a1.jpg").unlink()
    (root / "train_images/c3.jpg").unlink()
    (root / "train_images/c3.jpg").mkdir()
    path = root / "TextCaps_0.1_train.json"
    path.write_text(path.read_text().replace('["five"]', "[]"))
    pictures, rejected = read(open_named_source("textcaps", root))
    assert not pictures
    assert rejected == {"a1.jpg": "missing picture", "b2.jpg": "no caption", "c3.jpg": "unreadable picture"}


def test_textcaps_says_what_is_missing(tmp_path):
    root = write_textcaps(tmp_path)
    (root / "TextCaps_0.1_val.json").unlink()
    with pytest.raises(UserError, match="found no TextCaps_0.1_val.json; get it from https://textvqa.org/textcaps"):
        open_named_source("textcaps", root, split="validation")
    (root / "TextCaps_0.1_train.json").write_text('{"data": [{"x": 1}]}')
    with pytest.raises(UserError, match="TextCaps_0.1_train.json: expected"):
        open_named_source("textcaps", root)
    (root / "TextCaps_0.1_train.json").write_text('{"data": [')
    with pytest.raises(UserError, match="TextCaps_0.1_train.json: not valid JSON"):
        open_named_source("textcaps", root)
    shutil.rmtree(root / "train_images")
    with pytest.raises(UserError, match="found no train_images/; get train_val_images.zip from https://textvqa.org"):
        open_named_source("textcaps", root)


# --- COCO


def write_coco(root, year=2014):
    ids = (42, 7, 300)
    names = {number: f"{'COCO_val2014_' if year == 2014 else ''}{number:012d}.jpg" for number in ids}
    captions = [(42, "A dog.\n"), (7, "Two cats."), (42, "A dog sits."), (7, "Cats."), (300, " ")]
    values = {
        "info": {"year": year},
        "images": [{"id": number, "file_name": name, "height": 8} for number, name in names.items()],
        "annotations": [{"id": i, "image_id": number, "caption": text} for i, (number, text) in enumerate(captions)],
    }
    write_files(root, {f"annotations/captions_val{year}.json": json.dumps(values).encode()})
    write_files(root / f"val{year}", {name: encoded(number) for number, name in names.items()})
    return root


def open_coco(root):
    return open_named_source("coco", root, split="validation")


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco(tmp_path, year):
    source = open_coco(write_coco(tmp_path, year))
    pictures, rejected = read(source)
    before = "COCO_val2014_" if year == 2014 else ""
    assert source.pictures == 3
    assert [(origin, picture.caption, picture.image) for origin, picture in pictures.items()] == [
        (f"{before}000000000007.jpg", "Two cats.", encoded(7)),
        (f"{before}000000000042.jpg", "A dog.", encoded(42)),
    ]
    assert rejected == {f"{before}000000000300.jpg": "no caption"}


def test_coco_of_2014_comes_before_that_of_2017(tmp_path):
    write_coco(tmp_path, 2017)
    assert {*read(open_coco(write_coco(tmp_path)))[0]} == {f"COCO_val2014_{number:012d}.jpg" for number in (7, 42)}


def test_coco_says_what_is_missing(tmp_path):
    root = write_coco(tmp_path, 2017)
    shutil.rmtree(root / "val2017")
    with pytest.raises(
        UserError, match="found no val2017/; get val2017.zip and annotations_trainval2017.zip from https"
    ):
        open_coco(root)
    (root / "annotations/captions_val2017.json").unlink()
    with pytest.raises(UserError, match="found no annotations/captions_val2014.json; get val2014.zip and"):
        open_coco(root)
    write_files(root, {"val2014/x": b"", "annotations/captions_val2014.json": b'{"images": []}'})
    with pytest.raises(UserError, match="captions_val2014.json: expected .* of COCO captions"):
        open_coco(root)
