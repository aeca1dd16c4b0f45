"""Frozen towers: pictures to latents and back, captions to token embeddings.

A description (`mdit.descriptions`) is what a set's manifest says about an encoder: enough to build it again, the same.
"""

from mdit.encoders.image import ImageEncoder, build_image_encoder
from mdit.encoders.text import TextEncoder, build_text_encoder

__all__ = ["ImageEncoder", "TextEncoder", "build_image_encoder", "build_text_encoder"]
