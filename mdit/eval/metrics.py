"""The field's metrics of drawn pictures: FID, FD-DINOv2, FD-EffLite0, CMMD and CLIP score.

A metric is a distance between what one tower makes of the drawn pictures and of a reference's, or, of the CLIP score,
the mean over the drawn ones. docs/evaluation.md says how figures are made that others can be compared with.
"""

import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdit.config import MetricsConfig, UserError
from mdit.encoders.judges import INCEPTION_FEATURES, LOADERS, Judge
from mdit.eval.distances import FRECHET, Statistics, cmmd, fid, frechet_distance
from mdit.files import replacing, save_tensors

Batch = tuple[Tensor, Sequence[str]]  # (N, H, W, 3) uint8 pictures on the CPU, and their captions
Features = dict[str, Tensor]  # by the judge's name


@dataclass(frozen=True)
class Metric:
    """`judge` makes features; `place` is the key of MetricsConfig that says where it is; `distance` is None where the
    mean over the drawn pictures counts."""

    label: str
    judge: str
    place: str | None
    distance: Callable[[Tensor, Any], float] | None


METRICS = {
    "fid": Metric("FID", "inception", "inception", fid),
    "fd_dinov2": Metric("FD-DINOv2", "dinov2", "dinov2", frechet_distance),
    "fd_efflite0": Metric(FRECHET, "efficientnet", None, frechet_distance),
    "cmmd": Metric("CMMD", "clip", "cmmd_clip", cmmd),
    "clip_score": Metric("CLIP score", "clip_score", "clip", None),
}


class PictureMetrics:
    """The metrics that are asked for, with the towers that they need on `device`. Raises UserError where one cannot be
    loaded."""

    def __init__(self, config: MetricsConfig, device: torch.device) -> None:
        self.metrics = {name: METRICS[name] for name in config.names}
        self.judges: dict[str, Judge] = {}
        for name, metric in self.metrics.items():
            place = getattr(config, metric.place) if metric.place else ""
            self.judges[metric.judge] = LOADERS[metric.judge](place, f"metric {name}: {metric.judge} {place}", device)

    @cached_property
    def compared(self) -> list[str]:
        """The judges whose features of a reference are needed."""
        return [metric.judge for metric in self.metrics.values() if metric.distance]

    def features(self, batches: Iterable[Batch], judges: Iterable[str] | None = None) -> Features:
        """(N, F) float32 features of all batches' pictures by every judge, or by those named."""
        chosen = [*self.judges] if judges is None else [*judges]
        found: dict[str, list[Tensor]] = {name: [] for name in chosen}
        for images_NHWC, captions in batches:
            for name in chosen:
                found[name].append(self.judges[name].features(images_NHWC, captions))
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def scores(self, drawn: Features, reference: Mapping[str, Tensor | Statistics]) -> dict[str, float]:
        """Every metric by its name."""
        found = {}
        for name, metric in self.metrics.items():
            features_NF = drawn[metric.judge]
            compare = metric.distance
            found[name] = compare(features_NF, reference[metric.judge]) if compare else float(features_NF.mean())
        return found

    def save(self, reference: Mapping[str, Tensor | Statistics], path: Path) -> None:
        """Write a reference's features as a file that `load` takes."""
        features = {name: each for name, each in reference.items() if isinstance(each, Tensor)}
        with replacing(path) as partial:
            save_tensors(features, partial, {name: self.judges[name].weights for name in features})

    def load(self, path: Path) -> dict[str, Tensor | Statistics]:
        """A reference's features, from a file of `save`'s, or FID's statistics from an .npz file with mu and sigma.
        Raises UserError where it lacks a judge's, or they are of other weights."""
        if path.suffix == ".npz":
            return self._statistics(path)
        found: dict[str, Tensor | Statistics] = {}
        try:
            with safe_open(path, "pt") as file:
                weights, there = file.metadata() or {}, {*file.keys()}
                for name in self.compared:
                    if name not in there:
                        raise UserError(f"{path}: has features of {', '.join(sorted(there))}, not of {name}")
                    if weights.get(name) != (ours := self.judges[name].weights):
                        raise UserError(f"{path}: {name} had weights of xxh3 {weights.get(name)}, now it has {ours}")
                    found[name] = features = file.get_tensor(name)
                    if features.ndim != 2 or features.dtype != torch.float32:
                        raise UserError(f"{path}: {name} is {features.dtype} of shape {tuple(features.shape)}")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: no features of a reference: {error}") from None
        return found

    def _statistics(self, path: Path) -> dict[str, Tensor | Statistics]:
        if others := [name for name in self.compared if name != "inception"]:
            raise UserError(f"{path}: has statistics for FID alone, not features of {', '.join(others)}")
        width = int(INCEPTION_FEATURES)
        wanted = {"mu": (width,), "sigma": (width, width)}
        try:
            with zipfile.ZipFile(path) as archive:
                shapes = {name: _shape_in(archive, f"{name}.npy") for name in wanted}
            if shapes != wanted:
                both = [tuple(each.values()) for each in (shapes, wanted)]
                raise UserError(f"{path}: mu and sigma have shapes {both[0]}, not {both[1]}")
            with np.load(path, allow_pickle=False) as file:
                return {"inception": {name: np.asarray(file[name], dtype=np.float64) for name in wanted}}
        except UserError:
            raise
        except Exception as error:  # the parser of a header raises what its tokenizer raises
            raise UserError(f"{path}: no statistics of FID: {error}") from None

    def lines(self, scores: dict[str, float], drawn: int, reference: str) -> list[str]:
        """Lines for a reader: what each figure is, and of what."""
        told = []
        for name, metric in self.metrics.items():
            against = f"{drawn} pictures against {reference}" if metric.distance else f"{drawn} pictures"
            told.append(f"{metric.label} {scores[name]:.4g} of {against}")
        return told


def _shape_in(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """Shape that an array in an .npz file claims, before numpy takes the memory for it. Raises KeyError, ValueError."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(file)[0]
