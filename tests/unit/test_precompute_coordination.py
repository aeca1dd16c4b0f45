"""Sets in the making: going on after an interruption, several processes at once, and sets that are changed."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mdit.config import UserError
from mdit.data.shards import open_dataset
from mdit.data.writer import PartWriter
from mdit.precompute import coordination
from mdit.precompute.build import build_sets, check_source
from mdit.sources import Rejected, Slice, Source
from tests.picture_sets import (
    SIZE,
    WordCounts,
    captions_of,
    contents,
    interrupted,
    job_of,
    make,
    pictures,
    towers,
    without_seconds,
)
from tests.processes import run_forked


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """57 pictures in six parts, made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make(pictures(57), folder)
    return contents(folder)


# --- interrupted


@pytest.mark.parametrize("sizes", [(SIZE,), (SIZE, 11)], ids=["one size", "two"])
def test_interrupted_again_and_again_it_gives_the_same_and_makes_no_part_twice(
    tmp_path, monkeypatch, undisturbed, sizes
):
    began, text = Counter(), WordCounts()

    def begin(self, directory, part, *rest, begin=PartWriter.__init__):
        began[directory.name, part] += 1
        begin(self, directory, part, *rest)

    for after in (0, 1, 25, 21, 13):
        with interrupted(monkeypatch, after) as patch:
            patch.setattr(PartWriter, "__init__", begin)
            make(pictures(57), tmp_path, towers(sizes=sizes), sizes=sizes)
        assert not (tmp_path / "8").exists()
    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "__init__", begin)
        make(pictures(57), tmp_path, towers(text, sizes), sizes=sizes)
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("8/")} == undisturbed
    assert len(began) == 6 * len(sizes) and sum(began.values()) <= len(began) + 5 * len(sizes)
    assert len(text.asked) < 57 * 5 / 7  # some parts were there
    assert {path.name for path in tmp_path.iterdir()} == {str(size) for size in sizes}


def test_one_of_two_sets_is_finished_the_other_begun(tmp_path, monkeypatch, undisturbed):
    make(pictures(57), tmp_path)
    with interrupted(monkeypatch, after=30):
        make(pictures(57), tmp_path, towers(sizes=(SIZE, 11)), sizes=(SIZE, 11))
    make(pictures(57), tmp_path, towers(sizes=(SIZE, 11)), sizes=(SIZE, 11))
    assert open_dataset(tmp_path / "11").samples == 57
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("8/")} == undisturbed


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"build_settings": {"source": "other"}}, "source = 'test', but this command's is 'other'"),
        ({"build_settings": {"source": "test", "limit": 3}}, "limit = None, but this command's is 3"),
        ({"shard_bytes": 999}, "shard_bytes = 1000000000, but this command's is 999"),
        ({"embeddings": "i8b64"}, "layout.embeddings = 'f16', but this command's is 'i8b64'"),
        ({"producer": towers(batch_size=5)}, "batch_size = 4, but this command's is 5"),
        ({"producer": towers(WordCounts(weights="2" * 16))}, "encoders.text.weights = '1{16}', but this .* is '2{16}'"),
        ({"items": pictures(47)}, r"parts.0000\d = '\w{16}', but this command's is '\w{16}'"),
        ({"items": pictures(67)}, r"parts.0000\d = '\w{16}', but this command's is '\w{16}'"),
    ],
)
def test_a_set_is_not_gone_on_with_in_another_way(tmp_path, monkeypatch, changes, message):
    with interrupted(monkeypatch, after=15):
        make(pictures(57), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"\.8.partial/plan.json: was begun with " + message) as error:
        make(**{"items": pictures(57), "folder": tmp_path, **changes})
    assert "remove" in str(error.value) and "choose another" in str(error.value)
    assert contents(tmp_path) == before


# --- several processes: tests/end_to_end/test_precompute_launcher.py has real ones


HOLD = """
import fcntl, os, sys
lock = os.open(sys.argv[1], os.O_RDWR)
fcntl.lockf(lock, fcntl.LOCK_EX, int(sys.argv[3]), int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def hold(lock, start, length):
    """Another process has locked these bytes."""
    arguments = [sys.executable, "-c", HOLD, lock, str(start), str(length)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        yield
        other.kill()


def test_a_part_that_another_process_is_at_is_left_to_it_until_it_ends(tmp_path, monkeypatch, undisturbed):
    with interrupted(monkeypatch, after=25):
        make(pictures(57), tmp_path)
    with hold(tmp_path / ".8.lock", 1 + 4, 1):
        outcome = build_sets(job_of(pictures(57), tmp_path), towers())
        assert outcome.left == {tmp_path / "8": 1} and outcome.finished == {}
    make(pictures(57), tmp_path)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("joined", [False, True])
def test_a_set_that_another_process_is_finishing_is_left_to_it(tmp_path, monkeypatch, undisturbed, joined):
    """Parts are joined and their records removed at any moment, also while this process reads them."""

    def stop(*arguments, finish_set=coordination.finish_set):
        if joined:
            finish_set(*arguments)
        raise KeyboardInterrupt

    def read(directory, known):
        raise FileNotFoundError(directory / "part_00003.json")

    with monkeypatch.context() as patch:
        patch.setattr(coordination, "finish_set", stop)
        with pytest.raises(KeyboardInterrupt):
            make(pictures(57), tmp_path)
    with monkeypatch.context() as patch, hold(tmp_path / ".8.lock", 1, 0):
        patch.setattr(coordination, "written_parts", read)
        outcome = build_sets(job_of(pictures(57), tmp_path), towers())
        assert outcome.left == {tmp_path / "8": 0} and outcome.finished == {}
    make(pictures(57), tmp_path)
    assert contents(tmp_path) == undisturbed


# --- sets that are there grow, or have parts made again


def tars(numbers, **changed):
    """A source of parts of ten pictures each, called 00000.tar, ...; `changed` are captions of parts by number."""
    parts = []
    for number in numbers:
        items = pictures(10 * number + 10)[10 * number :]
        if caption := changed.get(f"part_{number}"):
            items = [dataclasses.replace(item, caption=caption) for item in items]
        parts.append(Slice(f"{number:05d}.tar", items, np.arange(10)))
    return Source(parts, 10 * len(parts))


def make_of(source, folder, producer=None, **changes):
    job = dataclasses.replace(job_of([], folder, **changes), source=source)
    outcome = build_sets(job, producer or towers())
    assert not outcome.left
    return folder / "8"


@pytest.fixture(scope="module")
def three_tars(tmp_path_factory):
    return make_of(tars(range(3)), tmp_path_factory.mktemp("three tars"))


def bytes_of(directory):
    """Content of the set, whatever its files are called: shards and DALI's indexes, index, report, plan."""
    manifest = open_dataset(directory).manifest
    names = [entry.file for entry in (*manifest.shards, *manifest.dali_indexes, manifest.index)]
    report = without_seconds(json.loads((directory / "report.json").read_text()))
    return [(directory / name).read_bytes() for name in names], report, (directory / "plan.json").read_text()


def test_a_set_grows_by_what_is_new_in_the_source(tmp_path):
    at_once = make_of(tars(range(6)), tmp_path / "at once")
    grown, text = make_of(tars(range(4)), tmp_path / "grown"), WordCounts()
    old, before = open_dataset(grown), {path.name: path.stat().st_mtime_ns for path in grown.glob("shard_*")}
    make_of(tars([1, 2, 3, 4, 5]), tmp_path / "grown", towers(text), extend=True)  # 00000.tar is not needed any more
    assert bytes_of(grown) == bytes_of(at_once)
    assert [path.name for path in grown.glob("shard_*")] == [path.name for path in at_once.glob("shard_*")]
    assert {*text.asked} == {item.caption for item in pictures(60)[40:]}
    assert all((grown / name).stat().st_mtime_ns == modified for name, modified in before.items())
    assert captions_of(old) == [item.caption for item in pictures(40)]  # a run that reads it goes on
    old.verify()
    assert [path.name for path in (tmp_path / "grown").iterdir()] == ["8"]
    manifest = (grown / "manifest.json").read_bytes()
    make_of(tars(range(6)), tmp_path / "grown", extend=True)
    assert (grown / "manifest.json").read_bytes() == manifest  # nothing is new


def test_one_part_is_made_again(tmp_path):
    new = tars(range(4), part_1="another caption")
    at_once, remade = make_of(new, tmp_path / "at once"), make_of(tars(range(4)), tmp_path / "remade")
    old, text = open_dataset(remade), WordCounts()
    with pytest.raises(UserError, match=r"8: was made when the source held something else in 1 part \(00001.tar\)"):
        check_source(new, remade, None)
    check_source(tars([0, 2]), remade, None)  # what is gone is not missed
    with pytest.raises(UserError, match=r"8: was made when .* other parts \(4 parts .* 1 part \(00007.tar\)"):
        check_source(tars([7]), remade, None)
    make_of(new, tmp_path / "remade", towers(text), remake=["00001.tar"])
    assert bytes_of(remade) == bytes_of(at_once) and text.asked == ["another caption"]
    assert captions_of(old) == [item.caption for item in pictures(40)]
    check_source(new, remade, None)
    newer = tars(range(5), part_1="another caption", part_2="and again")
    make_of(newer, tmp_path / "remade", extend=True)  # makes what changed as well
    assert bytes_of(remade) == bytes_of(make_of(newer, tmp_path / "at once again"))
    assert captions_of(old) == [item.caption for item in pictures(40)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"remake": ["00004.tar"]}, r"--remake 00004.tar: .*8 has no such part \(did you mean 0000\d.tar\?\)"),
        (
            {"extend": True, "producer": towers(batch_size=5)},
            "plan.json: was made with batch_size = 4, but this .* is 5",
        ),
        ({"extend": True, "producer": towers(WordCounts(weights="2" * 16))}, "encoders.text.weights = '1{16}', but"),
        ({"remake": ["00000.tar"], "source": tars(range(1, 5))}, "00000.tar: .* but the source has it no longer"),
        ({"remake": ["00000.tar"], "source": tars(range(5), part_1="x")}, r"else in 1 part \(00001.tar\); --extend"),
    ],
)
def test_a_change_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path, three_tars, changes, message):
    shutil.copytree(three_tars, tmp_path / "8")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        make_of(**{"source": tars(range(5)), "folder": tmp_path, **changes})
    assert contents(tmp_path) == before


def test_a_change_that_leaves_out_too_much_leaves_the_set_as_it_is(tmp_path, three_tars):
    shutil.copytree(three_tars, tmp_path / "8")
    manifest, source = (tmp_path / "8" / "manifest.json").read_bytes(), tars(range(4))
    source.parts[3].split[1:] = [Rejected("x", "no caption")] * 9
    with pytest.raises(UserError, match="as 90.0% is left out"):
        make_of(source, tmp_path, extend=True)
    assert (tmp_path / "8" / "manifest.json").read_bytes() == manifest
    make_of(source, tmp_path, extend=True, max_rejected=0.9)
    assert open_dataset(tmp_path / "8").samples == 31


# Writes, renamings and removals before the last one of them at which a process is killed.
BEFORE_THE_END = (1, 2, 3, 5, 8, 13, 30, 100)


def count_and_kill(folders, new):
    """Make or change the first set and count the writes, renamings and removals that takes; do it with each of the
    others in a process of its own, which is killed so many before the end."""
    done, last = [], None

    def patched(function):
        def watched(*arguments, **options):
            if len(done) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(function)
            return function(*arguments, **options)

        return watched

    for owner, names in {
        Path: ("replace", "rename", "unlink", "write_text", "mkdir"),
        shutil: ("rmtree",),
        PartWriter: ("write",),
        os: ("fsync", "pwrite"),
    }.items():
        for name in names:
            setattr(owner, name, patched(getattr(owner, name)))
    make_of(new, folders[0], extend=True)
    count, done = len(done), []
    for before_the_end, folder in zip(BEFORE_THE_END, folders[1:], strict=True):
        last = count - before_the_end
        if (child := os.fork()) == 0:
            try:
                make_of(new, folder, extend=True)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, (count, last)


@pytest.mark.parametrize("there", [True, False], ids=["a change", "a new set"])
def test_killed_at_any_moment_there_is_what_was_there_or_the_new_set(tmp_path, three_tars, there):
    new = tars(range(5), part_1="another caption")
    wanted = bytes_of(make_of(new, tmp_path / "at once"))
    before, after = [item.caption for item in pictures(30)], captions_of(open_dataset(tmp_path / "at once" / "8"))
    folders = [tmp_path / str(number) for number in range(len(BEFORE_THE_END) + 1)]
    for folder in folders:
        shutil.copytree(three_tars.parent, folder) if there else folder.mkdir()
    ended = run_forked(count_and_kill, folders, new)
    assert ended.returncode == 0, ended.output
    found = []
    for folder in folders[1:]:
        found.append(False)
        if there or (folder / "8").exists():
            dataset = open_dataset(folder / "8")
            dataset.verify()
            found[-1] = captions_of(dataset) == after
            assert found[-1] or captions_of(dataset) == before
        make_of(new, folder, extend=True)
        assert bytes_of(folder / "8") == wanted
        assert [path.name for path in folder.iterdir()] == ["8"]
    assert found == sorted(found, reverse=True) and {*found} == {False, True}, found


@pytest.mark.parametrize("file", ["plan.json", "report.json"])
@pytest.mark.parametrize("text", ["{", '{"a": 1, "a": 2}', "[]", '{"parts": 3}', '{"a":' * 9000 + "1" + "}" * 9000])
def test_damaged_documents_of_a_set_are_one_line(tmp_path, three_tars, file, text):
    shutil.copytree(three_tars, tmp_path / "8")
    (tmp_path / "8" / file).write_text(text)
    with pytest.raises(UserError, match=f"^{tmp_path / '8' / file}: ") as error:
        make_of(tars(range(4)), tmp_path, extend=True)
    assert len(str(error.value)) < 2100 and "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"8"}


@pytest.mark.parametrize("file", ["plan.json", "part_00000.json", "part_00000.npy"])
def test_damaged_documents_of_a_set_in_the_making_are_one_line(tmp_path, monkeypatch, file):
    with interrupted(monkeypatch, after=25):
        make(pictures(57), tmp_path)
    (path := tmp_path / ".8.partial" / file).write_text("{")
    with pytest.raises(UserError, match=f"^{path}: not "):
        make(pictures(57), tmp_path)
