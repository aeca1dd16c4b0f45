"""One order, two engines: the same bits for every step, from any step, for any number of processes; and whatever
happens to the files, right samples or a ShardError that names the file and the sample."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.data import shards
from mdit.data.manifest import ShardError
from mdit.data.order import build_order
from mdit.data.shards import open_dataset
from tests.latent_sets import changed, is_right, loader, make_manifest_match, sample_bytes, write_set

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
without_dali = pytest.mark.skipif(not DALI, reason="DALI is not installed")
both_engines = pytest.mark.parametrize("engine", ["native", pytest.param("dali", marks=without_dali)])
both_kinds = pytest.mark.parametrize("kind", ["f16", "i8b64"])
EPOCH = 67  # samples

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """At whether a shard is still the same file: so that what is found is found by reading."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SECONDS_BETWEEN_CHECKS", 1e9)
        yield


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """For each kind of embeddings, two directories of 40 and 27 samples in a few shards."""
    folder = tmp_path_factory.mktemp("sets")
    return {
        kind: [
            write_set(folder / kind / "a", 40, embeddings=kind),
            write_set(folder / kind / "b", 27, first=40, embeddings=kind),
        ]
        for kind in ("f16", "i8b64")
    }


def take(count, *args, **options):
    with loader(*args, **options) as batches:
        return list(islice(batches, count))


def order_of(directories, batch, seed=0, weights=None):
    return build_order([open_dataset(directory).shard_sizes for directory in directories], weights, batch, seed)


# The same bits


@both_engines
@both_kinds
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_every_step_holds_what_the_order_says(sets, engine, kind, weights):
    order = order_of(sets[kind], 8, 5, weights)
    batches = take(20, sets[kind], engine, batch=8, seed=5, weights=weights)  # more than two epochs
    assert [batch.step for batch in batches] == list(range(20))
    for step, batch in enumerate(batches):  # all were kept while later ones were read
        assert np.array_equal(batch.samples, order.batch(step))
        assert is_right(batch, kind)


@both_engines
@both_kinds
@settings(max_examples=4, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 2**40), st.permutations([1, 2, 4, 8, 16]))
def test_any_number_of_processes_goes_on_from_any_step(sets, engine, kind, step, seed, world_sizes):
    """A run that is stopped again and again and continued by another number of processes."""
    order = order_of(sets[kind], 16, seed)
    for world_size in world_sizes:
        share, steps = 16 // world_size, 2
        for rank in range(world_size):
            options = dict(start_step=step, rank=rank, world_size=world_size, seed=seed)
            for following, batch in enumerate(take(steps, sets[kind], engine, **options)):
                assert batch.step == step + following
                assert np.array_equal(batch.samples, order.batch(batch.step)[rank * share : (rank + 1) * share])
                assert is_right(batch, kind)
        step += steps


@both_engines
def test_a_batch_outlives_its_loader(sets, engine):
    batches = loader(sets["f16"], engine)
    kept = [next(batches) for _ in range(5)]
    batches.close()
    del batches
    assert all(is_right(batch) for batch in kept)


@pytest.mark.gpu
@both_engines
@both_kinds
def test_batches_arrive_whole_on_a_gpu(sets, engine, kind):
    kept = []
    with loader(sets[kind], engine, device="cuda") as batches:
        for batch in islice(batches, 40):
            assert batch.latents_NCHW.is_cuda and batch.captions_NLC.is_cuda
            kept.append((batch, batch.captions_NLC.clone()))
            torch.cuda._sleep(10**6)  # so that copies and readers of a batch queue up
    for batch, copy in kept:
        assert is_right(batch, kind) and torch.equal(batch.captions_NLC, copy)


# Ends


def threads():
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("mdit-"))


@both_engines
def test_closing_ends_the_threads_and_the_batches(sets, engine):
    assert threads() == []
    batches = loader(sets["f16"], engine)
    next(batches)
    assert "mdit-read-ahead" in threads()
    batches.close()
    batches.close()
    assert threads() == []
    with pytest.raises(StopIteration):
        next(batches)
    forgotten = loader(sets["f16"], engine)
    next(forgotten)
    del forgotten
    assert threads() == []


# Faults. Every damage is done to a set of 67 samples, before it is opened or while it is read.


def cut(at):
    def damage(path, start, end):
        os.truncate(path, at(start, end))

    return damage


def replace(path, start, end):
    """By a file of the same size."""
    content, other = path.read_bytes(), path.with_suffix(".other")
    other.write_bytes(content[: start + 600] + b"other" + content[start + 605 :])
    os.replace(other, path)


def empty_member(path, start, end):
    """The sample's latents have no bytes; all that follows moves up."""
    rewritten = BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=rewritten, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for member in old.getmembers():
            content = old.extractfile(member).read()
            if member.name.endswith(".lat.bin") and start < member.offset < end:
                content = b""
            member.size = len(content)
            new.addfile(member, BytesIO(content))
    with open(path, "r+b") as file:
        file.truncate(file.write(rewritten.getvalue()))


def and_manifest(damage):
    def damage_all(path, start, end):
        damage(path, start, end)
        make_manifest_match(path.parent)

    return damage_all


DAMAGES = {
    "missing": lambda path, start, end: path.unlink(),
    "empty": cut(lambda start, end: 0),
    "cut in the sample": cut(lambda start, end: (start + end) // 2),
    "replaced": replace,
    "member without bytes": empty_member,
    "cut in the sample, and manifest": and_manifest(cut(lambda start, end: (start + end) // 2)),
    "replaced, and manifest": and_manifest(replace),
    "member without bytes, and manifest": and_manifest(empty_member),
}


def read_until_error(batches, epochs=3, kind="f16"):
    """The ShardError that reading ends with; everything before it must be right. None when there is none."""
    try:
        for batch in islice(batches, epochs * EPOCH // len(next(batches).samples)):
            assert is_right(batch, kind)
    except ShardError as error:
        with pytest.raises(StopIteration):
            next(batches)
        return str(error)
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Path(write_set(tmp_path_factory.mktemp("whole") / "set", EPOCH))


@pytest.fixture
def directory(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


def open_and_read(directory, engine):
    """The ShardError of a set that is damaged before it is opened."""
    try:
        with loader([directory], engine) as batches:
            return read_until_error(batches)
    except ShardError as error:
        return str(error)


@both_engines
@pytest.mark.parametrize("when", ["before opening", "while reading"])
@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_shard(directory, monkeypatch, engine, when, name):
    by_name = name in ("missing", "replaced", "replaced, and manifest") and when == "while reading"
    if by_name:
        monkeypatch.setattr(shards, "SECONDS_BETWEEN_CHECKS", 0)
    dataset, shard = open_dataset(directory), 2
    first, end = sum(dataset.shard_sizes[:shard]), sum(dataset.shard_sizes[: shard + 1])
    sample = end - 1 if name.startswith("cut") else (first + end) // 2
    path, *span = sample_bytes(dataset, sample)
    if when == "before opening":
        DAMAGES[name](path, *span)
        error = open_and_read(directory, engine)
    else:
        with loader([directory], engine) as batches:
            assert is_right(next(batches))
            DAMAGES[name](path, *span)
            error = read_until_error(batches)
    assert error is not None and error.startswith(f"{path}: ")
    if name == "missing" or by_name:  # a shard may also be opened, or opened again, after the damage
        opened_after = rf"cannot open the shard|sample {sample} of the set is damaged: xxh3 is"
        assert re.search(rf"is missing, but .* of \d+ samples|was replaced|has gone|{opened_after}", error)
    elif name.startswith("empty"):
        assert first <= int(re.search(r"sample (\d+) of the set", error)[1]) < end
    elif name.startswith("member"):
        assert sample <= int(re.search(r"sample (\d+) of the set", error)[1]) < end
    else:
        assert f"sample {sample} of the set" in error


@both_engines
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_flipped_bit_of_a_sample_is_found_and_others_do_no_harm(whole, engine, data):
    dataset = open_dataset(whole)
    path = dataset.directory / data.draw(st.sampled_from(dataset.manifest.shards)).file
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    spans = [sample_bytes(dataset, sample) for sample in range(EPOCH)]
    hit = [sample for sample, (file, start, end) in enumerate(spans) if file == path and start <= at < end]
    with changed(path, bytes(content)), loader([whole], engine, batch=EPOCH) as batches:
        if hit:
            with pytest.raises(ShardError, match=f"{path}: sample {hit[0]} of the set is damaged: xxh3 is"):
                next(batches)
        else:
            assert is_right(next(batches))


@both_engines
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_shard_cut_anywhere_while_it_is_read(whole, engine, data):
    dataset = open_dataset(whole)
    path = dataset.directory / data.draw(st.sampled_from(dataset.manifest.shards)).file
    content = path.read_bytes()
    size = data.draw(st.integers(0, len(content) - 1))
    spans = [sample_bytes(dataset, sample) for sample in range(EPOCH)]
    lost = [sample for sample, (file, _, end) in enumerate(spans) if file == path and end > size]
    with changed(path, content), loader([whole], engine, batch=8) as batches:
        assert is_right(next(batches))
        os.truncate(path, size)
        error = read_until_error(batches)
    if lost:
        assert int(re.search(rf"{path}: sample (\d+) of the set is damaged: \d+ of \d+ bytes", error)[1]) in lost
    else:
        assert error is None  # nothing but the end of the archive is gone


@both_engines
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_index_that_is_not_of_these_shards(whole, engine, data):
    """Any byte of it changed, and the manifest made to match."""
    index, manifest = whole / "index.npy", whole / "manifest.json"
    content = bytearray(index.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with changed(manifest, manifest.read_bytes()), changed(index, bytes(content)):
        make_manifest_match(whole)
        error = open_and_read(whole, engine)
    header = len(content) - 24 * EPOCH
    if at >= header:
        assert f"sample {(at - header) // 24} of the set" in error
    else:
        assert error is None or error.startswith(f"{index}: ") or "manifest.json" in error


@both_engines
@pytest.mark.parametrize("change", ["cut", "overwritten", "replaced"])
def test_the_index_changes_while_it_is_read(directory, engine, change):
    index = directory / "index.npy"
    content = index.read_bytes()
    with loader([directory], engine) as batches:
        assert is_right(next(batches))
        if change == "cut":
            os.truncate(index, len(content) - 24 * EPOCH // 2)
        elif change == "overwritten":
            index.write_bytes(content[: -24 * EPOCH] + bytes(24 * EPOCH))
        else:
            index.unlink()
            index.write_bytes(bytes(content[::-1]))
        error = read_until_error(batches)
    if change == "replaced":
        assert error is None  # it is the old one that is open
    else:
        assert re.search(r"index.npy: .* cut short|shard_.*: sample \d+ of the set", error)


@both_engines
def test_files_of_another_set(directory, tmp_path, engine):
    other = Path(write_set(tmp_path / "other", EPOCH, first=100))
    for file, names in {
        "index.npy": "index.npy",
        "manifest.json": "index.npy|shard_",
        "shard_00000_001.tar": "shard_",
    }.items():
        mixed = shutil.copytree(directory, tmp_path / f"mixed {file}")
        shutil.copy(other / file, mixed / file)
        error = open_and_read(mixed, engine)
        assert re.match(rf"{mixed}/({names}).*: ", error), error
        make_manifest_match(mixed)
        if file != "manifest.json":  # which then is right
            assert re.search(r"shard_\S+.tar: sample \d+ of the set", open_and_read(mixed, engine))


@both_engines
def test_no_signal_and_no_hang(directory, engine):
    """In a process of its own: files are cut while they are read, and the interpreter ends with loaders open."""
    program = f"""
import os
from mdit.data.loader import build_loader
from mdit.data.manifest import ShardError
def loader():
    return build_loader([{str(directory)!r}], global_batch_size=16, seed=0, start_step=0, rank=0, world_size=1,
                        device="cpu", engine={engine!r})
fine, cut = loader(), loader()
print(next(fine).step, next(cut).step)
for path in os.scandir({str(directory)!r}):
    if path.name.endswith((".tar", ".npy", ".idx")):
        os.truncate(path, 300)
try:
    while True:
        next(cut)
except ShardError as error:
    print("ShardError")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 0\nShardError\n", "")
