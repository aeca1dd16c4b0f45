"""Pictures to features of their patches by a frozen vision tower: targets of representation alignment (REPA, Yu et al.
2024, arXiv 2410.06940).

    efficientnet-lite0   a stand-in whose weights are in a pip package: 112 channels
    PATH, HUB_ID         DINOv2 of transformers, without or with registers, or DINOv3: the normalised last hidden states

A tower's patch is a square of its own pixels. It is shown pictures of grid x patch pixels, so that its patches are
those of a backbone of this grid.
"""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.config import UserError
from mdit.encoders.efficientnet import IMAGENET_MEAN, IMAGENET_STD, PATCH, PATCH_CHANNELS, load_efficientnet
from mdit.encoders.loading import digest, load_family, require_weights

EFFICIENTNET = "efficientnet-lite0"
FAMILIES = {  # model_type -> class of transformers
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}
EXPECTED = f"expected {EFFICIENTNET}, or the local path or hub id of a DINOv2 or DINOv3 model of transformers"
BATCH_SIZE = 64


class VisionTower:
    """`channels` features of every patch of `patch` x `patch` pixels; float32."""

    def __init__(
        self, name: str, model: nn.Module, patches: Callable[[Tensor], Tensor], channels: int, patch: int
    ) -> None:
        self.name, self.model, self.patches, self.channels, self.patch = name, model, patches, channels, patch

    @cached_property
    def weights(self) -> str:
        return digest(self.model.parameters())

    @torch.no_grad()
    def features(self, images_NCHW: Tensor, grid: int) -> Tensor:
        """(N, 3, H, W) float pictures in [-1, 1] -> (N, grid * grid, C) float32 features on the tower's device, row by
        row."""
        device = next(self.model.parameters()).device
        parts = [self.patches(self._shown(images.to(device), grid)) for images in images_NCHW.split(BATCH_SIZE)]
        features_NTC = torch.cat(parts)
        if features_NTC.shape[1:] != (expected := (grid**2, self.channels)):
            raise UserError(
                f"align tower {self.name!r}: gives features of shape {tuple(features_NTC.shape[1:])} for a picture of "
                f"{grid * self.patch} pixels, not {expected}: its patch grid is not the backbone's of {grid} x {grid}"
            )
        return features_NTC

    def describe(self) -> dict[str, Any]:
        """Description for the manifest; build_vision_tower takes it."""
        return {"id": self.name, "weights": self.weights}

    def _shown(self, images_NCHW: Tensor, grid: int) -> Tensor:
        """As ImageNet's pictures are shown to a network: bicubic to the tower's size, by mean and deviation."""
        size = (grid * self.patch, grid * self.patch)
        images = F.interpolate(images_NCHW.float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
        return ((images + 1) / 2 - mean) / std


def build_vision_tower(
    tower: str | dict[str, Any], device: torch.device | str = "cpu", *, channels: int | None = None
) -> VisionTower:
    """From one of the names above, or from a description. `channels` are those that a recipe expects of it.

    Raises UserError when it cannot be loaded, or has other weights than the description's.
    """
    asked: dict[str, Any] = tower if isinstance(tower, dict) else {"id": tower}
    name, key = asked["id"], f"align tower {asked['id']!r}"
    built = _efficientnet() if name == EFFICIENTNET else _load(name, key)
    require_weights(key, built, asked)  # read where they were loaded
    if channels not in (None, built.channels):
        raise UserError(f"{key}: has {built.channels} channels, but align.channels = {channels}")
    built.model.to(device)
    return built


def _efficientnet() -> VisionTower:
    network = load_efficientnet()
    return VisionTower(EFFICIENTNET, network, network.patch_features, PATCH_CHANNELS, PATCH)


def _load(name: str, key: str) -> VisionTower:
    model = load_family(name, key, FAMILIES, EXPECTED)
    config: Any = model.config
    others = 1 + getattr(config, "num_register_tokens", 0)  # of the class and of registers, in front of the patches
    return VisionTower(name, model, partial(_hidden_states, model, others), config.hidden_size, config.patch_size)


def _hidden_states(model: nn.Module, others: int, images_NCHW: Tensor) -> Tensor:
    return model(pixel_values=images_NCHW).last_hidden_state[:, others:]
