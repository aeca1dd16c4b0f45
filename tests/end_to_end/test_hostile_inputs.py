"""Files that a stranger made to do harm: nothing of them is run, nothing outside their folder is read as data or
written, little memory is taken, and each ends in one line with exit code 2 or in rejects that say why.

Each table (here, `tests.hostile_sources`, `tests.hostile_towers`) is gone through by one process (`tests.hostile`).
"""

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from mdit.bench.tiny import ENCODERS
from mdit.checkpoint.averages import reconstruct, stored_averages
from mdit.checkpoint.released import import_released
from mdit.checkpoint.snapshot import load_snapshot, save_snapshot
from mdit.checkpoint.training_state import FORMAT, Checkpoint, Reader, examine, seal
from mdit.config import MetricsConfig, load_config
from mdit.data.shards import open_dataset, read_samples
from mdit.dist import World
from mdit.encoders.judges import Judge
from mdit.eval.metrics import LOADERS, PictureMetrics
from mdit.eval.scores import read_prompts
from mdit.files import measure, point_to, replacing_directory, write_text
from mdit.models import MicroDiT
from mdit.models.presets import tiny_2
from mdit.train.run_directory import check_place
from tests.hostile import Case, Pickled, check, code, marker
from tests.latent_sets import edit_manifest, write_set
from tests.recipes import TINY, tiny_config

CPU = torch.device("cpu")
ONE = World(0, 1, 0, CPU)

# --- weights


def tensors(header: dict | bytes, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    """A safetensors file that says what it likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], begin: int, end: int) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


HEADERS = {
    "10 GB": tensors({}, 10 * 2**30),
    "2^64 bytes": tensors({}, 2**64 - 1),
    "more than there is": tensors({"a": tensor([2**40], 0, 2**42)}),
    "overlapping": tensors({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}),
    "negative": tensors({"a": tensor([4], -16, 0)}),
    "sizes that overflow": tensors({"a": tensor([2**32] * 3, 0, 0)}),
    "nested": tensors(b'{"a":' + b"[" * 10**5),
    "nothing, of any shape": tensors({"pos_embed": tensor([0, 2**62], 0, 0)}, data=b""),
}


def snapshot(folder: Path, content: bytes | None = None) -> Path:
    """A small one, whose weights are replaced by `content` as by somebody who writes checksums too."""
    config, path = tiny_config(), folder / "step_00000001"
    recipe = {"recipe": config.model_dump(mode="json", exclude_none=True)}
    raw = MicroDiT(config.model).state_dict()
    save_snapshot(path, step=1, config_json=recipe, raw=raw, ema=None, encoders=ENCODERS)
    if content is not None:
        (path / "raw.safetensors").write_bytes(content)
        checksums = json.loads((path / "checksums.json").read_text())
        checksums["raw.safetensors"] = measure(path / "raw.safetensors")
        (path / "checksums.json").write_text(json.dumps(checksums))
    return path


def weights_of(header: str):
    return lambda folder: load_snapshot(snapshot(folder, HEADERS[header])).weights("raw")


def snapshot_elsewhere(folder: Path) -> None:
    point_to(folder / "latest", "/etc")
    load_snapshot(folder / "latest")


def snapshot_of_other_files(folder: Path) -> None:
    path = snapshot(folder)
    checksums = json.loads((path / "checksums.json").read_text())
    checksums["../../outside/secret.txt"] = checksums["raw.safetensors"]
    (path / "checksums.json").write_text(json.dumps(checksums))
    load_snapshot(path)


def averages_of_other_files(folder: Path) -> None:
    secret = "../../../outside/set/manifest.json"
    place = folder / "averages" / "step_00000001"
    place.mkdir(parents=True)
    files = {secret: measure(place / secret)}
    (place / "averages.json").write_text(json.dumps({"lengths": [0.1], "files": files}))
    stored_averages(folder, 1)


def averages_of_two_shapes(folder: Path) -> None:
    place = folder / "averages" / "step_00000001"
    place.mkdir(parents=True)
    for number, size in enumerate((2, 3)):
        (place / f"{number}").write_bytes(save({"a": torch.zeros(size)}))
    files = {name: measure(place / name) for name in "01"}
    (place / "averages.json").write_text(json.dumps({"lengths": [0.1, 0.2], "files": files}))
    dict(reconstruct(stored_averages(folder, 1), 0.1, 1))


def state(folder: Path, **changes) -> Path:
    (path := folder / "step_00000001").mkdir()
    values = {"format": FORMAT, "step": 1, "run": {}, "layout": {}, "files": {}, "numbers": [{}], **changes}
    (path / "state.json").write_text(json.dumps(seal(values)))
    return path


def checkpoint_of_other_files(folder: Path) -> list[str]:
    entry = measure(folder.parent / "outside" / "secret.txt")
    return [examine(state(folder, files={"../../outside/rank_00000_000": entry}), ONE)[1]]


def checkpoint_of_odd_fragments(folder: Path) -> None:
    name, shard = "rank_00000_000.safetensors", {"dim": 0, "index": 0, "count": 10**12, "blocks": 1}
    path = state(folder, files={name: {}})
    fragment = {"name": "a", "shape": [4], "shard": shard, "start": 0, "numel": 4, "partition": 0, "offset": 0}
    (path / name).write_bytes(save({"weights/a": torch.zeros(4)}, {"fragments": json.dumps([fragment])}))
    reader = Reader(Checkpoint(path, json.loads((path / "state.json").read_text())), range(1))
    assert reader.stored


def released(content):
    def run(folder: Path) -> None:
        source = folder / "released.pt"
        if isinstance(content, bytes):
            source.write_bytes(content)
        else:
            content(folder, source)
        import_released(source, folder / "snapshot")

    return run


def pickled(folder: Path, source: Path) -> None:
    torch.save({"pos_embed": Pickled(marker(folder))}, source)


def pickled_plainly(folder: Path, source: Path) -> None:
    source.write_bytes(pickle.dumps(Pickled(marker(folder))))


def packed(folder: Path, source: Path) -> None:
    """64 MiB of zeros in 64 KiB."""
    torch.save({"x": torch.zeros(2)}, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as plain, zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in plain.namelist():
            archive.writestr(name, bytes(2**26) if name.endswith("data/0") else plain.read(name))


def expanded(folder: Path, source: Path) -> None:
    """A model of 1.2 GB whose every tensor is one number."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MicroDiT(tiny_2(32)).state_dict().items()}
    torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, source)


# --- sets, references, documents


def a_set(change):
    def run(folder: Path) -> None:
        write_set(folder / "set", 3)
        edit_manifest(folder / "set", change)
        dataset = open_dataset(folder / "set")
        read_samples(dataset, range(dataset.samples))

    return run


def shard_elsewhere(manifest: dict) -> None:
    manifest["shards"][0]["file"] = "../../outside/secret.png"


def sample_without_end(manifest: dict) -> None:
    manifest["members"]["lat"]["shape"] = [10**9, 10**9, 10**9]


def set_of_a_device(folder: Path) -> None:
    write_set(folder / "set", 3)
    index = folder / "set" / json.loads((folder / "set" / "manifest.json").read_text())["index"]["file"]
    index.unlink()
    index.symlink_to("/dev/zero")
    edit_manifest(folder / "set", lambda manifest: manifest["index"].update(bytes=0))
    open_dataset(folder / "set")


def set_of_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "manifest.json")
    open_dataset(folder)


def reference(write, name: str):
    def run(folder: Path) -> None:
        write(folder, folder / name)
        for judge in LOADERS:
            LOADERS[judge] = lambda place, key, device: Judge("1" * 16, None)
        metrics = PictureMetrics(MetricsConfig(names=("fid",), every=1, num_pictures=2), CPU)
        metrics.load(folder / name)

    return run


def pickled_statistics(folder: Path, path: Path) -> None:
    np.savez(path, mu=np.array([Pickled(marker(folder))], dtype=object), sigma=np.eye(2048))


def statistics_of_terabytes(folder: Path, path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (2**22, 2**22)})
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", header.getvalue())


def document(name: str, content: bytes):
    def run(folder: Path) -> None:
        (folder / name).write_bytes(content)
        load_config(folder / name)

    return run


def endless(read):
    def run(folder: Path) -> None:
        (folder / "endless.json").symlink_to("/dev/zero")
        read(folder / "endless.json")

    return run


def large_model(folder: Path) -> None:
    recipe = {**TINY, "model": {**TINY["model"], "depth": 10**9, "dim": 2**40}}
    (folder / "config.json").write_text(json.dumps({"recipe": recipe}))
    load_config(folder / "config.json")


# --- what is written


def run_directory(name: str):
    def run(folder: Path) -> None:
        (folder / "samples").mkdir()
        (folder / name).symlink_to("../" * (name.count("/") + 1) + "outside/secret.txt")
        check_place(folder)

    return run


def partial_that_is_a_link(folder: Path) -> list[str]:
    for name in ("new", "old"):
        (folder / f".{name}.partial").symlink_to(folder.parent / "outside" / "secret.txt")
    (folder / ".set.partial").symlink_to(folder.parent / "outside")
    (folder / "set").symlink_to(folder.parent / "outside")
    (folder / "old").write_text("before")
    for name in ("new", "old"):
        write_text(folder / name, "written")
    with replacing_directory(folder / "set") as partial:
        (partial / "secret.txt").write_text("written")
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_symlink())
    return [*there, *((folder / name).read_text() for name in ("new", "old", "set/secret.txt"))]


FILES = [
    *(Case(f"safetensors: {name}", weights_of(name), "raw.safetensors: ") for name in HEADERS),
    Case("latest -> /etc", snapshot_elsewhere, "not a snapshot"),
    Case("checksums of other files", snapshot_of_other_files, "is missing, here or in checksums.json"),
    Case("averages: names", averages_of_other_files, "averages.json: is not as it was written"),
    Case("averages: shapes", averages_of_two_shapes, "not as they were written"),
    Case("checkpoint: names", checkpoint_of_other_files, "state.json is not as it was written"),
    Case("checkpoint: fragments", checkpoint_of_odd_fragments, "is not as it was written"),
    Case("released: a pickle", released(pickled), "would run"),
    Case("released: a pickle alone", released(pickled_plainly), "no plain file of tensors"),
    Case("released: packed", released(packed), "no plain file of tensors"),
    Case("released: views of one number", released(expanded), "its tensors would take"),
    Case("released: gzip", released(gzip.compress(bytes(2**20))), "no plain file of tensors"),
    Case("set: names", a_set(shard_elsewhere), "is not the name of a file in this directory"),
    Case("set: shapes", a_set(sample_without_end), "manifest.json: a sample takes .* bytes"),
    Case("set: a device", set_of_a_device, "no regular file"),
    Case("set: a pipe", set_of_a_pipe, "no regular file"),
    Case("reference: a pickle", reference(pickled_statistics, "a.npz"), "mu and sigma have shapes"),
    Case("reference: terabytes", reference(statistics_of_terabytes, "a.npz"), "mu and sigma have shapes"),
    Case(
        "reference: safetensors",
        reference(lambda folder, path: path.write_bytes(HEADERS["10 GB"]), "a.safetensors"),
        "no features of a reference",
    ),
    Case("recipe: JSON of little text", document("a.json", b"[" + b"[]," * 2**24 + b"[]]"), "MiB of memory"),
    Case("recipe: long JSON", document("a.json", b" " * (2**26 + 1)), "has more than 67108864 bytes"),
    Case("recipe: nested JSON", document("a.json", b"[" * 2**20), "nested more than 64 deep"),
    Case("recipe: long TOML", document("a.toml", b"a = [" + b"1," * 2**20 + b"]"), "longer than 1048576 bytes"),
    Case("recipe: a model", large_model, "config.json"),
    Case("recipe: a device", endless(load_config), "no regular file"),
    Case("prompts: a device", endless(lambda path: read_prompts(str(path), None, 4)), "no regular file"),  # pyright: ignore[reportArgumentType]
    Case("run: metrics", run_directory("metrics.jsonl"), "metrics.jsonl: is a link"),
    Case("run: lock", run_directory("run.lock"), "run.lock: is a link"),
    Case("run: samples", run_directory("samples/00000001.png"), "00000001.png: is a link"),
    Case("partial names", partial_that_is_a_link, r"^new\nold\nset\nset/secret.txt\nwritten\nwritten\nwritten$"),
]


def test_the_bait_would_be_taken(tmp_path):
    (folder := tmp_path / "case").mkdir()
    for take in (lambda: pickle.loads(pickle.dumps(Pickled(marker(folder)))), lambda: exec(code(folder))):
        take()
        assert marker(folder).read_text() == "executed"
        marker(folder).unlink()


def test_sources(tmp_path):
    pytest.importorskip("datasets")
    check("tests.hostile_sources", "SOURCES", tmp_path / "root")


def test_files(tmp_path):
    check(__name__, "FILES", tmp_path / "root")


def test_towers(tmp_path):
    pytest.importorskip("diffusers")
    check("tests.hostile_towers", "TOWERS", tmp_path / "root")
