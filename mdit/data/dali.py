"""The engine that leaves staging, the copy to the GPU and dequantisation to a DALI pipeline.

The threads that feed the native engine feed it too, in the same order. DALI never opens a file: its own reader of tars
ends the process by a signal where a shard is cut short, and passes flipped bits. Samples are of one shape, so there is
nothing to pad.
"""

import math
from typing import Any

import torch
from nvidia.dali import Pipeline, fn
from nvidia.dali import types as dali_types

from mdit.data.manifest import TAR_BLOCK, SampleLayout
from mdit.data.prefetcher import Batch, Buffer, Loader, Prefetcher
from mdit.data.quantise import BLOCK

types: Any = dali_types  # whose stub lacks its enumerations
WORDS = {8: types.INT64, 4: types.INT32, 2: types.INT16}  # by their bytes


class DaliLoader(Loader):
    """Rows split into tensors by DALI. While a batch is used, the next one is copied and dequantised."""

    def __init__(self, prefetcher: Prefetcher, batch_size: int, device: torch.device, features: bool = False) -> None:
        super().__init__(prefetcher, device)
        self._on_gpu = device.type == "cuda"
        self._pipeline: Any = build_pipeline(
            prefetcher.layout, batch_size, device.index if self._on_gpu else None, features
        )
        self._running: Buffer | None = None
        self._copying: list[tuple] = []  # outputs that torch may still be reading, each with an event behind that

    def __next__(self) -> Batch:
        buffer = self._running or self._start(self._prefetcher.take())
        outputs = self._pipeline.share_outputs()  # waits until they are there
        self._pipeline.release_outputs()
        # DALI's outputs stay as they are for as long as they are held; float32 ones are rounded here (build_pipeline).
        tensors = [torch.from_dlpack(output[0]).to(torch.float16, copy=self._on_gpu) for output in outputs]
        if self._on_gpu:
            # DALI knows nothing of torch's stream, where kernels queue up that read a batch: what goes out is a copy.
            self._copying = [(held, copied) for held, copied in self._copying if not copied.query()]
            self._copying.append((outputs, torch.cuda.current_stream(self._device).record_event()))
        latents_NCHW, captions_NLC, *features = tensors
        batch = Batch(latents_NCHW, captions_NLC, buffer.texts, buffer.samples, buffer.step, *features)
        self._prefetcher.recycle(buffer)
        self._running = None
        if (following := self._prefetcher.take_filled()) is not None:
            self._start(following)
        return batch

    def _start(self, buffer: Buffer) -> Buffer:
        self._pipeline.feed_input("rows", [buffer.rows.numpy()])
        self._pipeline.schedule_run()
        self._running = buffer
        return buffer

    def close(self) -> None:
        super().close()
        for _, copied in self._copying:
            copied.synchronize()
        self._pipeline = self._running = None  # ends DALI's threads


def build_pipeline(layout: SampleLayout, batch_size: int, device_id: int | None, features: bool = False) -> Pipeline:
    """From "rows" (N, row_bytes) uint8 in host memory to latents (N, C, H, W) fp16, caption embeddings (N, L, C) and,
    if asked for, patch features (N, T, C), on the GPU of that number, or the CPU where it is None. What is stored in 8
    bits comes out in float32, where products are exact: DALI's CPU operators round ties to fp16 away from zero, torch
    rounds them to even.

    A batch is one sample of DALI's, which costs less than one for each row.
    """
    length, channels = layout.embedding_shape
    values_bytes = length * channels if layout.embeddings == "i8b64" else layout.embedding_bytes
    # Slices are copied word by word: the wider, the faster.
    word = math.gcd(
        8, layout.latent_bytes, values_bytes, layout.embedding_bytes, layout.features_bytes if features else 0
    )

    def cut(start: int, size: int, dtype: Any, shape: list[int]):
        return fn.reinterpret(words[:, start // word : (start + size) // word], dtype=dtype, shape=shape)

    def dequantised(start: int, stored: int, rows: int, width: int):
        blocks = batch_size * rows * width // BLOCK
        values = cut(start, rows * width, types.INT8, [blocks, BLOCK])
        scales = cut(start + rows * width, stored - rows * width, types.FLOAT16, [blocks, 1])
        return fn.reshape(values * fn.cast(scales, dtype=types.FLOAT), shape=[batch_size, rows, width])

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=device_id, prefetch_queue_depth=1)
    with pipeline:
        # Without a copy: the buffer is not given back before the outputs are there.
        rows = fn.external_source(name="rows", dtype=types.UINT8, ndim=2, no_copy=True)
        if device_id is not None:
            rows = rows.gpu()
        words = fn.reinterpret(rows, dtype=WORDS[word], shape=[batch_size, layout.row_bytes // word])
        latents = cut(layout.latent_at, layout.latent_bytes, types.FLOAT16, [batch_size, *layout.latent_shape])
        if layout.embeddings == "i8b64":
            captions = dequantised(TAR_BLOCK, layout.embedding_bytes, length, channels)
        else:
            captions = cut(TAR_BLOCK, values_bytes, types.FLOAT16, [batch_size, length, channels])
        outputs = [latents, captions]
        if features and layout.features_shape is not None:
            outputs.append(dequantised(layout.features_at, layout.features_bytes, *layout.features_shape))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline
