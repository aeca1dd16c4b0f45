"""JPEGs decoded, resized and cropped by DALI: on a GPU by nvJPEG, without one by libjpeg-turbo.

Which pictures are kept is Pillow's decision: it reads the headers, and what is not a plain, upright, whole RGB JPEG it
decodes itself, as it does every batch in which DALI fails on a picture. The crop is `mdit.precompute.decode`'s.
Without a GPU, DALI's decoded pixels equal Pillow's and only the resizing rounds otherwise: on pictures like photographs
the two differ by less than 0.25 of 255 in the mean and by at most 8. nvJPEG is held to 1 and 16.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdit.config import UserError
from mdit.dist import logger
from mdit.precompute.decode import Decoded, PillowDecoder
from mdit.sources.pictures import open_header, orientation, source_box
from mdit.sources.storage import is_damage

BATCH_SIZE = 64
END_OF_IMAGE = b"\xff\xd9"


class DaliUnavailable(Exception):
    """DALI is not installed or does not work here; the text says why, in one line."""


class DaliDecoder(PillowDecoder):
    """DALI, and Pillow for what DALI does not decode. For one thread at a time. Raises DaliUnavailable."""

    def __init__(self, image_sizes: Sequence[int], min_side: int, device: torch.device) -> None:
        super().__init__(image_sizes, min_side, device)
        self.failed_before = False
        probe = io.BytesIO()
        Image.new("RGB", (16, 16)).save(probe, "JPEG")
        try:
            self.pipeline = self._build_pipeline()
            self._run([probe.getvalue()] * 2, [(16, 16)] * 2)
        except ImportError as error:
            raise DaliUnavailable(f"DALI is not installed: {error}") from None
        except (RuntimeError, OSError) as error:
            raise DaliUnavailable(f"DALI does not work here: {_reason(error)}") from None

    def __call__(self, pictures: Sequence[bytes | Image.Image]) -> Decoded:
        extents = [plain_jpeg(picture) for picture in pictures]
        plain = [i for i, extent in enumerate(extents) if extent and min(extent) >= self.min_side]
        waiting = {i: self.pool.submit(self.decode, pictures[i]) for i in {*range(len(pictures))} - {*plain}}
        results: dict[int, Any] = {}
        for start in range(0, len(plain), BATCH_SIZE):
            batch = plain[start : start + BATCH_SIZE]
            try:
                results |= zip(batch, self._run([pictures[i] for i in batch], [extents[i] for i in batch]))
            except RuntimeError as error:
                self._start_again(error)
                waiting |= {i: self.pool.submit(self.decode, pictures[i]) for i in batch}
        results |= {i: decoded.result() for i, decoded in waiting.items()}
        return self.gather([results[i] for i in range(len(pictures))])

    def _run(self, pictures: Sequence[Any], extents: Sequence[Any]) -> list[dict[int, Tensor]]:
        """Image size -> uint8 (size, size, 3) of each of at most BATCH_SIZE pictures. Raises RuntimeError."""
        inputs: dict[str, list] = {"pictures": [np.frombuffer(picture, np.uint8) for picture in pictures]}
        for size in self.image_sizes:
            boxes = [source_box(width, height, size) for width, height in extents]
            inputs[f"start_{size}"] = [np.array([top, left], np.float32) for left, top, _, _ in boxes]
            inputs[f"end_{size}"] = [np.array([bottom, right], np.float32) for _, _, right, bottom in boxes]
        outputs = self.pipeline.run(**inputs)
        images = [torch.stack([torch.from_dlpack(output[i]) for i in range(len(output))]) for output in outputs]
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # DALI may write again where this was copied from
        return [dict(zip(self.image_sizes, rows, strict=True)) for rows in zip(*images, strict=True)]

    def _build_pipeline(self):
        from nvidia.dali import Pipeline, fn
        from nvidia.dali import types as dali_types

        types: Any = dali_types  # whose stub lacks its enumerations
        on_gpu = self.device.type == "cuda"
        index = torch.cuda.current_device() if on_gpu and self.device.index is None else self.device.index
        pipeline = Pipeline(BATCH_SIZE, self.threads, index if on_gpu else None, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="pictures", dtype=types.UINT8, ndim=1)
            # nvJPEG's own way of scaling colours up differs from that of libjpeg-turbo, which Pillow uses.
            decoded = fn.decoders.image(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,
            )
            outputs = []
            for size in self.image_sizes:
                start, end = (
                    fn.external_source(name=f"{edge}_{size}", dtype=types.FLOAT, ndim=1) for edge in ("start", "end")
                )
                outputs.append(
                    fn.resize(
                        decoded,
                        size=[size, size],
                        roi_start=start,
                        roi_end=end,
                        interp_type=types.INTERP_CUBIC,
                        antialias=True,
                    )
                )
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _start_again(self, error: RuntimeError) -> None:
        """A pipeline that failed cannot be used any more."""
        if not self.failed_before:
            logger.warning(f"DALI failed on a picture ({_reason(error)}); Pillow decodes such batches")
        self.failed_before = True
        self.pipeline = self._build_pipeline()


def plain_jpeg(picture: bytes | Image.Image) -> tuple[int, int] | None:
    """(width, height) of a file that DALI is sure to decode as Pillow does, as far as its header and its end tell."""
    if isinstance(picture, Image.Image) or not picture.endswith(END_OF_IMAGE):
        return None
    try:
        image = open_header(picture)
    except Exception as error:  # as in `decode`, which is going to reject it
        if not is_damage(error):
            raise
        return None
    stored_as_rgb = image.info.get("adobe_transform") == 0
    if image.format != "JPEG" or image.mode != "RGB" or stored_as_rgb or orientation(image) != 1:
        return None
    return image.size


def _reason(error: Exception) -> str:
    """The line of DALI's long messages that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [i + 1 for i, line in enumerate(lines) if line == "encountered:"]
    return lines[after[0]] if after and after[0] < len(lines) else lines[0] if lines else type(error).__name__


def build_decoder(
    image_sizes: Sequence[int], min_side: int, device: torch.device, *, engine: str = "auto"
) -> PillowDecoder:
    """A decoder of pictures whose shorter side is at least `min_side` pixels.

    `engine` is "pillow", "dali", or "auto": DALI where it works and `device` is a GPU, else Pillow; the log says which
    and why. Raises UserError when "dali" is asked for and does not work here.
    """
    reason = "asked for" if engine == "pillow" else f"{device} is no GPU"
    if engine == "dali" or (engine == "auto" and device.type == "cuda"):
        try:
            dali = DaliDecoder(image_sizes, min_side, device)
            logger.info(f"pictures are decoded by DALI (on {device})")
            return dali
        except DaliUnavailable as error:
            if engine == "dali":
                raise UserError(f"decoder 'dali': {error}; see docs/data.md") from None
            reason = str(error)
    logger.info(f"pictures are decoded by Pillow ({reason})")
    return PillowDecoder(image_sizes, min_side, device)
