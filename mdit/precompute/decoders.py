"""Choice of the decoder of pictures: Pillow's threads, or DALI where it works and there is a GPU."""

from collections.abc import Sequence
from typing import Protocol

import torch
from PIL import Image

from mdit.config import UserError
from mdit.dist import logger
from mdit.precompute.dali import DaliDecoder, DaliUnavailable
from mdit.precompute.decode import Decoded, PillowDecoder


class Decoder(Protocol):
    def __call__(self, pictures: Sequence[bytes | Image.Image]) -> Decoded:
        """Decode each picture once for all image sizes. What is wrong with a picture is in the result, never raised."""
        ...


def build_decoder(image_sizes: Sequence[int], min_side: int, device: torch.device, *, engine: str = "auto") -> Decoder:
    """A decoder of pictures whose shorter side is at least `min_side` pixels.

    `engine` is "pillow", "dali", or "auto": DALI where it works and `device` is a GPU, else Pillow; the log says which
    and why. Raises UserError when "dali" is asked for and does not work here.
    """
    pillow = PillowDecoder(image_sizes, min_side, device)
    if engine == "pillow":
        return _chosen(pillow, "Pillow", "asked for")
    if engine == "auto" and device.type != "cuda":
        return _chosen(pillow, "Pillow", f"{device} is no GPU")
    try:
        dali = DaliDecoder(pillow)
    except DaliUnavailable as error:
        if engine == "dali":
            raise UserError(f"decoder 'dali': {error}; see docs/data.md") from None
        return _chosen(pillow, "Pillow", str(error))
    return _chosen(dali, "DALI", f"on {device}")


def _chosen(decoder: Decoder, name: str, reason: str) -> Decoder:
    logger.info(f"pictures are decoded by {name} ({reason})")
    return decoder
