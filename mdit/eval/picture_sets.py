"""Sets of pictures, drawn ones and those that they are compared with.

Drawn pictures lie in tars of the WebDataset layout, NUMBER.png and NUMBER.txt, SHARD of them in each: any number of
processes draw a tar at a time, and what is there is not drawn again. Pictures to compare with are

    DIR                   a set of latents (decoded), or pictures in tars or in folders, without captions
    SOURCE:DIR            a public set as it was downloaded (`mdit.sources`), its validation split: coco:data/coco
"""

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from mdit.config import UserError
from mdit.data.manifest import MANIFEST
from mdit.data.shards import LatentSet, open_dataset, read_samples
from mdit.dist import World, logger
from mdit.encoders import ImageEncoder, build_image_encoder
from mdit.eval.metrics import Batch
from mdit.eval.samples import Painter, to_images
from mdit.files import replacing
from mdit.sources import SOURCES, FilePart, Part, Picture, Rejected, open_named_source, part_name, splits_of
from mdit.sources.archives import is_picture, read_members, walk
from mdit.sources.pictures import crop, open_header, upright_rgb
from mdit.sources.storage import is_damage

SHARD = 64  # pictures
BATCH_SIZE = 64  # pictures judged at a time
PER_PART = 500  # pictures of a folder


def draw_set(painter: Painter, prompts: Sequence[str], folder: Path, world: World, **settings) -> None:
    """Draw this rank's shards of a picture for each prompt, as far as they are not there. Picture i is that of
    `Painter.draw`, whatever draws it; `settings` are that method's."""
    shards = range(-(-len(prompts) // SHARD))
    for shard in shards[world.rank :: world.size]:
        path, numbers = shard_path(folder, shard), range(shard * SHARD, min((shard + 1) * SHARD, len(prompts)))
        if path.exists():
            continue
        texts = [prompts[number] for number in numbers]
        drawn = zip(numbers, texts, painter.draw(texts, numbers=numbers, **settings), strict=True)
        with replacing(path) as partial, tarfile.open(partial, "w") as archive:
            for number, text, picture in drawn:
                picture.save(content := io.BytesIO(), format="PNG")
                for suffix, data in ((".png", content.getvalue()), (".txt", text.encode())):
                    member = tarfile.TarInfo(f"{number:08d}{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        logger.info(f"{path}: shard {shard + 1} of {len(shards)}")


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.tar"


def open_drawn(folder: Path) -> Sequence[Part]:
    return open_named_source("webdataset", folder).parts


def open_pictures(place: str, device: torch.device | str) -> Sequence[Part]:
    """The pictures of a set in parts. Raises UserError where there are none."""
    if (public := open_public(place)) is not None:
        return public
    path = Path(place)
    if (path / MANIFEST).exists():
        dataset = open_dataset(path)
        decoder = build_image_encoder(dataset.encoders["image"], device)
        starts = range(0, dataset.samples, SHARD)
        return [LatentPart(f"{n:08d}", dataset, decoder, range(n, min(n + SHARD, dataset.samples))) for n in starts]
    if not path.exists():
        raise UserError(f"{place}: there is no such file or directory")
    archives = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".tar", ".zip"))
    parts = [PicturesOnly(part_name(archive, path.parent), archive) for archive in archives]
    for folder, names in sorted(walk(path)):
        names = sorted(filter(is_picture, names))
        if names and archives:
            raise UserError(f"{place}: has pictures in {archives[0]} and in {folder}; name one of both")
        some = [frozenset(names[start : start + PER_PART]) for start in range(0, len(names), PER_PART)]
        parts += [PicturesOnly(part_name(folder, path.parent), folder, each) for each in some]
    if not parts:
        raise UserError(f"{place}: has neither {MANIFEST} nor pictures in tars or folders")
    return parts


def open_public(place: str) -> Sequence[Part] | None:
    """The parts of SOURCE:DIR, of its validation split where it has one; None where `place` is none. Raises UserError
    where the set is not there."""
    name, _, root = place.partition(":")
    if name not in SOURCES:
        return None
    split = splits_of(name)[-1]
    return open_named_source(name, Path(root) if root else None, split=split).parts


def read_batches(parts: Iterable[Part], size: int) -> Iterator[Batch]:
    """The middle squares of all pictures in `size` x `size` pixels, with their captions. Raises UserError for one that
    cannot be read: a distance from part of a set would not be that from the set."""
    images, captions = [], []
    for part in parts:
        for picture in part:
            images.append(torch.frombuffer(bytearray(_square(picture, size)), dtype=torch.uint8).view(size, size, 3))
            captions.append(picture.caption if isinstance(picture, Picture) else "")
            if len(images) == BATCH_SIZE:
                yield torch.stack(images), captions
                images, captions = [], []
    if images:
        yield torch.stack(images), captions


def side_of(parts: Sequence[Part]) -> int:
    """Pixels of the first picture's side."""
    return open_header(next(iter(picture.image for picture in parts[0] if isinstance(picture, Picture)))).width


@dataclass(frozen=True)
class PicturesOnly(FilePart):
    """The pictures of a tar, a zip or a folder, or those of some `names` there; their captions do not matter."""

    names: frozenset[str] | None = None

    def __iter__(self) -> Iterator[Picture | Rejected]:
        wanted = is_picture if self.names is None else self.names.__contains__
        for member in read_members(self.path, self.name, wanted):
            if isinstance(member, Rejected):
                yield member
            else:
                yield Picture(f"{self.name}/{member.name}", member.data, "")


@dataclass(frozen=True)
class LatentPart:
    """Pictures that the latents of some samples are decoded to."""

    name: str
    dataset: LatentSet
    decoder: ImageEncoder
    samples: range

    def __iter__(self) -> Iterator[Picture | Rejected]:
        latents_NCHW, _, texts = read_samples(self.dataset, self.samples)
        for sample, image, text in zip(self.samples, to_images(self.decoder, latents_NCHW), texts, strict=True):
            yield Picture(f"{self.dataset.directory}/{sample}", Image.fromarray(image.numpy()), text)


def _square(picture: Picture | Rejected, size: int) -> bytes:
    if isinstance(picture, Rejected):
        raise UserError(f"{picture.origin}: {picture.detail or picture.reason}")
    try:
        return crop(upright_rgb(open_header(picture.image)), size).tobytes()
    except Exception as error:
        if not is_damage(error):
            raise
        raise UserError(f"{picture.origin}: is no picture: {error}") from None
