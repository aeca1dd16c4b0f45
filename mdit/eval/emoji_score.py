"""Scores on emoji scenes whose truth is known: is this the object, on the background, that the caption asked for?

The captions name object x background pairs that training never saw together. Two shares of right pictures are counted:

    background   the median border pixel's nearest named colour, in RGB, is the asked one
    object       of renderings of all the recipe's objects on the asked background, in the asked style, the one with
                 the nearest EfficientNet-Lite0 features (by cosine) is the asked one

Beside them stand chance, and what true renderings of the same captions get: the best that the measure can give.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdit.encoders.efficientnet import EfficientNetLite0, image_features
from mdit.sources.emoji import BACKGROUNDS, LARGEST, SMALLEST, EmojiScenes, Pair, Scene


@dataclass(frozen=True)
class Scores:
    """Shares of right pictures, 0 to 1."""

    background: float
    object: float


class SceneJudge:
    """Tells which of a recipe's objects and backgrounds pictures show."""

    def __init__(self, source: EmojiScenes, network: EfficientNetLite0) -> None:
        self.source, self.network = source, network
        self._features: dict[tuple[str, str], Tensor] = {}

    @property
    def chance(self) -> Scores:
        return Scores(1 / len(BACKGROUNDS), 1 / len(self.source.objects))

    def score(self, images_NHWC: Tensor, features_NF: Tensor, scenes: Sequence[Scene]) -> Scores:
        """(N, H, W, 3) uint8 pictures, with their `image_features`, against the N scenes that were asked for."""
        backgrounds, objects = nearest_backgrounds(images_NHWC), self.nearest_objects(features_NF, scenes)
        rows = zip(backgrounds, objects, (scene.pair for scene in scenes), strict=True)
        right_N2 = [(background == pair.background, object_ == pair.object) for background, object_, pair in rows]
        return Scores(*np.mean(right_N2, axis=0).tolist())

    def nearest_objects(self, features_NF: Tensor, scenes: Sequence[Scene]) -> list[str]:
        """The nearest object for every picture, among all on its scene's background in its scene's style."""
        features_NF = F.normalize(features_NF, dim=1)
        rows = [
            int((self._object_features(scene.pair.background, scene.style) @ feature_F).argmax())
            for feature_F, scene in zip(features_NF, scenes, strict=True)
        ]
        return [self.source.objects[row] for row in rows]

    def _object_features(self, background: str, style: str) -> Tensor:
        """(O, F) of unit length: every object in the middle, at a middling size. Features hardly feel the place."""
        if (background, style) not in self._features:
            size = (SMALLEST + LARGEST) / 2
            scenes = [Scene(Pair(name, background), style, "", size) for name in self.source.objects]
            features = image_features(self.network, render(self.source, scenes))
            self._features[background, style] = F.normalize(features, dim=1)
        return self._features[background, style]


def nearest_backgrounds(images_NHWC: Tensor) -> list[str]:
    """The named colour nearest to the median of each picture's border, one pixel wide; (N, H, W, 3) uint8."""
    border = torch.ones(images_NHWC.shape[1:3], dtype=torch.bool)
    border[1:-1, 1:-1] = False
    medians_N3 = images_NHWC[:, border].float().median(dim=1).values
    names, colours = list(BACKGROUNDS), torch.tensor(list(BACKGROUNDS.values())).float()
    return [names[i] for i in torch.cdist(medians_N3, colours).argmin(dim=1)]


def held_out_scenes(source: EmojiScenes, count: int) -> list[Scene]:
    """The first scenes of held-out pairs; beyond the recipe's validation_scenes they go on in the same way."""
    return [source.validation.scene(i) for i in range(count)]


def render(source: EmojiScenes, scenes: Sequence[Scene]) -> Tensor:
    """The true pictures, (N, H, W, 3) uint8."""
    return torch.from_numpy(np.stack([np.asarray(source.render(scene)) for scene in scenes]))
