"""Sets that come in tars, zips and directories: their real layouts, parts of them, and what happens to damaged ones."""

import json
import shutil
import tarfile
import tracemalloc
import zipfile

import pytest

from mdit.config import UserError
from mdit.sources import Rejected, open_named_source
from mdit.sources.archives import ArchiveMember, is_picture, read_members
from tests.unit.test_sources import encoded, read, write_files, write_tar, write_zip

# --- archives


FILES = {f"./{i:03d}.{'txt' if i % 3 else 'jpg'}": encoded(i) * (i % 4) for i in range(9)}


def members(path, wanted=lambda name: True):
    """-> name -> data of what can be read, and the rejected."""
    items = list(read_members(path, "origin", wanted))
    assert items == list(read_members(path, "origin", wanted))
    found = {item.name: item.data for item in items if isinstance(item, ArchiveMember)}
    return found, [item for item in items if isinstance(item, Rejected)]


def pack(folder, kind):
    if kind == "zip":
        return write_zip(folder / "a.zip", {name.removeprefix("./"): data for name, data in FILES.items()})
    if kind == "directory":
        return write_files(folder / "a", FILES)
    return write_tar(folder / f"a.{kind}", FILES, {"tar": "w", "tgz": "w:gz"}[kind])


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip", "directory"])
def test_every_kind_gives_the_wanted_files(tmp_path, kind):
    path = pack(tmp_path, kind)
    assert members(path) == ({name.removeprefix("./"): data for name, data in FILES.items()}, [])
    assert [*members(path, is_picture)[0]] == ["000.jpg", "003.jpg", "006.jpg"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_directories_in_a_tar_are_passed_over_and_links_are_told(tmp_path, format):
    """Directories, links, names too long for a plain header; as GNU tar and Python write them."""
    folder = write_files(tmp_path / "in", {"d/a.jpg": b"1", "d/b.jpg": b"2"})
    (folder / "d" / "link.jpg").symlink_to("a.jpg")
    with tarfile.open(tmp_path / "a.tar", "w", format=format) as archive:
        archive.add(folder, ".")
        if format != tarfile.USTAR_FORMAT:
            archive.add(folder / "d/a.jpg", f"{'x' * 150}.jpg")
    found, rejected = members(tmp_path / "a.tar", is_picture)
    assert rejected == [Rejected("origin/d/link.jpg", "link")] and found.pop(f"{'x' * 150}.jpg", b"1") == b"1"
    assert found == {"d/a.jpg": b"1", "d/b.jpg": b"2"}


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_tar_cut_off_anywhere_gives_what_comes_before_and_says_so(tmp_path, kind):
    whole = pack(tmp_path, kind).read_bytes()
    content = len(whole)
    if kind == "tar":  # the end mark comes behind the content
        content = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    lengths = {
        *range(0, len(whole), 211),
        *range(0, content, 512),
        *([content, content + 512] if kind == "tar" else []),
    }
    expected = [(name.removeprefix("./"), data) for name, data in FILES.items()]
    path = tmp_path / f"cut.{kind}"
    for length in lengths:
        path.write_bytes(whole[:length])
        found, rejected = members(path)
        assert list(found.items()) == expected[: len(found)]
        assert rejected == ([] if length >= content + 512 else [Rejected("origin", "damaged archive")]), length
        if length >= content:
            assert len(found) == len(FILES)


@pytest.mark.parametrize("with_what", [b"\xff", b"\0", b"7"], ids=["ones", "zeros", "digits"])
def test_a_tar_whose_header_is_overwritten(tmp_path, with_what):
    path = pack(tmp_path, "tar")
    data = bytearray(path.read_bytes())
    start = data.index(b"./004.txt")
    data[start : start + 300] = with_what * 300
    path.write_bytes(data)
    found, rejected = members(path)
    assert [*found] == ["000.jpg", "001.txt", "002.txt", "003.jpg"]
    assert rejected == [Rejected("origin", "damaged archive")]


def test_a_tar_that_is_zeros_from_somewhere_on(tmp_path):
    """As a download leaves it that makes the whole file first and is then cut off."""
    files = {f"{i}.jpg": b"x" * 9000 for i in range(9)}
    path = write_tar(tmp_path / "a.tar", files)
    data = path.read_bytes()
    start = data.index(b"5.jpg")
    path.write_bytes(data[:start] + b"\0" * (len(data) - start))
    found, rejected = members(path)
    assert [*found] == [*files][:5] and rejected == [Rejected("origin", "damaged archive")]


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 99], ids=["empty", "html"])
def test_what_is_no_archive_at_all(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert members(tmp_path / name) == ({}, [Rejected("origin", "damaged archive")])


def test_a_zip_loses_only_the_file_that_is_hurt_but_all_without_its_directory(tmp_path):
    path = pack(tmp_path, "zip")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        hurt = archive.getinfo("003.jpg").header_offset + 60
    path.write_bytes(whole[:hurt] + b"\0\0\0\0" + whole[hurt + 4 :])
    found, rejected = members(path)
    assert [*found] == [name.removeprefix("./") for name in FILES if "003" not in name]
    assert rejected == [Rejected("origin/003.jpg", "unreadable picture")]
    path.write_bytes(whole[:-100])
    assert members(path) == ({}, [Rejected("origin", "damaged archive")])


def test_a_tar_of_many_members_is_read_in_little_memory(tmp_path):
    """tarfile alone would keep each of 2,000 headers, some 2 MB."""
    path = write_tar(tmp_path / "a.tar", {f"{i:06d}.jpg": b"" for i in range(2_000)})
    tracemalloc.start()
    count = sum(1 for _ in read_members(path, "", is_picture))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2_000 and peak < 2**19


# --- SA-1B


def write_sa1b(root, tars=(0, 1)):
    """Three pictures a tar in Meta's layout, and PixArt's recaptions of all but the last."""
    for tar in tars:
        numbers = range(10 * tar, 10 * tar + 3)
        files = {
            f"./sa_{n}.{suffix}": encoded(n) if suffix == "jpg" else b"{}"
            for n in numbers
            for suffix in ("jpg", "json")
        }
        write_tar(root / f"images/sa_{tar:06d}.tar", files)
        write_files(root / "captions", {f"sa_{n}.txt": f"The image shows {n}.\n".encode() for n in numbers[:2]})
    return root


def test_sa1b(tmp_path):
    root = write_sa1b(tmp_path)
    source = open_named_source("sa1b", root)
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == ["images/sa_000000.tar", "images/sa_000001.tar"]
    assert source.pictures is None
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        f"images/sa_{n // 10:06d}.tar/sa_{n}.jpg": (f"The image shows {n}.", encoded(n)) for n in (0, 1, 10, 11)
    }
    assert rejected == {f"images/sa_{n // 10:06d}.tar/sa_{n}.jpg": "no caption" for n in (2, 12)}


@pytest.mark.parametrize("below", ["all", "sa_{:06d}"], ids=["one_directory", "one_for_each_tar"])
def test_sa1b_captions_may_lie_one_directory_deeper(tmp_path, below):
    root = write_sa1b(tmp_path)
    expected = read(open_named_source("sa1b", root))
    for path in list((root / "captions").iterdir()):
        folder = root / "captions" / below.format(int(path.stem.removeprefix("sa_")) // 10)
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    assert read(open_named_source("sa1b", root)) == expected


def test_sa1b_unpacked_or_partly_so(tmp_path):
    root = write_sa1b(tmp_path)
    write_files(root / "raw/sa_000001", {f"sa_{n}.jpg": encoded(n) for n in (10, 11)})  # taken instead of the tar
    write_files(root / "raw/more/sa_000002", {"sa_20.jpg": encoded(20), "readme.jpg": b""})
    write_files(root / "captions", {"sa_20.txt": b"\xff\xfe"})
    source = open_named_source("sa1b", root)
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == ["images/sa_000000.tar", "raw/more/sa_000002", "raw/sa_000001"]
    assert sorted(picture.caption for picture in pictures.values()) == [f"The image shows {n}." for n in (0, 1, 10, 11)]
    assert rejected == {
        "images/sa_000000.tar/sa_2.jpg": "no caption",
        "raw/more/sa_000002/sa_20.jpg": "unreadable caption",
    }


def test_sa1b_says_what_is_missing(tmp_path):
    root = write_sa1b(tmp_path)
    shutil.rmtree(root / "captions")
    with pytest.raises(UserError, match=r"found no captions/\*\*/sa_\*.txt; unpack SA1B_caption.tar.gz of .*SAM-LLaVA"):
        open_named_source("sa1b", root)
    shutil.rmtree(root / "images")
    with pytest.raises(UserError, match=r"found no images/\*.tar and no raw/\*\*/sa_\*.jpg; .*ai.meta.com/datasets"):
        open_named_source("sa1b", root)


# --- CC12M and other tars of the WebDataset layout


def sample(key, suffix="jpg", text=None, **values):
    """What img2dataset writes for a picture, files in its order."""
    files = {f"{key}.{suffix}": encoded(int(key), suffix.lower())}
    files |= {} if text is None else {f"{key}.txt": text.encode()}
    return files | {f"{key}.json": json.dumps({"status": "success", "key": key, **values}).encode()}


@pytest.mark.parametrize("name", ["cc12m", "webdataset"])
def test_tars_of_img2dataset(tmp_path, name):
    write_tar(tmp_path / "00000.tar", sample("000000000", text="a cat\n") | sample("000000001", "png", text="a dög"))
    write_tar(
        tmp_path / "00002.tar",
        sample("000020000", "webp", text="a fish", caption="not this")
        | sample("000020007", "JPEG", caption="one with <PERSON>"),
    )
    write_files(tmp_path, {"00000_stats.json": b"{}", "00000.parquet": b""})
    source = open_named_source(name, tmp_path)
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == ["00000.tar", "00002.tar"] and not rejected
    assert {origin: picture.caption for origin, picture in pictures.items()} == {
        "00000.tar/000000000": "a cat",
        "00000.tar/000000001": "a dög",
        "00002.tar/000020000": "a fish",
        "00002.tar/000020007": "one with <PERSON>",
    }
    assert pictures["00002.tar/000020000"].image == encoded(20000, "webp")


def test_what_is_wrong_with_a_sample_of_a_tar(tmp_path):
    files = (
        sample("0", text=" \n")
        | sample("1")
        | {"2.txt": b"a text alone"}
        | {"3.jpg": encoded(3), "3.txt": b"\xff\xff"}
        | {"4.jpg": encoded(4), "4.json": b"{nonsense"}
        | {"5.jpg": encoded(5)}
        | sample("6", caption=["first", "second"])
        | {"a/7.seg.png": b"", "a/7.jpg": encoded(7), "a/7.txt": b"in a directory"}
        | sample("8", caption=8)
    )
    write_tar(tmp_path / "a.tar", files)
    pictures, rejected = read(open_named_source("webdataset", tmp_path))
    assert {origin: picture.caption for origin, picture in pictures.items()} == {
        "a.tar/6": "first",
        "a.tar/a/7": "in a directory",
    }
    reasons = {0: "no caption", 1: "no caption", 2: "missing picture", 5: "no caption", 8: "no caption"}
    reasons |= {3: "unreadable caption", 4: "unreadable caption"}
    assert rejected == {f"a.tar/{number}": reason for number, reason in reasons.items()}


def test_a_caption_key_is_looked_up_in_the_json_alone(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", text="alt text", llava="a caption") | sample("1", text="alt text"))
    pictures, rejected = read(open_named_source("cc12m", tmp_path, caption_key="llava"))
    assert [picture.caption for picture in pictures.values()] == ["a caption"]
    assert rejected == {"a.tar/1": "no caption"}


def test_a_tar_cut_off_within_a_sample(tmp_path):
    path = write_tar(tmp_path / "a.tar", sample("0", text="zero") | sample("1", text="one"))
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"1.txt") + 100])
    pictures, rejected = read(open_named_source("cc12m", tmp_path))
    assert [*pictures] == ["a.tar/0"] and rejected == {"a.tar/1": "no caption", "a.tar": "damaged archive"}


def test_missing_tars_say_where_they_are_had(tmp_path):
    with pytest.raises(
        UserError, match=r"found no \*.tar; get them from https://huggingface.co/datasets/pixparse/cc12m"
    ):
        open_named_source("cc12m", tmp_path)


# --- JourneyDB


def journeydb_line(folder, name, prompt, **more):
    return json.dumps({"img_path": f"./{folder}/{name}.jpg", "prompt": prompt, "Task2": {"Caption": "x"}, **more})


def write_journeydb(root, split=("train", "train_anno_realease_repath.jsonl"), packed=(), unpacked=("000", "001")):
    """Lines of three archives with two pictures each, the archives' lines in turn; only some archives are there."""
    folder, captions = root / "data" / split[0], split[1]
    lines = [
        journeydb_line(name, f"{name}-{i}", f"{split[0]} {name} {i} --v 4")
        for i in range(2)
        for name in ("000", "001", "002")
    ]
    write_files(folder, {captions: "\n".join(lines).encode()})
    pictures = {
        name: {f"{name}/{name}-{i}.jpg": encoded(int(name) + i) for i in range(2)} for name in (*packed, *unpacked)
    }
    for name in packed:
        write_tar(folder / f"imgs/{name}.tgz", pictures[name], "w:gz")
    for name in unpacked:
        write_files(folder / "imgs", pictures[name])
    return root


@pytest.mark.parametrize("layout", ["hub", "paper"])
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_journeydb(tmp_path, layout, packed):
    names = ("000", "001")
    write_journeydb(tmp_path, packed=names if packed else (), unpacked=() if packed else names)
    if layout == "paper":
        (tmp_path / "data" / "train").rename(tmp_path / "train")
    source = open_named_source("journeydb", tmp_path)
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == [*names] and source.pictures == 4 and not rejected
    suffix = ".tgz" if packed else ""
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        f"{name}{suffix}/{name}-{i}.jpg": (f"train {name} {i} --v 4", encoded(int(name) + i))
        for name in names
        for i in range(2)
    }


def test_journeydb_validation(tmp_path):
    write_journeydb(tmp_path)
    write_journeydb(tmp_path, ("valid", "valid_anno_repath.jsonl"), unpacked=("002",))
    pictures, _ = read(open_named_source("journeydb", tmp_path, split="validation"))
    assert [picture.caption for picture in pictures.values()] == ["valid 002 0 --v 4", "valid 002 1 --v 4"]


def test_journeydb_with_an_archive_half_unpacked_and_lines_that_are_wrong(tmp_path):
    write_journeydb(tmp_path, packed=("000", "001"), unpacked=("001",))
    (tmp_path / "data/train/imgs/001/001-1.jpg").unlink()
    write_files(tmp_path / "data/train/imgs/001", {"nameless.jpg": encoded(9)})
    captions = tmp_path / "data/train/train_anno_realease_repath.jsonl"
    before = captions.read_text() + "\n"
    tricky = journeydb_line("000", "000-2", 'a sign that says "img_path": "./001/001-0.jpg"')
    wrong = [tricky, journeydb_line("000", "000-3", " "), journeydb_line("000", "000-4", None), "no JSON", ""]
    captions.write_text(before + "\n".join(wrong) + journeydb_line("001", "001-5", "cut off")[:-9])
    source = open_named_source("journeydb", tmp_path)
    pictures, rejected = read(source)
    assert sorted(pictures) == ["000.tgz/000-0.jpg", "000.tgz/000-1.jpg", "001/001-0.jpg"]
    cut_off = len(before) + sum(len(line) + 1 for line in wrong) - 1
    assert rejected == {
        **{f"000.tgz/000-{i}.jpg": "missing picture" for i in (2, 3, 4)},
        "001/001-1.jpg": "missing picture",
        "001/nameless.jpg": "no caption",
        f"{captions.name}:byte {cut_off}": "unreadable caption",
    }


def test_journeydb_with_a_damaged_archive(tmp_path):
    write_journeydb(tmp_path, packed=("000", "001"), unpacked=())
    path = tmp_path / "data/train/imgs/000.tgz"
    path.write_bytes(path.read_bytes()[:200])
    pictures, rejected = read(open_named_source("journeydb", tmp_path))
    assert sorted(pictures)[-2:] == ["001.tgz/001-0.jpg", "001.tgz/001-1.jpg"]
    assert rejected["000.tgz"] == "damaged archive"
    assert len(pictures) + list(rejected.values()).count("missing picture") == 4  # it is known what is lost


def test_journeydb_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="found no data/train/imgs/000.tgz .*datasets/JourneyDB/JourneyDB"):
        open_named_source("journeydb", tmp_path)
    write_journeydb(tmp_path)
    captions = tmp_path / "data/train/train_anno_realease_repath.jsonl"
    captions.unlink()
    with pytest.raises(UserError, match="found no data/train/train_anno_realease_repath.jsonl; get it from"):
        open_named_source("journeydb", tmp_path)
    captions.with_name(captions.name + ".tgz").touch()
    with pytest.raises(UserError, match="found no .*; unpack .*train_anno_realease_repath.jsonl.tgz"):
        open_named_source("journeydb", tmp_path)
    with pytest.raises(UserError, match="found no data/valid/imgs/000.tgz"):
        open_named_source("journeydb", tmp_path, split="validation")
