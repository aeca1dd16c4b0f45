"""Representation alignment keeps a run's guarantees: one curve in every layout, resume over its last step, snapshots of
a plain model."""

import pytest
import torch
from safetensors.torch import load_file

from mdit.checkpoint.snapshot import load_model, load_snapshot
from tests.distributed.test_same_curve import assert_same_run
from tests.training import attempt, read_metrics, train, write_ds_json, write_recipe

STEPS, LAST = 8, 5
RECIPE = dict(
    model={"mixer_dim": 16},
    training={"num_steps": STEPS, "global_batch_size": 16},
    optim={"eps": 1e-5, "schedule": "constant", "final_lr_ratio": 1.0},
    align={"tower": "tower", "channels": 20, "block": 2, "weight": 0.5, "stop_step": LAST, "width": 24},
    report={"validate_every": STEPS, "checkpoint_every": STEPS},
)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baseline")
    recipe = write_recipe(folder, **RECIPE)
    train(recipe, write_ds_json(folder / "ds.json", stage=1), folder / "run")
    return recipe, folder / "run"


def test_tensors_over_two_keep_losses_and_weights(baseline, tmp_path):
    """With experts and ZeRO-3 it is in tests/distributed/test_same_curve.py, beside all other levers."""
    pytest.importorskip("megatron.core")
    recipe, expected = baseline
    ds_json = write_ds_json(tmp_path / "ds.json", stage=1, mdit={"tensor_parallel": 2})
    train(recipe, ds_json, tmp_path / "run", processes=2)
    assert_same_run(tmp_path / "run", expected, keys=("loss", "align_loss", "gradient_norm", "validation_loss"))
    assert [*read_metrics(expected, "align_loss")] == [*range(1, LAST + 1)]


def test_a_run_goes_on_over_the_last_aligned_step(baseline, tmp_path):
    """Stopped before it and behind it, bit for bit."""
    recipe, expected = baseline
    ds_json, run = write_ds_json(tmp_path / "ds.json", stage=1), tmp_path / "run"
    for steps in (LAST - 1, LAST + 1, STEPS):
        train(recipe, ds_json, run, "--set", f"training.num_steps={steps}")
    for key in ("loss", "align_loss", "gradient_norm"):
        assert read_metrics(run, key) == read_metrics(expected, key)
    name = f"checkpoints/step_{STEPS:08d}/rank_00000_000.safetensors"
    ours, theirs = load_file(run / name), load_file(expected / name)
    assert {"master/align.0.weight", "exp_avg/align.4.bias", "ema/align.2.weight"} <= ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_snapshot_is_a_plain_models(baseline):
    snapshot = load_snapshot(baseline[1] / "snapshots" / "latest")
    assert not [name for name, _ in load_model(snapshot).named_parameters() if "align" in name]
    assert snapshot.config.align is not None


def test_a_wrong_key_ends_before_any_step(baseline, tmp_path):
    recipe, _ = baseline
    ds_json = write_ds_json(tmp_path / "ds.json")
    code, told = attempt(recipe, ds_json, tmp_path / "run", "--set", "align.block=9")
    assert code == 2 and "align.block 9 is above model.depth 4" in told.splitlines()[-1]
    code, told = attempt(recipe, ds_json, tmp_path / "run", "--set", "align.tower=other")
    assert code == 2 and told.splitlines()[-1].endswith("features are by 'tower', but align.tower = 'other'")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
