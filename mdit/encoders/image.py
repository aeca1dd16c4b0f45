"""Pictures to latents and back: plain pixels, or an autoencoder of the Stable Diffusion family."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mdit.config import UserError

# Brings emoji scenes, of standard deviation 0.6 in [-1, 1], near the sigma_data of 0.9 that the recipes use.
PIXEL_SCALE = 1.5


class ImageEncoder(Protocol):
    def encode(self, images_NCHW: Tensor) -> Tensor:
        """(N, 3, H, W) float pictures in [-1, 1] -> (N, C, h, w) float32 latents on the encoder's device."""

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """(N, C, h, w) latents -> (N, 3, H, W) float32 pictures in about [-1, 1], on the encoder's device."""

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square picture."""

    def describe(self) -> dict[str, Any]:
        """For the manifest; build_image_encoder takes it."""


class PixelEncoder:
    """No autoencoder: latents are pixels in [-1, 1] times `scale`, for pictures so small that none is needed."""

    def __init__(self, scale: float, device: torch.device | str) -> None:
        self.scale, self.device = scale, device

    def encode(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.to(self.device, torch.float32) * self.scale

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        return latents_NCHW.to(self.device, torch.float32) / self.scale

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        return 3, image_size, image_size

    def describe(self) -> dict[str, Any]:
        return {"id": "pixels", "scale": self.scale}


class AutoencoderEncoder:
    """diffusers' AutoencoderKL: latents are (mean of the posterior - shift) * scale, in float32.

    The mean and not a sample, so that the same pictures always give the same set.
    """

    def __init__(self, name: str, autoencoder, scale: float, shift: float) -> None:
        self.name, self.autoencoder, self.scale, self.shift = name, autoencoder, scale, shift

    @torch.no_grad()
    def encode(self, images_NCHW: Tensor) -> Tensor:
        images_NCHW = images_NCHW.to(self.autoencoder.device, torch.float32)
        return (self.autoencoder.encode(images_NCHW).latent_dist.mode() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        latents_NCHW = latents_NCHW.to(self.autoencoder.device, torch.float32)
        return self.autoencoder.decode(latents_NCHW / self.scale + self.shift).sample

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        config = self.autoencoder.config
        size = image_size // 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, size, size

    def describe(self) -> dict[str, Any]:
        return {"id": self.name, "scale": self.scale, "shift": self.shift}


def build_image_encoder(encoder: str | dict[str, Any], device: torch.device | str = "cpu") -> ImageEncoder:
    """From "pixels", a local path or a hub id of an AutoencoderKL (or of a pipeline with one under vae/), or from a
    description, whose scale and shift then count. Raises UserError when it cannot be loaded."""
    described = encoder if isinstance(encoder, dict) else {"id": encoder}
    if described["id"] == "pixels":
        return PixelEncoder(described.get("scale", PIXEL_SCALE), device)
    autoencoder = _load_autoencoder(described["id"]).to(device).eval().requires_grad_(False)
    config = autoencoder.config
    scale = described.get("scale", config.scaling_factor)
    shift = described.get("shift", getattr(config, "shift_factor", None) or 0.0)
    return AutoencoderEncoder(described["id"], autoencoder, scale, shift)


def _load_autoencoder(name: str):
    local = Path(name).expanduser()
    if not local.is_dir() and (local.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"data.prepare.image_encoder = {name!r}: there is no such directory")
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        reason = f"data.prepare.image_encoder = {name!r} needs diffusers ({error})"
        raise UserError(f"{reason}: pip install diffusers") from None
    problems = []
    for folder in ({"subfolder": "vae"}, {}):
        try:
            # use_safetensors: never a pickle
            return AutoencoderKL.from_pretrained(local if local.is_dir() else name, use_safetensors=True, **folder)
        except (OSError, ValueError, RuntimeError) as error:
            problems.append(str(error).split("\n")[0])
    raise UserError(
        f"data.prepare.image_encoder = {name!r}: expected pixels, or the local path or hub id of a diffusers "
        f"AutoencoderKL, cannot load it: {problems[0 if (local / 'vae').is_dir() else -1]}"
    )
