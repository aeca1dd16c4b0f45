"""Score of a snapshot by the field's metrics, on any number of processes.

OUT/settings.json            what was drawn, by which weights: a run that goes on is of the same
OUT/pictures/00012.tar       drawn pictures with their prompts (`mdit.eval.picture_sets`)
OUT/reference.safetensors    features of the reference, which --reference takes in its place
OUT/scores.json, grid.png    the figures, and the first pictures
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from mdit.checkpoint.snapshot import Snapshot, WeightKind
from mdit.config import MetricsConfig, UserError
from mdit.data.shards import open_dataset, read_samples
from mdit.dist import World, gather, on_all_ranks, on_rank_zero
from mdit.documents import differences, read_json, read_text
from mdit.eval.distances import Statistics
from mdit.eval.metrics import Features, PictureMetrics
from mdit.eval.picture_sets import draw_set, open_drawn, open_pictures, open_public, read_batches, side_of
from mdit.eval.samples import Painter, drawn_by, grid, save_png
from mdit.eval.validation import losses_on_set
from mdit.files import write_json
from mdit.sources import Part, Picture
from mdit.sources.pictures import open_header

PICTURES, SETTINGS, SCORES, REFERENCE = "pictures", "settings.json", "scores.json", "reference.safetensors"
IN_GRID = 64
PROMPTS_SEED = 0  # of which captions of a set are prompts


@dataclass(frozen=True)
class Scoring:
    """Snapshot, prompts and settings of a score: by `metrics`, with their reference, and by the validation loss where
    `val_loss`. `guidance` and `steps` are the recipe's where None."""

    snapshot: Snapshot
    weights: WeightKind
    metrics: MetricsConfig | None
    prompts: Sequence[str]
    out: Path
    guidance: float | None
    steps: int | None
    seed: int
    batch_size: int
    val_loss: bool

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "pictures": len(self.prompts),
            "prompts_xxh3": xxhash.xxh3_64_hexdigest("\n".join(self.prompts).encode()),
            "seed": self.seed,
            **drawn_by(self.snapshot, self.weights, self.guidance, self.steps),
        }

    def begin(self) -> None:
        """Write down what is drawn to OUT. Raises UserError where it has pictures of something else."""
        path = self.out / SETTINGS
        for key, there, asked in differences(read_json(path), self.settings) if path.exists() else ():
            raise UserError(f"{path}: {key} is {there}, now it is {asked}; choose another --out")
        (self.out / PICTURES).mkdir(parents=True, exist_ok=True)
        write_json(path, self.settings)


def read_prompts(place: str | None, snapshot: Snapshot, count: int) -> list[str]:
    """`count` captions: the first ones of the recipe's validation set, or of a file of one a line; of a public set
    SOURCE:DIR those of as many pictures, drawn by lot (PROMPTS_SEED) and in the set's order. Raises UserError where
    there are fewer."""
    if place is None:
        dataset = open_dataset(snapshot.config.data.validation)
        source, found = dataset.directory, read_samples(dataset, range(min(count, dataset.samples)))[2]
    elif (parts := open_public(place)) is not None:
        source, every = place, [each.caption for part in parts for each in part if isinstance(each, Picture)]
        chosen = random.Random(PROMPTS_SEED).sample(range(len(every)), min(count, len(every)))
        found = [every[number] for number in sorted(chosen)]
    else:
        lines = read_text(place).split("\n")
        source, found = place, [line.strip() for line in lines if line.strip()][:count]
    if len(found) < count:
        raise UserError(f"{source}: has {len(found)} captions for --num_pictures {count}")
    return found


class Reference:
    """Pictures that drawn ones are compared with, or what a file has of them. Raises UserError where there are none, or
    the file's features are another tower's."""

    def __init__(self, metrics: PictureMetrics, place: str, device: torch.device | str) -> None:
        self.metrics, self.place = metrics, place
        from_file = place.endswith((".safetensors", ".npz"))
        self.features: dict[str, Tensor | Statistics] = metrics.load(Path(place)) if from_file else {}
        self.parts = () if from_file else open_pictures(place, device)

    @property
    def pictures(self) -> int | None:
        """Number of its pictures; None of statistics, and before they are judged."""
        return min((len(each) for each in self.features.values() if isinstance(each, Tensor)), default=None)

    def judge(self, size: int, world: World) -> None:
        """Make features of the pictures in `size` pixels, if there are none yet. A collective."""
        if not self.features:
            self.features = {**judged(self.metrics, self.metrics.compared, self.parts, size, world)}
        if not self.features or self.pictures == 1:
            has = "one picture" if self.features else "no pictures"
            raise UserError(f"{self.place}: has {has} to compare with; expected at least 2")


def score(scoring: Scoring, world: World) -> list[str]:
    """Draw what is not drawn yet, judge it and the reference, write scores.json -> lines for a reader. A collective."""
    out, config = scoring.out, scoring.snapshot.config
    metrics = reference = None
    if scoring.metrics is not None:  # what is missing is said before anything is drawn
        metrics = PictureMetrics(scoring.metrics, world.device)
        if metrics.compared:
            reference = Reference(metrics, scoring.metrics.reference or config.data.validation, world.device)
    on_rank_zero(world, scoring.begin)
    painter = Painter(scoring.snapshot, scoring.weights)
    losses = losses_on_set(painter.model, config, world.device, world=world) if scoring.val_loss else []
    options = {"guidance": scoring.guidance, "steps": scoring.steps, "seed": scoring.seed}
    draw_set(painter, scoring.prompts, out / PICTURES, world, batch_size=scoring.batch_size, **options)
    del painter  # its memory
    gather(None, world)  # all is drawn
    parts, scores, lines = open_drawn(out / PICTURES), {}, []
    if losses:
        scores["val_loss"] = sum(losses) / len(losses)
        lines.append(f"validation loss {scores['val_loss']:.4f}")
    about: dict[str, Any] = {}
    if metrics is not None:
        size = side_of(parts)
        drawn = judged(metrics, [*metrics.judges], parts, size, world)
        if reference is not None:
            reference.judge(size, world)
            about = {"reference": reference.place, "reference_pictures": reference.pictures}
        features = reference.features if reference else {}
        found = on_rank_zero(world, lambda: metrics.scores(drawn, features))
        scores |= found
        told = f"{reference.pictures or 'statistics'} of {reference.place}" if reference else ""
        lines += metrics.lines(found, len(scoring.prompts), told)

    def finish() -> None:
        write_json(out / SCORES, {**scoring.settings, **about, "scores": scores})
        if metrics is not None and reference is not None and reference.parts:
            metrics.save(reference.features, out / REFERENCE)
        first = [*islice((each for part in parts for each in part if isinstance(each, Picture)), IN_GRID)]
        pictures = [open_header(each.image).convert("RGB") for each in first]
        save_png(grid(pictures, [each.caption for each in first]), out / "grid.png")

    on_rank_zero(world, finish)
    return [*lines, str(out / SCORES)]


def judged(metrics: PictureMetrics, judges: Sequence[str], parts: Sequence[Part], size: int, world: World) -> Features:
    """Features of the middle squares of all parts' pictures, in their order. A collective."""
    mine = range(world.rank, len(parts), world.size)

    def judge() -> dict[int, Features]:
        return {number: metrics.features(read_batches([parts[number]], size), judges) for number in mine}

    found = {number: each for rank in gather(on_all_ranks(world, judge), world) for number, each in rank.items()}
    there = [found[number] for number in sorted(found) if found[number]]  # a tar may have no pictures
    return {name: torch.cat([features[name] for features in there]) for name in judges if there}
