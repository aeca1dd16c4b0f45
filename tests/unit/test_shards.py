"""The on-disk format: what is written can be read by anyone, and what is damaged is refused by name."""

import functools
import importlib.util
import os
import resource
import tarfile
import threading

import numpy as np
import pytest
import webdataset
import xxhash

from mdit.config import UserError, parse_section
from mdit.data import prefetcher, shards
from mdit.data.manifest import SampleLayout, ShardError
from mdit.data.shards import open_dataset, read_samples
from mdit.data.writer import PartWriter, ShardWriter, finish_set, written_parts
from mdit.descriptions import Encoders
from mdit.files import checksum
from tests.latent_sets import edit_manifest, is_right, loader, made_up, write_set
from tests.processes import run_forked

LATENT, EMBEDDING = (3, 4, 4), (5, 6)
LAYOUT = SampleLayout(latent_shape=LATENT, embedding_shape=EMBEDDING)
ENCODERS = {
    "image": {"id": "pixels", "scale": 1.5},
    "text": {"id": "none", "max_tokens": 5, "channels": 1, "mean": [0.25], "std": [1.5]},
}


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


def members(directory, dataset):
    """Four readers of one set: for each, (embedding bytes, latent bytes, caption) of every sample in order."""
    tars = [directory / shard.file for shard in dataset.manifest.shards]
    layout = dataset.layout
    row = np.empty(layout.row_bytes, np.uint8)
    ours = []
    for i in range(dataset.samples):
        [place] = dataset.locate([i])
        text = dataset.read_row(place, row)
        embedding, latent = row[512:][: layout.embedding_bytes], row[layout.latent_at :][: layout.latent_bytes]
        ours.append((embedding.tobytes(), latent.tobytes(), text.encode()))
    plain = []
    for path in tars:
        with tarfile.open(path) as tar:
            files = [(member.name.split(".", 1)[1], tar.extractfile(member).read()) for member in tar]
        assert [kind for kind, _ in files[:3]] == ["emb.bin", "lat.bin", "txt"]
        plain += [tuple(content for _, content in files[i : i + 3]) for i in range(0, len(files), 3)]
    urls = [str(path) for path in tars]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [item["__key__"] for item in found] == [f"key-{i:03d}" for i in range(len(ours))]
    web = [(item["emb.bin"], item["lat.bin"], item["txt"]) for item in found]
    return {"ours": ours, "tarfile": plain, "webdataset": web} | dali_members(urls, dataset)


def dali_members(urls, dataset):
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return {}
    from nvidia.dali import fn, pipeline_def, types

    indexes = [str(dataset.directory / entry.file) for entry in dataset.manifest.dali_indexes]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def pipeline():
        kinds = {"ext": ["emb.bin", "lat.bin", "txt"], "dtypes": [types.UINT8] * 3}
        return tuple(
            fn.readers.webdataset(paths=urls, index_paths=indexes, missing_component_behavior="error", **kinds)
        )

    reader = pipeline()
    reader.build()
    return {"dali": [tuple(np.array(out[0]).tobytes() for out in reader.run()) for _ in range(dataset.samples)]}


@pytest.mark.parametrize("embeddings", ["f16", "i8b64"])
def test_four_readers_find_the_same_bytes(tmp_path, embeddings):
    with ShardWriter(tmp_path / "set", LATENT, (5, 64), ENCODERS, {}, 20_000, embeddings) as out:
        for i in range(23):
            latent, _, text = sample(i)
            out.write(f"key-{i:03d}", latent, np.random.default_rng(i).normal(size=(5, 64)), text)
    dataset = open_dataset(tmp_path / "set")
    found = members(tmp_path / "set", dataset)
    assert len(dataset.shard_sizes) > 1 and len(found["ours"]) == 23
    for reader, read in found.items():
        assert read == found["ours"], reader
    for i, (embedding, latent, text) in enumerate(found["ours"]):
        assert latent == sample(i)[0].astype("<f2").tobytes() and text.decode() == sample(i)[2]
        values = np.random.default_rng(i).normal(size=(5, 64)).astype("<f2")
        if embeddings == "f16":
            assert embedding == values.tobytes()
        else:
            blocks, scales = np.frombuffer(embedding[:320], np.int8), np.frombuffer(embedding[320:], "<f2")
            read = blocks.reshape(5, 64) * scales[:, None].astype(np.float64)
            assert np.abs(read - values).max() <= np.abs(values).max() / 127


def test_eight_bits_need_whole_blocks(tmp_path):
    with pytest.raises(UserError, match="blocks of 64 values, which do not fit 6 channels"):
        ShardWriter(tmp_path / "set", LATENT, EMBEDDING, ENCODERS, {}, embeddings="i8b64")


def test_the_same_samples_give_the_same_files(directory, tmp_path):
    with writer(tmp_path / "again") as out:
        for i in range(23):
            out.write(f"key-{i:03d}", *sample(i))
    names = sorted(os.listdir(directory))
    assert names == sorted(os.listdir(tmp_path / "again"))
    assert all((directory / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)


def test_many_shards_are_read_with_few_open_files(directory, monkeypatch):
    few = functools.lru_cache(2)(lambda owner, path: shards.OpenShard(path))
    monkeypatch.setattr(shards, "open_shards", lambda: few)
    before = len(os.listdir("/proc/self/fd"))
    dataset, again = open_dataset(directory), open_dataset(directory)
    for one in (dataset, again):
        _, _, texts = read_samples(one, [*range(23), *range(23)])
        assert texts == [sample(i)[2] for i in range(23)] * 2
    assert len(os.listdir("/proc/self/fd")) <= before + 2 + 2  # two shards and the indexes
    dataset.close()
    again.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def read_with_few_files(directories, soft, hard):
    """All batches of two epochs of several sets, while another thread reads one of them too; with no more files than
    `soft`, or half of `hard`, for shards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    prefetcher.SLOW = 0  # many threads
    validation, stop, failed = open_dataset(directories[0]), threading.Event(), []

    def read():
        try:
            while not stop.is_set():
                assert read_samples(validation, range(40))[2] == [made_up(i)[2] for i in range(40)]
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        # 120 shards in each batch: more than may be open at once.
        with loader(directories, batch=120) as batches:
            assert all(is_right(next(batches)) for _ in range(4))
        most = shards.open_shards().cache_parameters()["maxsize"]
        assert most == hard // 2 and len(os.listdir("/proc/self/fd")) <= hard
    finally:
        stop.set()
        thread.join()
    assert not failed, failed


@pytest.mark.parametrize("soft, hard", [(64, 64), (64, 120)])
def test_one_budget_of_open_files_for_all_sets_of_a_process(tmp_path, soft, hard):
    """Each sample is a shard of its own, so all sets together have twice as many as the process may open files."""
    directories = [write_set(tmp_path / str(n), 40, first=40 * n, shard_bytes=1) for n in range(3)]
    ended = run_forked(read_with_few_files, directories, soft, hard)
    assert ended.returncode == 0, ended.output


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
    path = directory / "shard_00000_001.tar"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(
        ShardError, match=rf"shard_00000_001.tar: has {size - 100} bytes, but manifest.json says {size}"
    ):
        open_dataset(directory)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_caption_that_is_not_utf8(directory):
    dataset = open_dataset(directory)
    path, [place] = directory / "shard_00000_000.tar", dataset.locate([0])
    content = bytearray(path.read_bytes())
    content[dataset.layout.row_bytes] = 0xFF
    path.write_bytes(content)
    end = dataset.layout.row_bytes + place.text_bytes
    index = np.load(directory / "index.npy")
    index[0]["xxh3"] = xxhash.xxh3_64_intdigest(bytes(content[:end]))  # a writer that is not ours
    np.save(directory / "index.npy", index)
    edit_manifest(directory, lambda m: m["index"].update(xxh3=checksum(directory / "index.npy")))
    dataset = open_dataset(directory)
    with pytest.raises(ShardError, match="shard_00000_000.tar: sample 0 of the set is damaged: the caption"):
        read_samples(dataset, [0])


def test_a_shard_replaced_while_it_is_open(directory, monkeypatch):
    monkeypatch.setattr(shards, "SECONDS_BETWEEN_CHECKS", 0)
    dataset, path = open_dataset(directory), directory / "shard_00000_000.tar"
    read_samples(dataset, [0])
    content = path.read_bytes()
    path.rename(directory / "before.tar")
    path.write_bytes(content[::-1])
    with pytest.raises(ShardError, match="shard_00000_000.tar: the shard was replaced"):
        read_samples(dataset, [0])
    path.unlink()
    with pytest.raises(ShardError, match="shard_00000_000.tar: the shard has gone"):
        read_samples(dataset, [0])


def test_verify_finds_damage_in_every_kind_of_file(directory):
    open_dataset(directory).verify()
    first = directory / "shard_00000_001.tar"
    flip(first, 600)
    with pytest.raises(ShardError, match=r"shard_00000_001.tar: sample \d+ of the set is damaged"):
        open_dataset(directory).verify()
    flip(first, 600)
    flip(first, first.stat().st_size - 1)  # the tar's trailer, which belongs to no sample
    with pytest.raises(ShardError, match="shard_00000_001.tar: xxh3 is .* but manifest.json says"):
        open_dataset(directory).verify()
    flip(first, first.stat().st_size - 1)
    flip(directory / "shard_00000_001.idx", 9)
    with pytest.raises(ShardError, match="shard_00000_001.idx: xxh3 is .* but manifest.json says"):
        open_dataset(directory).verify()


def write_part(directory, part, **options):
    """Samples 10 * part to 10 * part + 9; part 2 has none."""
    with PartWriter(directory, part, LAYOUT, **options) as out:
        for i in range(10 * part, 10 * part + 10 if part != 2 else 0):
            out.write(f"{part}-{i:03d}", *sample(i))
        out.report.seen = part


def finish(directory, parts=4):
    return finish_set(directory, parts, LAYOUT, parse_section(Encoders, ENCODERS, "test"), {"objects": 3})


def test_parts_join_to_a_set_whatever_their_order_and_interruptions(tmp_path):
    for name, parts in {"a": (0, 1, 2, 3), "b": (3, 1, 0, 2)}.items():
        folder = tmp_path / name
        folder.mkdir()
        if name == "b":
            with (
                pytest.raises(KeyboardInterrupt),
                PartWriter(folder, 1, LAYOUT, 2000) as out,
            ):
                for i in range(5):
                    out.write(f"{i}", *sample(i + 50))
                raise KeyboardInterrupt
            assert list(folder.glob("shard_00001_*")) and not written_parts(folder)
        for part in parts:
            write_part(folder, part, shard_bytes=20_000)
        assert {part: report.seen for part, report in written_parts(folder).items()} == {
            part: part for part in range(4)
        }
        finish(folder)
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    dataset = open_dataset(tmp_path / "a")
    dataset.verify()
    wanted = [*range(20), *range(30, 40)]
    assert read_samples(dataset, range(30))[2] == [sample(i)[2] for i in wanted]


def test_finishing_again_changes_nothing(tmp_path):
    for part in range(4):
        write_part(tmp_path, part)
    record = (tmp_path / "part_00003.json").read_bytes()
    manifest = finish(tmp_path)
    (tmp_path / "part_00003.json").write_bytes(record)  # killed before the last record was removed
    assert finish(tmp_path) == manifest and not list(tmp_path.glob("part_*"))


def test_a_complete_part_is_not_written_again(tmp_path):
    write_part(tmp_path, 0)
    with pytest.raises(ValueError, match="part 0 is complete"):
        write_part(tmp_path, 0)


def test_a_set_without_samples(tmp_path):
    write_part(tmp_path, 2)
    with pytest.raises(UserError, match="not a single sample"):
        finish(tmp_path, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(format="mdit-latents/9"), "format is 'mdit-latents/9', expected 'mdit-latents/1'"),
        (lambda m: m.update(colour="blue"), "unknown key colour"),
        (lambda m: m.pop("shards"), "missing key shards"),
        (lambda m: m["members"]["lat"].update(dtype="f32"), "members.lat.dtype = 'f32'"),
        (lambda m: m.update(samples=24), "samples is 24, but there are 23 rows in the index"),
        (lambda m: m["shards"][0].update(samples=1), "samples is 23, but there are .* samples in its shards"),
        (lambda m: m["shards"][0].update(samples=0), "shards.0.samples = 0"),
        (lambda m: m["encoders"]["text"].update(max_tokens="5"), "encoders.text.max_tokens = '5'"),
        (lambda m: m["encoders"].pop("image"), "missing key encoders.image"),
        (lambda m: m["dali_indexes"].pop(), "shards, but"),
    ],
)
def test_foreign_manifest(directory, change, message):
    edit_manifest(directory, change)
    with pytest.raises(ShardError, match=message) as caught:
        open_dataset(directory)
    assert "manifest.json" in str(caught.value)


NESTED = ['{"a":' * depth + "1" + "}" * depth for depth in (100, 90_000)]


@pytest.mark.parametrize("text", ["{", '{"format": "mdit-latents/1", "format": "mdit-latents/1"}', *NESTED])
def test_manifest_that_is_no_json(directory, text):
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ShardError, match="manifest.json: not valid JSON"):
        open_dataset(directory)


@pytest.mark.parametrize("array", [np.array([{"a": 1}], dtype=object), np.zeros(23)], ids=["a pickle", "numbers"])
def test_an_index_of_another_kind_is_never_loaded(directory, array):
    path = directory / "index.npy"
    np.save(path, array, allow_pickle=True)
    entry = {"bytes": path.stat().st_size, "xxh3": checksum(path)}
    edit_manifest(directory, lambda m: m["index"].update(entry))
    with pytest.raises(ShardError, match="index.npy: (has rows of|not a numpy file)"):
        open_dataset(directory)


def test_empty_folder(tmp_path):
    with pytest.raises(ShardError, match="manifest.json: cannot read the manifest.*docs/data.md"):
        open_dataset(tmp_path)
