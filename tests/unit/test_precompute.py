"""From parts of a source to sets: what is written, what is left out and why, and going on after an interruption."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import mdit.precompute.coordination as in_progress
from mdit.config import UserError
from mdit.data.shards import open_dataset, read_samples
from mdit.data.writer import PartWriter
from mdit.encoders import build_image_encoder
from mdit.precompute.build import BuildJob, build_sets, check_source
from mdit.precompute.decoders import build_decoder
from mdit.precompute.pipeline import CaptionCache, EncodingPipeline, ahead
from mdit.precompute.report import merge, new_report, reject, summary
from mdit.sources import Picture, Rejected, Slice, Source, captioned, slices
from tests.processes import run_forked

SIZE, PER_PART = 8, 10


class WordCounts:
    """A text tower of 4 tokens of 64 channels that can be computed in one's head. Embeds what came before in the same
    call a little into each caption, as no real tower should, so that results tell how captions were batched."""

    max_tokens, channels = 4, 64

    def __init__(self, needs_fit=False, weights="1" * 16):
        self.needs_fit, self.mean_C, self.std_C, self.weights = needs_fit, None, None, weights
        self.fitted_on, self.asked = [], []

    def fit(self, captions):
        self.fitted_on.append(list(captions))
        self.mean_C, self.std_C, self.needs_fit = torch.full((64,), float(len(captions))), torch.ones(64), False

    def encode(self, captions):
        self.asked += captions
        return torch.stack([self.embedding(text) + i / 64 for i, text in enumerate(captions)])

    def embedding(self, caption):
        if caption == "infinite":
            return torch.full((4, 64), torch.inf)
        return torch.full((4, 64), float(len(caption.split())))

    def describe(self):
        statistics = {} if self.mean_C is None else {"mean": self.mean_C.tolist(), "std": self.std_C.tolist()}
        return {"id": "words", "max_tokens": 4, "channels": 64, "weights": self.weights, **statistics}


def png(number, size=(20, 12)):
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def pictures(count):
    return [Picture(f"picture {i}", png(i), f"{'a ' * (i % 5)}caption {i % 7}") for i in range(count)]


def source_of(items, per_part=PER_PART):
    return Source(slices(items, per_part), len(items))


def towers(text=None, sizes=(SIZE,), min_side=1, batch_size=4, overlap=True):
    decoder = build_decoder(sizes, min_side, torch.device("cpu"), engine="pillow")
    return EncodingPipeline(build_image_encoder("pixels"), text or WordCounts(), decoder, batch_size, overlap)


def job_of(items, folder, sizes=(SIZE,), **changes):
    values = {
        "sets": {size: folder / str(size) for size in sizes},
        "build_settings": {"source": "test"},
        "progress": False,
    }
    return BuildJob(source=source_of(items), **{**values, **changes})


def make(items, folder, producer=None, **changes):
    outcome = build_sets(job_of(items, folder, **changes), producer or towers())
    assert not outcome.left
    return outcome.finished


def contents(folder):
    """Path -> bytes, and of reports all but the time that was needed."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    reports = {path: json.loads(data) for path, data in found.items() if path.endswith("report.json")}
    return found | {path: without_seconds(report) for path, report in reports.items()}


def without_seconds(report):
    parts = {name: without_seconds(part) for name, part in report.get("parts", {}).items()}
    return {**report, "seconds": sorted(report["seconds"]), "parts": parts}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """57 pictures in six parts, made in one go."""
    folder = tmp_path_factory.mktemp("undisturbed")
    make(pictures(57), folder)
    return contents(folder)


# --- what is written


def test_samples_are_encoded_and_in_the_order_of_reading(tmp_path):
    items, text = pictures(23), WordCounts()
    make(items, tmp_path, towers(text))
    dataset = open_dataset(tmp_path / "8")
    latents, captions, texts = read_samples(dataset, range(dataset.samples))
    assert texts == [item.caption for item in items]
    decoder = build_decoder([SIZE], 1, torch.device("cpu"), engine="pillow")
    images = decoder([item.image for item in items]).images[SIZE]
    expected = 1.5 * (images.permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(latents.float(), expected, atol=1e-3, rtol=1e-3)
    words = torch.tensor([float(len(caption.split())) for caption in texts])
    assert (captions.float().mean((1, 2)) - words).abs().max() < 1
    assert dataset.fingerprint == {"source": "test", "image_size": 8}
    assert dataset.encoders["text"] == text.describe()
    assert len(dataset.shard_sizes) == 3
    report = json.loads((tmp_path / "8" / "report.json").read_text())
    parts = report.pop("parts")
    assert report.pop("seconds")["cpu"] > 0
    assert report == {"seen": 23, "written": 23, "rejected": {}}
    assert {name: part["written"] for name, part in parts.items()} == {"00000": 8, "00001": 8, "00002": 7}


def test_shards_are_of_the_size_asked_for_and_embeddings_in_8_bits(tmp_path):
    make(pictures(20), tmp_path, shard_bytes=1, embeddings="i8b64")
    dataset = open_dataset(tmp_path / "8")
    assert dataset.shard_sizes == [1] * 20 and dataset.layout.embeddings == "i8b64"
    dataset.verify()


def test_a_caption_is_embedded_once_in_each_part(tmp_path):
    text = WordCounts()
    make(pictures(30), tmp_path, towers(text))
    expected = Counter()
    for part in range(3):
        expected.update({item.caption for item in pictures(30)[10 * part : 10 * part + 10]})
    assert Counter(text.asked) == expected


def test_two_sizes_at_once_are_the_same_as_two_runs(tmp_path):
    items = pictures(25) + [Picture("tiny", png(9, (9, 9)), "x"), Picture("torn", png(1)[:50], "x")]
    make(items, tmp_path / "both", towers(sizes=(8, 11), min_side=10), sizes=(8, 11))
    for size in (8, 11):
        make(items, tmp_path / "each", towers(sizes=(size,), min_side=10), sizes=(size,))
    assert contents(tmp_path / "both") == contents(tmp_path / "each")
    assert open_dataset(tmp_path / "both" / "11").samples == 25


def test_without_overlap_it_is_the_same(tmp_path, undisturbed):
    make(pictures(57), tmp_path, towers(overlap=False))
    assert contents(tmp_path) == undisturbed


# --- what is left out


def test_what_cannot_be_used_is_counted_by_reason_with_the_first_origins(tmp_path):
    items = pictures(40)
    items[3] = Rejected("d/3", "no caption")
    items[5] = dataclasses.replace(items[5], image=png(5)[:60])
    for i in range(10, 18):
        items[i] = dataclasses.replace(items[i], image=png(i, (30, 9)))
    items[20] = dataclasses.replace(items[20], caption="infinite")
    items[21] = captioned("picture 21", items[21].image, "half a pair \ud83d")
    items[39] = Rejected("d/39 \udcff", "damaged archive")
    finished = make(items, tmp_path, towers(min_side=10))
    expected = {
        "damaged archive": {"count": 1, "first": ["d/39 \\udcff"]},
        "no caption": {"count": 1, "first": ["d/3"]},
        "not decodable": {"count": 1, "first": ["picture 5"]},
        "not finite": {"count": 1, "first": ["picture 20"]},
        "too small": {"count": 8, "first": [f"picture {i}" for i in range(10, 15)]},
        "unreadable caption": {"count": 1, "first": ["picture 21"]},
    }
    report = json.loads((tmp_path / "8" / "report.json").read_text())
    assert finished == {tmp_path / "8": report}
    seconds, parts = report["seconds"], report["parts"]
    assert report == {"seen": 40, "written": 27, "rejected": expected, "seconds": seconds, "parts": parts}
    assert merge(parts.values())["rejected"] == expected
    assert list(report["rejected"]) == sorted(expected)
    _, _, texts = read_samples(open_dataset(tmp_path / "8"), range(27))
    lost = {3, 5, *range(10, 18), 20, 21, 39}
    assert texts == [item.caption for i, item in enumerate(items) if i not in lost]
    assert "27 of 40 pictures; rejected: 1 damaged archive (d/39 \\udcff), " in summary(report)
    assert "8 too small (picture 10, ...)" in summary(report)


def test_reports_join_to_that_of_all():
    parts = []
    for part in range(3):
        report = new_report() | {"seen": 10, "written": 7}
        for i in range(3):
            reject(report, "too small", f"{part}/{i}")
        parts.append(report)
    reject(parts[2], "no caption", "last")
    joined = merge(parts)
    assert (joined["seen"], joined["written"]) == (30, 21)
    first = ["0/0", "0/1", "0/2", "1/0", "1/1"]
    assert joined["rejected"] == {
        "no caption": {"count": 1, "first": ["last"]},
        "too small": {"count": 9, "first": first},
    }
    timed = [{**report, "seconds": {device: 1.5}} for report, device in zip(parts, ("a", "b", "a"))]
    assert merge(timed)["seconds"] == {"a": 3.0, "b": 1.5}
    assert "seconds" not in joined and "seconds" not in merge([*timed[:2], parts[2]])  # made before there were times


def test_every_part_in_the_set_counts_its_own_time_once(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter(range(99)).__next__)  # each look at it takes a second
    monkeypatch.setattr("mdit.precompute.build.time", clock)
    with monkeypatch.context() as patch:
        interrupt(patch, after=25)
        with pytest.raises(KeyboardInterrupt):
            make(pictures(57), tmp_path, towers(sizes=(8, 16)), sizes=(8, 16))
    reports = make(pictures(57), tmp_path, towers(sizes=(8, 16)), sizes=(8, 16))
    seconds = [report["seconds"]["cpu"] for report in reports.values()]
    assert seconds == pytest.approx([6 * 64 / 320, 6 * 256 / 320])  # six parts of a second, shared by pixels


def test_more_left_out_than_may_be_is_no_set_until_it_may(tmp_path, monkeypatch):
    items = [Rejected(f"d/{i}", "no caption") if i % 3 else item for i, item in enumerate(pictures(30))]
    items[0] = dataclasses.replace(items[0], image=b"torn")
    message = (
        r"out/8: is not finished, as 70.0% is left out and --max_rejected is 0.5: 9 of 30 pictures; rejected: "
        r"20 no caption \(d/1, ...\), 1 not decodable \(picture 0\); all parts are made, .* --max_rejected 0.7 "
    )
    with pytest.raises(UserError, match=message):
        make(items, tmp_path / "out", towers(sizes=(8, 16)), sizes=(8, 16))
    assert not (tmp_path / "out" / "8").exists()
    monkeypatch.setattr(PartWriter, "write", None)  # nothing is made again
    make(items, tmp_path / "out", towers(sizes=(8, 16)), sizes=(8, 16), max_rejected=0.7)
    assert open_dataset(tmp_path / "out" / "8").samples == open_dataset(tmp_path / "out" / "16").samples == 9


def test_a_set_without_a_picture_is_no_set(tmp_path):
    with pytest.raises(UserError, match=r"out/8: no picture can be used: 0 of 12 pictures; rejected: 12 too small \("):
        make(pictures(12), tmp_path / "out", towers(min_side=13))
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(UserError, match="2 no caption"):
        make([Rejected("a", "no caption")] * 2, tmp_path / "out", towers(WordCounts(needs_fit=True)))


@pytest.mark.parametrize("limit", [1, 9, 10, 11, 24, 100])
def test_a_limit_takes_the_first_pictures(tmp_path, limit):
    items = pictures(30)
    items[2] = Rejected("d/2", "no caption")  # is no picture
    items[12] = dataclasses.replace(items[12], image=b"torn")  # is one
    text = WordCounts(needs_fit=True)
    make(items, tmp_path, towers(text), limit=limit)
    wanted = [item for item in items if isinstance(item, Picture)][:limit]
    dataset = open_dataset(tmp_path / "8")
    _, _, texts = read_samples(dataset, range(dataset.samples))
    assert texts == [item.caption for item in wanted if item.image != b"torn"]
    assert text.fitted_on == [[item.caption for item in wanted]]


# --- text statistics


def test_statistics_are_measured_once_on_the_first_captions_and_kept_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("mdit.precompute.build.FIT_CAPTIONS", 25)
    items, text = pictures(40), WordCounts(needs_fit=True)
    interrupt(monkeypatch, after=14)
    with pytest.raises(KeyboardInterrupt):
        make(items, tmp_path, towers(text))
    assert text.fitted_on == [[item.caption for item in items[:25]]]
    monkeypatch.undo()
    again = WordCounts(needs_fit=True)
    make(items, tmp_path, towers(again))
    assert again.fitted_on == [] and open_dataset(tmp_path / "8").encoders["text"] == text.describe()


def test_captions_to_measure_on_may_be_given(tmp_path):
    text = WordCounts(needs_fit=True)
    make(pictures(5), tmp_path, towers(text), captions=lambda: ["these", "two"])
    assert text.fitted_on == [["these", "two"]]


# --- interrupted


def interrupt(monkeypatch, after):
    """Writing the next sample after so many is interrupted."""
    written = []

    def write(self, *sample, write=PartWriter.write):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(write(self, *sample))

    monkeypatch.setattr(PartWriter, "write", write)


@pytest.mark.parametrize("sizes", [(SIZE,), (SIZE, 11)], ids=["one size", "two"])
def test_interrupted_again_and_again_it_gives_the_same_and_makes_no_part_twice(
    tmp_path, monkeypatch, undisturbed, sizes
):
    began, text = Counter(), WordCounts()

    def begin(self, directory, part, *rest, begin=PartWriter.__init__):
        began[directory.name, part] += 1
        begin(self, directory, part, *rest)

    for after in (0, 1, 25, 21, 13):
        with monkeypatch.context() as patch:
            interrupt(patch, after)
            patch.setattr(PartWriter, "__init__", begin)
            with pytest.raises(KeyboardInterrupt):
                make(pictures(57), tmp_path, towers(sizes=sizes), sizes=sizes)
        assert not (tmp_path / "8").exists()
    with monkeypatch.context() as patch:
        patch.setattr(PartWriter, "__init__", begin)
        make(pictures(57), tmp_path, towers(text, sizes), sizes=sizes)
    assert {name: data for name, data in contents(tmp_path).items() if name.startswith("8/")} == undisturbed
    assert len(began) == 6 * len(sizes) and sum(began.values()) <= len(began) + 5 * len(sizes)
    assert len(text.asked) < 57 * 5 / 7  # some parts were there
    assert {path.name for path in tmp_path.iterdir()} == {str(size) for size in sizes}


@pytest.mark.parametrize("where", ["report", "finish_set", "after finish_set", "rename", "unlink"])
def test_interrupted_while_the_set_gets_its_name(tmp_path, monkeypatch, undisturbed, where):
    interrupt(monkeypatch, after=55)
    with pytest.raises(KeyboardInterrupt):
        make(pictures(57), tmp_path)
    monkeypatch.undo()

    def stop(*arguments, finish_set=in_progress.finish_set):
        if where == "after finish_set":
            finish_set(*arguments)
        raise KeyboardInterrupt

    def stop_at(self, *arguments, **options):
        if self.name in (".8.partial", ".8.lock"):
            raise KeyboardInterrupt
        return unpatched(self, *arguments, **options)

    if where in ("rename", "unlink"):
        unpatched = getattr(Path, where)
        monkeypatch.setattr(Path, where, stop_at)
    else:
        monkeypatch.setattr(in_progress, "write_json" if where == "report" else "finish_set", stop)
    with pytest.raises(KeyboardInterrupt):
        make(pictures(57), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "8").exists() == (where == "unlink")
    assert (tmp_path / ".8.partial" / "manifest.json").exists() == (where in ("after finish_set", "rename"))
    make(pictures(57), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_one_of_two_sets_is_finished_the_other_begun(tmp_path, monkeypatch, undisturbed):
    make(pictures(57), tmp_path)
    interrupt(monkeypatch, after=30)
    with pytest.raises(KeyboardInterrupt):
        make(pictures(57), tmp_path, towers(sizes=(SIZE, 11)), sizes=(SIZE, 11))
    monkeypatch.undo()
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
    interrupt(monkeypatch, after=15)
    with pytest.raises(KeyboardInterrupt):
        make(pictures(57), tmp_path)
    monkeypatch.undo()
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
    interrupt(monkeypatch, after=25)
    with pytest.raises(KeyboardInterrupt):
        make(pictures(57), tmp_path)
    monkeypatch.undo()
    with hold(tmp_path / ".8.lock", 1 + 4, 1):
        outcome = build_sets(job_of(pictures(57), tmp_path), towers())
        assert outcome.left == {tmp_path / "8": 1} and outcome.finished == {}
    make(pictures(57), tmp_path)
    assert contents(tmp_path) == undisturbed


@pytest.mark.parametrize("joined", [False, True])
def test_a_set_that_another_process_is_finishing_is_left_to_it(tmp_path, monkeypatch, undisturbed, joined):
    """Parts are joined and their records removed at any moment, also while this process reads them."""

    def stop(*arguments, finish_set=in_progress.finish_set):
        if joined:
            finish_set(*arguments)
        raise KeyboardInterrupt

    def read(directory, known):
        raise FileNotFoundError(directory / "part_00003.json")

    with monkeypatch.context() as patch:
        patch.setattr(in_progress, "finish_set", stop)
        with pytest.raises(KeyboardInterrupt):
            make(pictures(57), tmp_path)
    with monkeypatch.context() as patch, hold(tmp_path / ".8.lock", 1, 0):
        patch.setattr(in_progress, "written_parts", read)
        outcome = build_sets(job_of(pictures(57), tmp_path), towers())
        assert outcome.left == {tmp_path / "8": 0} and outcome.finished == {}
    make(pictures(57), tmp_path)
    assert contents(tmp_path) == undisturbed


def test_a_part_whose_process_was_killed_before_it_said_so_is_not_made_again(tmp_path, monkeypatch, undisturbed):
    def stop(self, part):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(in_progress.SetInProgress, "complete", stop)
        with pytest.raises(KeyboardInterrupt):
            make(pictures(57), tmp_path)
    part = tmp_path / ".8.partial" / "shard_00000_000.tar"
    before = part.stat().st_mtime_ns
    make(pictures(57), tmp_path)
    assert (tmp_path / "8" / part.name).stat().st_mtime_ns == before
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


def captions_of(dataset):
    return read_samples(dataset, range(dataset.samples))[2]


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


def count_and_kill(folders, new):
    """Change the first set and count the writes, renamings and removals that takes; change each of the others in a
    process of its own, which is killed ever nearer to the end. Prints the moments."""
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
    for number, folder in enumerate(folders[1:]):
        last = count - int(2 * 1.8**number)
        if (child := os.fork()) == 0:
            try:
                make_of(new, folder, extend=True)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, (count, last)


def test_killed_at_any_moment_of_a_change_there_is_the_old_set_or_the_new_one(tmp_path, three_tars):
    new = tars(range(5), part_1="another caption")
    wanted = bytes_of(make_of(new, tmp_path / "at once"))
    before, after = [item.caption for item in pictures(30)], captions_of(open_dataset(tmp_path / "at once" / "8"))
    folders = [shutil.copytree(three_tars.parent, tmp_path / str(number)) for number in range(9)]
    ended = run_forked(count_and_kill, folders, new)
    assert ended.returncode == 0, ended.output
    found = []
    for folder in folders[1:]:
        dataset = open_dataset(folder / "8")
        dataset.verify()
        found.append(captions_of(dataset) == after)
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
    with monkeypatch.context() as patch:
        interrupt(patch, after=25)
        with pytest.raises(KeyboardInterrupt):
            make(pictures(57), tmp_path)
    (path := tmp_path / ".8.partial" / file).write_text("{")
    with pytest.raises(UserError, match=f"^{path}: not "):
        make(pictures(57), tmp_path)


# --- what goes wrong


class Failing:
    def __init__(self, error):
        self.name, self.error = "00001.tar", error

    def __iter__(self):
        yield Picture("a", png(1), "a caption")
        raise self.error


@pytest.mark.parametrize(
    "error, message",
    [
        (OSError(5, "Input/output error"), "part 00001.tar of the source cannot be read: .*Input/output error"),
        (UserError("as the source says"), "as the source says"),
    ],
)
def test_a_source_that_fails_is_heard(tmp_path, error, message):
    job = job_of([], tmp_path)
    job = dataclasses.replace(job, source=Source([*slices(pictures(3), 3), Failing(error)], None))
    with pytest.raises(UserError, match=message):
        build_sets(job, towers())
    assert not (tmp_path / "8").exists()


def test_what_fails_before_there_is_a_plan_leaves_nothing(tmp_path):
    job = job_of([], tmp_path / "new" / "folder", limit=5)
    job = dataclasses.replace(job, source=Source([Failing(OSError("gone"))], None))
    with pytest.raises(UserError, match="gone"):
        build_sets(job, towers())
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="which do not fit 64 channels|blocks"):
        text = WordCounts()
        text.channels = 65
        make(pictures(3), tmp_path / "new", towers(text), embeddings="i8b64")
    assert not list(tmp_path.iterdir())


# --- reading ahead


def test_ahead_gives_the_same_a_bounded_number_early_and_raises():
    made = []

    def numbers(count):
        for i in range(count):
            made.append(i)
            yield i
        raise ValueError("the end")

    stream = ahead(numbers(10), depth=3)
    assert next(stream) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # the next one and those after it are asked for when one is taken
    taken = []
    with pytest.raises(ValueError, match="the end"):
        taken.extend(stream)
    assert list(range(1, 10)) == made[1:]
    assert list(ahead(iter(range(5)))) == [0, 1, 2, 3, 4] and list(ahead(iter([]))) == []


def test_ahead_works_on_the_gpu_of_its_process(monkeypatch):
    current, device = threading.local(), torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    assert {*ahead((getattr(current, "device", None) for _ in range(3)), device)} == {device}


def test_ahead_ends_its_thread_when_it_is_closed():
    before = threading.active_count()
    stream = ahead(iter(range(1000)))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


# --- captions are embedded once


class CountingEncoder:
    def __init__(self):
        self.asked = []

    def encode(self, captions):
        self.asked += captions
        return torch.tensor([[[float(caption)]] for caption in captions])


def test_a_caption_is_embedded_once_while_it_is_in_use():
    encoder = CountingEncoder()
    cache = CaptionCache(encoder, capacity=40)
    for batch in (["1", "2", "1"], ["2", "3"], ["1"]):
        assert [e.item() for e in cache(batch)] == [float(caption) for caption in batch]
    assert encoder.asked == ["1", "2", "3"]
    cache([str(i) for i in range(100, 139)])  # 40 captions are kept: "1" and these 39
    assert len(cache._embeddings) == 40
    cache(["1"])
    assert encoder.asked.count("1") == 1
    cache(["2"])
    assert encoder.asked.count("2") == 2
