"""Every file ends in a sample, in one that is rejected, or in an error; the machine's errors are nobody's rejects."""

import errno
import io
import json
import os
import resource
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.config import FolderSource, UserError
from mdit.precompute.pipeline import WorkItem
from mdit.precompute.pipeline import read as read_part
from mdit.sources import Picture, Rejected, open_named_source, open_source, storage
from mdit.sources.archives import PICTURES, ArchiveMember, is_picture, read_members
from mdit.sources.samples import Group, grouped
from tests.unit.test_sources import encoded, read, write_files, write_folder, write_tar, write_zip
from tests.unit.test_sources_mds import PICTURES as MDS_COLUMNS
from tests.unit.test_sources_mds import picture as mds_picture
from tests.unit.test_sources_mds import write_mds

JPG, TXT = encoded(0), b"a caption"


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar, in which a name may come twice."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def read_tar(folder: Path, members: list[tuple[str, bytes]]) -> tuple[dict[str, str], dict[str, str]]:
    """-> origin -> caption, origin -> reason; origins without the tar's name."""
    write_members(folder / "0.tar", members)
    pictures, rejected = read(open_named_source("webdataset", folder))
    captions = {origin.removeprefix("0.tar/"): picture.caption for origin, picture in pictures.items()}
    return captions, {origin.removeprefix("0.tar/"): reason for origin, reason in rejected.items()}


# --- samples of files


NAMES = st.tuples(
    st.sampled_from(["a", "b", "a.b", "a.b.c", "v1.0_1", "v1.0_2", "d/a", "d.e/a", "a-b", "ab"]),
    st.sampled_from([".jpg", ".JPG", ".png", ".txt", ".json", ".seg.png", ".npy", ""]),
).map("".join)


@settings(max_examples=100, deadline=None)
@given(st.lists(NAMES, max_size=14), st.booleans())
def test_each_file_is_in_one_group(names, by_name):
    names = sorted(names) if by_name else names
    members = [
        ArchiveMember(name, b"%d" % number) for number, name in enumerate(names) if "." in name.rpartition("/")[2]
    ]
    groups = list(grouped(members))
    assert sorted(name for group in groups for name in group.names) == sorted(member.name for member in members)
    for group in groups:
        assert isinstance(group, Group) and all(name.startswith(group.key + ".") for name in group.names)


@settings(max_examples=40, deadline=None)
@given(st.lists(NAMES, max_size=14), st.sampled_from(["tar", "sorted tar", "zip", "folder"]))
def test_pictures_that_are_there_are_used_or_counted(tmp_path_factory, names, kind):
    """Files of tars and folders by their samples, those of a zip one by one."""
    folder, data = tmp_path_factory.mktemp("members"), {}
    names = sorted(names) if kind == "sorted tar" else names if kind == "tar" else sorted({*names})
    names = [name for name in names if kind != "folder" or not name.startswith("d")]
    for number, name in enumerate(names):
        data[number] = b"%d" % number if is_picture(name) else json.dumps({"caption": str(number)}).encode()
    members = [(name, data[number]) for number, name in enumerate(names)]
    wanted = [data[number] for number, name in enumerate(names) if is_picture(name)]
    if kind == "zip":
        items = read_members(write_zip(folder / "a.zip", dict(members)), "a.zip", is_picture)
        assert sorted(item.data for item in items) == sorted(wanted)
        return
    (folder / "in").mkdir()
    if kind == "folder":
        write_files(folder / "in", dict(members))
    else:
        write_members(folder / "in" / "0.tar", members)
    try:
        source = open_named_source("folder" if kind == "folder" else "webdataset", folder / "in")
        items = [item for part in source.parts for item in part]
    except UserError as error:
        if "is not sorted" in str(error):
            assert kind == "tar"
        else:
            assert "found no captions.jsonl" in str(error) and not wanted
        return
    used = [item.image for item in items if isinstance(item, Picture)]
    assert len({*used}) == len(used) and {*used} <= {*wanted}
    for item in items:
        if isinstance(item, Picture):  # with the caption of its own key
            caption = item.caption if item.caption.isdigit() else json.loads(item.caption)["caption"]
            assert names[int(item.image)].rpartition(".")[0] == names[int(caption)].rpartition(".")[0]
    read_at_all = [
        ArchiveMember(*member) for member in members if member[0].lower().endswith((*PICTURES, ".txt", ".json"))
    ]
    assert len(items) == len(list(grouped(read_at_all)))  # each gives one item


def test_a_key_ends_at_the_last_dot_and_a_line_says_where_webdataset_ends_it(tmp_path, caplog):
    members = [("v1.0_1.jpg", JPG), ("v1.0_1.txt", TXT), ("v1.0_2.jpg", JPG), ("v1.0_2.txt", b"two"), ("3.jpg", JPG)]
    captions, rejected = read_tar(tmp_path, [*members, ("3.txt", b"three")])
    assert captions == {"v1.0_1": "a caption", "v1.0_2": "two", "3": "three"} and not rejected
    assert caplog.text.count("ends at the last dot (v1.0_1); webdataset itself would end it at the first (v1)") == 1


def test_further_pictures_of_a_sample_are_told_once(tmp_path, caplog):
    members = [(f"{key}{end}", data) for key in "ab" for end, data in ((".jpg", JPG), (".seg.png", b""), (".txt", TXT))]
    captions, rejected = read_tar(tmp_path, members)
    assert captions == {"a": "a caption", "b": "a caption"} and not rejected
    assert caplog.text.count("not a.seg.png") == 1 and "b.seg" not in caplog.text


TWICE = [("1.jpg", JPG), ("1.jpg", encoded(9)), ("1.txt", TXT), ("1.txt", b"another")]
OF_OTHER_KEYS = [("a.input.jpg", JPG), ("a.outputs.txt", TXT), ("b.jpg", JPG), ("b.txt", TXT)]


@pytest.mark.parametrize(
    "members, captions, rejected",
    [
        (TWICE[::2] + TWICE[1::2], {"1": "a caption", "1 (2)": "another"}, {}),
        (TWICE, {}, {"1": "name twice"}),  # which text is that of which picture?
        (OF_OTHER_KEYS, {"b": "a caption"}, {"a.input": "no caption", "a.outputs": "missing picture"}),
    ],
)
def test_a_key_that_comes_twice_and_files_of_other_keys(tmp_path, members, captions, rejected):
    assert read_tar(tmp_path, members) == (captions, rejected)


@pytest.mark.parametrize("count", [2, 300])
def test_a_tar_that_is_not_sorted_says_how_to_repack_it(tmp_path, count):
    keys = [f"{number:03d}" for number in range(count)]
    with pytest.raises(UserError, match=r"0.tar: is not sorted by name: the files of 000 .*tar --sort=name -cf 0.tar"):
        read_tar(tmp_path, [(f"{key}.jpg", JPG) for key in keys] + [(f"{key}.txt", TXT) for key in keys])


def test_formats_hidden_files_and_links(tmp_path):
    members = []
    for key, suffix in enumerate(["gif", "bmp", "tiff", "avif"]):
        members += [(f"{key}.{suffix}", encoded(key, suffix)), (f"{key}.txt", TXT), (f"._{key}.{suffix}", b"macOS")]
    members += [("5.heic", b""), ("5.txt", TXT)]
    path = write_members(tmp_path / "0.tar", members)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("6.jpg", tarfile.LNKTYPE), ("7.jpg", tarfile.SYMTYPE), ("8.jpg", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "0.gif"
            archive.addfile(entry)
            entry = tarfile.TarInfo(name.replace("jpg", "txt"))
            entry.size = len(TXT)
            archive.addfile(entry, io.BytesIO(TXT))
    pictures, rejected = read(open_named_source("webdataset", tmp_path))
    assert [*pictures] == [f"0.tar/{key}" for key in range(4)]
    reasons = ["missing picture", "link", "link", "unreadable picture"]
    assert rejected == {f"0.tar/{key}": reason for key, reason in enumerate(reasons, start=5)}


def test_a_caption_key_that_is_not_there_is_found_before_pictures_are_read(tmp_path):
    files = (("jpg", b""), ("json", b'{"text_en": "x"}'))
    members = [(f"{key}.{end}", data) for key in range(9) for end, data in files]
    for arguments in ({}, {"caption_key": "text_fr"}):
        with pytest.raises(UserError, match=f"no key|has the key {arguments.get('caption_key', 'caption')}; .*text_en"):
            write_members(tmp_path / "0.tar", members)
            open_named_source("webdataset", tmp_path, **arguments)
    assert len(read(open_named_source("webdataset", tmp_path, caption_key="text_en"))[0]) == 9
    folder = write_folder(tmp_path / "folder", count=3)
    with pytest.raises(UserError, match="captions.jsonl: .* the key x; the keys there are file, caption, width"):
        open_named_source("folder", folder, caption_key="x")


def test_folders_of_img2dataset(tmp_path):
    for folder in ("00000", "00001"):
        for key in range(2):
            about = b'{"caption": "of the json", "width": NaN}'
            files = {f"{folder}{key}.jpg": encoded(key), f"{folder}{key}.json": about}
            write_files(tmp_path / folder, files | ({f"{folder}{key}.txt": b"of the text"} if key else {}))
    write_files(tmp_path, {"00000_stats.json": b"{}", "00000.parquet": b""})
    source = open_named_source("folder", tmp_path)
    pictures, rejected = read(source)
    assert [part.name for part in source.parts] == ["00000", "00001"] and not rejected
    assert {origin: picture.caption for origin, picture in pictures.items()} == {
        f"{folder}/{folder}{key}": ["of the json", "of the text"][key]
        for folder in ("00000", "00001")
        for key in (0, 1)
    }


def test_parquet_files_of_img2dataset_and_columns_of_two_types(tmp_path):
    pytest.importorskip("datasets")
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    about = {"url": ["u"] * 3, "key": ["0", "1", "2"], "status": ["success", "failed_to_download", "success"]}
    table = {**about, "jpg": [encoded(0), None, encoded(2)], "caption": ["zero", "one", "two"]}
    parquet.write_table(pyarrow.table(table), tmp_path / "00000.parquet")
    other = {**about, "jpg": ["a text", "another", None], "caption": [1, 2, 3]}
    parquet.write_table(pyarrow.table(other), tmp_path / "00001.parquet")
    write_files(tmp_path, {"00000_stats.json": b"{}", "00001_stats.json": b"{}"})
    pictures, rejected = read(open_named_source("huggingface", tmp_path))
    assert {origin: (picture.caption, picture.image) for origin, picture in pictures.items()} == {
        "00000.parquet:row 0": ("zero", encoded(0)),
        "00000.parquet:row 2": ("two", encoded(2)),
    }
    assert rejected == {
        "00000.parquet:row 1": "missing picture",
        "00001.parquet:row 0": "unreadable picture",
        "00001.parquet:row 1": "unreadable picture",
        "00001.parquet:row 2": "missing picture",
    }
    source = open_named_source("huggingface", tmp_path)
    (tmp_path / "00000.parquet").unlink()  # gone with the disk that it was on
    with pytest.raises(UserError, match="part 00000.parquet of the source cannot be read: .*No such file"):
        list(read_part(WorkItem(0, source.parts[0])))


# --- bytes that are not what they should be


def test_json_nested_deep_and_half_a_pair(tmp_path):
    nested = [b'{"caption": "x", "more": ' + b"[" * depth + b"]" * depth + b"}" for depth in (50, 100, 1000, 100_000)]
    values = [*nested, b'{"caption": "half a pair \\ud83d"}', b'{"caption": "x", "a": NaN, "a": 1e999}']
    members = [m for key, value in enumerate(values) for m in ((f"{key}.jpg", JPG), (f"{key}.json", value))]
    captions, rejected = read_tar(tmp_path, members)
    assert captions == {"0": "x", "5": "x"} and rejected == dict.fromkeys("1234", "unreadable caption")


def test_a_recipe_names_a_damaged_avif_and_a_pipe(tmp_path):
    whole = encoded(1, "avif", (64, 64))
    for name, write in (
        ("torn.avif", lambda path: path.write_bytes(whole[:-20])),
        ("pipe.png", os.mkfifo),
    ):
        folder = write_folder(tmp_path / name, count=12)
        write(folder / name)
        with open(folder / "captions.jsonl", "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"file": name, "caption": "x"}))
        with pytest.raises(UserError, match=f"captions.jsonl:13: cannot read the picture .*{name}"):
            open_source(FolderSource(name="folder", path=str(folder), validation_share=0.5), 8)


@pytest.mark.parametrize("size", ["9" * 23, "-1024", "1" * 5000])
def test_sizes_that_no_file_has(tmp_path, size):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, headers in (("0.jpg", {}), ("0.txt", {}), ("1.jpg", {"size": size})):
            entry = tarfile.TarInfo(name)
            entry.size, entry.pax_headers = len(TXT), headers
            archive.addfile(entry, io.BytesIO(TXT))
    items = list(open_named_source("webdataset", tmp_path).parts[0])
    assert Rejected("0.tar", "damaged archive") in items and any(isinstance(item, Picture) for item in items)


def test_encrypted_members_of_a_zip_and_names_that_come_twice(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"0.jpg": JPG, "1.jpg": JPG})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("1.jpg", b"the second")
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)
    assert list(read_members(path, "a.zip", is_picture)) == [
        Rejected("a.zip/0.jpg", "encrypted"),
        ArchiveMember("1.jpg", JPG),
        ArchiveMember("1.jpg", b"the second"),
    ]


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff")
    write_members(tmp_path / f"{name}.tar", [(f"{name}.jpg", JPG), (f"{name}.txt", TXT), ("a.txt", TXT)])
    source = open_named_source("webdataset", tmp_path)
    assert [part.name for part in source.parts] == ["\\udcff.tar"]
    pictures, rejected = read(source)
    assert [*pictures] == [f"\\udcff.tar/{name}"] and rejected == {"\\udcff.tar/a": "missing picture"}
    folder = write_folder(tmp_path / "folder", count=12)
    (folder / f"{name}.png").write_bytes(encoded(0, "png"))
    with open(folder / "captions.jsonl", "a", encoding="utf-8") as lines:
        lines.write(json.dumps({"file": f"{name}.png", "caption": "x"}))
    source = open_source(FolderSource(name="folder", path=str(folder), validation_share=0.5), 8)
    assert len(source.training) + len(source.validation) == 13


# --- errors of the machine

UNREADABLE = Path("/proc/self/mem")  # reading its first byte is an Input/output error


def source_of_a_tar(root):
    (root / "0.tar").symlink_to(UNREADABLE)
    return open_named_source("webdataset", root)


def source_of_a_tgz(root):
    (root / "imgs").mkdir()
    (root / "train" / "imgs").mkdir(parents=True)
    (root / "train" / "imgs" / "000.tgz").symlink_to(UNREADABLE)
    write_files(root / "train", {"train_anno_realease_repath.jsonl": b'{"img_path": "./000/0.jpg", "prompt": "x"}\n'})
    return open_named_source("journeydb", root)


def source_of_files(root):
    folder = write_folder(root / "folder", count=3)
    (folder / "sub" / "picture 1.png").unlink()
    (folder / "sub" / "picture 1.png").symlink_to(UNREADABLE)
    return open_named_source("folder", folder)


def source_of_texts(root):
    write_tar(root / "images" / "sa_000000.tar", {"sa_1.jpg": JPG})
    (root / "captions").mkdir()
    (root / "captions" / "sa_1.txt").symlink_to(UNREADABLE)
    return open_named_source("sa1b", root)


def source_of_shards(root):
    write_mds(root, MDS_COLUMNS, [[mds_picture(0)]], "gz")
    (root / "shard.00000.mds.gz").unlink()
    (root / "shard.00000.mds.gz").symlink_to(UNREADABLE)
    return open_named_source("mds", root)


@pytest.mark.skipif(not UNREADABLE.exists(), reason="no /proc")
@pytest.mark.parametrize("make", [source_of_a_tar, source_of_a_tgz, source_of_files, source_of_texts, source_of_shards])
def test_an_error_of_the_disk_stops(tmp_path, make):
    with pytest.raises(UserError, match="cannot (be )?read.*Input/output error"):
        source = make(tmp_path)
        for number, part in enumerate(source.parts):
            list(read_part(WorkItem(number, part)))


def test_what_zipfile_makes_of_an_error_of_the_disk_is_undone(tmp_path, monkeypatch):
    """It calls it a bad zip."""
    path = write_zip(tmp_path / "a.zip", {"0.jpg": JPG})

    def fail(file, buffer):
        with file._remembering():
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(storage._File, "readinto", fail)
    monkeypatch.setattr(storage._File, "readall", lambda file: fail(file, None))
    with pytest.raises(OSError) as error:
        list(read_members(path, "a.zip", is_picture))
    assert (error.value.errno, error.value.filename) == (errno.ESTALE, str(path))


def test_too_many_open_files_stop(tmp_path):
    part = iter(open_named_source("folder", write_folder(tmp_path / "folder", count=3)).parts[0])
    next(part)  # captions.jsonl is open
    held, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        with pytest.raises(OSError) as error:
            while True:
                held.append(open(os.devnull, "rb"))
        assert error.value.errno == errno.EMFILE
        with pytest.raises(OSError) as error:
            list(part)
        assert error.value.errno == errno.EMFILE
    finally:
        for file in held:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_picture_that_is_missing_is_a_reject_but_not_one_in_a_folder_that_is_gone(tmp_path):
    folder = write_folder(tmp_path / "folder", count=3)
    (folder / "sub" / "picture 0.png").unlink()
    part = iter(open_named_source("folder", folder).parts[0])
    assert next(part) == Rejected("captions.jsonl:1", "missing picture")
    folder.rename(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError, match="captions.jsonl"):
        list(part)
