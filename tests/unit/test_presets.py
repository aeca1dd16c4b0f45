"""The presets against the names and shapes of the released checkpoints."""

import pytest
import torch

from mdit.models import MicroDiT, presets
from tests.released import released


def on_meta(config):
    with torch.device("meta"):
        return MicroDiT(config)


@pytest.mark.parametrize("name", ["tiny_2", "xl_2"])
def test_names_and_shapes_are_those_of_the_released_checkpoints(name):
    state = on_meta(getattr(presets, name)()).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == released(name)


@pytest.mark.parametrize("name, millions", [("tiny_2", 200.7), ("xl_2", 1165)])
def test_parameter_count(name, millions):
    count = sum(p.numel() for p in on_meta(getattr(presets, name)()).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.0005)


def test_more_than_half_of_xl_2_is_in_experts():
    model = on_meta(presets.xl_2())
    experts = [p.numel() for name, p in model.named_parameters() if name.endswith(("mlp.w1", "mlp.w2"))]
    mixer = [p.numel() for name, p in model.named_parameters() if name.startswith("patch_mixer")]
    assert sum(experts) / 1e9 == pytest.approx(0.604, abs=0.0005)
    assert sum(mixer) / 1e9 == pytest.approx(0.186, abs=0.001)


@pytest.mark.parametrize("name", ["tiny_2", "xl_2"])
def test_at_512_px_only_the_positions_change(name):
    preset = getattr(presets, name)
    small, large = preset(32), preset(64)
    assert (large.latent_size, large.pos_interp_scale) == (64, 2.0)
    assert large.model_copy(update={"latent_size": 32, "pos_interp_scale": 1.0}) == small
    shapes = {key: value.shape for key, value in on_meta(small).state_dict().items()}
    changed = {key for key, value in on_meta(large).state_dict().items() if value.shape != shapes[key]}
    assert changed == {"pos_embed"}


def test_a_preset_takes_changes():
    assert presets.tiny_2(depth=2).depth == 2
