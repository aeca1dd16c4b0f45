"""The kit of tools/first_contact.py: what a GPU machine lacks that has no network, in packs of one folder each.

wheels.tar.gz     packages beside torch
kernels.tar.gz    a Triton cache, built ahead
training.tar.gz   emoji scenes and their recipe
COMMIT            the commit's name
"""

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Nothing else of mdit: the packages it needs may only come with the kit.
from mdit.documents import UserError, read_json, to_json
from mdit.provenance import commit

ROOT = Path(__file__).resolve().parents[1]

# Wheels beside torch, numpy, pillow, tensorboard and transformers, of the versions in constraints.txt.
WHEELS = (
    *("pydantic", "pydantic_core", "annotated-types", "typing_extensions", "typing-inspection"),
    *("webdataset", "braceexpand", "xxhash", "safetensors", "tqdm"),
    *("hjson", "einops", "msgpack", "ninja", "py-cpuinfo", "psutil", "packaging"),  # DeepSpeed's
)
BUILT = ("deepspeed",)  # from source, of Python alone
TARGET_PYTHON = "3.12"
PLATFORMS = [f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "2010", "1")]

# The scenes of configs/emoji_64.toml that a few minutes can learn, in a set small enough to travel.
SCENES = (
    "data.precompute.source.objects=200",
    "data.precompute.source.scenes=3500",
    "data.precompute.source.validation_scenes=256",
    'data.precompute.embeddings="i8b64"',
    "training.num_steps=100000",  # until time is up: neither learning rate nor mask comes to fall
    "ema.start_step=250",
    "report.log_every=25",
    "report.validate_every=500",
    "report.sample_every=250",
    "report.snapshot_every=0",
    "report.checkpoint_every=100000",
)


def prepare(kit: Path, python: Path | None) -> None:
    """Fill the kit with what it does not have yet. Raises UserError where something cannot be had."""
    kit.mkdir(parents=True, exist_ok=True)
    (kit / "COMMIT").write_text(f"{commit() or 'unknown'}\n", encoding="utf-8")
    for name, make in KIT.items():
        if (archive := kit / f"{name}.tar.gz").exists():
            continue
        if name == "kernels" and python is None:
            print("kernels: not built ahead; --python says with what")
            continue
        with arriving_pack(archive) as folder:
            make(folder, str(python))
    sizes = {path.name: path.stat().st_size / 2**20 for path in sorted(kit.iterdir())}
    print(*(f"{size:7.2f} MiB  {name}" for name, size in sizes.items()), sep="\n")
    print(f"{sum(sizes.values()):7.2f} MiB in all")


def fetch_wheels(folder: Path, python: str) -> None:
    pip = [sys.executable, "-m", "pip"]
    options = ["-q", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    wanted = ["--only-binary=:all:", "--implementation", "cp", "--python-version", TARGET_PYTHON]
    wanted += [word for platform in PLATFORMS for word in ("--platform", platform)]
    call([*pip, "download", *options, *wanted, "-d", str(folder), *WHEELS])
    call([*pip, "wheel", *options, "-w", str(folder), *BUILT], DS_BUILD_OPS="0")


def build_kernels(folder: Path, python: str) -> None:
    build = [python, "-m", "tools.build_kernels", "--cache", str(folder)]
    call([*build, "--micro_batch", "128", "--recipe", "configs/emoji_64.toml"], PYTHONPATH=str(ROOT))


def make_training_set(folder: Path, python: str) -> None:
    """The recipe and its sets, all in `folder`."""
    from mdit import files
    from mdit.config import load_config
    from mdit.precompute import precompute as make_sets

    places = [f'data.train=["{folder / "train"}"]', f"data.validation={folder / 'validation'}"]
    config = load_config(ROOT / "configs" / "emoji_64.toml", [*SCENES, *places])
    make_sets(config)
    files.write_json(folder / "recipe.json", {"recipe": config.model_dump(mode="json", exclude_none=True)})


def call(command: list[str], **environment: str) -> None:
    if code := subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT).returncode:
        raise UserError(f"{shlex.join(command)}: exit code {code}")


KIT = {"wheels": fetch_wheels, "kernels": build_kernels, "training": make_training_set}


@contextmanager
def arriving(place: Path) -> Iterator[Path]:
    """A name to make a file or a folder at, which gets its own at the end of the block if all went well."""
    partial = place.with_name(f"{place.name}.partial")
    yield partial
    partial.replace(place)


def pack(folder: Path, target: Path, choose: Callable[[tarfile.TarInfo], Any] = lambda info: info) -> None:
    """Pack what `choose` leaves of a folder into a file that is whole, or as it was."""
    with arriving(target) as partial, tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname=folder.name, filter=choose)


def unpack(archive: Path, place: Path) -> None:
    """Put the one folder that an archive holds at `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder, tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
        (inside,) = Path(folder).iterdir()
        inside.rename(place)


def move_cache(cache: Path) -> None:
    """Let Triton find in `cache` what was built in another place: its lists of files name them by absolute paths."""
    for listing in cache.glob("*/__grp__*"):
        content = read_json(listing)
        paths = {name: str(listing.with_name(Path(path).name)) for name, path in content["child_paths"].items()}
        listing.write_text(to_json(content | {"child_paths": paths}), encoding="utf-8")


@contextmanager
def arriving_pack(place: Path) -> Iterator[Path]:
    """A new folder, which is packed at `place` once all went well."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = Path(folder, place.name.removesuffix(".tar.gz"))
        new.mkdir()
        yield new
        pack(new, place)
