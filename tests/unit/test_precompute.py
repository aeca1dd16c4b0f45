"""From parts of a source to sets: what is written, what is left out and why."""

import dataclasses
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mdit.config import UserError
from mdit.data.report import PartReport, merge, new_report
from mdit.data.shards import open_dataset, read_samples
from mdit.data.writer import PartWriter
from mdit.precompute.build import build_sets
from mdit.precompute.dali import build_decoder
from mdit.precompute.pipeline import CaptionCache, ahead
from mdit.sources import Picture, Rejected, Source, captioned, slices
from tests.picture_sets import SIZE, WordCounts, captions_of, contents, interrupted, job_of, make, pictures, png, towers

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


def test_without_overlap_it_is_the_same(tmp_path):
    for overlap in (False, True):
        make(pictures(23), tmp_path / str(overlap), towers(overlap=overlap))
    assert contents(tmp_path / "False") == contents(tmp_path / "True")


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
    finished = make(items, tmp_path, towers(min_side=10))[tmp_path / "8"]
    expected = {
        "damaged archive": {"count": 1, "first": ["d/39 \\udcff"]},
        "no caption": {"count": 1, "first": ["d/3"]},
        "not decodable": {"count": 1, "first": ["picture 5"]},
        "not finite": {"count": 1, "first": ["picture 20"]},
        "too small": {"count": 8, "first": [f"picture {i}" for i in range(10, 15)]},
        "unreadable caption": {"count": 1, "first": ["picture 21"]},
    }
    report = json.loads((tmp_path / "8" / "report.json").read_text())
    assert finished.model_dump(mode="json", exclude_none=True) == report
    seconds, parts = report["seconds"], report["parts"]
    assert report == {"seen": 40, "written": 27, "rejected": expected, "seconds": seconds, "parts": parts}
    assert list(report["rejected"]) == sorted(expected)
    lost = {3, 5, *range(10, 18), 20, 21, 39}
    assert captions_of(open_dataset(tmp_path / "8")) == [item.caption for i, item in enumerate(items) if i not in lost]
    assert "27 of 40 pictures; rejected: 1 damaged archive (d/39 \\udcff), " in finished.summary()
    assert "8 too small (picture 10, ...)" in finished.summary()


def test_reports_join_to_that_of_all():
    parts = {}
    for part, device in enumerate("aba"):
        parts[str(part)] = PartReport(seen=10, written=7, rejected={}, seconds={device: 1.5})
        for i in range(3):
            parts[str(part)].reject("too small", [f"{part}/{i}"])
    joined = merge(parts)
    found = joined.rejected["too small"]
    assert (found.count, found.first) == (9, ("0/0", "0/1", "0/2", "1/0", "1/1"))
    assert (joined.seen, joined.written, joined.seconds) == (30, 21, {"a": 3.0, "b": 1.5})
    assert merge({**parts, "old": new_report()}).seconds is None  # made before there were times


def test_every_part_in_the_set_counts_its_own_time_once(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter(range(99)).__next__)  # each look at it takes a second
    monkeypatch.setattr("mdit.precompute.build.time", clock)
    with interrupted(monkeypatch, after=25):
        make(pictures(57), tmp_path, towers(sizes=(8, 16)), sizes=(8, 16))
    reports = make(pictures(57), tmp_path, towers(sizes=(8, 16)), sizes=(8, 16))
    seconds = [report.seconds["cpu"] for report in reports.values()]
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
    assert captions_of(open_dataset(tmp_path / "8")) == [item.caption for item in wanted if item.image != b"torn"]
    assert text.fitted_on == [[item.caption for item in wanted]]


# --- text statistics


def test_statistics_are_measured_once_on_the_first_captions_and_kept_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("mdit.precompute.build.FIT_CAPTIONS", 25)
    items, text = pictures(40), WordCounts(needs_fit=True)
    with interrupted(monkeypatch, after=14):
        make(items, tmp_path, towers(text))
    assert text.fitted_on == [[item.caption for item in items[:25]]]
    again = WordCounts(needs_fit=True)
    make(items, tmp_path, towers(again))
    assert again.fitted_on == [] and open_dataset(tmp_path / "8").encoders["text"] == text.describe()


def test_captions_to_measure_on_may_be_given(tmp_path):
    text = WordCounts(needs_fit=True)
    make(pictures(5), tmp_path, towers(text), captions=lambda: ["these", "two"])
    assert text.fitted_on == [["these", "two"]]


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


# --- the pipeline


def test_ahead_gives_the_same_a_bounded_number_early_raises_and_ends_its_thread():
    made, threads = [], threading.active_count()

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
    assert taken == made[1:] == list(range(1, 10)) and list(ahead(iter([]))) == []
    stream = ahead(iter(range(1000)))
    next(stream)
    assert threading.active_count() == threads + 1
    stream.close()
    assert threading.active_count() == threads


def test_ahead_works_on_the_gpu_of_its_process(monkeypatch):
    current, device = threading.local(), torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    assert {*ahead((getattr(current, "device", None) for _ in range(3)), device)} == {device}


def test_a_caption_is_embedded_once_while_it_is_among_the_last_in_use():
    text = WordCounts()
    cache = CaptionCache(text, capacity=3)
    for batch in (["a", "b", "a"], ["b", "c"], ["a"], ["d"], ["a"], ["b"]):
        assert [len(each) for each in cache(batch)] == [4] * len(batch)
    assert text.asked == ["a", "b", "c", "d", "b"]
