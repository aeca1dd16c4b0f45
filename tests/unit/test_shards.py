"""The on-disk format: what is written can be read by anyone, and what is damaged is refused by name."""

import json
import os
import tarfile

import numpy as np
import pytest
import webdataset

from mdit.config import UserError
from mdit.data import shards
from mdit.data.shards import ShardError, ShardWriter, open_dataset, read_samples

LATENT, EMBEDDING = (3, 4, 4), (5, 6)
ENCODERS = {"image": {"id": "pixels", "scale": 1.5}, "text": {"id": "none", "mean": [0.25]}}


def sample(i):
    rng = np.random.default_rng(i)
    latent, embedding = rng.normal(size=LATENT).astype(np.float16), rng.normal(size=EMBEDDING).astype(np.float16)
    return latent, embedding, f"caption {i} " + "é" * (i % 7)


def writer(directory, **changes):
    options = {"encoders": ENCODERS, "fingerprint": {"objects": 3}, "shard_bytes": 20_000} | changes
    return ShardWriter(directory, LATENT, EMBEDDING, **options)


@pytest.fixture
def directory(tmp_path):
    """23 samples in several shards."""
    with writer(tmp_path / "set") as out:
        for i in range(23):
            out.write(f"key-{i:03d}", *sample(i))
    return tmp_path / "set"


def edit_manifest(directory, change):
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_samples_come_back_as_they_were_written(directory):
    dataset = open_dataset(directory)
    assert dataset.samples == 23 and len(dataset.shard_sizes) > 2 and sum(dataset.shard_sizes) == 23
    assert (dataset.latent_shape, dataset.embedding_shape) == (LATENT, EMBEDDING)
    assert dataset.encoders == ENCODERS and dataset.fingerprint == {"objects": 3}
    ids = [22, 0, 7, 7]
    latents, captions, texts = read_samples(dataset, ids)
    for row, i in enumerate(ids):
        latent, embedding, text = sample(i)
        assert np.array_equal(latents[row].numpy(), latent)
        assert np.array_equal(captions[row].numpy(), embedding)
        assert texts[row] == text


def test_plain_tarfile_finds_the_bytes_where_the_index_says(directory):
    dataset, i = open_dataset(directory), 0
    for shard in dataset.manifest.shards:
        with tarfile.open(directory / shard.file) as tar:
            members = tar.getmembers()
            for emb, lat, txt in zip(members[0::3], members[1::3], members[2::3]):
                names = [f"key-{i:03d}.{kind}" for kind in ("emb.bin", "lat.bin", "txt")]
                assert [emb.name, lat.name, txt.name] == names
                row = dataset.index[i]
                assert (emb.offset_data, lat.offset_data) == (row["embedding"], row["latent"])
                assert (txt.offset_data, txt.size) == (row["text"], row["text_bytes"])
                latent, embedding, text = sample(i)
                assert tar.extractfile(lat).read() == latent.astype("<f2").tobytes()
                assert tar.extractfile(emb).read() == embedding.astype("<f2").tobytes()
                assert tar.extractfile(txt).read().decode() == text
                i += 1
    assert i == 23


def test_webdataset_reads_the_same_bytes(directory):
    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(found) == 23
    for i, item in enumerate(found):
        latent, embedding, text = sample(i)
        assert item["__key__"] == f"key-{i:03d}" and item["txt"].decode() == text
        assert item["lat.bin"] == latent.tobytes() and item["emb.bin"] == embedding.tobytes()


def test_the_same_samples_give_the_same_files(directory, tmp_path):
    with writer(tmp_path / "again") as out:
        for i in range(23):
            out.write(f"key-{i:03d}", *sample(i))
    names = sorted(os.listdir(directory))
    assert names == sorted(os.listdir(tmp_path / "again"))
    assert all((directory / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_many_shards_are_read_with_few_open_files(directory, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    before = len(os.listdir("/proc/self/fd"))
    dataset = open_dataset(directory)
    _, _, texts = read_samples(dataset, [*range(23), *range(23)])
    assert texts == [sample(i)[2] for i in range(23)] * 2
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 1  # two shards and the index's map
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_an_exception_leaves_no_manifest_and_the_set_cannot_be_opened(tmp_path):
    with pytest.raises(KeyboardInterrupt), writer(tmp_path / "set") as out:
        for i in range(15):
            out.write(f"{i}", *sample(i))
        raise KeyboardInterrupt
    assert list((tmp_path / "set").glob("shard_*.tar"))  # finished shards stay, under their names
    with pytest.raises(ShardError, match="manifest.json: cannot read"):
        open_dataset(tmp_path / "set")


def test_shards_are_never_rewritten(directory):
    with pytest.raises(UserError, match="not empty"):
        writer(directory)


def test_values_beyond_fp16_are_refused(tmp_path):
    latent, embedding, text = sample(0)
    with pytest.raises(UserError, match="sample big: latents not finite"), writer(tmp_path / "set") as out:
        out.write("big", latent.astype(np.float32) + 1e6, embedding, text)
    with pytest.raises(UserError, match="sample nan: caption embedding not finite"), writer(tmp_path / "other") as out:
        out.write("nan", latent, embedding * np.nan, text)


def test_wrong_shapes_and_keys_are_refused(tmp_path):
    latent, embedding, text = sample(0)
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4\)"), writer(tmp_path / "a") as out:
        out.write("x", latent[0], embedding, text)
    with pytest.raises(ValueError, match="dot"), writer(tmp_path / "b") as out:
        out.write("a.png", latent, embedding, text)


def test_truncated_shard(directory):
    path = directory / "shard_00001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(ShardError, match=rf"shard_00001.tar: has {size - 100} bytes, but manifest.json says {size}"):
        open_dataset(directory)


def test_a_shard_cut_after_opening_names_file_and_sample(directory):
    dataset = open_dataset(directory)
    os.truncate(directory / "shard_00000.tar", 3000)
    with pytest.raises(ShardError, match="shard_00000.tar: sample 2 of the set is damaged: .* bytes are there"):
        read_samples(dataset, [2])


def test_missing_shard(directory):
    (directory / "shard_00002.tar").unlink()
    with pytest.raises(ShardError, match="shard_00002.tar: is missing, but manifest.json lists it"):
        open_dataset(directory)


def test_a_shard_that_goes_missing_later(directory):
    dataset = open_dataset(directory)
    (directory / "shard_00000.tar").unlink()
    with pytest.raises(ShardError, match="shard_00000.tar: cannot open"):
        read_samples(dataset, [0])


def test_caption_that_is_not_utf8(directory):
    dataset = open_dataset(directory)
    with open(directory / "shard_00000.tar", "r+b") as file:
        file.seek(int(dataset.index[1]["text"]))
        file.write(b"\xff")
    with pytest.raises(ShardError, match="shard_00000.tar: sample 1 of the set is damaged: the caption"):
        read_samples(dataset, [1])


def test_verify_finds_a_flipped_bit(directory):
    dataset = open_dataset(directory)
    dataset.verify()
    with open(directory / "shard_00001.tar", "r+b") as file:
        file.seek(600)
        byte = file.read(1)[0]
        file.seek(600)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ShardError, match="shard_00001.tar: xxh3 is .* but manifest.json says"):
        open_dataset(directory).verify()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format="mdit-latents/9"), "format is 'mdit-latents/9', expected 'mdit-latents/1'"),
        (lambda m: m.update(colour="blue"), "unknown key colour"),
        (lambda m: m.pop("shards"), "missing key shards"),
        (lambda m: m["members"]["lat"].update(dtype="<f4"), "members.lat.dtype = '<f4'"),
        (lambda m: m.update(samples=24), "samples is 24, but there are 23 rows in the index"),
        (lambda m: m["shards"][0].update(samples=1), "samples is 23, but there are .* samples in its shards"),
    ],
)
def test_foreign_manifest(directory, change, message):
    edit_manifest(directory, change)
    with pytest.raises(ShardError, match=message) as caught:
        open_dataset(directory)
    assert "manifest.json" in str(caught.value)


def test_manifest_that_is_no_json(directory):
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ShardError, match="manifest.json: not valid JSON"):
        open_dataset(directory)


def test_index_that_is_a_pickle_is_never_loaded(directory):
    path = directory / "index.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    edit_manifest(directory, lambda m: m["index"].update(bytes=path.stat().st_size))
    with pytest.raises(ShardError, match="index.npy"):
        open_dataset(directory)


def test_index_of_another_kind(directory):
    path = directory / "index.npy"
    np.save(path, np.zeros(23))
    edit_manifest(directory, lambda m: m["index"].update(bytes=path.stat().st_size))
    with pytest.raises(ShardError, match="index.npy: has rows of"):
        open_dataset(directory)


def test_empty_folder(tmp_path):
    with pytest.raises(ShardError, match="manifest.json: cannot read the manifest.*docs/data.md"):
        open_dataset(tmp_path)
