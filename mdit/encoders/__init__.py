"""Frozen towers: pictures to latents and back, captions to token embeddings, pictures to features of their patches.

A description (`mdit.descriptions`) is what a set's manifest says about an encoder: enough to build it again, the same.
"""

from mdit.encoders.image import ImageEncoder, build_image_encoder, image_encoder_of
from mdit.encoders.text import TextEncoder, build_text_encoder, text_encoder_of
from mdit.encoders.vision import VisionTower, build_vision_tower

__all__ = [
    "ImageEncoder",
    "TextEncoder",
    "VisionTower",
    "build_image_encoder",
    "build_text_encoder",
    "build_vision_tower",
    "image_encoder_of",
    "text_encoder_of",
]
