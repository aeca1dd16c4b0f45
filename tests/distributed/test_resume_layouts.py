"""Stopping and going on leaves no trace under any ZeRO stage, precision and number of processes."""

import pytest
import torch
from safetensors.torch import load_file

from tests.training import read_metrics, train, write_ds_json, write_recipe

LAYOUTS = {
    "ZeRO-1, bf16, 2 processes": dict(stage=1, bf16=True, processes=2),
    "ZeRO-2, bf16, 2 processes": dict(stage=2, bf16=True, processes=2),
    "ZeRO-3, 2 processes": dict(stage=3, bf16=False, processes=2),
    "ZeRO-3, bf16": dict(stage=3, bf16=True, processes=1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_resumed_run_equals_the_whole_one(tmp_path, layout):
    constant = {"schedule": "constant", "final_lr_ratio": 1.0}  # so that an earlier end does not bend the rate
    recipe = write_recipe(tmp_path, training={"num_steps": 8}, optim=constant)
    ds_json = write_ds_json(tmp_path / "ds.json", stage=layout["stage"], bf16={"enabled": layout["bf16"]})
    processes = layout["processes"]
    train(recipe, ds_json, tmp_path / "whole", processes=processes)
    train(recipe, ds_json, tmp_path / "parts", "--set", "training.num_steps=4", processes=processes)
    assert "resuming at step 4" in train(recipe, ds_json, tmp_path / "parts", processes=processes)
    assert read_metrics(tmp_path / "parts") == read_metrics(tmp_path / "whole")
    for rank in range(processes):
        name = f"checkpoints/step_00000008/rank_{rank:05d}.safetensors"
        whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
