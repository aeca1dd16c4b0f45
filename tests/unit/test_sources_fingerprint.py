"""When a part of a source counts as the same, and when as another."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mdit.sources import Slice, Source, open_named_source
from mdit.sources.fingerprint import BLOCK_BYTES, fingerprint
from tests.picture_sets import png
from tests.unit.test_sources import write_tar


def folder(root, captions):
    root.mkdir(exist_ok=True)
    for number in range(len(captions)):
        (root / f"{number}.png").write_bytes(png(0))
    lines = [json.dumps({"file": f"{number}.png", "caption": text}) + "\n" for number, text in enumerate(captions)]
    (root / "captions.jsonl").write_text("".join(lines))
    return open_named_source("folder", root)


def coco(root, captions):
    for name in ("val2014", "annotations"):
        (root / name).mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(len(captions))]
    annotations = [{"image_id": number, "caption": text} for number, text in enumerate(captions)]
    values = {"images": images, "annotations": annotations}
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(values))
    for number in range(len(captions)):
        (root / "val2014" / f"{number}.png").write_bytes(png(0))
    return open_named_source("coco", root, split="validation")


def webdataset(root, captions):
    root.mkdir(exist_ok=True)
    files = {}
    for number, text in enumerate(captions):
        files |= {f"{number:03d}.png": png(0), f"{number:03d}.txt": text.encode()}
    write_tar(root / "00000.tar", files)
    return open_named_source("webdataset", root)


def parquet(root, captions):
    pyarrow = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    root.mkdir(exist_ok=True)
    rows = [{"image": {"bytes": png(0), "path": None}, "text": text} for text in captions]
    pyarrow.write_table(Table.from_pylist(rows), root / "train.parquet")
    return open_named_source("huggingface", root)


def fingerprints(source: Source) -> list[str]:
    return [fingerprint(part, part) for part in source.parts]


@pytest.mark.parametrize("write", [folder, coco, webdataset, parquet])
def test_rewritten_captions_are_another_source_and_a_copy_is_the_same(tmp_path, write):
    captions = [f"caption {number}" for number in range(20)]
    before = fingerprints(write(tmp_path / "here", captions))
    assert fingerprints(write(tmp_path / "copy", captions)) == before
    for number in (0, 7, 19):
        rewritten = [*captions]
        rewritten[number] = captions[number].replace("a", "e")  # of the same length
        assert fingerprints(write(tmp_path / f"rewritten {number}", rewritten)) != before
    other = fingerprints(write(tmp_path / "here", captions[:-1]))
    assert other != before


def test_a_folder_that_grows_keeps_its_whole_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("mdit.sources.folder.LINES_PER_PART", 5)
    captions = [f"caption {number}" for number in range(13)]
    before = fingerprints(folder(tmp_path / "folder", captions[:12]))
    after = fingerprints(folder(tmp_path / "folder", captions))
    assert len(before) == len(after) == 3 and before[:2] == after[:2] and before[2] != after[2]


def test_pictures_that_settings_decide_are_not_drawn_to_be_looked_at():
    class Scenes:
        drawn = True

        def __getitem__(self, index):
            raise AssertionError

    parts = [Slice(str(number), Scenes(), np.arange(number, number + 5)) for number in range(2)]
    assert len({fingerprint(part, part) for part in parts}) == 2


class Archive:
    def __init__(self, path: Path) -> None:
        self.path = path

    def inputs(self) -> list[Path]:
        return [self.path]


def test_of_large_files_size_and_blocks_count_and_of_directories_names(tmp_path):
    content = np.random.default_rng(0).bytes(40 * BLOCK_BYTES)
    path = tmp_path / "archive"

    def found(data: bytes) -> str:
        path.write_bytes(data)
        return fingerprint(Archive(path), [])

    before = found(content)
    assert before == found(content)
    for at in (0, 13 * BLOCK_BYTES, len(content) - 1):
        assert found(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]) != before
    assert found(content + b"\0") != before
    between = 5 * BLOCK_BYTES
    assert found(content[:between] + b"?" + content[between + 1 :]) == before  # as docs/data.md says
    (tmp_path / "unpacked").mkdir()
    for number in range(9):
        (tmp_path / "unpacked" / str(number)).write_bytes(b"a picture")
    unpacked = Archive(tmp_path / "unpacked")
    before = fingerprint(unpacked, [])
    shutil.move(tmp_path / "unpacked" / "5", tmp_path / "unpacked" / "six")
    assert fingerprint(unpacked, []) != before
