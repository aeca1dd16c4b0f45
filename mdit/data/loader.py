"""From directories of shards to this rank's batches, in the global order, from any step on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mdit.config import UserError
from mdit.data.native import ReadAhead
from mdit.data.order import GlobalOrder
from mdit.data.shards import MANIFEST, LatentSet, open_dataset


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch.

    `latents_NCHW` and `captions_NLC` are fp16 on the loader's device, `texts` the captions themselves, `samples` the
    (N,) int64 sample numbers over all directories, `step` the optimizer step they belong to.
    """

    latents_NCHW: Tensor
    captions_NLC: Tensor
    texts: list[str]
    samples: np.ndarray
    step: int


class Loader:
    """An endless iterator of Batch over all epochs, and a context manager; close() stops its thread."""

    def __init__(self, read_ahead: ReadAhead, device: torch.device) -> None:
        self._read_ahead, self._device = read_ahead, device

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        """Raises ShardError when a shard turns out to be damaged; StopIteration once the loader is closed."""
        if not self._read_ahead.close.alive:
            raise StopIteration
        try:
            buffer = self._read_ahead.take()
        except Exception:
            self.close()
            raise
        latents_NCHW, captions_NLC = (
            host.to(self._device, non_blocking=True, copy=True) for host in (buffer.latents_NCHW, buffer.captions_NLC)
        )
        if buffer.copied is not None:
            buffer.copied.record()
        batch = Batch(latents_NCHW, captions_NLC, buffer.texts, buffer.samples, buffer.step)
        self._read_ahead.give_back(buffer)
        return batch

    def close(self) -> None:
        self._read_ahead.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def build_loader(
    directories: Sequence[str],
    *,
    global_batch_size: int,
    seed: int,
    start_step: int,
    rank: int,
    world_size: int,
    device: torch.device | str,
) -> Loader:
    """Rank r of W yields rows [r * G / W, (r + 1) * G / W) of every global batch of G samples, from `start_step` on.

    Raises UserError when the directories do not fit together, when G is not a multiple of W or when the set is smaller
    than G; ShardError when shards are missing or damaged.
    """
    if global_batch_size % world_size:
        raise UserError(
            f"training.global_batch_size = {global_batch_size} is not a multiple of the {world_size} processes"
        )
    datasets = [open_dataset(directory) for directory in directories]
    for other in datasets[1:]:
        require_same_kind(datasets[0], other)
    shard_sizes = [size for dataset in datasets for size in dataset.shard_sizes]
    order = GlobalOrder(shard_sizes, global_batch_size, seed)
    share = global_batch_size // world_size

    def rows(step: int) -> np.ndarray:
        return order.batch(step)[rank * share : (rank + 1) * share]

    device = torch.device(device)
    return Loader(ReadAhead(datasets, rows, share, start_step, pinned=device.type == "cuda"), device)


def require_same_kind(one: LatentSet, other: LatentSet) -> None:
    """Raise UserError unless two sets have the same shapes and were made by the same encoders."""
    paths = f"{one.directory / MANIFEST} and {other.directory / MANIFEST}"
    for name in ("latent_shape", "embedding_shape"):
        first, second = getattr(one, name), getattr(other, name)
        if first != second:
            raise UserError(f"{paths}: {name} is {first} and {second}; one model cannot read both")
    for name in sorted(one.encoders.keys() | other.encoders.keys()):
        first, second = one.encoders.get(name, {}), other.encoders.get(name, {})
        for key in sorted(first.keys() | second.keys()):
            if first.get(key) != second.get(key):
                values = f"{_short(first.get(key))} and {_short(second.get(key))}"
                raise UserError(f"{paths}: encoders.{name}.{key} is {values}; make both with the same encoders")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
