"""Reading ahead: a thread fills recycled buffers with this rank's rows of the coming batches. Every platform."""

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mdit.data.shards import LatentSet

NUM_BUFFERS = 3  # one with the consumer, two ahead


@dataclass
class Buffer:
    """Host memory for one batch, pinned when it is to be copied to a GPU; `copied` marks the end of that copy."""

    latents_NCHW: Tensor
    captions_NLC: Tensor
    copied: torch.cuda.Event | None
    texts: list[str] = field(default_factory=list)
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    step: int = -1


class ReadAhead:
    """Buffers filled for `start_step`, `start_step + 1`, ... without end.

    `rows(step)` gives the sample numbers to read for a step, counted over all `datasets` as if they were one.
    """

    def __init__(
        self,
        datasets: Sequence[LatentSet],
        rows: Callable[[int], np.ndarray],
        num_rows: int,
        start_step: int,
        pinned: bool,
    ) -> None:
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[Buffer | Exception] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(_new_buffer(datasets[0], num_rows, pinned))
        stopped = threading.Event()
        arguments = (datasets, rows, start_step, self._free, self._filled, stopped)
        thread = threading.Thread(target=_fill_buffers, args=arguments, name="mdit-read-ahead", daemon=True)
        # Runs once: on close(), when this object is forgotten, or at the interpreter's exit.
        self.close = weakref.finalize(self, _stop, stopped, self._free, thread)
        thread.start()

    def take(self) -> Buffer:
        """Wait for the next filled buffer. Raises what went wrong in the thread."""
        filled = self._filled.get()
        if isinstance(filled, Exception):
            raise filled
        return filled

    def give_back(self, buffer: Buffer) -> None:
        self._free.put(buffer)


def _new_buffer(dataset: LatentSet, num_rows: int, pinned: bool) -> Buffer:
    def empty(shape: Sequence[int]) -> Tensor:
        return torch.empty(num_rows, *shape, dtype=torch.float16, pin_memory=pinned)

    return Buffer(empty(dataset.latent_shape), empty(dataset.embedding_shape), torch.cuda.Event() if pinned else None)


def _fill_buffers(datasets, rows, start_step: int, free, filled, stopped: threading.Event) -> None:
    first_samples = np.cumsum([0, *(dataset.samples for dataset in datasets)])
    try:
        for step in itertools.count(start_step):
            buffer = free.get()
            if stopped.is_set():
                return
            if buffer.copied is not None:
                buffer.copied.synchronize()  # the GPU may still be reading this memory
            buffer.step, buffer.samples = step, rows(step)
            numbers = np.searchsorted(first_samples, buffer.samples, side="right") - 1
            targets = zip(buffer.latents_NCHW.numpy(), buffer.captions_NLC.numpy(), strict=True)
            buffer.texts = [
                datasets[number].read_into(int(sample - first_samples[number]), latent, caption)
                for number, sample, (latent, caption) in zip(numbers, buffer.samples, targets, strict=True)
            ]
            filled.put(buffer)
    except Exception as error:
        filled.put(error)


def _stop(stopped: threading.Event, free: queue.SimpleQueue, thread: threading.Thread) -> None:
    stopped.set()
    free.put(None)  # wakes the thread if it waits for a buffer
    thread.join()
