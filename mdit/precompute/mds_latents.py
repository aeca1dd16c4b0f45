"""Latents and caption embeddings that the paper's code made become samples as they are."""

from collections.abc import Generator, Iterable
from typing import Any

from mdit.config import Embeddings
from mdit.data.manifest import SampleLayout
from mdit.precompute.pipeline import SampleProducer, Samples, WorkItem, ahead, read_parts
from mdit.sources.mds import EMBEDDING_SHAPE, ShardOfLatents

SAMPLES_TOGETHER = 256
# What the paper's code makes its latents and embeddings with.
IMAGE_ENCODER, SCALE = "stabilityai/stable-diffusion-xl-base-1.0", 0.13025
TEXT_ENCODER = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"


class ImportedLatents(SampleProducer):
    """Stands where the towers would. The encoders' names are for the manifest; nothing is loaded."""

    def __init__(self, part: ShardOfLatents, image_encoder: str, text_encoder: str) -> None:
        self.part = part
        self.image_encoder, self.text_encoder = image_encoder, text_encoder

    def layout(self, image_size: int, embeddings: Embeddings) -> SampleLayout:
        return SampleLayout(latent_shape=self.part.latent_shape, embedding_shape=EMBEDDING_SHAPE, embeddings=embeddings)

    def encoders(self) -> dict[str, dict[str, Any]]:
        length, channels = EMBEDDING_SHAPE
        return {
            "image": {"id": self.image_encoder, "scale": SCALE, "shift": 0.0},
            "text": {"id": self.text_encoder, "max_tokens": length, "channels": channels},
        }

    def samples(self, work: Iterable[WorkItem]) -> Generator[Samples, None, None]:
        return ahead(map(self._taken_over, read_parts(work, SAMPLES_TOGETHER)))

    def _taken_over(self, batch: Samples) -> Samples:
        for sample in batch.samples:
            sample.latents = {size: sample.read.latent for size in batch.item.image_sizes}
            sample.embedding = sample.read.embedding
        return batch
