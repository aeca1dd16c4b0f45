"""Sets in the layouts of the library `datasets`: saved to disk, parquet files, folders of pictures, the hub."""

import json
from pathlib import Path

import pytest

from mdit.config import UserError
from mdit.sources import huggingface, open_named_source
from tests.unit.test_sources import encoded, read, write_files

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def _no_cache_and_no_bars(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def rows(count, start=0, **columns):
    """A Dataset like HuggingFaceM4/TextCaps: a picture, several captions, other columns."""
    numbers = range(start, start + count)
    values = {
        "image_id": [str(number) for number in numbers],
        "image": [{"bytes": encoded(number), "path": None} for number in numbers],
        "reference_strs": [[f"caption {number}", "another"] for number in numbers],
        **columns,
    }
    return datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())


def captions(source):
    pictures, rejected = read(source)
    assert not rejected
    return [picture.caption for picture in pictures.values()]


def test_saved_to_disk_and_cut_in_ranges_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "ROWS_PER_PART", 3)
    rows(7).save_to_disk(tmp_path / "set")
    source = open_named_source("huggingface", tmp_path / "set")
    assert source.pictures == 7 and [len(list(part)) for part in source.parts] == [3, 3, 1]
    pictures, rejected = read(source)
    assert not rejected
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        f"row {number}": (f"caption {number}", encoded(number)) for number in range(7)
    }
    with pytest.raises(UserError, match="--split validation: .*set has no such split; it has train"):
        open_named_source("huggingface", tmp_path / "set", split="validation")


def test_saved_to_disk_with_splits(tmp_path):
    datasets.DatasetDict(train=rows(2), validation=rows(1, 9)).save_to_disk(tmp_path / "set")
    assert captions(open_named_source("huggingface", tmp_path / "set")) == ["caption 0", "caption 1"]
    assert captions(open_named_source("huggingface", tmp_path / "set", split="validation")) == ["caption 9"]


def write_parquet(root, files):
    for name, table in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / name)
    return root


def test_a_copy_of_a_set_of_the_hub(tmp_path):
    """Parquet files are read where they are, one a part, and only those of the split."""
    files = {f"data/train-{i:05d}-of-00002.parquet": rows(3, 10 * i) for i in (1, 0)}
    root = write_parquet(tmp_path / "set", {**files, "data/validation-00000-of-00001.parquet": rows(1, 90)})
    (root / "README.md").write_text("---\nlicense: cc\n---\n# A set\n")
    source = open_named_source("huggingface", root)
    assert [part.name for part in source.parts] == sorted(files) and source.pictures == 6
    pictures, rejected = read(source)
    assert {origin: picture.image for origin, picture in pictures.items()} == {
        f"data/train-{i:05d}-of-00002.parquet:row {row}": encoded(10 * i + row) for i in range(2) for row in range(3)
    }
    assert captions(open_named_source("huggingface", root, split="validation")) == ["caption 90"]
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    with pytest.raises(UserError, match="--split validation: .* has no such split; it has train"):
        open_named_source("huggingface", write_parquet(tmp_path / "other", {"a.parquet": rows(1)}), split="validation")


def test_parquet_files_that_datasets_did_not_write_and_damaged_ones(tmp_path):
    pictures = [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in range(3)]
    pictures += [{"bytes": None, "path": None}, None, {"bytes": encoded(5), "path": None}]
    table = pyarrow.table({"text": [*"abcde", None], "image": pictures})
    parquet.write_table(table, tmp_path / "1.parquet", row_group_size=2)
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "0.parquet").write_bytes(whole[:-50])
    source = open_named_source("huggingface", tmp_path)
    found, rejected = read(source)
    assert [(picture.caption, picture.image) for picture in found.values()] == [
        (c, encoded(i)) for i, c in enumerate("abc")
    ]
    assert rejected == {
        "0.parquet": "damaged archive",
        "1.parquet:row 3": "missing picture",
        "1.parquet:row 4": "missing picture",
        "1.parquet:row 5": "no caption",
    }
    write_files(tmp_path / "other", {"0.parquet": whole[:-50]})
    with pytest.raises(UserError, match="none of its 1 parquet files can be read"):
        open_named_source("huggingface", tmp_path / "other")


def test_a_folder_of_pictures_with_their_metadata(tmp_path):
    lines = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(3)]
    write_files(tmp_path / "set", {line["file_name"]: encoded(i, "png") for i, line in enumerate(lines)})
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = open_named_source("huggingface", tmp_path / "set")
    pictures, rejected = read(source)
    assert not rejected
    assert {picture.caption: picture.image for picture in pictures.values()} == {
        f"caption {i}": encoded(i, "png") for i in range(3)
    }


def test_a_set_of_the_hub_by_its_id(tmp_path, monkeypatch):
    asked = []

    class Builder:
        name = "parquet"

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: asked.append(name) or Builder())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows(2))
    monkeypatch.chdir(tmp_path)
    source = open_named_source("huggingface", huggingface.Path("HuggingFaceM4/TextCaps"), split="validation")
    assert asked == ["HuggingFaceM4/TextCaps", ("HuggingFaceM4/TextCaps", "validation")]
    assert captions(source) == ["caption 0", "caption 1"]

    for error in (ConnectionError, ValueError, datasets.exceptions.DatasetNotFoundError):

        def unreachable(name, error=error):
            raise error("Couldn't reach\n it")

        monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
        with pytest.raises(UserError, match="^a/b: cannot open it as a set of Hugging Face's: Couldn't reach it$"):
            open_named_source("huggingface", huggingface.Path("a/b"))


def test_the_caption_column(tmp_path):
    path = tmp_path / "set"
    rows(1, prompt=["a prompt"], caption=["a caption"], other=["another one"]).save_to_disk(path)
    assert captions(open_named_source("huggingface", path)) == ["a caption"]
    assert captions(open_named_source("huggingface", path, caption_key="other")) == ["another one"]
    with pytest.raises(
        UserError, match="has no column x for captions; its columns are image_id, image, reference_strs"
    ):
        open_named_source("huggingface", path, caption_key="x")
    rows(1).remove_columns("reference_strs").save_to_disk(tmp_path / "none")
    with pytest.raises(UserError, match="has no column caption or text .*; name one by --caption_key"):
        open_named_source("huggingface", tmp_path / "none")
    rows(1).remove_columns("image").save_to_disk(tmp_path / "blind")
    with pytest.raises(UserError, match="has no column of pictures; its columns are image_id, reference_strs"):
        open_named_source("huggingface", tmp_path / "blind")


def test_versions_of_datasets_that_could_run_a_script_are_told_not_to(monkeypatch):
    def load_dataset_builder(path, trust_remote_code=True):
        raise ValueError(f"asked with {trust_remote_code}")

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    with pytest.raises(UserError, match="asked with False"):
        open_named_source("huggingface", Path("owner/name"))
