"""Pictures to samples: read, decoded and put through the frozen towers."""

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from mdit.captions import Caption
from mdit.config import Embeddings, UserError
from mdit.data.manifest import SampleLayout
from mdit.dist import work_on
from mdit.documents import explain
from mdit.encoders import ImageEncoder, TextEncoder, VisionTower
from mdit.precompute.decode import PillowDecoder
from mdit.sources import Part, Rejected

T = TypeVar("T")
CPU = torch.device("cpu")
CACHED_BYTES, TOGETHER_BYTES = 256 * 2**20, 64 * 2**20  # of caption embeddings
BATCHES_TOGETHER = 8
BATCH_SIZE = 32


@dataclass(frozen=True)
class WorkItem:
    """Part `number` of a source, to be made for some image sizes; `pictures` limits how many are read of it."""

    number: int
    part: Part
    pictures: int | None = None
    image_sizes: tuple[int, ...] = ()


@dataclass(slots=True)
class Sample:
    """Item read of a source, and its encodings in fp16: `latents` maps each image size to (C, h, w), `features`, where
    there is a vision tower, to (T, C); `embedding` is (L, C), of several captions (k, L, C)."""

    key: str
    read: Any  # a Picture, or Latents
    latents: dict[int, np.ndarray] = field(default_factory=dict)
    features: dict[int, np.ndarray] = field(default_factory=dict)
    embedding: np.ndarray = field(default_factory=lambda: np.empty(0, np.float16))

    @property
    def captions(self) -> str | Sequence[Caption]:
        """The only caption, or all of several."""
        return getattr(self.read, "captions", ()) or self.read.caption


@dataclass
class Samples:
    """Consecutive samples of a part. `seen` counts what was read for them, `rejected` are the (reason, origin) of what
    gave no sample, and `last` says that they end the part. `images`, while they are on their way, maps each image size
    to uint8 (n, size, size, 3)."""

    item: WorkItem
    samples: list[Sample] = field(default_factory=list)
    images: dict[int, Tensor] = field(default_factory=dict)
    seen: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    last: bool = False

    def extend(self, following: "Samples") -> None:
        self.samples += following.samples
        self.rejected += following.rejected
        self.seen, self.last = self.seen + following.seen, following.last


class SampleProducer(Protocol):
    """Producer of samples from parts. What it holds by default is right where nothing is encoded."""

    def layout(self, image_size: int, embeddings: Embeddings) -> SampleLayout: ...

    def encoders(self) -> dict[str, dict[str, Any]]:
        """Their descriptions, for the manifest."""
        ...

    def samples(self, work: Iterable[WorkItem]) -> Generator[Samples, None, None]:
        """The samples of one part after another. The next part is begun while the last samples of one are written."""
        ...

    def settle(self, stored: dict[str, Any] | None, captions: Callable[[], Sequence[str]]) -> None:
        """Take text statistics from stored descriptions of the encoders, or measure them on captions, where needed."""
        ...

    def settings(self) -> dict[str, Any]:
        """Further settings that decide the bytes."""
        return {}

    def device_name(self) -> str:
        """Name of the GPU that does the work, or "cpu", for the report."""
        return "cpu"


@dataclass(frozen=True)
class PatchFeatures:
    """Features by `tower` of the patches that a model of `patch_size` cuts latents into."""

    tower: VisionTower
    patch_size: int

    def grid(self, latent_size: int) -> int:
        """Patches along a side. Raises UserError."""
        grid, rest = divmod(latent_size, self.patch_size)
        if rest:
            raise UserError(
                f"latents of {latent_size} x {latent_size} are no whole patches of patch_size {self.patch_size}"
            )
        return grid


class EncodingPipeline(SampleProducer):
    """Makes samples of a part a function of that part, whatever was made before it: batches do not reach over its ends
    and no caption's embedding is taken over from another part.

    With `overlap`, the default on a GPU, a thread reads and decodes, another works the towers, and the caller writes,
    all at the same time. On a CPU the three take cores and interpreter from each other.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        decoder: PillowDecoder,
        batch_size: int = BATCH_SIZE,
        overlap: bool | None = None,
        features: PatchFeatures | None = None,
    ) -> None:
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.decoder, self.batch_size, self.device = decoder, batch_size, torch.device(image_encoder.device)
        self.features = features
        self.overlap = self.device.type == "cuda" if overlap is None else overlap

    def layout(self, image_size: int, embeddings: Embeddings) -> SampleLayout:
        latent_shape = self.image_encoder.latent_shape(image_size)
        layout: dict[str, Any] = {
            "latent_shape": latent_shape,
            "embedding_shape": (self.text_encoder.max_tokens, self.text_encoder.channels),
            "embeddings": embeddings,
        }
        if self.features is not None:
            layout["features_shape"] = (self.features.grid(latent_shape[1]) ** 2, self.features.tower.channels)
        return SampleLayout(**layout)

    def settle(self, stored: dict[str, Any] | None, captions: Callable[[], Sequence[str]]) -> None:
        encoder = self.text_encoder
        if not encoder.needs_fit:
            return
        if stored is None:
            if found := captions():  # if there are none, there will be nothing to embed
                encoder.fit(found)
        elif "mean" in stored["text"]:
            encoder.mean_C, encoder.std_C = torch.tensor(stored["text"]["mean"]), torch.tensor(stored["text"]["std"])

    def encoders(self) -> dict[str, dict[str, Any]]:
        found = {"image": self.image_encoder.describe(), "text": self.text_encoder.describe()}
        return found if self.features is None else {**found, "features": self.features.tower.describe()}

    def settings(self) -> dict[str, Any]:
        return {"decoder": type(self.decoder).__name__, "batch_size": self.batch_size}

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def samples(self, work: Iterable[WorkItem]) -> Generator[Samples, None, None]:
        batches = map(self._decode, read_parts(work, self.batch_size))
        if not self.overlap:
            return self._embed(map(self._encode, batches))
        return ahead(self._embed(map(self._encode, ahead(batches, self.device))), self.device)

    def _decode(self, batch: Samples) -> Samples:
        decoded = self.decoder([sample.read.image for sample in batch.samples])
        batch.rejected += [(why, batch.samples[index].read.origin) for index, why in sorted(decoded.rejected.items())]
        batch.images = {size: decoded.images[size] for size in batch.item.image_sizes}
        batch.samples = [batch.samples[index] for index in decoded.kept]
        return batch

    def _encode(self, batch: Samples) -> Samples:
        for size, images in batch.images.items() if batch.samples else ():
            images_NCHW = images.permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = self.image_encoder.encode(images_NCHW).half().cpu().numpy()
            for sample, latent in zip(batch.samples, latents, strict=True):
                sample.latents[size] = latent
            if self.features is not None:
                grid = self.features.grid(latents.shape[2])
                features = self.features.tower.features(images_NCHW, grid).half().cpu().numpy()
                for sample, of_patches in zip(batch.samples, features, strict=True):
                    sample.features[size] = of_patches
        batch.images = {}
        return batch

    def _embed(self, batches: Iterable[Samples]) -> Generator[Samples, None, None]:
        bytes_each = 2 * self.text_encoder.max_tokens * self.text_encoder.channels
        together = max(1, min(BATCHES_TOGETHER * self.batch_size, TOGETHER_BYTES // bytes_each))
        embed = CaptionCache(self.text_encoder, max(CACHED_BYTES // bytes_each, together + self.batch_size))
        waiting: Samples | None = None
        captions = 0
        for batch in batches:
            captions += sum(len(sample.read.texts) for sample in batch.samples)
            if waiting is None:
                waiting = batch
            else:
                waiting.extend(batch)
            # A few large calls of the text tower instead of many small ones: captions repeat.
            if waiting.last or captions >= together:
                embeddings = iter(embed([text for sample in waiting.samples for text in sample.read.texts]))
                for sample in waiting.samples:
                    found = [next(embeddings) for _ in sample.read.texts]
                    sample.embedding = np.stack(found) if sample.read.captions else found[0]
                yield waiting
                waiting, captions = None, 0
            if batch.last:
                embed.clear()


def read_parts(work: Iterable[WorkItem], together: int) -> Iterator[Samples]:
    """Samples as the parts give them, `together` at a time and none across the end of a part, not encoded yet."""
    for item in work:
        batch = Samples(item)
        for position, found in enumerate(read(item)):
            batch.seen += 1
            if isinstance(found, Rejected):
                batch.rejected.append((found.reason, found.origin))
                continue
            batch.samples.append(Sample(f"{item.number:05d}_{position:07d}", found))
            if len(batch.samples) == together:
                yield batch
                batch = Samples(item)
        batch.last = True
        yield batch


def read(work: WorkItem) -> Iterator[Any]:
    """The Pictures or Latents and the Rejected of a part, up to its limit. Raises UserError."""
    pictures = 0
    try:
        for item in work.part:
            pictures += not isinstance(item, Rejected)
            yield item
            if pictures == work.pictures:
                return
    except OSError as error:
        raise UserError(f"part {work.part.name} of the source cannot be read: {explain(error)}") from None


def ahead(items: Iterator[T], device: torch.device = CPU, depth: int = 2) -> Generator[T, None, None]:
    """The same items, made in a thread that works on `device`, up to `depth` of them before they are asked for. Raises
    here what is raised there."""
    end: Any = object()
    with ThreadPoolExecutor(1, initializer=work_on, initargs=(device,)) as thread:
        coming = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            while (item := coming.popleft().result()) is not end:
                coming.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


class CaptionCache:
    """Embeds captions, each distinct one once as long as it stays among the last `capacity` ones in use."""

    def __init__(self, encoder: TextEncoder, capacity: int) -> None:
        self.encoder, self.capacity = encoder, capacity
        self._embeddings: OrderedDict[str, np.ndarray] = OrderedDict()

    def __call__(self, captions: Sequence[str]) -> list[np.ndarray]:
        """-> fp16 (L, C) of every caption."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._embeddings]
        if new:
            self._embeddings.update(zip(new, self.encoder.encode(new).half().numpy(), strict=True))
        for caption in captions:
            self._embeddings.move_to_end(caption)
        found = [self._embeddings[caption] for caption in captions]
        while len(self._embeddings) > self.capacity:
            self._embeddings.popitem(last=False)
        return found

    def clear(self) -> None:
        self._embeddings.clear()
