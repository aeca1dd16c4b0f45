"""Make a recipe's training and validation sets when they are not there: pictures and captions -> latent shards."""

import fcntl
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mdit.config import TrainConfig, UserError
from mdit.data.loader import require_same_kind
from mdit.data.shards import MANIFEST, LatentSet, ShardWriter, open_dataset, read_manifest
from mdit.encoders import ImageEncoder, TextEncoder, build_image_encoder, build_text_encoder, build_text_encoder_from
from mdit.files import sync
from mdit.sources import Sample, Split, open_source

BATCH_SIZE = 32
LOOK_AHEAD = 32 * BATCH_SIZE
CAPTION_CACHE_BYTES = 256 * 2**20


def is_prepared(config: TrainConfig) -> bool:
    """Whether every set of the recipe has its manifest."""
    return not _missing(config)


def prepare(config: TrainConfig, progress: bool = True, device: torch.device | str = "cpu") -> None:
    """Make `data.validation` and `data.train[0]` where they are missing, then check all sets against the recipe.

    A set appears under its name when all of it is on disk, so an interrupted call leaves nothing half written and the
    same call starts again; of two calls at once, one waits for the other. Where the recipe has some set already, its
    text statistics are used for the missing ones too, so that all captions are embedded alike.

    Raises UserError when a set cannot be made or does not fit the recipe, in shape or in what it was made from.
    """
    if missing := _missing(config):
        if config.data.prepare is None:
            raise UserError(
                f"{missing[0] / MANIFEST}: is missing, and the recipe has no [data.prepare] to make it from. Bring "
                "latent shards, or make them from your own pictures with launchers/precompute.py: see docs/data.md"
            )
        if others := [path for path in missing if path not in _makeable(config)]:
            raise UserError(f"{others[0] / MANIFEST}: is missing; only the first of data.train is made: docs/data.md")
        _make_missing(config, progress, device)
    sets = [open_dataset(directory) for directory in dict.fromkeys(_directories(config))]
    for dataset in sets:
        _check_shapes(dataset, config)
        require_same_kind(sets[0], dataset)
    if config.data.prepare is not None:
        for directory, split in _makeable(config).items():
            _check_fingerprint(directory, _fingerprint(config, split))


def _directories(config: TrainConfig) -> list[Path]:
    return [Path(directory) for directory in (*config.data.train, config.data.validation)]


def _missing(config: TrainConfig) -> list[Path]:
    return [directory for directory in _directories(config) if not (directory / MANIFEST).exists()]


def _makeable(config: TrainConfig) -> dict[Path, str]:
    """Directory -> split. Validation first: the small set shows soonest whether all is well."""
    return {Path(config.data.validation): "validation", Path(config.data.train[0]): "training"}


def _fingerprint(config: TrainConfig, split: str) -> dict[str, Any]:
    made_from = config.data.prepare.model_dump(mode="json")
    return {"split": split, "caption_length": config.model.caption_length, **made_from}


def _make_missing(config: TrainConfig, progress: bool, device: torch.device | str) -> None:
    recipe, model = config.data.prepare, config.model
    if len(_makeable(config)) == 1:
        raise UserError(f"data.train and data.validation are both {config.data.validation!r}; give each a directory")
    image_encoder = build_image_encoder(recipe.image_encoder, device)
    _require("data.prepare.image_encoder", "latents", image_encoder.latent_shape(recipe.image_size), _latents(config))
    text_encoder = _text_encoder(config, device)
    shape = (text_encoder.max_tokens, text_encoder.channels)
    _require("data.prepare.text_encoder", "caption embeddings", shape, _embeddings(config))
    source = open_source(recipe.source, recipe.image_size)
    if text_encoder.mean_C is None:
        text_encoder.fit(source.training.captions)
    encoders = {"image": image_encoder.describe(), "text": text_encoder.describe()}
    kept = CAPTION_CACHE_BYTES // (2 * model.caption_length * model.caption_channels)
    embed = CaptionCache(text_encoder, max(kept, LOOK_AHEAD))
    for directory, split in _makeable(config).items():
        try:
            with _alone(directory) as temporary:
                if (directory / MANIFEST).exists():
                    continue
                samples, fingerprint = getattr(source, split), _fingerprint(config, split)
                bar = tqdm(total=len(samples), desc=str(directory), disable=not progress)
                shapes = _latents(config), _embeddings(config)
                with bar, ShardWriter(temporary, *shapes, encoders, fingerprint) as writer:
                    _write(samples, writer, image_encoder, embed, bar)
                temporary.rename(directory)
                sync(directory.parent)
        except OSError as error:
            raise UserError(f"{directory}: cannot write the set: {error}") from None


def _write(samples: Split, writer: ShardWriter, image_encoder: ImageEncoder, embed: "CaptionCache", bar: tqdm) -> None:
    """In a shuffled order, always the same."""
    order = np.random.default_rng(0).permutation(len(samples))
    captions = samples.captions
    for start in range(0, len(order), BATCH_SIZE):
        if start % LOOK_AHEAD == 0:  # a few large calls of the text tower instead of many small ones
            embed([captions[index] for index in order[start : start + LOOK_AHEAD]])
        batch = [samples[int(index)] for index in order[start : start + BATCH_SIZE]]
        latents = image_encoder.encode(_to_tensor(batch)).cpu().numpy()
        embeddings = embed([sample.caption for sample in batch])
        for sample, latent, embedding in zip(batch, latents, embeddings, strict=True):
            writer.write(sample.key, latent, embedding, sample.caption)
        bar.update(len(batch))


def _to_tensor(batch: Sequence[Sample]) -> Tensor:
    """(N, 3, H, W) float32 in [-1, 1]."""
    images_NHWC = np.stack([np.asarray(sample.image) for sample in batch]).astype(np.float32)
    return torch.from_numpy(images_NHWC / 127.5 - 1).permute(0, 3, 1, 2)


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


def _text_encoder(config: TrainConfig, device: torch.device | str) -> TextEncoder:
    """With the statistics of a set that is already there, if one is."""
    name, length = config.data.prepare.text_encoder, config.model.caption_length
    for directory in _directories(config):
        if (directory / MANIFEST).exists():
            description = read_manifest(directory).encoders["text"]
            if (description.get("id"), description.get("max_tokens")) != (name, length):
                raise UserError(
                    f"{directory / MANIFEST}: captions were embedded by {description.get('id')!r} in "
                    f"{description.get('max_tokens')} tokens, but data.prepare.text_encoder = {name!r} and "
                    f"model.caption_length = {length}"
                )
            return build_text_encoder_from(description, device)
    return build_text_encoder(name, max_tokens=length, device=device)


@contextmanager
def _alone(directory: Path) -> Iterator[Path]:
    """An unused temporary path beside `directory`, for one process at a time; what a killed one left is removed."""
    temporary = directory.with_name(f".{directory.name}.partial")
    directory.parent.mkdir(parents=True, exist_ok=True)
    if directory.exists() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise UserError(f"{directory}: holds files but no {MANIFEST}; remove it or choose another directory")
    descriptor = os.open(directory.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        shutil.rmtree(temporary, ignore_errors=True)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)  # releases the lock


def _latents(config: TrainConfig) -> tuple[int, int, int]:
    return config.model.latent_channels, config.model.latent_size, config.model.latent_size


def _embeddings(config: TrainConfig) -> tuple[int, int]:
    return config.model.caption_length, config.model.caption_channels


def _check_shapes(dataset: LatentSet, config: TrainConfig) -> None:
    path = dataset.directory / MANIFEST
    _require(f"{path}: members.lat.shape", "latents", dataset.latent_shape, _latents(config))
    _require(f"{path}: members.emb.shape", "caption embeddings", dataset.embedding_shape, _embeddings(config))


def _require(where: str, what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    keys = {
        "latents": ("model.latent_channels", "model.latent_size", "model.latent_size"),
        "caption embeddings": ("model.caption_length", "model.caption_channels"),
    }[what]
    for key, is_, should in zip(keys, found, wanted):
        if is_ != should:
            raise UserError(f"{where} gives {what} of shape {found}, but the recipe's {key} = {should} and not {is_}")


def _check_fingerprint(directory: Path, wanted: dict[str, Any]) -> None:
    found, wanted = _flat(read_manifest(directory).fingerprint), _flat(wanted)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{directory / MANIFEST}: was made with {key} = {found.get(key)!r}, but the recipe's is "
                f"{wanted.get(key)!r}; remove {directory} to make it again, or choose another directory"
            )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
