"""What all sources share, and folders of one's own pictures."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mdit.config import FolderSource, UserError
from mdit.sources import SOURCES, Picture, Rejected, Source, open_named_source, open_source, slices
from mdit.sources.folder import LINES_PER_PART

# --- for the tests of every source


def encoded(number: int, suffix: str = "jpg", size: tuple[int, int] = (12, 8)) -> bytes:
    """A small picture of its own colour, as a file of this kind."""
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(suffix, suffix.upper())
    Image.new("RGB", size, (number % 256, 100, 200)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def read(source: Source) -> tuple[dict[str, Picture], dict[str, str]]:
    """Every picture by origin, and why others are rejected. Reading again gives the same, and nothing comes twice."""
    assert len({part.name for part in source.parts}) == len(source.parts)
    items = [item for part in source.parts for item in part]
    assert items == [item for part in source.parts for item in part]
    assert len({item.origin for item in items}) == len(items)
    pictures = {item.origin: item for item in items if isinstance(item, Picture)}
    assert all(picture.caption and picture.caption == picture.caption.strip() for picture in pictures.values())
    return pictures, {item.origin: item.reason for item in items if isinstance(item, Rejected)}


# --- opening by name


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("cc12", {}, r"--source cc12: is not known \(did you mean cc12m\?\)"),
        ("imagenet21k", {}, "is not known; there are sa1b, cc12m, textcaps, journeydb, .* mds, emoji"),
        ("sa1b", {"split": "validation"}, "--split validation: sa1b has no such split; it has train"),
        ("coco", {}, "--split train: coco has no such split; it has validation"),
        ("textcaps", {"split": "test"}, "--split test: textcaps has no such split; it has train and validation"),
        ("journeydb", {"caption_key": "x"}, "--caption_key x: journeydb has one caption a picture"),
        ("cc12m", {"root": None}, "--source cc12m needs --root"),
        ("emoji", {}, "--source emoji is drawn and takes no --root"),
    ],
)
def test_what_a_source_does_not_take(tmp_path, name, arguments, message):
    with pytest.raises(UserError, match=message):
        open_named_source(name, **{"root": tmp_path, **arguments})


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "emoji"])
@pytest.mark.parametrize("there", [False, True], ids=["absent", "empty"])
def test_a_wrong_root_is_named_with_what_was_looked_for_and_how_to_get_it(tmp_path, name, there):
    root = tmp_path / "some where"
    if there:
        root.mkdir()
    if name == "huggingface":
        pytest.importorskip("datasets")
    if name == "diffusiondb":
        pytest.importorskip("pyarrow")
    with pytest.raises(UserError) as error:
        open_named_source(name, root, split="validation" if name == "coco" else "train")
    message = str(error.value)
    assert message.startswith(f"{root}: ") and "\n" not in message
    assert ("found no" if there else "there is no such directory") in message or name == "huggingface"
    assert "docs/data.md" in message or name == "huggingface"


@pytest.mark.parametrize("name, package", [("huggingface", "datasets"), ("diffusiondb", "pyarrow")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    write_files(tmp_path, {"images/part-000001.zip": b"", "metadata.parquet": b""})
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(UserError, match=f"--source {name} needs the package {package}: pip install {package}"):
        open_named_source(name, tmp_path)


# --- slices


def test_slices_hold_everything_once_in_nearly_equal_parts():
    split = [Picture(str(i), b"", "x") for i in range(1003)]
    for seed in (None, 0):
        parts = slices(split, 100, seed)
        assert {len(list(part)) for part in parts} == {91, 92} and len(parts) == 11
        assert sorted(read(Source(parts, 1003))[0]) == sorted(picture.origin for picture in split)
    assert [picture for part in slices(split, 100) for picture in part] == split
    shuffled = [[picture for part in slices(split, 100, seed) for picture in part] for seed in (0, 0, 1)]
    assert shuffled[0] == shuffled[1] != shuffled[2] and shuffled[0] != split
    assert slices([], 100, 0) == []


# --- folders, by recipe


def write_folder(path, count=40, size=(20, 12)):
    """Pictures whose left third is red and right third blue, the middle green."""
    (path / "sub").mkdir(parents=True)
    lines = []
    for i in range(count):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        third = size[0] // 3
        pixels[:, :third, 0] = pixels[:, -third:, 2] = pixels[:, third:-third, 1] = 255
        name = f"sub/picture {i}.png"
        Image.fromarray(pixels).save(path / name)
        lines.append(json.dumps({"file": name, "caption": f"caption {i}", "width": size[0]}))
    (path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return path


def open_folder(path, share=0.2):
    return open_source(FolderSource(name="folder", path=str(path), validation_share=share), 8)


def set_line(path, number, line):
    lines = (path / "captions.jsonl").read_bytes().split(b"\n")
    lines[number - 1] = line.encode(errors="surrogateescape")
    (path / "captions.jsonl").write_bytes(b"\n".join(lines))


def test_every_picture_is_in_one_split_and_stays_there(tmp_path):
    write_folder(tmp_path / "a")
    source = open_folder(tmp_path / "a")
    training, validation = set(source.training.captions), set(source.validation.captions)
    assert not training & validation and len(training | validation) == 40
    assert 2 <= len(validation) <= 16
    write_folder(tmp_path / "b", count=60)  # more pictures move none of the earlier ones
    assert validation <= set(open_folder(tmp_path / "b").validation.captions)
    assert [sample.caption for sample in source.training] == source.training.captions
    assert len({sample.origin for split in (source.training, source.validation) for sample in split}) == 40


def test_captions_of_one_picture_share_its_split(tmp_path):
    write_folder(tmp_path / "a")
    with open(tmp_path / "a" / "captions.jsonl", "a") as file:
        file.writelines(f'{{"file": "sub/picture {i}.png", "caption": "caption {i}"}}\n' for i in range(40))
    source = open_folder(tmp_path / "a")
    assert not set(source.training.captions) & set(source.validation.captions)


def test_pictures_are_the_files_as_they_are(tmp_path):
    folder = write_folder(tmp_path / "a", count=10)
    source = open_folder(folder, share=0.3)
    for picture in (*source.training, *source.validation):
        line = int(picture.origin.removeprefix("captions.jsonl:"))
        assert picture.caption == f"caption {line - 1}"
        assert picture.image == (folder / f"sub/picture {line - 1}.png").read_bytes()


PICTURE = '"file": "sub/picture 2.png"'
WRONG_LINES = [  # of captions.jsonl, what a recipe's user is told, and the reason in a report of a source by name
    ("{nonsense", "not valid JSON", "unreadable caption"),
    ("", "not valid JSON", "unreadable caption"),
    ("[1, 2]", "expected", "unreadable caption"),
    (f'{{{PICTURE}, "caption": "x", "more": {"[" * 1000}{"]" * 1000}}}', "nested more", "unreadable caption"),
    (f'{{{PICTURE}, "caption": "\udcff"}}', "not valid JSON: 'utf-8'", "unreadable caption"),
    (f'{{{PICTURE}, "caption": "half \\ud83d"}}', "caption is not Unicode text", "unreadable caption"),
    (f"{{{PICTURE}}}", "caption is None", "no caption"),
    (f'{{{PICTURE}, "caption": 5}}', "caption is 5", "no caption"),
    (f'{{{PICTURE}, "caption": "  "}}', "caption is '  '", "no caption"),
    ('{"caption": "x"}', "file is None", "missing picture"),
    ('{"file": "sub/none.png", "caption": "x"}', "there is no picture .*sub/none.png", "missing picture"),
    ('{"file": "sub", "caption": "x"}', "cannot read the picture", "unreadable picture"),
    ('{"file": "sub/\\ud83d.png", "caption": "x"}', "cannot read the picture", "unreadable picture"),
    ('{"file": "a\\u0000b", "caption": "x"}', "cannot read the picture", "unreadable picture"),
]


@pytest.mark.parametrize("line, message, reason", WRONG_LINES, ids=lambda value: value[:30])
def test_a_wrong_line_is_named_by_the_recipe_and_rejected_by_name(tmp_path, line, message, reason):
    folder = write_folder(tmp_path / "a", count=5)
    set_line(folder, 3, line)
    with pytest.raises(UserError, match=f"captions.jsonl:3: .*{message}"):
        open_folder(folder)
    source = open_named_source("folder", folder)
    pictures, rejected = read(source)
    assert rejected == {"captions.jsonl:3": reason} and source.pictures == 5
    assert {origin: picture.caption for origin, picture in pictures.items()} == {
        f"captions.jsonl:{number}": f"caption {number - 1}" for number in (1, 2, 4, 5)
    }


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_named_with_its_line(tmp_path, suffix):
    folder, rng = write_folder(tmp_path / "a", count=5), np.random.default_rng(0)
    path = folder / f"broken.{suffix}"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    set_line(folder, 4, json.dumps({"file": path.name, "caption": "x"}))
    with pytest.raises(UserError, match=f"captions.jsonl:4: cannot read the picture .*broken.{suffix}"):
        open_folder(folder)


def test_captions_file_missing_empty_or_not_text(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl: cannot read the captions.*docs/data.md"):
        open_folder(tmp_path)
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="captions.jsonl: is empty"):
        open_folder(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="captions.jsonl:1: not valid JSON: 'utf-8'"):
        open_folder(tmp_path)


@pytest.mark.parametrize("share, left", [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_split_without_pictures_names_the_share(tmp_path, share, left):
    write_folder(tmp_path / "a", count=3)
    with pytest.raises(UserError, match=f"validation_share = {share} of 3 pictures leaves none for {left}"):
        open_folder(tmp_path / "a", share=share)


# --- folders, by name


def test_a_long_folder_is_cut_in_parts_and_may_have_captions_under_another_key(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(0, "png"))
    count = 2 * LINES_PER_PART + 1
    lines = (json.dumps({"file": "a.png", "caption": "x", "other": f"caption {i} é"}) + "\n" for i in range(count))
    (tmp_path / "captions.jsonl").write_text("".join(lines))
    source = open_named_source("folder", tmp_path, caption_key="other")
    assert source.pictures == count and len(source.parts) == 3
    found = [[picture.caption for picture in part] for part in source.parts]
    assert [len(part) for part in found] == [LINES_PER_PART, LINES_PER_PART, 1]
    assert sum(found, []) == [f"caption {i} é" for i in range(count)]
    assert [picture.caption for picture in source.parts[1]] == found[1]


def test_an_empty_folder(tmp_path):
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="captions.jsonl: is empty"):
        open_named_source("folder", tmp_path)
