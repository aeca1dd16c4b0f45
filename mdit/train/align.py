"""Features of a batch's patches for representation alignment, by a frozen tower, where the shards hold none."""

from dataclasses import replace

import torch

from mdit.config import AlignConfig, TrainConfig
from mdit.data.loader import Batch, Loader
from mdit.data.manifest import read_manifest
from mdit.encoders import ImageEncoder, VisionTower, build_image_encoder, build_vision_tower


def stores_features(config: TrainConfig) -> bool:
    """Whether the training sets hold features. `mdit.precompute` has checked that all do or none."""
    return read_manifest(config.data.train[0]).layout.features_shape is not None


class ComputedFeatures(Loader):
    """Batches of another loader with the features of their pictures, up to the alignment's last step."""

    def __init__(
        self, batches: Loader, align: AlignConfig, grid: int, decoder: ImageEncoder, tower: VisionTower
    ) -> None:
        self.batches, self.align, self.grid, self.decoder, self.tower = batches, align, grid, decoder, tower

    def __next__(self) -> Batch:
        batch = next(self.batches)
        if batch.step >= self.align.stop_step:
            return batch
        images_NCHW = self.decoder.decode(batch.latents_NCHW)
        return replace(batch, features_NTC=self.tower.features(images_NCHW, self.grid).half())

    def close(self) -> None:
        self.batches.close()


def with_features(batches: Loader, config: TrainConfig, device: torch.device) -> Loader:
    """Raises UserError where the tower is not what the recipe says."""
    assert (align := config.align) is not None
    decoder = build_image_encoder(read_manifest(config.data.train[0]).encoders.plain()["image"], device)
    tower = build_vision_tower(align.tower, device, channels=align.channels)
    return ComputedFeatures(batches, align, config.model.latent_size // config.model.patch_size, decoder, tower)
