"""Choice of the decoder of pictures: Pillow's threads, or DALI where it works and there is a GPU."""

from collections.abc import Sequence

import torch

from mdit.config import UserError
from mdit.dist import logger
from mdit.precompute.dali import DaliDecoder, DaliUnavailable
from mdit.precompute.decode import PillowDecoder


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
