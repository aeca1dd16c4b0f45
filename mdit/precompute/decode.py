"""Pictures to square RGB tensors: turned upright, laid on white where transparent, cropped (`mdit.sources.pictures`).

`mdit.precompute.dali` does the same on a GPU.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mdit.dist import cores
from mdit.sources.pictures import crop, open_header, room_for, upright_rgb
from mdit.sources.storage import is_damage

TOO_SMALL = "too small"
NOT_DECODABLE = "not decodable"

MOST_THREADS = 16


@dataclass(frozen=True)
class Decoded:
    """`images` maps each image size to uint8 (n, size, size, 3) RGB on the decoder's device: row i is the picture at
    `kept[i]` of those given, ascending. `rejected` maps the others to "too small" or "not decodable"."""

    images: dict[int, Tensor]
    kept: list[int]
    rejected: dict[int, str]


class PillowDecoder:
    """Threads, one a core up to MOST_THREADS: Pillow lets go of the interpreter while it decodes and resizes."""

    def __init__(self, image_sizes: Sequence[int], min_side: int, device: torch.device) -> None:
        self.image_sizes, self.min_side, self.device = tuple(image_sizes), min_side, device
        self.threads = min(cores(), MOST_THREADS)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def __call__(self, pictures: Sequence[bytes | Image.Image]) -> Decoded:
        """Decode each picture once for all image sizes. What is wrong with one is in the result, never raised."""
        decoded = all(isinstance(picture, Image.Image) for picture in pictures)
        results = map(self.decode, pictures) if decoded else self.pool.map(self.decode, pictures)
        return self.gather(list(results))

    def decode(self, picture: bytes | Image.Image) -> dict[int, np.ndarray] | str:
        """Image size -> uint8 (size, size, 3), or the reason of rejection."""
        try:
            image = open_header(picture)
            if min(image.size) < self.min_side:
                return TOO_SMALL
            with room_for(image):
                image = upright_rgb(image)
                return {size: np.array(crop(image, size)) for size in self.image_sizes}
        except Exception as error:
            if not is_damage(error):
                raise
            return NOT_DECODABLE

    def gather(self, results: Sequence[dict[int, Any] | str]) -> Decoded:
        """One batch of what was made of each picture: image size -> array or tensor, or the reason of rejection."""
        kept = {i: result for i, result in enumerate(results) if not isinstance(result, str)}
        rejected = {i: result for i, result in enumerate(results) if isinstance(result, str)}
        images = {}
        for size in self.image_sizes:
            rows = [torch.as_tensor(result[size], device=self.device) for result in kept.values()]
            nothing = torch.empty(0, size, size, 3, dtype=torch.uint8, device=self.device)
            images[size] = torch.stack(rows) if rows else nothing
        return Decoded(images, list(kept), rejected)
