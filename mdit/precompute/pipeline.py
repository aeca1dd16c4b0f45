"""Pictures to samples: read, decoded and put through the frozen towers."""

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from mdit.config import Embeddings, UserError
from mdit.data.manifest import SampleLayout
from mdit.dist import work_on
from mdit.documents import explain
from mdit.encoders import ImageEncoder, TextEncoder
from mdit.precompute.decoders import Decoder
from mdit.sources import Part, Picture, Rejected

T = TypeVar("T")
CPU = torch.device("cpu")
CACHED_BYTES, TOGETHER_BYTES = 256 * 2**20, 64 * 2**20  # of caption embeddings
BATCHES_TOGETHER = 8


@dataclass(frozen=True)
class WorkItem:
    """Part `number` of a source, to be made for some image sizes; `pictures` limits how many are read of it."""

    number: int
    part: Part
    pictures: int | None = None
    image_sizes: tuple[int, ...] = ()

    def key(self, position: int) -> str:
        """Key of the sample that is read at a position of the part."""
        return f"{self.number:05d}_{position:07d}"


@dataclass(frozen=True, slots=True)
class Sample:
    """fp16: `latents` maps each image size to (C, h, w), `embedding` is (L, C)."""

    key: str
    origin: str
    caption: str
    latents: dict[int, np.ndarray]
    embedding: np.ndarray


@dataclass
class Samples:
    """Consecutive samples of a part. `seen` counts what was read for them, `rejected` are the (reason, origin) of what
    gave no sample, and `last` says that they end the part."""

    item: WorkItem
    samples: list[Sample] = field(default_factory=list)
    seen: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    last: bool = False


@dataclass
class PictureBatch:
    """Pictures on their way. `images` maps each image size to uint8 (n, size, size, 3)."""

    item: WorkItem
    keys: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    images: dict[int, Tensor] = field(default_factory=dict)
    latents: list[dict[int, np.ndarray]] = field(default_factory=list)  # one for each picture
    seen: int = 0
    rejected: list[tuple[str, str]] = field(default_factory=list)
    last: bool = False


class EncodingPipeline:
    """Makes samples of a part a function of that part, whatever was made before it: batches do not reach over its ends
    and no caption's embedding is taken over from another part.

    With `overlap` a thread reads and decodes, another works the towers, and the caller writes, all at the same time.
    That pays where towers on a GPU leave the CPU free; on a CPU the three take cores and interpreter from each other.
    """

    def __init__(
        self,
        image_encoder: ImageEncoder,
        text_encoder: TextEncoder,
        decoder: Decoder,
        batch_size: int,
        overlap: bool,
    ) -> None:
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.decoder, self.batch_size, self.overlap = decoder, batch_size, overlap

    def layout(self, image_size: int, embeddings: Embeddings) -> SampleLayout:
        return SampleLayout(
            latent_shape=self.image_encoder.latent_shape(image_size),
            embedding_shape=(self.text_encoder.max_tokens, self.text_encoder.channels),
            embeddings=embeddings,
        )

    def settle(self, stored: dict[str, Any] | None, captions: Callable[[], Sequence[str]]) -> None:
        """Take the text statistics, where the encoder lacks them, from stored descriptions, or else measure them."""
        encoder = self.text_encoder
        if not encoder.needs_fit:
            return
        if stored is None:
            if found := captions():  # if there are none, there will be nothing to embed
                encoder.fit(found)
        elif "mean" in stored["text"]:
            encoder.mean_C, encoder.std_C = torch.tensor(stored["text"]["mean"]), torch.tensor(stored["text"]["std"])

    def encoders(self) -> dict[str, dict[str, Any]]:
        return {"image": self.image_encoder.describe(), "text": self.text_encoder.describe()}

    def settings(self) -> dict[str, Any]:
        """Further settings that decide the bytes."""
        return {"decoder": type(self.decoder).__name__, "batch_size": self.batch_size}

    @property
    def device(self) -> torch.device:
        return torch.device(self.image_encoder.device)

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def samples(self, work: Iterable[WorkItem]) -> Generator[Samples, None, None]:
        """The samples of one part after another. The next part is begun while the last samples of one are written."""
        if not self.overlap:
            return self._embed(map(self._encode, map(self._decode, self._read(work))))
        batches = ahead(map(self._decode, self._read(work)), self.device)
        return ahead(self._embed(map(self._encode, batches)), self.device)

    def _read(self, work: Iterable[WorkItem]) -> Iterator[PictureBatch]:
        for item in work:
            batch = PictureBatch(item)
            for position, found in enumerate(read(item)):
                batch.seen += 1
                if isinstance(found, Rejected):
                    batch.rejected.append((found.reason, found.origin))
                    continue
                batch.keys.append(item.key(position))
                batch.pictures.append(found)
                if len(batch.pictures) == self.batch_size:
                    yield batch
                    batch = PictureBatch(item)
            batch.last = True
            yield batch

    def _decode(self, batch: PictureBatch) -> PictureBatch:
        decoded = self.decoder([picture.image for picture in batch.pictures])
        batch.rejected += [(why, batch.pictures[index].origin) for index, why in sorted(decoded.rejected.items())]
        batch.images = {size: decoded.images[size] for size in batch.item.image_sizes}
        batch.keys = [batch.keys[index] for index in decoded.kept]
        batch.pictures = [batch.pictures[index] for index in decoded.kept]
        return batch

    def _encode(self, batch: PictureBatch) -> PictureBatch:
        if batch.pictures:
            encoded = {size: self._latents(images) for size, images in batch.images.items()}
            batch.latents = [dict(zip(encoded, rows)) for rows in zip(*encoded.values())]
        batch.images = {}
        return batch

    def _latents(self, images_NHWC: Tensor) -> np.ndarray:
        images_NCHW = images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
        return self.image_encoder.encode(images_NCHW).half().cpu().numpy()

    def _embed(self, batches: Iterable[PictureBatch]) -> Generator[Samples, None, None]:
        bytes_each = 2 * self.text_encoder.max_tokens * self.text_encoder.channels
        together = max(1, min(BATCHES_TOGETHER * self.batch_size, TOGETHER_BYTES // bytes_each))
        embed = CaptionCache(self.text_encoder, max(CACHED_BYTES // bytes_each, together + self.batch_size))
        waiting: list[PictureBatch] = []
        for batch in batches:
            waiting.append(batch)
            # A few large calls of the text tower instead of many small ones: captions repeat.
            if batch.last or sum(len(batch.pictures) for batch in waiting) >= together:
                yield _joined(waiting, embed)
                waiting = []
            if batch.last:
                embed.clear()


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


def _joined(batches: list[PictureBatch], embed: CaptionCache) -> Samples:
    joined = Samples(batches[0].item)
    embeddings = iter(embed([picture.caption for batch in batches for picture in batch.pictures]))
    for batch in batches:
        for key, picture, latents in zip(batch.keys, batch.pictures, batch.latents, strict=True):
            joined.samples.append(Sample(key, picture.origin, picture.caption, latents, next(embeddings)))
        joined.seen += batch.seen
        joined.rejected += batch.rejected
        joined.last = batch.last
    return joined
