"""Make a recipe's training and validation sets when they are not there: pictures and captions -> latent shards."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mdit.config import FolderSource, TrainConfig, UserError
from mdit.data.loader import require_same_kind
from mdit.data.manifest import MANIFEST, read_manifest
from mdit.data.shards import LatentSet, open_dataset
from mdit.dist import logger
from mdit.encoders import (
    ImageEncoder,
    TextEncoder,
    build_image_encoder,
    build_text_encoder,
    build_vision_tower,
)
from mdit.files import checksum
from mdit.precompute.build import MAX_REJECTED, BuildJob, build_sets
from mdit.precompute.coordination import check_set, is_finished
from mdit.precompute.dali import build_decoder
from mdit.precompute.pipeline import EncodingPipeline, PatchFeatures
from mdit.sources import Source, open_source, slices
from mdit.sources.folder import CAPTIONS

OWNER = "the recipe's"
PICTURES_PER_PART = {"emoji": 20_000, "folder": 2_000}  # scenes are quick to make, and repeat their captions


def is_precomputed(config: TrainConfig) -> bool:
    """Whether every set of the recipe has its manifest."""
    return not _missing(config)


def precompute(
    config: TrainConfig,
    progress: bool = True,
    device: torch.device | str = "cpu",
    max_rejected: float = MAX_REJECTED,
) -> None:
    """Make `data.validation` and `data.train[0]` where they are missing, then check all sets against the recipe.

    A set appears under its name when all of it is on disk; after an interruption the same call goes on with the parts
    that are missing. Of several calls at once, each makes some of the parts, and all return when all are made. Where
    the recipe has some set already, its text statistics are used for the missing ones too, so that all captions are
    embedded alike.

    Raises UserError when a set cannot be made or does not fit the recipe, in shape or in what it was made from.
    """
    if missing := _missing(config):
        if config.data.precompute is None:
            raise UserError(
                f"{missing[0] / MANIFEST}: is missing, and the recipe has no [data.precompute] to make it from. Bring "
                "latent shards, or make them from your own pictures with launchers/precompute.py: see docs/data.md"
            )
        if others := [path for path in missing if path not in _makeable(config)]:
            raise UserError(f"{others[0] / MANIFEST}: is missing; only the first of data.train is made: docs/data.md")
        _make_missing(config, progress, device, max_rejected)
    model, sets = config.model, [open_dataset(directory) for directory in dict.fromkeys(_directories(config))]
    for dataset in sets:
        path = dataset.directory / MANIFEST
        _require(f"{path}: members.lat.shape", "latents", dataset.latent_shape, model.latent_shape)
        _require(f"{path}: members.emb.shape", "caption embeddings", dataset.embedding_shape, model.caption_shape)
        require_same_kind(sets[0], dataset)
    training = {Path(directory) for directory in config.data.train}
    _check_features(config, [dataset for dataset in sets if dataset.directory in training])
    if config.data.precompute is not None:
        for directory, split in _makeable(config).items():
            check_set(directory, _build_settings(config, directory, split), OWNER)


def _directories(config: TrainConfig) -> list[Path]:
    return [Path(directory) for directory in (*config.data.train, config.data.validation)]


def _missing(config: TrainConfig) -> list[Path]:
    return [directory for directory in _directories(config) if not is_finished(directory)]


def _makeable(config: TrainConfig) -> dict[Path, str]:
    """Directory -> split. Validation first: the small set shows soonest whether all is well."""
    return {Path(config.data.validation): "validation", Path(config.data.train[0]): "training"}


def _build_settings(config: TrainConfig, directory: Path, split: str) -> dict[str, Any]:
    """The settings of a set, and of a folder, named as it lies beside the set so that both may be moved, the xxh3 of
    its captions: of those that the set in `directory` was made from where the folder is not there, as on machines that
    only train."""
    recipe = config.data.precompute
    assert recipe is not None
    values = recipe.model_dump(mode="json", exclude=None if recipe.captions else {"captions"})
    build_settings = {"split": split, "caption_length": config.model.caption_length, **values}
    features = config.align.tower if config.align and split == "training" else None
    if is_finished(directory):  # with features or without, and a run may leave them alone: _check_features
        features = read_manifest(directory).fingerprint.get("features")
    if features is not None:
        build_settings["features"] = features
    if not isinstance(recipe.source, FolderSource):
        return build_settings
    captions, found = Path(recipe.source.path) / CAPTIONS, None
    if captions.is_file():
        found = checksum(captions)
    elif is_finished(directory):
        found = read_manifest(directory).fingerprint.get("captions")
    build_settings["source"]["path"] = os.path.relpath(recipe.source.path, directory)
    return {**build_settings, "captions": found}


def _make_missing(config: TrainConfig, progress: bool, device: torch.device | str, max_rejected: float) -> None:
    recipe = config.data.precompute
    assert recipe is not None
    for directory, split in _makeable(config).items():
        check_set(directory, _build_settings(config, directory, split), OWNER)
    image_encoder, text_encoder = _encoders(config, device)
    shape = image_encoder.latent_shape(recipe.image_size)
    _require("data.precompute.image_encoder", "latents", shape, config.model.latent_shape)
    shape = (text_encoder.max_tokens, text_encoder.channels)
    _require("data.precompute.text_encoder", "caption embeddings", shape, config.model.caption_shape)
    decoder = build_decoder([recipe.image_size], min_side=1, device=torch.device(device))
    features = None
    if (align := config.align) is not None and not is_finished(Path(config.data.train[0])):
        tower = build_vision_tower(align.tower, device, channels=align.channels)
        features = PatchFeatures(tower, config.model.patch_size)
    kinds = None if recipe.captions is None else [*recipe.captions]
    source = open_source(recipe.source, recipe.image_size, kinds)
    for directory, split in _makeable(config).items():
        if is_finished(directory):
            continue
        samples = getattr(source, split)
        job = BuildJob(
            source=Source(slices(samples, PICTURES_PER_PART[recipe.source.name], seed=0), len(samples)),
            sets={recipe.image_size: directory},
            build_settings=_build_settings(config, directory, split),
            owner=OWNER,
            embeddings=recipe.embeddings,
            weights=recipe.captions,
            captions=lambda: source.training.captions,
            progress=progress,
            max_rejected=max_rejected,
        )
        wanted = features if split == "training" else None
        pipeline = EncodingPipeline(image_encoder, text_encoder, decoder, features=wanted)
        while not (outcome := build_sets(job, pipeline)).finished:  # whoever is at the last parts may still be killed
            job = replace(job, progress=False)
            time.sleep(0.5)
        if (report := outcome.finished[directory]).rejected:
            logger.info(f"{directory}: {report.summary()}")


def _encoders(config: TrainConfig, device: torch.device | str) -> tuple[ImageEncoder, TextEncoder]:
    """The encoders of the recipe: if a set is there already, those that made it. Raises UserError."""
    recipe, length = config.data.precompute, config.model.caption_length
    assert recipe is not None
    for directory in filter(is_finished, _directories(config)):
        described = read_manifest(directory).encoders.plain()
        image, text = described["image"], described["text"]
        if image["id"] != recipe.image_encoder:
            raise UserError(
                f"{directory / MANIFEST}: pictures were encoded by {image['id']!r}, but "
                f"data.precompute.image_encoder = {recipe.image_encoder!r}"
            )
        if (text["id"], text["max_tokens"]) != (recipe.text_encoder, length):
            raise UserError(
                f"{directory / MANIFEST}: captions were embedded by {text['id']!r} in {text['max_tokens']} tokens, but "
                f"data.precompute.text_encoder = {recipe.text_encoder!r} and model.caption_length = {length}"
            )
        return build_image_encoder(image, device), build_text_encoder(text, device)
    return (
        build_image_encoder(recipe.image_encoder, device),
        build_text_encoder(recipe.text_encoder, max_tokens=length, device=device),
    )


def _check_features(config: TrainConfig, sets: list[LatentSet]) -> None:
    """Raise UserError where training sets have other features than [align] asks for, or none and pictures cannot be had
    from the latents for nothing."""
    if (align := config.align) is None:
        return
    side = config.model.latent_size // config.model.patch_size
    for dataset in sets:
        path, shape = dataset.directory / MANIFEST, dataset.layout.features_shape
        if shape is None:
            if dataset.encoders["image"]["id"] == "pixels":
                continue  # they are computed in training
            raise UserError(
                f"{path}: has no features for align.tower = {align.tower!r}; make the set again: remove it where the "
                f"recipe makes it, else launchers/precompute.py --source ... --features {align.tower} "
                f"--patch_size {config.model.patch_size}"
            )
        made_by = dataset.encoders["features"]
        if made_by["id"] != align.tower:
            raise UserError(f"{path}: features are by {made_by['id']!r}, but align.tower = {align.tower!r}")
        if made_by != sets[0].encoders["features"]:
            raise UserError(
                f"{path} and {sets[0].directory / MANIFEST}: features are by {align.tower!r} of other weights"
            )
        if shape[0] != side**2:
            raise UserError(
                f"{path}: features are of {shape[0]} patches, but the recipe's model has {side} x {side} "
                f"(model.latent_size {config.model.latent_size} / model.patch_size {config.model.patch_size})"
            )
        if shape[1] != align.channels:
            raise UserError(f"{path}: features have {shape[1]} channels, but align.channels = {align.channels}")
    if sets[0].layout.features_shape is None:
        build_vision_tower(align.tower, channels=align.channels)  # raises where it is not the recipe's


def _require(where: str, what: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    keys = {
        "latents": ("model.latent_channels", "model.latent_size", "model.latent_size"),
        "caption embeddings": ("model.caption_length", "model.caption_channels"),
    }[what]
    for key, is_, should in zip(keys, found, wanted):
        if is_ != should:
            raise UserError(f"{where} gives {what} of shape {found}, but the recipe's {key} = {should} and not {is_}")
