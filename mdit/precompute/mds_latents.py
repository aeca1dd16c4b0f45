"""Latents and caption embeddings that the paper's code made become samples as they are."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from mdit.config import Embeddings
from mdit.data.manifest import SampleLayout
from mdit.precompute.pipeline import Sample, Samples, WorkItem, ahead, read
from mdit.sources import Rejected
from mdit.sources.mds import ShardOfLatents

SAMPLES_TOGETHER = 256
# What the paper's code makes its latents and embeddings with.
IMAGE_ENCODER, SCALE = "stabilityai/stable-diffusion-xl-base-1.0", 0.13025
TEXT_ENCODER = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"


class ImportedLatents:
    """Stands where the towers would. The encoders' names are for the manifest; nothing is loaded."""

    def __init__(self, part: ShardOfLatents, image_encoder: str, text_encoder: str) -> None:
        self.part = part
        self.image_encoder, self.text_encoder = image_encoder, text_encoder

    def layout(self, image_size: int, embeddings: Embeddings) -> SampleLayout:
        return SampleLayout(
            latent_shape=self.part.latent_shape, embedding_shape=self.part.embedding_shape, embeddings=embeddings
        )

    def settle(self, stored: dict[str, Any] | None, captions: Callable[[], Sequence[str]]) -> None:
        """There is nothing to measure."""

    def encoders(self) -> dict[str, dict[str, Any]]:
        length, channels = self.part.embedding_shape
        return {
            "image": {"id": self.image_encoder, "scale": SCALE, "shift": 0.0},
            "text": {"id": self.text_encoder, "max_tokens": length, "channels": channels},
        }

    def settings(self) -> dict[str, Any]:
        return {}

    def device_name(self) -> str:
        return "cpu"

    def samples(self, work: Iterable[WorkItem]) -> Generator[Samples, None, None]:
        return ahead(self._read(work))

    def _read(self, work: Iterable[WorkItem]) -> Iterator[Samples]:
        for item in work:
            together = Samples(item)
            for position, found in enumerate(read(item)):
                together.seen += 1
                if isinstance(found, Rejected) or not found.caption:
                    reason = found.reason if isinstance(found, Rejected) else "no caption"
                    together.rejected.append((reason, found.origin))
                    continue
                latents = {size: found.latent for size in item.image_sizes}
                sample = Sample(item.key(position), found.origin, found.caption, latents, found.embedding)
                together.samples.append(sample)
                if len(together.samples) == SAMPLES_TOGETHER:
                    yield together
                    together = Samples(item)
            together.last = True
            yield together
