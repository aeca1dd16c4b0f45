"""Small sets of latents whose every value is known, and ways to damage them."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mdit.data.loader import Batch, build_loader
from mdit.data.quantise import BLOCK, quantise
from mdit.data.shards import LatentSet
from mdit.data.writer import ShardWriter
from mdit.files import checksum

LATENT, EMBEDDING = (2, 4, 4), (3, 64)
ENCODERS = {"image": {"id": "pixels", "scale": 1.0}, "text": {"id": "none", "max_tokens": 3, "channels": 64}}


@cache
def made_up(i: int, latent_shape=LATENT) -> tuple[np.ndarray, np.ndarray, str]:
    """Latents, caption embedding and caption of sample i."""
    rng = np.random.default_rng(i)
    latent, embedding = rng.normal(size=latent_shape), rng.normal(size=EMBEDDING) * 10.0 ** rng.integers(-6, 4)
    return latent.astype(np.float16), embedding.astype(np.float16), "é" * (i % 5) + f" {i}"


@cache
def read_embedding(i: int, embeddings: str) -> np.ndarray:
    """The caption embedding of sample i as it must be read."""
    embedding = made_up(i)[1]
    if embeddings == "f16":
        return embedding
    stored, count = quantise(embedding), embedding.size
    values = np.frombuffer(stored[:count], np.int8).reshape(-1, BLOCK).astype(np.float64)
    scales = np.frombuffer(stored[count:], np.float16)[:, None].astype(np.float64)
    return (values * scales).astype(np.float16).reshape(EMBEDDING)  # exact, then rounded once


def write_set(
    directory: Path, samples: int, *, first=0, embeddings="f16", shape=LATENT, encoders=ENCODERS, shard_bytes=30_000
) -> str:
    """Samples first, first + 1, ... of `made_up` in several shards."""
    with ShardWriter(directory, shape, EMBEDDING, encoders, {}, shard_bytes, embeddings) as writer:
        for i in range(first, first + samples):
            writer.write(f"{i:05d}", *made_up(i, shape))
    return str(directory)


def loader(directories, engine="auto", *, batch=16, **options):
    options = {"seed": 0, "start_step": 0, "rank": 0, "world_size": 1, "device": "cpu", **options}
    return build_loader(directories, global_batch_size=batch, engine=engine, **options)


def is_right(batch: Batch, embeddings: str = "f16") -> bool:
    """Whether a batch holds, bit for bit, the samples it says it holds, of sets that begin at sample 0."""
    samples = batch.samples.tolist()
    latents = np.stack([made_up(i)[0] for i in samples])
    captions = np.stack([read_embedding(i, embeddings) for i in samples])
    return batch.texts == [made_up(i)[2] for i in samples] and all(
        found.dtype == torch.float16
        and found.shape == expected.shape
        and np.array_equal(found.cpu().numpy().view(np.uint16), expected.view(np.uint16))
        for found, expected in ((batch.latents_NCHW, latents), (batch.captions_NLC, captions))
    )


def sample_bytes(dataset: LatentSet, sample: int) -> tuple[Path, int, int]:
    """The shard of a sample, and where its bytes begin and end there: first header to last letter of the caption."""
    [place] = dataset.locate([sample])
    at, size = dataset.layout.checked(place.text_bytes, place.captions if dataset.weights else None)
    return dataset.directory / dataset.manifest.shards[place.shard].file, place.offset, place.offset + at + size


def edit_manifest(directory: Path, change: Callable[[dict], None]) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def make_manifest_match(directory: Path) -> None:
    """Sizes and checksums of all files as they are now, as by somebody who repairs a set by hand."""

    def change(manifest: dict) -> None:
        for entry in (manifest["index"], *manifest["shards"], *manifest["dali_indexes"]):
            path = directory / entry["file"]
            entry.update(bytes=path.stat().st_size, xxh3=checksum(path))

    edit_manifest(directory, change)


@contextmanager
def changed(path: Path, content: bytes):
    """The file with other content, written in place, for as long as the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)
