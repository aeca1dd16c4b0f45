"""DiffusionDB: zips with their prompts, and the table of ratings, which may be in any order and of any grouping."""

import json

import pytest

from mdit.config import UserError
from mdit.sources import open_named_source
from mdit.sources.diffusiondb import ZIPS_PER_PART, read_ratings
from tests.unit.test_sources import encoded, read, write_files, write_zip

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

PER_ZIP = 4


def name(part, i, suffix):
    return f"{part:08d}-0000-4000-8000-{i:012d}.{suffix}"


def ratings(parts, suffix):
    """(image_nsfw, prompt_nsfw) of every picture: the second of each zip fails by itself, the third by its prompt."""
    of = {1: (0.21, 0.0), 2: (0.1, 0.9)}
    return [(part, name(part, i, suffix), *of.get(i, (0.2, 0.19))) for part in parts for i in range(PER_ZIP)]


def write_table(path, rows, row_group_size=3):
    columns = list(zip(*rows)) or [(), (), (), ()]
    table = {
        "image_name": pyarrow.array(columns[1], pyarrow.string()),
        "prompt": pyarrow.array([f"prompt of {image}" for image in columns[1]], pyarrow.string()),
        "part_id": pyarrow.array(columns[0], pyarrow.uint16()),
        "user_name": pyarrow.array(["someone"] * len(rows), pyarrow.string()),
        "image_nsfw": pyarrow.array(columns[2], pyarrow.float32()),
        "prompt_nsfw": pyarrow.array(columns[3], pyarrow.float32()),
    }
    parquet.write_table(pyarrow.table(table), path, row_group_size=row_group_size)


def contents(part, suffix):
    names = [name(part, i, suffix) for i in range(PER_ZIP)]
    prompts = {image: {"p": f"prompt of {image} ", "se": 1, "c": 7.0, "st": 50, "sa": "k_lms"} for image in names}
    pictures = {image: encoded(part + i, suffix) for i, image in enumerate(names)}
    return {**pictures, f"part-{part:06d}.json": json.dumps(prompts).encode()}


def write_2m(root, parts=(1, 2), all_parts=range(1, 5)):
    for part in parts:
        write_zip(root / f"images/part-{part:06d}.zip", contents(part, "png"))
    write_table(root / "metadata.parquet", ratings(all_parts, "png"))
    return root


def test_2m(tmp_path):
    source = open_named_source("diffusiondb", write_2m(tmp_path))
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == ["parts-000001-000010"] and source.pictures is None
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        f"part-{part:06d}.zip/{name(part, i, 'png')}": (f"prompt of {name(part, i, 'png')}", encoded(part + i, "png"))
        for part in (1, 2)
        for i in (0, 3)
    }
    assert rejected == {f"part-{part:06d}.zip/{name(part, i, 'png')}": "unsafe" for part in (1, 2) for i in (1, 2)}


def test_large_in_its_two_directories_and_parts_that_more_zips_do_not_rename(tmp_path, caplog):
    for part in (3, 12, 10_001):
        folder = tmp_path / f"diffusiondb-large-part-{1 if part < 10_001 else 2}"
        write_zip(folder / f"part-{part:06d}.zip", contents(part, "webp"))
    write_2m(tmp_path)  # the smaller set beside it is part of the larger one
    write_table(tmp_path / "metadata-large.parquet", ratings((3, 12, 10_001), "webp"), row_group_size=10**6)
    source = open_named_source("diffusiondb", tmp_path)
    assert "images/ is not read beside diffusiondb-large-part-1/" in caplog.text
    assert [part.name for part in source.parts] == [f"parts-{first:06d}-{first + 9:06d}" for first in (1, 11, 10_001)]
    pictures, rejected = read(source)
    assert len(pictures) == len(rejected) == 6 and {*rejected.values()} == {"unsafe"}
    for part in (11, 20, 21):
        write_zip(tmp_path / f"diffusiondb-large-part-1/part-{part:06d}.zip", {})
    more = open_named_source("diffusiondb", tmp_path)
    assert [len(part.paths) for part in more.parts] == [1, 3, 1, 1] and ZIPS_PER_PART == 10
    assert {part.name for part in source.parts} <= {part.name for part in more.parts}


def test_unpacked_as_by_the_papers_code(tmp_path):
    for part in (1, 2):
        write_files(tmp_path / f"images/part-{part:06d}", contents(part, "webp"))
    write_zip(tmp_path / "images/part-000002.zip", {})  # the directory is taken
    write_table(tmp_path / "metadata-large.parquet", ratings((1, 2), "webp"))
    pictures, _ = read(open_named_source("diffusiondb", tmp_path))
    assert [*pictures] == [f"part-{part:06d}/{name(part, i, 'webp')}" for part in (1, 2) for i in (0, 3)]


def test_what_cannot_be_used(tmp_path):
    write_2m(tmp_path, parts=())
    files = contents(1, "png")
    prompts = json.loads(files.pop("part-000001.json"))
    prompts[name(1, 0, "png")] = {"se": 5}
    files |= {"part-000001.json": json.dumps(prompts).encode(), "unknown.png": encoded(7)}
    write_zip(tmp_path / "images/part-000001.zip", files)
    write_zip(tmp_path / "images/part-000002.zip", {k: v for k, v in contents(2, "png").items() if k.endswith("png")})
    whole = write_zip(tmp_path / "images/part-000003.zip", contents(3, "png")).read_bytes()
    (tmp_path / "images/part-000003.zip").write_bytes(whole[: len(whole) // 2])
    rows = [row for row in ratings((1, 2, 3), "png") if row[1] != name(1, 3, "png")]
    write_table(tmp_path / "metadata.parquet", [*rows, (1, name(1, 3, "png"), None, 0.0)])
    pictures, rejected = read(open_named_source("diffusiondb", tmp_path))
    assert not pictures
    assert rejected == {
        **{f"part-{part:06d}.zip/{name(part, i, 'png')}": "unsafe" for part in (1, 2) for i in (1, 2)},
        **{f"part-000002.zip/{name(2, i, 'png')}": "no caption" for i in (0, 3)},
        f"part-000001.zip/{name(1, 0, 'png')}": "no caption",
        f"part-000001.zip/{name(1, 3, 'png')}": "unsafe",
        "part-000001.zip/unknown.png": "not rated",
        "part-000003.zip": "damaged archive",
    }


@pytest.mark.parametrize("row_group_size", [1, 5, 1000])
def test_ratings_are_found_in_a_table_of_any_order(tmp_path, row_group_size):
    rows = ratings(range(1, 30), "png")[::-1]
    rows = rows[::2] + rows[1::2]
    write_table(tmp_path / "a.parquet", rows, row_group_size)
    expected = {image: max(scores) <= 0.2001 for part, image, *scores in rows if part in (2, 17)}
    assert read_ratings(tmp_path / "a.parquet", [2, 17]) == expected and len(expected) == 8
    assert read_ratings(tmp_path / "a.parquet", [500]) == {}


def test_a_table_that_is_damaged_within_is_an_error(tmp_path):
    root = write_2m(tmp_path, all_parts=range(1, 200))
    data = bytearray((root / "metadata.parquet").read_bytes())
    data[4:3000] = b"\xff" * 2996
    (root / "metadata.parquet").write_bytes(data)
    source = open_named_source("diffusiondb", root)
    with pytest.raises(UserError, match="metadata.parquet: cannot read the ratings"):
        list(source.parts[0])


def test_what_is_missing_is_named(tmp_path):
    root = write_2m(tmp_path)
    (root / "metadata.parquet").unlink()
    with pytest.raises(
        UserError, match="found no metadata.parquet and no metadata-large.parquet .*poloclub/diffusiondb"
    ):
        open_named_source("diffusiondb", root)
    (root / "metadata.parquet").write_bytes(b"<html>")
    with pytest.raises(UserError, match="metadata.parquet: cannot read the ratings"):
        open_named_source("diffusiondb", root)
    parquet.write_table(pyarrow.table({"image_name": ["a"], "part_id": [1]}), root / "metadata.parquet")
    with pytest.raises(UserError, match="has no column image_nsfw; its columns are image_name, part_id"):
        open_named_source("diffusiondb", root)
    for path in (root / "images").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"found no images/part-\*.zip and no diffusiondb-large-part-1"):
        open_named_source("diffusiondb", root)
