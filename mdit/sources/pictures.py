"""Encoded pictures to upright RGB ones, the one judgement of what is a picture, and to squares of them.

The crop is that of torchvision's Resize(size, bicubic) and CenterCrop(size), which the paper's code uses: the shorter
side is resized to `size` with an antialiased bicubic filter, then the middle square is cut out; bit for bit what
torchvision gives on Pillow pictures.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mdit.sources.storage import is_damage

# Beyond this ratio of the sides only the middle of a picture is resized, lest a strip of 1 x 100,000 fill the memory.
STRIP = 32
# What Pillow is asked to read: of others, an EPS would be run by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "MPO")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS or 2**26  # about 89 million, 4 bytes each and twice at once
MANY_PIXELS = 2**24  # of such pictures one at a time is decoded
BAND_PIXELS = 2**22  # laid on white at once
_alone = threading.Lock()


def open_header(picture: bytes | Image.Image) -> Image.Image:
    """Size, mode and format; pixels are decoded when they are asked for. Raises what Pillow raises, and ValueError for
    more than MOST_PIXELS."""
    if isinstance(picture, Image.Image):
        return picture
    image = Image.open(io.BytesIO(picture), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS}")
    return image


@contextmanager
def room_for(image: Image.Image) -> Iterator[None]:
    """Around what needs a picture's pixels: only one of MANY_PIXELS is there at a time, whatever the threads."""
    with _alone if image.width * image.height > MANY_PIXELS else nullcontext():
        yield


def orientation(image: Image.Image) -> int:
    """EXIF's number for how the picture is turned, 1 to 8; 1 is upright, and so is a picture with damaged EXIF data."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:
        if not is_damage(error):
            raise
        return 1


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode, of several frames the first. Raises ValueError for pixels that are no colours (32-bit integers, floats),
    and what Pillow raises."""
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range")
    if image.has_transparency_data:
        return _on_white(image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    laid, height = Image.new("RGB", image.size), max(BAND_PIXELS // image.width, 1)
    for top in range(0, image.height, height):
        band = image.crop((0, top, image.width, min(top + height, image.height))).convert("RGBA")
        laid.paste(Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB"), (0, top))
    return laid


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
