"""Encoded pictures to upright RGB ones: the one judgement of what is a picture."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mdit.sources.storage import is_damage


def open_header(picture: bytes | Image.Image) -> Image.Image:
    """Size, mode and format; pixels are decoded when they are asked for. Raises what Pillow raises."""
    if isinstance(picture, Image.Image):
        return picture
    return Image.open(io.BytesIO(picture))


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
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
