"""From directories of shards to this rank's batches, in the global order, from any step on."""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mdit.config import UserError, near_key
from mdit.data.manifest import MANIFEST
from mdit.data.order import build_order
from mdit.data.prefetcher import Batch, Buffer, Loader, Prefetcher
from mdit.data.shards import LatentSet, open_dataset
from mdit.dist import logger

__all__ = ["Batch", "build_loader", "choose_engine", "require_same_kind"]

Engine = Literal["native", "dali"]


def build_loader(
    directories: Sequence[str],
    *,
    global_batch_size: int,
    seed: int,
    start_step: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
    weights: Sequence[float] | None = None,
    captions: Mapping[str, float] | None = None,
    engine: Literal["auto", "native", "dali"] = "auto",
    features: bool = False,
):
    """An endless iterator of Batch and a context manager: rank r of W yields rows [r * G / W, (r + 1) * G / W) of every
    global batch of G samples, from `start_step` on. Engines differ in how they move bytes, never in what arrives. With
    `features` a batch has those of the sets, which must have some. `captions` are weights of their kinds, in place of
    the sets' own.

    Raises UserError when the directories do not fit together, when G is not a multiple of W, when a set is smaller than
    its share of G or when the engine is not there; ShardError when shards are missing or damaged.
    """
    if global_batch_size % world_size:
        raise UserError(
            f"training.global_batch_size = {global_batch_size} is not a multiple of the {world_size} processes"
        )
    datasets = [open_dataset(directory) for directory in directories]
    for other in datasets[1:]:
        require_same_kind(datasets[0], other)
        require_same_rows(datasets[0], other)
    if captions is not None:
        weigh_captions(datasets, captions)
    order = build_order([dataset.shard_sizes for dataset in datasets], weights, global_batch_size, seed)
    share = global_batch_size // world_size

    def rows(step: int) -> np.ndarray:
        return order.batch(step)[rank * share : (rank + 1) * share]

    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    chosen, reason = choose_engine(engine, device)
    logger.info(f"data engine: {chosen} ({reason})")
    prefetcher = Prefetcher(datasets, rows, start_step, device, seed)
    if chosen == "dali":
        from mdit.data.dali import DaliLoader

        return DaliLoader(prefetcher, share, device, features)
    return NativeLoader(prefetcher, device, features)


class NativeLoader(Loader):
    """Rows split into tensors by torch.

    On a CPU a batch is a view of the buffer it was read into, which is used again once nobody holds the batch. To a GPU
    it is copied from pinned memory on a stream of its own: while a batch is used, the next one is on its way.
    """

    def __init__(self, prefetcher: Prefetcher, device: torch.device, features: bool = False) -> None:
        super().__init__(prefetcher, device)
        self._features = features
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copying: tuple[Batch, torch.Event] | None = None  # the next batch, and the event behind its copy

    def __next__(self) -> Batch:
        if self._stream is None:
            buffer = self._prefetcher.take()
            return self._split(self._prefetcher.checkout(buffer), buffer)
        batch, copied = self._copying or self._copy(self._prefetcher.take())
        following = self._prefetcher.take_filled()
        self._copying = None if following is None else self._copy(following)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for tensor in (batch.latents_NCHW, batch.captions_NLC, batch.features_NTC):
            if tensor is not None:
                tensor.record_stream(computing)  # else the next copy could take its memory while it is still read
        return batch

    def _split(self, rows: Tensor, buffer: Buffer) -> Batch:
        layout = self._prefetcher.layout
        features = layout.features(rows) if self._features else None
        return Batch(*layout.split(rows), buffer.texts, buffer.samples, buffer.step, features)

    def _copy(self, buffer: Buffer) -> tuple[Batch, torch.Event]:
        """Start it. Dequantisation, where samples are in 8 bits, is part of it."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            rows = buffer.rows.to(self._device, non_blocking=True)
            if buffer.copied is not None:
                buffer.copied.record()
            batch = self._split(rows, buffer)
        done = self._stream.record_event()
        self._prefetcher.recycle(buffer)
        return batch, done

    def close(self) -> None:
        super().close()
        self._copying = None


def choose_engine(wanted: Literal["auto", "native", "dali"], device: torch.device) -> tuple[Engine, str]:
    """-> the engine and why. Raises UserError when DALI is asked for and not installed."""
    installed = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if wanted == "dali" and not installed:
        raise UserError("mdit.data_engine = 'dali', but DALI is not installed: pip install nvidia-dali-cuda130")
    if wanted != "auto":
        return wanted, "asked for"
    if device.type != "cuda":
        return "native", "no GPU"
    return ("dali", "installed, and a GPU is there") if installed else ("native", "DALI is not installed")


def weigh_captions(datasets: Sequence[LatentSet], weights: Mapping[str, float]) -> None:
    """Give sets with several captions a sample these weights of the kinds in place of their own; a sample that has none
    of the kinds takes any of its captions. Raises UserError for a kind that no set has."""
    several = [dataset for dataset in datasets if dataset.weights is not None]
    known = sorted({kind for dataset in several for kind in dataset.weights or ()})
    for kind in weights:
        if kind not in known:
            there = f"{near_key(kind, known)}; there are {', '.join(known)}" if known else "; they have one a sample"
            raise UserError(f"data.captions.{kind}: no set of data.train has captions of this kind{there}")
    for dataset in several:
        dataset.weights = dict(weights)


def require_same_kind(one: LatentSet, other: LatentSet) -> None:
    """Raise UserError unless two sets have the same shapes and were made by the same encoders. Which weights those had
    counts where both sets say so, and then makes it no difference where the weights lay."""
    paths = f"{one.directory / MANIFEST} and {other.directory / MANIFEST}"
    for name in ("latent_shape", "embedding_shape", "embeddings"):
        first, second = getattr(one.layout, name), getattr(other.layout, name)
        if first != second:
            raise UserError(f"{paths}: {name} is {first} and {second}; one model cannot read both")
    for name in ("image", "text"):
        first, second = one.encoders.get(name, {}), other.encoders.get(name, {})
        weights = {first.get("weights"), second.get("weights")}
        apart = {"weights"} if None in weights else {"id"} if len(weights) == 1 else set()
        for key in sorted((first.keys() | second.keys()) - apart):
            if first.get(key) != second.get(key):
                values = f"{_short(first.get(key))} and {_short(second.get(key))}"
                raise UserError(f"{paths}: encoders.{name}.{key} is {values}; make both with the same encoders")


def require_same_rows(one: LatentSet, other: LatentSet) -> None:
    """Raise UserError unless the samples of two sets, of the same kind, can be read into one buffer."""
    first, second = one.layout.features_shape, other.layout.features_shape
    if first != second:
        paths = f"{one.directory / MANIFEST} and {other.directory / MANIFEST}"
        raise UserError(f"{paths}: members.rep.shape is {first} and {second}; train on sets with the same features")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
