"""The engine that needs nothing but torch: a rank's rows as tensors, on any device."""

import torch

from mdit.data.prefetcher import Batch, Buffer, Loader, Prefetcher


class NativeLoader(Loader):
    """Rows split into tensors by torch.

    On a CPU a batch is a view of the buffer it was read into, which is used again once nobody holds the batch. To a GPU
    it is copied from pinned memory on a stream of its own: while a batch is used, the next one is on its way.
    """

    def __init__(self, prefetcher: Prefetcher, device: torch.device) -> None:
        super().__init__(prefetcher, device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copying: tuple[Batch, torch.Event] | None = None  # the next batch, and the event behind its copy

    def __next__(self) -> Batch:
        if self._stream is None:
            buffer = self._prefetcher.take()
            texts, samples, step = buffer.texts, buffer.samples, buffer.step
            return Batch(*self._prefetcher.layout.split(self._prefetcher.checkout(buffer)), texts, samples, step)
        batch, copied = self._copying or self._copy(self._prefetcher.take())
        following = self._prefetcher.take_filled()
        self._copying = None if following is None else self._copy(following)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_event(copied)
        for tensor in (batch.latents_NCHW, batch.captions_NLC):
            tensor.record_stream(computing)  # else the next copy could take its memory while it is still read
        return batch

    def _copy(self, buffer: Buffer) -> tuple[Batch, torch.Event]:
        """Start it. Dequantisation, where samples are in 8 bits, is part of it."""
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            rows = buffer.rows.to(self._device, non_blocking=True)
            if buffer.copied is not None:
                buffer.copied.record()
            batch = Batch(*self._prefetcher.layout.split(rows), buffer.texts, buffer.samples, buffer.step)
        done = self._stream.record_event()
        self._prefetcher.recycle(buffer)
        return batch, done

    def close(self) -> None:
        super().close()
        self._copying = None
