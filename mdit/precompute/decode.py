"""Pictures to square RGB tensors: turned upright, laid on white where transparent, cropped as in the paper's code.

The crop is that of torchvision's Resize(size, bicubic) and CenterCrop(size), which the paper's code uses: the shorter
side is resized to `size` with an antialiased bicubic filter, then the middle square is cut out. Pillow's decoder gives
bit for bit what torchvision gives on Pillow pictures; `mdit.precompute.dali` has the same crop on a GPU.
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
from mdit.sources.pictures import open_header, upright_rgb
from mdit.sources.storage import is_damage

TOO_SMALL = "too small"
NOT_DECODABLE = "not decodable"

MOST_THREADS = 16
# Beyond this ratio of the sides only the middle of a picture is resized, lest a strip of 1 x 100,000 fill the memory.
STRIP = 32


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
            image = upright_rgb(image)
        except Exception as error:
            if not is_damage(error):
                raise
            return NOT_DECODABLE
        return {size: np.array(crop(image, size)) for size in self.image_sizes}

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


def placement(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """(width, height) of a picture resized so that its shorter side is `size`, and (left, top) of the square in its
    middle; rounded as torchvision does."""
    if width <= height:
        resized = size, int(size * height / width)
    else:
        resized = int(size * width / height), size
    left, top = (int(round((side - size) / 2)) for side in resized)
    return *resized, left, top


def source_box(width: int, height: int, size: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of that square in the picture's own pixels."""
    new_width, new_height, left, top = placement(width, height, size)
    x, y = width / new_width, height / new_height
    return left * x, top * y, (left + size) * x, (top + size) * y


def crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle, `size` x `size`; of a picture that is this square already, its very pixels."""
    if max(image.size) > STRIP * min(image.size):
        return image.resize((size, size), Image.Resampling.BICUBIC, box=source_box(*image.size, size))
    width, height, left, top = placement(*image.size, size)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
