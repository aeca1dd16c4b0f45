"""Sets made in tests from pictures of noise, with towers that can be computed in one's head."""

import io
import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from mdit.data.shards import read_samples
from mdit.data.writer import PartWriter
from mdit.encoders import build_image_encoder
from mdit.precompute.build import BuildJob, build_sets
from mdit.precompute.dali import build_decoder
from mdit.precompute.pipeline import EncodingPipeline
from mdit.sources import Picture, Source, slices

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


def captions_of(dataset):
    return read_samples(dataset, range(dataset.samples))[2]


@contextmanager
def interrupted(monkeypatch, after):
    """Writing the next sample after so many ends what is inside, as Ctrl-C would."""
    written = []

    def write(self, *sample, write=PartWriter.write):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(write(self, *sample))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartWriter, "write", write)
        yield patch
