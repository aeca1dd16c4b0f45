"""The engine that needs nothing but torch: a rank's rows as tensors, on any device."""

import torch

from mdit.data.read_ahead import Batch, ReadAhead


class NativeLoader:
    """An endless iterator of Batch over all epochs, and a context manager; close() stops its threads.

    On a CPU a batch is a view of the buffer it was read into, which is used again once nobody holds the batch. To a GPU
    it is copied from pinned memory, in the order of the current stream and without waiting.
    """

    def __init__(self, read_ahead: ReadAhead, device: torch.device) -> None:
        self._read_ahead, self._device = read_ahead, device

    def __iter__(self) -> "NativeLoader":
        return self

    def __next__(self) -> Batch:
        """Raises ShardError when a shard turns out to be damaged; StopIteration once the loader is closed."""
        buffer = self._read_ahead.take()
        texts, samples, step = buffer.texts, buffer.samples, buffer.step
        if buffer.copied is None:
            rows = self._read_ahead.lend(buffer)
        else:
            rows = buffer.rows.to(self._device, non_blocking=True)
            buffer.copied.record()
            self._read_ahead.give_back(buffer)
        return Batch(*self._read_ahead.layout.split(rows), texts, samples, step)

    def close(self) -> None:
        self._read_ahead.close()

    def __enter__(self) -> "NativeLoader":
        return self

    def __exit__(self, *error) -> None:
        self.close()
