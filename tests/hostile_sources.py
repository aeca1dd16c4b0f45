"""Source data that strangers made to do harm: archives, folders, tables, pictures."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mdit.config import FolderSource
from mdit.eval.picture_sets import open_pictures
from mdit.precompute.decode import PillowDecoder
from mdit.precompute.pipeline import WorkItem
from mdit.precompute.pipeline import read as read_part
from mdit.sources import Rejected, open_named_source, open_source
from tests.hostile import Case, Pickled, code, marker


def png(width: int, height: int) -> bytes:
    """A picture of one colour that says it is of this size, and has few of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    pixels = zlib.compress(bytes(min(width * height, 2**24)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file closefile showpage\n%%EOF\n"
TWO_COLOURS = io.BytesIO()
Image.new("RGB", (16, 16), (1, 2, 3)).save(TWO_COLOURS, "PNG")
PNG = TWO_COLOURS.getvalue()


def members(path: Path, entries: list[tuple[str, bytes, dict[str, Any]]], mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for name, data, attributes in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            vars_of = {**attributes}
            for key, value in vars_of.items():
                setattr(entry, key, value)
            archive.addfile(entry, io.BytesIO(data) if data else None)
    return path


def read(name: str, root: Path, **options) -> list[str]:
    """Captions, colours and rejects of a source, its pictures decoded."""
    source = open_named_source(name, root, **options)
    return look(item for number, part in enumerate(source.parts) for item in read_part(WorkItem(number, part)))


def look(items) -> list[str]:
    decoder, lines = PillowDecoder([8], 1, torch.device("cpu")), []
    for item in items:
        if isinstance(item, Rejected):
            lines.append(f"{item.reason}: {item.detail}")
            continue
        decoded = decoder.decode(item.image)
        colour = decoded if isinstance(decoded, str) else tuple(decoded[8][0, 0].tolist())
        lines.append(f"picture {item.caption!r} {colour}")
    return lines or ["nothing"]


def tar_of_links(folder: Path) -> list[str]:
    outside = str(folder.parent / "outside" / "secret")
    kinds = [
        (tarfile.SYMTYPE, outside),
        (tarfile.LNKTYPE, "../outside/secret"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
    ]
    entries = []
    for number, (kind, target) in enumerate(kinds):
        for suffix, end in ((".jpg", ".png"), (".txt", ".txt")):
            link = {"type": kind, "linkname": target and target + end}
            entries.append((f"{number}{suffix}", b"", {**link, "devmajor": 1, "devminor": 5}))
    for name in ("../outside/victim", str(folder.parent / "outside" / "victim")):
        entries += [(f"{name}.png", PNG, {}), (f"{name}.txt", b"whole", {})]
    members(folder / "0.tar", entries)
    return read("webdataset", folder)


def tar_of_zeros(folder: Path) -> list[str]:
    """4 GiB in 4 MB: the same gzip member again and again behind the header of a tar."""
    header = tarfile.TarInfo("0.jpg")
    header.size = 2**32 - 2**20
    zeros = gzip.compress(bytes(2**26), 6)
    (folder / "0.tar").write_bytes(gzip.compress(header.tobuf()) + zeros * 64)
    return read("webdataset", folder)


def tar_of_bz2(folder: Path) -> list[str]:
    """A header of pax that says it has 200 MB."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, 200 * 2**20
    (folder / "0.tar").write_bytes(bz2.compress(header.tobuf() + bytes(2**26)))
    return read("webdataset", folder)


def tar_of_xz(folder: Path) -> list[str]:
    """A block whose dictionary is of 4 GiB."""
    whole = bytearray(lzma.compress(bytes(2**20), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**20}]))
    length = 4 * (whole[12] + 1)
    assert whole[14] == 0x21
    whole[16] = 40
    whole[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(whole[12 : 12 + length - 4]))
    (folder / "0.tar").write_bytes(whole)
    return read("webdataset", folder)


def sparse_tar(folder: Path) -> list[str]:
    headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(2**27)}
    headers |= {"GNU.sparse.map": f"0,16,{2**27 - 16},0", "GNU.sparse.name": "0.png"}
    members(folder / "0.tar", [("0.png", PNG[:16], {"pax_headers": headers}), ("0.txt", b"a", {})])
    return read("webdataset", folder)


def zip_of_bombs(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("bzip2.png", bytes(2**26), zipfile.ZIP_BZIP2)
        archive.writestr("large.png", b"", zipfile.ZIP_DEFLATED)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(folder.parent / "outside" / "secret.png"))
    data = bytearray((folder / "a.zip").read_bytes())
    at = data.index(b"large.png", data.index(b"PK\1\2"))
    data[at - 46 + 24 : at - 46 + 28] = struct.pack("<I", 2**32 - 2)  # its size in the listing
    (folder / "a.zip").write_bytes(data)
    return look(item for part in open_pictures(str(folder / "a.zip"), "cpu") for item in part)


def captions(folder: Path, names: list[str]) -> Path:
    lines = [json.dumps({"file": name, "caption": "a"}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def names_that_lead_out(folder: Path) -> list[str]:
    (folder / "in").mkdir()
    secret = folder.parent / "outside" / "secret.png"
    return read("folder", captions(folder, ["../outside/secret.png", "in/../../outside/secret.png", str(secret)]))


def a_recipe_that_leads_out(folder: Path) -> list[str]:
    captions(folder, ["../outside/secret.png"] * 9)
    open_source(FolderSource(name="folder", path=str(folder), validation_share=0.5), 8)
    return ["opened"]


def pictures_in_disguise(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    files = {"eps.png": EPS, "bomb.png": png(100_000, 100_000), "long.png": png(10**8, 1), "just.png": png(9000, 9900)}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return read("folder", captions(folder, ["pipe.png", "device.png", *files]))


def links_in_circles(folder: Path) -> list[str]:
    """Two links back make a tree of 2^40 folders; a third leads to the root of this machine."""
    (folder / "a").mkdir()
    (folder / "a" / "0.png").write_bytes(PNG)
    (folder / "a" / "0.txt").write_text("found once")
    for name, target in (("x", ".."), ("y", ".."), ("z", "/")):
        (folder / "a" / name).symlink_to(target)
    found = read("folder", folder)
    assert sum("found once" in line for line in found) == 1
    return found


def cache_of_the_hub(folder: Path) -> list[str]:
    """A download as the Hub's client keeps it: links to files beside the snapshot, which go on working."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "0123"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    captions(blobs, ["0.png"])
    (blobs / "1").write_bytes(PNG)
    (snapshot / "captions.jsonl").symlink_to("../../blobs/captions.jsonl")
    (snapshot / "0.png").symlink_to("../../blobs/1")
    return read("folder", snapshot)


def one_long_line(folder: Path) -> list[str]:
    with open(folder / "captions.jsonl", "wb") as file:
        file.truncate(2**33)
    return read("folder", folder)


def coco(folder: Path, content: str) -> list[str]:
    (folder / "annotations").mkdir()
    (folder / "val2014").mkdir()
    (folder / "annotations" / "captions_val2014.json").write_text(content)
    return read("coco", folder, split="validation")


def coco_that_leads_out(folder: Path) -> list[str]:
    images = [{"id": 1, "file_name": "../../outside/secret.png"}]
    return coco(folder, json.dumps({"images": images, "annotations": [{"image_id": 1, "caption": "a"}]}))


def shards_elsewhere(folder: Path) -> list[str]:
    shard = {"format": "mds", "version": 2, "samples": 1, "column_names": ["jpg"], "column_encodings": ["jpeg"]}
    shard |= {"column_sizes": [None], "raw_data": {"basename": "../outside/secret.png"}, "zip_data": None}
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [shard]}))
    return read("mds", folder)


def parquet(folder: Path) -> list[str]:
    """Pictures by path, and a type whose description would be unpickled."""
    import pyarrow
    import pyarrow.parquet

    paths = [str(folder.parent / "outside" / "secret.png"), "../outside/secret.png", "0.png"]
    (folder / "0.png").write_bytes(PNG)
    evil = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    evil |= {b"ARROW:extension:metadata": pickle.dumps(Pickled(marker(folder)))}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image), ("caption", pyarrow.string()), pyarrow.field("x", pyarrow.int64(), metadata=evil)]
    rows = [[{"bytes": None, "path": path} for path in paths], ["a"] * 3, [1] * 3]
    pyarrow.parquet.write_table(pyarrow.table(rows, schema=pyarrow.schema(fields)), folder / "train.parquet")
    return read("huggingface", folder)


def saved_elsewhere(folder: Path) -> list[str]:
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../outside/secret.txt"}]}))
    (folder / "dataset_info.json").write_text("{}")
    return read("huggingface", folder)


def a_set_with_a_script(folder: Path) -> list[str]:
    (folder / f"{folder.name}.py").write_text(code(folder))
    (folder / "data.pkl").write_bytes(pickle.dumps(Pickled(marker(folder))))
    return read("huggingface", folder)


SOURCES = [
    Case("tar: links, devices, names", tar_of_links, r"(?s)link: .*link: .*unreadable picture: .*picture 'whole'"),
    Case("tar.gz: 4 GiB of zeros", tar_of_zeros, "damaged archive: unpacks to more than"),
    Case("tar.bz2: a long header", tar_of_bz2, "damaged archive: asks for"),
    Case("tar.xz: a large dictionary", tar_of_xz, "damaged archive: Memory usage limit"),
    Case("tar: sparse", sparse_tar, "unreadable picture: 0.png is no regular file"),
    Case("zip: bombs and a link", zip_of_bombs, r"(?s)packed by method 12.*4294967294 bytes.*link: link.png"),
    Case("captions.jsonl: names", names_that_lead_out, r"(?s)leads out of .*leads out of .*leads out of "),
    Case("captions.jsonl: names, in a recipe", a_recipe_that_leads_out, "captions.jsonl:1: .*leads out of"),
    Case("pictures in disguise", pictures_in_disguise, r"(?s)regular file.*regular file.*(decodable.*){3}"),
    Case("links in circles", links_in_circles, "found once"),
    Case("links of the hub's cache", cache_of_the_hub, r"picture 'a' \(1, 2, 3\)"),
    Case("a line of 8 GiB", one_long_line, "captions.jsonl: has a line of more than"),
    Case("coco: names", coco_that_leads_out, "leads outside: .*leads out of"),
    Case("coco: JSON of little text", lambda folder: coco(folder, "[" + "[]," * 2**25 + "[]]"), "MiB of memory"),
    Case("coco: JSON nested", lambda folder: coco(folder, "[" * 10**6), "not valid JSON"),
    Case("mds: names", shards_elsewhere, "index.json: is not the index"),
    Case("parquet: paths and pickles", parquet, r"(?s)leads out of.*leads out of.*\(1, 2, 3\)"),
    Case("save_to_disk: names", saved_elsewhere, "not the name of a file in this directory"),
    Case("a script and a pickle", a_set_with_a_script, "cannot open it as a set"),
]
