"""MDS shards as the paper's code writes them: pictures, latents, whole and damaged. The writer here is our own."""

import bz2
import gzip
import json
import struct

import numpy as np
import pytest

from mdit.config import UserError
from mdit.sources import Rejected, open_named_source
from mdit.sources.mds import Latents, holds_latents, open_latents
from tests.unit.test_sources import encoded, read

FIXED = {"int32": 4, "int": 8, "float32": 4}
PICTURES = {"width": "int32", "height": "int32", "jpg": "jpeg", "caption": "str"}
LATENTS = {"caption": "str", "caption_latents": "bytes", "latents_256": "bytes", "latents_512": "bytes"}
PACK = {"gz": gzip.compress, "bz2": bz2.compress}


def write_mds(folder, columns, shards, compression=None, keep_raw=False):
    """Shards of samples (name -> bytes), in the words of MosaicML's documentation: columns sorted by name; a sample is
    the sizes of its columns that have no fixed one, then their data; a shard counts samples and says where each is."""
    folder.mkdir(parents=True, exist_ok=True)
    names, entries = sorted(columns), []
    sizes = [FIXED.get(columns[name]) for name in names]
    described = {"column_names": names, "column_encodings": [columns[n] for n in names], "column_sizes": sizes}
    header = {**described, "compression": compression, "format": "mds", "hashes": [], "size_limit": 2**28, "version": 2}
    text = json.dumps(header, sort_keys=True).encode()
    for number, samples in enumerate(shards):
        bodies = []
        for sample in samples:
            head = b"".join(struct.pack("<I", len(sample[n])) for n, size in zip(names, sizes) if size is None)
            bodies.append(head + b"".join(sample[n] for n in names))
        at = 4 + 4 * (len(samples) + 1) + len(text)
        offsets = [at + sum(map(len, bodies[:i])) for i in range(len(samples) + 1)]
        data = struct.pack(f"<I{len(offsets)}I", len(samples), *offsets) + text + b"".join(bodies)
        raw = {"basename": f"shard.{number:05d}.mds", "bytes": len(data), "hashes": {}}
        packed = None
        if compression is not None:
            suffix = compression.split(":")[0]
            zipped = (PACK.get(suffix) or __import__("zstandard").ZstdCompressor(7).compress)(data)
            packed = {"basename": f"{raw['basename']}.{suffix}", "bytes": len(zipped), "hashes": {}}
            (folder / packed["basename"]).write_bytes(zipped)
        if compression is None or keep_raw:
            (folder / raw["basename"]).write_bytes(data)
        entries.append({**header, "raw_data": raw, "zip_data": packed, "samples": len(samples)})
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": entries}))
    return folder


def picture(number, caption=None):
    size = struct.pack("<i", 12), struct.pack("<i", 8)
    caption = f"caption {number} é" if caption is None else caption
    return {"width": size[0], "height": size[1], "jpg": encoded(number), "caption": caption.encode()}


def latents(number, caption="a caption"):
    rng = np.random.default_rng(number)
    values = {"caption_latents": (77, 1024), "latents_256": (4, 32, 32), "latents_512": (4, 64, 64)}
    return {"caption": caption.encode()} | {
        name: rng.standard_normal(shape).astype("<f2").tobytes() for name, shape in values.items()
    }


def merge(root):
    """What merge_index of MosaicML Streaming makes of the index.json of each process."""
    shards = []
    for index in sorted(root.glob("*/index.json")):
        for shard in json.loads(index.read_text())["shards"]:
            for which in ("raw_data", "zip_data"):
                if shard[which]:
                    shard[which]["basename"] = f"{index.parent.name}/{shard[which]['basename']}"
            shards.append(shard)
    (root / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))


# --- pictures


@pytest.mark.parametrize("compression", [None, "gz:9", "bz2", "zstd:7"])
def test_pictures(tmp_path, compression):
    if compression == "zstd:7":
        pytest.importorskip("zstandard")
    write_mds(tmp_path, PICTURES, [[picture(0), picture(1)], [picture(2)], []], compression)
    source = open_named_source("mds", tmp_path)
    pictures, rejected = read(source)
    suffix = f".{compression.split(':')[0]}" if compression else ""
    assert [part.name for part in source.parts] == [f"shard.{i:05d}.mds{suffix}" for i in range(3)]
    assert source.pictures == 3 and not rejected
    assert [(picture.caption, picture.image) for picture in pictures.values()] == [
        (f"caption {i} é", encoded(i)) for i in range(3)
    ]
    assert [*pictures][2] == f"shard.00001.mds{suffix}/0"


def test_shards_that_were_unpacked_need_no_package(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    write_mds(tmp_path, PICTURES, [[picture(0)]], "zstd", keep_raw=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [*read(open_named_source("mds", tmp_path))[0]] == ["shard.00000.mds/0"]
    (tmp_path / "shard.00000.mds").unlink()
    with pytest.raises(UserError, match="shard.00000.mds.zstd: needs the package zstandard: pip install zstandard"):
        open_named_source("mds", tmp_path)


@pytest.mark.parametrize("merged", [False, True])
def test_shards_of_several_processes(tmp_path, merged):
    for process in range(2):
        shards = [[picture(10 * process)], [picture(10 * process + 1)]]
        write_mds(tmp_path / str(process), PICTURES, shards)
    if merged:
        merge(tmp_path)
    source = open_named_source("mds", tmp_path)
    assert [picture.caption for picture in read(source)[0].values()] == [f"caption {i} é" for i in (0, 1, 10, 11)]
    assert [part.name for part in source.parts][1:3] == ["0/shard.00001.mds", "1/shard.00000.mds"]


def test_columns_of_other_names_and_captions_that_are_wrong(tmp_path):
    columns = {"caption_syn_pixart_llava15": "json", "other": "str", "image": "bytes", "n": "int"}
    captions = [b'"as json"', b'["first", "second"]', b"no json", b'""', b"5"]
    sample = {"image": encoded(0), "n": struct.pack("<q", 1), "other": b"another"}
    write_mds(tmp_path, columns, [[{**sample, "caption_syn_pixart_llava15": caption} for caption in captions]])
    pictures, rejected = read(open_named_source("mds", tmp_path))
    assert [picture.caption for picture in pictures.values()] == ["as json", "first"]
    shard = "shard.00000.mds"
    assert rejected == {f"{shard}/2": "unreadable caption", f"{shard}/3": "no caption", f"{shard}/4": "no caption"}
    pictures, _ = read(open_named_source("mds", tmp_path, caption_key="other"))
    assert [picture.caption for picture in pictures.values()] == ["another"] * 5


def test_a_shard_cut_off_anywhere_gives_what_comes_before_and_says_so(tmp_path):
    path = write_mds(tmp_path, PICTURES, [[picture(i) for i in range(4)]]) / "shard.00000.mds"
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        pictures, rejected = read(open_named_source("mds", tmp_path))
        assert [picture.image for picture in pictures.values()] == [encoded(i) for i in range(len(pictures))]
        assert len(pictures) < 4 and rejected == {"shard.00000.mds": "damaged archive"}


@pytest.mark.parametrize("compression", ["gz", "bz2", "zstd"])
def test_a_damaged_shard_that_is_compressed(tmp_path, compression):
    if compression == "zstd":
        pytest.importorskip("zstandard")
    path = (
        write_mds(tmp_path, PICTURES, [[picture(i) for i in range(9)]], compression) / f"shard.00000.mds.{compression}"
    )
    whole = path.read_bytes()
    middle = len(whole) // 2
    damages = [whole[:middle], b"\xff" * 40 + whole[40:], b"<html>", b""]
    if compression != "zstd":  # which has a checksum only where it is asked for one
        damages += [
            whole[: middle + i] + b"\xff" * 4 + whole[middle + i + 4 :] for i in range(0, middle - 4, middle // 9)
        ]
    for damaged in damages:
        path.write_bytes(damaged)
        _, rejected = read(open_named_source("mds", tmp_path))
        assert rejected == {path.name: "damaged archive"}


@pytest.mark.parametrize("where, value", [(0, 9), (4, 2**31), (8, 20), (12, 2**31)])
def test_a_shard_whose_numbers_are_wrong(tmp_path, where, value):
    path = write_mds(tmp_path, PICTURES, [[picture(i) for i in range(4)]]) / "shard.00000.mds"
    data = bytearray(path.read_bytes())
    data[where : where + 4] = struct.pack("<I", value)
    path.write_bytes(data)
    _, rejected = read(open_named_source("mds", tmp_path))
    assert rejected == {"shard.00000.mds": "damaged archive"}


def test_a_copy_of_some_shards(tmp_path, caplog):
    write_mds(tmp_path, PICTURES, [[picture(0)], [picture(1)], [picture(2)]])
    (tmp_path / "shard.00001.mds").unlink()
    source = open_named_source("mds", tmp_path)
    assert source.pictures == 2 and len(read(source)[0]) == 2
    assert "1 of 3 shards are not there" in caplog.text
    for path in tmp_path.glob("*.mds"):
        path.unlink()
    with pytest.raises(UserError, match="found no shard that index.json lists"):
        open_named_source("mds", tmp_path)


@pytest.mark.parametrize(
    "columns, arguments, message",
    [
        ({"jpg": "pil", "caption": "str"}, {}, r"no column jpg or .*its columns are caption \(str\), jpg \(pil\)"),
        ({"jpg": "jpeg", "text_": "str"}, {}, r"has no column caption or .*; its columns are jpg \(jpeg\), text_"),
        ({"jpg": "jpeg", "caption": "str"}, {"caption_key": "x"}, r"has no column x \(str or json\)"),
        (LATENTS, {}, "has no column jpg"),
    ],
)
def test_columns_that_are_missing(tmp_path, columns, arguments, message):
    write_mds(tmp_path, columns, [[]])
    with pytest.raises(UserError, match=f"shard.00000.mds: .*{message}"):
        open_named_source("mds", tmp_path, **arguments)


@pytest.mark.parametrize(
    "index, message",
    [
        ("{nonsense", "index.json: not valid JSON"),
        ("[]", "index.json: is not the index of shards in the format mds, version 2"),
        ('{"version": 2, "shards": [{"format": "json", "version": 2}]}', "is not the index of shards"),
        ('{"version": 2, "shards": [{"format": "mds", "version": 2}]}', "is not the index of shards"),
    ],
)
def test_an_index_that_is_none(tmp_path, index, message):
    (tmp_path / "index.json").write_text(index)
    for ask in (lambda: open_named_source("mds", tmp_path), lambda: holds_latents(tmp_path)):
        with pytest.raises(UserError, match=message):
            ask()


def test_a_compression_that_is_not_read(tmp_path):
    write_mds(tmp_path, PICTURES, [[picture(0)]], "gz")
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace('"gz"', '"br"').replace(".mds.gz", ".mds.br"))
    (tmp_path / "shard.00000.mds.gz").rename(tmp_path / "shard.00000.mds.br")
    with pytest.raises(UserError, match="shard.00000.mds.br: br is not read"):
        open_named_source("mds", tmp_path)


# --- latents


@pytest.mark.parametrize("image_size", [256, 512])
def test_latents_of_the_papers_code(tmp_path, image_size):
    samples = [[latents(0, " é "), latents(1)], [latents(2, "")]]
    for process, shards in enumerate((samples[:1], samples[1:])):
        write_mds(tmp_path / str(process), LATENTS, shards)
    merge(tmp_path)
    assert holds_latents(tmp_path)
    parts = open_latents(tmp_path, image_size)
    assert [(part.name, part.samples) for part in parts] == [("0/shard.00000.mds", 2), ("1/shard.00000.mds", 1)]
    side = image_size // 8
    found = [sample for part in parts for sample in part]
    assert [sample.origin for sample in found] == ["0/shard.00000.mds/0", "0/shard.00000.mds/1", "1/shard.00000.mds/0"]
    assert found.pop().reason == "no caption" and [sample.caption for sample in found] == ["é", "a caption"]
    for number, sample in enumerate(found):
        written = latents(number)
        assert isinstance(sample, Latents) and sample.latent.dtype == sample.embedding.dtype == np.float16
        assert sample.latent.shape == parts[0].latent_shape == (4, side, side)
        assert sample.embedding.shape == (77, 1024)
        assert sample.latent.tobytes() == written[f"latents_{image_size}"]
        assert sample.embedding.tobytes() == written["caption_latents"]
    again = [sample for part in parts for sample in part]
    assert all(np.array_equal(a.latent, b.latent) for a, b in zip(found, again))


def test_pictures_are_no_latents(tmp_path):
    assert not holds_latents(tmp_path / "nowhere")
    write_mds(tmp_path, PICTURES, [[picture(0)]])
    assert not holds_latents(tmp_path)
    with pytest.raises(
        UserError, match=r"has no column latents_256 \(bytes\); its columns are caption \(str\), height"
    ):
        open_latents(tmp_path, 256)


def test_damaged_latents_are_told(tmp_path):
    torn = {**latents(1), "latents_256": b"\0" * 100}
    folder = write_mds(
        tmp_path, LATENTS, [[latents(5)], [latents(0), torn, {**latents(2), "caption": b"\xff"}, latents(3)]]
    )
    for name in ("shard.00000.mds", "shard.00001.mds"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    first, second = open_latents(tmp_path, 256)
    assert list(first) == [Rejected("shard.00000.mds", "damaged archive")]
    kept, *rejected = second
    assert kept.latent.tobytes() == latents(0)["latents_256"]
    assert [(item.origin, item.reason) for item in rejected] == [
        ("shard.00001.mds/1", "unreadable latents"),
        ("shard.00001.mds/2", "unreadable latents"),
        ("shard.00001.mds", "damaged archive"),
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"caption_latents": b"\0" * 120 * 4096 * 2}, "caption_latents has 983040 bytes, expected 157696: 77 x 1024"),
        ({"latents_256": b"\0" * 100}, "latents_256 has 100 bytes, expected 4 x 32 x 32 in fp16"),
    ],
)
def test_latents_of_another_shape(tmp_path, change, message):
    write_mds(tmp_path, LATENTS, [[{**latents(0), **change}]])
    with pytest.raises(UserError, match=f"shard.00000.mds: {message}"):
        open_latents(tmp_path, 256)


def test_latents_without_a_sample_that_can_be_read(tmp_path):
    write_mds(tmp_path, LATENTS, [[], []])
    with pytest.raises(UserError, match="none of the 2 shards has a sample that can be read"):
        open_latents(tmp_path, 256)
