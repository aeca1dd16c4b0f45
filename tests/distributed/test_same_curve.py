"""The JSON never changes what is learned: processes, micro-batches, ZeRO stages, compilation, recomputation."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training import read_metrics, train, write_ds_json, write_recipe

STEPS = 6


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """One process, whole batch at once, ZeRO-1, float32."""
    folder = tmp_path_factory.mktemp("baseline")
    recipe = write_recipe(folder, training={"num_steps": STEPS}, report={"validate_every": 3})
    train(recipe, write_ds_json(folder / "ds.json", stage=1), folder / "run")
    return recipe, folder / "run"


LAYOUTS = {
    "micro-batch of 2, accumulated 4 times": dict(processes=1, stage=2, micro_batch=2),
    "2 processes, ZeRO-1": dict(processes=2, stage=1),
    "2 processes, ZeRO-2, micro-batch of 1": dict(processes=2, stage=2, micro_batch=1),
    "2 processes, ZeRO-3": dict(processes=2, stage=3, micro_batch=2),
    "ZeRO-3 alone": dict(processes=1, stage=3),
    "optimizer in host memory": dict(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "activation checkpointing": dict(processes=1, stage=2, mdit={"activation_checkpointing": "block"}),
    "latents through DALI": dict(processes=2, stage=2, mdit={"data_engine": "dali"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_keeps_losses_and_weights(baseline, tmp_path, name):
    if "DALI" in name:
        pytest.importorskip("nvidia.dali")
    recipe, expected = baseline
    layout = dict(LAYOUTS[name])
    processes = layout.pop("processes", 1)
    train(recipe, write_ds_json(tmp_path / "ds.json", **layout), tmp_path / "run", processes=processes)

    for key in ("loss", "validation_loss", "gradient_norm"):
        ours, theirs = read_metrics(tmp_path / "run", key), read_metrics(expected, key)
        assert ours.keys() == theirs.keys() and ours
        assert ours == pytest.approx(theirs, rel=1e-5), key
    for kind in ("ema", "raw"):
        ours, theirs = (
            load_file(run / "snapshots/latest" / f"{kind}.safetensors") for run in (tmp_path / "run", expected)
        )
        for parameter, value in theirs.items():
            torch.testing.assert_close(ours[parameter], value, rtol=0, atol=2e-5, msg=parameter)


def test_weights_moved_and_ema_lags_behind(baseline):
    _, run = baseline
    ema, raw = (load_file(run / "snapshots/latest" / f"{kind}.safetensors") for kind in ("ema", "raw"))
    name = "final_layer.linear.weight"  # starts at zero
    assert 0 < ema[name].norm() < raw[name].norm()


def test_compiled_blocks_keep_the_curve(tmp_path):
    """A few blocks only: the compiler takes several seconds for each."""
    few = {"depth": 2, "mixer_depth": 1, "experts_every_n": 2}
    recipe = write_recipe(tmp_path, model=few, training={"num_steps": 3})
    for name, compiled in (("plain", False), ("compiled", True)):
        train(recipe, write_ds_json(tmp_path / f"{name}.json", mdit={"compile": compiled}), tmp_path / name)
    plain, compiled = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_float32(baseline, tmp_path, stage):
    recipe, expected = baseline
    ds_json = write_ds_json(tmp_path / "ds.json", stage=stage, micro_batch=4, bf16={"enabled": True})
    train(recipe, ds_json, tmp_path / "run", processes=2)
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(expected)
    assert ours == pytest.approx(theirs, rel=1e-2)
    assert ours != pytest.approx(theirs, rel=1e-7), "bf16 was asked for and not used"
