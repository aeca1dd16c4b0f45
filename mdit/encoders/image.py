"""Pictures to latents and back: plain pixels, or an autoencoder of the Stable Diffusion family."""

from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from mdit.config import UserError
from mdit.encoders.loading import (
    check_config,
    described,
    digest,
    dtype_of,
    local_folder,
    refusing,
    require_complete,
    require_weights,
)

# Brings emoji scenes, of standard deviation 0.6 in [-1, 1], near the sigma_data of 0.9 that the recipes use.
PIXEL_SCALE = 1.5
MOST_PARAMETERS = 2**28  # of an autoencoder, which takes its memory before it reads its file; FLUX's has 84 million


class ImageEncoder(Protocol):
    @property
    def device(self) -> torch.device | str: ...

    def encode(self, images_NCHW: Tensor) -> Tensor:
        """(N, 3, H, W) float pictures in [-1, 1] -> (N, C, h, w) float32 latents on the encoder's device."""
        ...

    def decode(self, latents_NCHW: Tensor) -> Tensor:
        """(N, C, h, w) latents -> (N, 3, H, W) float32 pictures in about [-1, 1], on the encoder's device."""
        ...

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square picture. Raises UserError for a size that gives no whole latents."""
        ...

    def describe(self) -> dict[str, Any]:
        """Description for the manifest; build_image_encoder takes it."""
        ...


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
    """diffusers' AutoencoderKL: latents are (mean of the posterior - shift) * scale.

    The mean, so that the same pictures always give the same set; the paper's code takes a sample of the posterior. The
    autoencoder computes in `precision`. SDXL's asks for float32 because it overflows in fp16 (`force_upcast`); bfloat16
    has the range of float32, and the paper's code runs it so.
    """

    def __init__(self, name: str, autoencoder, scale: float, shift: float, precision: str) -> None:
        self.name, self.autoencoder, self.scale, self.shift = name, autoencoder, scale, shift
        self.precision, self.dtype = precision, dtype_of(precision)

    @cached_property
    def weights(self) -> str:
        return digest(self.autoencoder.parameters())

    @property
    def device(self) -> torch.device:
        return self.autoencoder.device

    @torch.no_grad()
    def encode(self, images_NCHW: Tensor) -> Tensor:
        images_NCHW = images_NCHW.to(self.device, self.dtype)
        return (self.autoencoder.encode(images_NCHW).latent_dist.mode().float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents_NCHW: Tensor) -> Tensor:
        latents_NCHW = latents_NCHW.to(self.device, torch.float32) / self.scale + self.shift
        return self.autoencoder.decode(latents_NCHW.to(self.dtype)).sample.float()

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        config = self.autoencoder.config
        side = 2 ** (len(config.block_out_channels) - 1)  # of a latent, in pixels
        if image_size % side:
            raise UserError(f"image_size {image_size}: image encoder {self.name!r} takes multiples of {side} pixels")
        return config.latent_channels, image_size // side, image_size // side

    def describe(self) -> dict[str, Any]:
        return {"id": self.name, "scale": self.scale, "shift": self.shift} | described(self)


def build_image_encoder(
    encoder: str | dict[str, Any], device: torch.device | str = "cpu", *, precision: str = "float32"
) -> ImageEncoder:
    """From "pixels", a local path or a hub id of an AutoencoderKL (or of a pipeline with one under vae/), or from a
    description, whose scale, shift and precision then count. Pixels are float32 in any precision.

    Raises UserError when it cannot be loaded, or has other weights than the description's.
    """
    asked: dict[str, Any] = encoder if isinstance(encoder, dict) else {"id": encoder, "precision": precision}
    name, precision = asked["id"], asked.get("precision", "float32")
    if name == "pixels":
        return PixelEncoder(asked.get("scale", PIXEL_SCALE), device)
    key = f"image encoder {name!r}"
    autoencoder = load_autoencoder(name, key, dtype_of(precision)).eval().requires_grad_(False)
    built = image_encoder_of(autoencoder, asked)  # its weights are read where they were loaded
    autoencoder.to(device)
    return built


def image_encoder_of(autoencoder, description: dict[str, Any]) -> ImageEncoder:
    """From an AutoencoderKL that is there, None for pixels, and the description of an encoder. Raises UserError where
    it is another one than the description's."""
    name = description["id"]
    if autoencoder is None:
        return PixelEncoder(description.get("scale", PIXEL_SCALE), "cpu")
    scale = description.get("scale", autoencoder.config.scaling_factor)
    shift = description.get("shift", getattr(autoencoder.config, "shift_factor", None) or 0.0)
    built = AutoencoderEncoder(name, autoencoder, scale, shift, description.get("precision", "float32"))
    require_weights(f"image encoder {name!r}", built, description)
    return built


def load_autoencoder(name: str, key: str, dtype: torch.dtype):
    """diffusers' AutoencoderKL from a path or hub id. Raises UserError, beginning with `key`, where there is none."""
    local = local_folder(name, key)
    try:
        from diffusers import AutoencoderKL  # pyright: ignore[reportPrivateImportUsage]: it is what they document
    except ImportError as error:
        raise UserError(f"{key}: needs diffusers ({error}): pip install diffusers") from None
    # use_safetensors: never a pickle; low_cpu_mem_usage: True needs accelerate, which this is too small for
    options = dict(use_safetensors=True, low_cpu_mem_usage=False, torch_dtype=dtype, output_loading_info=True)
    subfolders, problem = ("vae", None), ""  # a hub id may be of a pipeline
    if local is not None:
        subfolders = ("vae",) if (local / "vae").is_dir() else (None,)
    for subfolder in subfolders:
        try:
            with refusing(""):
                config: Any = AutoencoderKL.load_config(local or name, subfolder=subfolder)
                check_config(config, "config.json")
                with torch.device("meta"):
                    built: Any = AutoencoderKL.from_config(config)
                needed = sum(parameter.numel() for parameter in built.parameters())
                if needed > MOST_PARAMETERS:
                    raise UserError(f"config.json: {needed} parameters are more than {MOST_PARAMETERS}")
                loaded: Any = AutoencoderKL.from_pretrained(local or name, subfolder=subfolder, **options)
        except UserError as error:
            problem = str(error).removeprefix(": ")
            continue
        autoencoder, found = loaded
        require_complete(key, found)
        return autoencoder
    raise UserError(f"{key}: expected pixels, or the local path or hub id of a diffusers AutoencoderKL: {problem}")
