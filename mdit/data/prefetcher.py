"""Reading ahead: threads fill recycled buffers with this rank's rows of the coming batches, in the global order."""

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mdit.captions import caption_draw
from mdit.data.shards import LatentSet, SampleLocation
from mdit.dist import work_on

AHEAD = 2  # batches
# What is in memory or on a local disk costs least CPU when one thread reads it. On shared storage, where a sample takes
# milliseconds, threads wait side by side.
READERS = 16
SLOW = 1e-3  # seconds for a sample


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one global batch.

    `latents_NCHW` and `captions_NLC` are fp16 on the loader's device, `texts` the captions themselves, `samples` the
    (N,) int64 sample numbers over all directories, `step` the optimizer step they belong to; `features_NTC`, fp16, a
    vision tower's features of all patches, where the run asks for them.
    """

    latents_NCHW: Tensor
    captions_NLC: Tensor
    texts: list[str]
    samples: np.ndarray
    step: int
    features_NTC: Tensor | None = None


@dataclass
class Buffer:
    """Host memory for one batch, pinned when it is to be copied to a GPU; `copied` marks the end of that copy."""

    rows: Tensor  # (N, row_bytes) uint8
    copied: torch.cuda.Event | None
    texts: list[str] = field(default_factory=list)
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    step: int = -1


class Prefetcher:
    """Buffers filled for `start_step`, `start_step + 1`, ... without end, at most AHEAD of what was taken.

    `rows(step)` gives the sample numbers to read for a step, counted over all `datasets` as if they were one. Where a
    sample has several captions, (seed, step, number) decide which one is read. Buffers that are given back are filled
    again; of those that are not, there are simply more. For a GPU `device` they are pinned.
    """

    def __init__(
        self,
        datasets: Sequence[LatentSet],
        rows: Callable[[int], np.ndarray],
        start_step: int,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.layout = datasets[0].layout
        self._queues = Queues()
        thread = threading.Thread(
            target=_fill_buffers,
            args=(datasets, rows, start_step, device, seed, self._queues),
            name="mdit-read-ahead",
            daemon=True,
        )
        # Runs once: on close(), when this object is forgotten, or at the interpreter's exit.
        self.close = weakref.finalize(self, self._queues.stop, thread)
        thread.start()

    def take(self) -> Buffer:
        """Wait for the next filled buffer. Raises what went wrong in the threads; StopIteration when closed."""
        if not self.close.alive:
            raise StopIteration
        filled = self._queues.filled.get()
        if isinstance(filled, BaseException):
            self.close()
            raise filled
        self._queues.room.release()
        return filled

    def take_filled(self) -> Buffer | None:
        """The next buffer if it is filled by now. An error is left to `take`."""
        try:
            filled = self._queues.filled.get_nowait()
        except queue.Empty:
            return None
        if isinstance(filled, BaseException):
            self._queues.filled.put(filled)  # nothing comes behind an error
            return None
        self._queues.room.release()
        return filled

    def recycle(self, buffer: Buffer) -> None:
        self._queues.free.put(buffer)

    def checkout(self, buffer: Buffer) -> Tensor:
        """The buffer's rows, which come back by themselves when the last tensor that sees them is gone."""
        rows = buffer.rows.numpy()[:]  # an array of its own, to be told when it goes
        weakref.finalize(rows, self._queues.free.put, buffer).atexit = False
        return torch.from_numpy(rows)


class Loader(Iterator[Batch], AbstractContextManager):
    """An endless iterator of Batch over all epochs, and a context manager; close() stops its threads.

    `__next__` raises ShardError when a shard turns out to be damaged; StopIteration once the loader is closed.
    """

    def __init__(self, prefetcher: Prefetcher, device: torch.device) -> None:
        self._prefetcher, self._device = prefetcher, device

    def close(self) -> None:
        self._prefetcher.close()

    def __exit__(self, *error) -> None:
        self.close()


class Queues:
    """Between the threads and the consumer."""

    def __init__(self) -> None:
        self.free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        self.filled: queue.SimpleQueue[Buffer | BaseException] = queue.SimpleQueue()
        self.room = threading.Semaphore(AHEAD)
        self.stopped = threading.Event()

    def stop(self, thread: threading.Thread) -> None:
        self.stopped.set()
        self.room.release()  # wakes the thread if it waits for room
        thread.join()


def _fill_buffers(datasets, rows, start_step: int, device: torch.device, seed: int, queues: Queues) -> None:
    first_samples = np.cumsum([0, *(dataset.samples for dataset in datasets)])
    threads = READERS
    try:
        work_on(device)
        with ThreadPoolExecutor(READERS, "mdit-reader") as readers:
            for step in itertools.count(start_step):
                queues.room.acquire()
                if queues.stopped.is_set():
                    return
                samples = rows(step)
                buffer = _free_buffer(queues, datasets[0].layout.row_bytes, len(samples), device.type == "cuda")
                buffer.step, buffer.samples = step, samples
                draws = [caption_draw(seed, step, sample) for sample in samples.tolist()]
                work = list(zip(_locate(datasets, first_samples, samples), buffer.rows.numpy(), draws))
                share, start = -(-len(work) // threads), time.perf_counter()
                buffer.texts = _read(work, readers, share)
                threads = READERS if (time.perf_counter() - start) / share > SLOW else 1
                queues.filled.put(buffer)
    except BaseException as error:
        queues.filled.put(error)


def _free_buffer(queues: Queues, row_bytes: int, num_rows: int, pinned: bool) -> Buffer:
    try:
        buffer = queues.free.get_nowait()
    except queue.Empty:
        rows = torch.empty(num_rows, row_bytes, dtype=torch.uint8, pin_memory=pinned)
        return Buffer(rows, torch.cuda.Event() if pinned else None)
    if buffer.copied is not None:
        buffer.copied.synchronize()  # the GPU may still be reading this memory
    return buffer


def _locate(
    datasets: Sequence[LatentSet], first_samples: np.ndarray, samples: np.ndarray
) -> list[tuple[LatentSet, SampleLocation]]:
    """Dataset and location of each of the samples."""
    numbers = np.searchsorted(first_samples, samples, side="right") - 1
    found: list = [None] * len(samples)
    for number in np.unique(numbers).tolist():
        rows = np.flatnonzero(numbers == number)
        locations = datasets[number].locate(samples[rows] - first_samples[number])
        for row, location in zip(rows.tolist(), locations):
            found[row] = (datasets[number], location)
    return found


def _read(
    work: list[tuple[tuple[LatentSet, SampleLocation], np.ndarray, float]], readers: ThreadPoolExecutor, share: int
) -> list[str]:
    """Read every location into its row, `share` of them one after the other. -> captions."""

    def read(part: list) -> list[str]:
        return [dataset.read_row(location, row, draw) for (dataset, location), row, draw in part]

    if share == len(work):
        return read(work)
    parts = [work[start : start + share] for start in range(0, len(work), share)]
    return [text for texts in readers.map(read, parts) for text in texts]
