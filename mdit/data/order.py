"""The order of samples: a function of (seed, step), with no reader's state behind it.

Every epoch shuffles the shards, cuts them into windows of `group` shards and shuffles the samples of each window:
random enough for what the shards hold, and a reader touches few shards at a time.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mdit.config import UserError

SHARDS, WINDOW, MIX = 0, 1, 2  # what a random stream is for


class GlobalOrder:
    """The samples of each global batch. Those that fill no whole batch at an epoch's end are left out of
    that epoch. Knows nothing of ranks: a rank takes its rows of the batch. `stream` tells apart orders of one seed.

    Raises UserError when there are fewer samples than one global batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        global_batch_size: int,
        seed: int,
        group: int = 64,
        stream: tuple[int, ...] = (),
    ) -> None:
        self.shard_starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self.global_batch_size, self.seed, self.group, self.stream = global_batch_size, seed, group, stream
        self.samples = int(self.shard_starts[-1])
        self.steps_per_epoch = self.samples // global_batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.train: {self.samples} samples do not fill one batch of "
                f"training.global_batch_size = {global_batch_size}"
            )
        # Consecutive steps share them; a batch may reach over the end of a window.
        self._windows = lru_cache(maxsize=1)(self._windows)
        self._window = lru_cache(maxsize=2)(self._window)

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of one global batch, (global_batch_size,) int64; `step` counts from 0 over all epochs."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        position = step_in_epoch * self.global_batch_size
        end = position + self.global_batch_size
        _, window_starts = self._windows(epoch)
        window = int(np.searchsorted(window_starts, position, side="right")) - 1
        parts = []
        while position < end:
            start = window_starts[window]
            parts.append(self._window(epoch, window)[position - start : end - start])
            position += len(parts[-1])
            window += 1
        return np.concatenate(parts)

    def _windows(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of every window of an epoch, and the position in the epoch at which each window starts."""
        shards = self._rng(epoch, SHARDS).permutation(len(self.shard_starts) - 1)
        windows = [shards[i : i + self.group] for i in range(0, len(shards), self.group)]
        sizes = np.diff(self.shard_starts)
        starts = np.concatenate([[0], np.cumsum([sizes[window].sum() for window in windows])])
        return windows, starts

    def _window(self, epoch: int, number: int) -> np.ndarray:
        windows, _ = self._windows(epoch)
        samples = np.concatenate([np.arange(*self.shard_starts[shard : shard + 2]) for shard in windows[number]])
        self._rng(epoch, WINDOW, number).shuffle(samples)
        return samples

    def _rng(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(*self.stream, *stream)))


class WeightedOrder:
    """Several sets in one stream: every batch holds the same number of samples of each, in proportion to its weight.

    Each set has an order, and so epochs, of its own. Weights are rounded to whole samples of a batch.
    """

    def __init__(
        self,
        sets: Sequence[Sequence[int]],
        weights: Sequence[float],
        global_batch_size: int,
        seed: int,
        group: int = 64,
    ) -> None:
        self.seed = seed
        self.quotas = quotas(weights, global_batch_size)
        self.first_samples = np.cumsum([0, *(sum(shard_sizes) for shard_sizes in sets)])
        for number, (size, quota) in enumerate(zip(np.diff(self.first_samples), self.quotas, strict=True)):
            if size < quota:
                raise UserError(
                    f"data.train[{number}]: {size} samples, but data.weights gives it {quota} of every batch"
                )
        self.orders = [
            GlobalOrder(shard_sizes, quota, seed, group, stream=(MIX, number))
            for number, (shard_sizes, quota) in enumerate(zip(sets, self.quotas, strict=True))
        ]

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of one global batch, counted over all sets as if they were one, (global_batch_size,) int64."""
        parts = [order.batch(step) + first for order, first in zip(self.orders, self.first_samples)]
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(MIX, len(self.orders), step)))
        return rng.permutation(np.concatenate(parts))


def build_order(
    sets: Sequence[Sequence[int]], weights: Sequence[float] | None, global_batch_size: int, seed: int
) -> GlobalOrder | WeightedOrder:
    """`sets` holds the shard sizes of every set. Without weights they are read as one set.

    Raises UserError when a set, or its share of a batch, is too small.
    """
    if weights is None:
        return GlobalOrder([size for shard_sizes in sets for size in shard_sizes], global_batch_size, seed)
    return WeightedOrder(sets, weights, global_batch_size, seed)


def quotas(weights: Sequence[float], global_batch_size: int) -> list[int]:
    """Samples of each set in a batch, by largest remainder. Raises UserError when a set would get none."""
    shares = np.array(weights, dtype=np.float64) / np.sum(weights) * global_batch_size
    counts = np.floor(shares).astype(int)
    missing = global_batch_size - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    for number, count in enumerate(counts):
        if count == 0:
            raise UserError(
                f"data.weights[{number}] = {weights[number]} of {sum(weights)} is not one sample in a batch of "
                f"training.global_batch_size = {global_batch_size}"
            )
    return counts.tolist()
