"""Evaluation of a snapshot, as `launchers/evaluate.py` reports it: pictures with their captions, and numbers."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from mdit.checkpoint.snapshot import Snapshot
from mdit.config import EmojiSource, UserError
from mdit.data.manifest import MANIFEST
from mdit.data.shards import open_dataset, read_samples
from mdit.encoders import build_image_encoder, build_text_encoder
from mdit.encoders.efficientnet import PACKAGE, image_features, load_efficientnet
from mdit.eval.distances import FRECHET, frechet_distance
from mdit.eval.emoji_score import SceneJudge, held_out_scenes, render
from mdit.eval.samples import draw_pictures, require_shape, to_images
from mdit.eval.validation import validation_loss
from mdit.models import MicroDiT
from mdit.provenance import package_folder
from mdit.sources.emoji import EmojiScenes


@dataclass(frozen=True)
class Evaluation:
    """`pictures_NHWC` uint8; `scores` for a file; `lines` say the same to a reader."""

    pictures_NHWC: Tensor
    captions: list[str]
    scores: dict[str, Any]
    lines: list[str]


def evaluate(snapshot: Snapshot, model: MicroDiT, count: int, seed: int, options: dict[str, Any]) -> Evaluation:
    """By scenes of known truth where the recipe has them, else by validation loss. `options`: sampling_options."""
    made = snapshot.config.data.precompute
    if made is None or not isinstance(made.source, EmojiSource):
        return evaluate_validation(snapshot, model, count, seed, options)
    return evaluate_scenes(snapshot, model, EmojiScenes(made.source, made.image_size), count, seed, options)


def evaluate_scenes(
    snapshot: Snapshot, model: MicroDiT, source: EmojiScenes, count: int, seed: int, options: dict[str, Any]
) -> Evaluation:
    """Scores of `count` pictures of pairs that training never saw (`mdit.eval.emoji_score`)."""
    device = next(model.parameters()).device
    judge = SceneJudge(source, network := load_efficientnet(device))
    scenes = held_out_scenes(source, 2 * count)
    scenes, others = scenes[:count], scenes[count:]
    captions = [scene.caption for scene in scenes]
    captions_NLC = build_text_encoder(snapshot.encoders["text"], device).encode(captions)
    pictures_NHWC, true_NHWC = draw_pictures(snapshot, model, captions_NLC, seed, options), render(source, scenes)
    drawn_NF, true_NF = image_features(network, pictures_NHWC), image_features(network, true_NHWC)
    shares = {
        "drawn": asdict(judge.score(pictures_NHWC, drawn_NF, scenes)),
        "true": asdict(judge.score(true_NHWC, true_NF, scenes)),
        "chance": asdict(judge.chance),
    }
    lines = [f"{count} pictures of object x background pairs that training never saw"]
    for what in ("background", "object"):
        right, ceiling, chance = (share[what] for share in shares.values())
        lines.append(f"{what:10} {right:6.1%} right (true pictures score {ceiling:.1%}, chance {chance:.1%})")
    if count == 1:  # has no covariance
        return Evaluation(pictures_NHWC, captions, shares, lines)
    others_NF = image_features(network, render(source, others))
    distances = {"drawn": frechet_distance(drawn_NF, true_NF), "true": frechet_distance(others_NF, true_NF)}
    lines.append(f"{FRECHET} {distances['drawn']:.1f} (other true pictures have {distances['true']:.1f})")
    scores = {**shares, FRECHET: distances}
    return Evaluation(pictures_NHWC, captions, scores, lines)


def evaluate_validation(
    snapshot: Snapshot, model: MicroDiT, count: int, seed: int, options: dict[str, Any]
) -> Evaluation:
    """Loss and pictures of the first `count` validation samples (all, where there are fewer)."""
    dataset, device = open_dataset(snapshot.config.data.validation), next(model.parameters()).device
    sizes, file = snapshot.config.model, dataset.directory / MANIFEST
    require_shape(file, "latents", dataset.latent_shape, sizes.latent_shape)
    require_shape(file, "captions", dataset.embedding_shape, sizes.caption_shape)
    indices = range(min(count, dataset.samples))
    latents_NCHW, captions_NLC, captions = read_samples(dataset, indices)
    latents_NCHW, captions_NLC = latents_NCHW.to(device), captions_NLC.to(device)
    sums = validation_loss(model, latents_NCHW, captions_NLC, config=snapshot.config, indices=indices, batch_size=16)
    losses = (sums / len(indices)).tolist()
    loss = sum(losses) / len(losses)
    if not math.isfinite(loss):
        raise UserError(f"{snapshot.path}: the validation loss is {loss} on {dataset.directory}")
    scores: dict[str, Any] = {"validation_loss": loss, "validation_loss_by_sigma": losses}
    pictures_NHWC = draw_pictures(snapshot, model, captions_NLC, seed, options)
    lines = [f"validation loss {loss:.4f} over {len(indices)} samples"]
    if len(indices) > 1 and pictures_NHWC.shape[-1] == 3 and package_folder(PACKAGE):
        true_NHWC = to_images(build_image_encoder(dataset.encoders["image"], device), latents_NCHW)
        network = load_efficientnet(device)
        drawn_NF, true_NF = image_features(network, pictures_NHWC), image_features(network, true_NHWC)
        scores[FRECHET] = {"drawn": frechet_distance(drawn_NF, true_NF)}
        lines.append(f"{FRECHET} {scores[FRECHET]['drawn']:.1f}")
    return Evaluation(pictures_NHWC, captions, scores, lines)
