"""Towers that pictures are judged by, against transformers itself; what cannot be loaded is one line."""

import numpy as np
import pytest
import torch
from PIL import Image

from mdit.config import UserError
from mdit.encoders.judges import DINOV2_SIZE, LOADERS
from tests.towers import save_clip, save_dinov2

CPU = torch.device("cpu")
CAPTIONS = ["a red apple", "", "a long story, " * 30]


@pytest.fixture(scope="module")
def pictures():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(save_clip(tmp_path_factory.mktemp("clip"), with_vision=True))


def load(judge, place):
    return LOADERS[judge](str(place), f"metric x: {judge}", CPU)


def test_clip_score_is_that_of_transformers(clip, pictures):
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPImageProcessor.from_pretrained(clip)
    options = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip)(CAPTIONS, **options)
    shown = processor(images=[Image.fromarray(picture.numpy()) for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        found = model(**tokens, **shown)
    cosines = (found.logits_per_image / model.logit_scale.exp()).diagonal()
    ours = load("clip_score", clip).features(pictures, CAPTIONS)
    torch.testing.assert_close(ours[:, 0], 100 * cosines.clamp(min=0), rtol=1e-5, atol=1e-5)
    assert ours.shape == (3, 1) and cosines.max() > 0
    embeddings = load("clip", clip).features(pictures, CAPTIONS)
    torch.testing.assert_close(embeddings, found.image_embeds / found.image_embeds.norm(dim=1, keepdim=True))


def test_dinov2s_features_are_its_class_token(tmp_path, pictures):
    from transformers import Dinov2Model

    model = Dinov2Model.from_pretrained(save_dinov2(tmp_path)).eval()
    size = (DINOV2_SIZE, DINOV2_SIZE)
    resized = [np.asarray(Image.fromarray(picture.numpy()).resize(size, Image.BICUBIC)) for picture in pictures]
    shown = (np.stack(resized) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        expected = model(pixel_values=torch.tensor(shown).permute(0, 3, 1, 2).float()).pooler_output
    torch.testing.assert_close(load("dinov2", tmp_path).features(pictures, CAPTIONS), expected, rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_neighbours(clip, pictures):
    for judge, place in (("clip", clip), ("clip_score", clip), ("efficientnet", "")):
        loaded = load(judge, place)
        whole = loaded.features(pictures, CAPTIONS)
        torch.testing.assert_close(loaded.features(pictures[1:2], CAPTIONS[1:2]), whole[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "judge, what, message",
    [
        ("clip", "nothing", "metric x: clip: there is no such directory"),
        ("dinov2", "clip", "metric x: dinov2: is a clip model; expected the local path or hub id of a DINOv2 model"),
        ("clip_score", "empty", "metric x: clip_score: expected the local path or hub id of a CLIP model"),
    ],
)
def test_what_is_no_such_tower_is_one_line(clip, tmp_path, judge, what, message):
    (tmp_path / "empty").mkdir()
    place = clip if what == "clip" else tmp_path / what
    with pytest.raises(UserError) as error:
        load(judge, place)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
