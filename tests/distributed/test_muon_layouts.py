"""Muon under ZeRO: one curve for every layout, resume from every layout in every other, skipped steps among them."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mdit.models import meta_model
from mdit.parallel.muon import takes_muon
from tests.distributed.test_skipped_steps import BF16, EP2, STEADY, STEPS, metrics, state, train_all
from tests.recipes import tiny_config
from tests.training import attempt, run_in_processes, write_ds_json, write_recipe

# As Adam's eps: with the default, gradients that are themselves rounding (1e-9) move weights (see test_same_curve.py).
MUON = {**STEADY, "name": "muon", "muon": {"lr": 4e-3, "weight_decay": 0.1, "eps": 1e-5}}
CHAIN = [  # (processes, a layout)
    (1, {"stage": 2, "micro_batch": 4, "until": 2}),  # of its two steps the first is skipped
    (2, {"stage": 3, "micro_batch": 2, "until": 3}),
    (4, {"stage": 1, **EP2, "until": 4}),
    (4, {"stage": 2, **EP2}),
]
LAYOUTS = {
    "chained": CHAIN,
    "ZeRO-3 of 2, in parts": [(2, {"zero_optimization": {"stage": 3, "sub_group_size": 3000}})],
    "ZeRO-2 of 4, experts over 2, accumulated twice": [(4, {"stage": 2, "micro_batch": 1, **EP2})],
}
IN_BF16 = {"stage": 1, "micro_batch": 2, **BF16, **EP2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """-> the directory of all runs, some of whose steps are poisoned; "expected": one process, the whole batch."""
    folder = tmp_path_factory.mktemp("muon")
    write_recipe(folder, training={"num_steps": STEPS}, optim=MUON, report={"checkpoint_every": STEPS})
    for processes in (1, 2, 4):
        here = {name: [layout for size, layout in parts if size == processes] for name, parts in LAYOUTS.items()}
        here |= {"expected": [{"stage": 1}]} if processes == 1 else {}
        here |= {"bf16": [IN_BF16], "bf16 in parts": [IN_BF16] * 2} if processes == 2 else {}
        run_in_processes(train_all, processes, str(folder), {k: v for k, v in here.items() if v}, timeout=280)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_the_same_steps(runs, name):
    both = name, "expected"
    for key in ("loss", "gradient_norm", "learning_rate"):
        ours, theirs = ([-1 if row[key] is None else row[key] for row in metrics(runs / run)] for run in both)
        assert ours == pytest.approx(theirs, rel=1e-6), key
    for kind in ("raw", "ema"):
        ours, theirs = (load_file(runs / run / f"snapshots/latest/{kind}.safetensors") for run in both)
        for parameter, value in theirs.items():
            torch.testing.assert_close(ours[parameter], value, rtol=0, atol=1e-6, msg=f"{kind} {parameter}")


def test_bf16_follows_float32_and_goes_on_bit_for_bit(runs):
    losses, expected = ([row["loss"] or -1 for row in metrics(runs / run)] for run in ("bf16", "expected"))
    assert losses == pytest.approx(expected, rel=1e-2) and losses != pytest.approx(expected, rel=1e-7)
    ours, theirs = state(runs / "bf16 in parts"), state(runs / "bf16")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_checkpoint_has_no_second_moments_of_muons_parameters(runs):
    (file,) = (runs / "expected/checkpoints").glob("*/*.safetensors")
    stored = {*safe_open(file, "pt").keys()}
    parameters = dict(meta_model(tiny_config().model).named_parameters())
    without = {name for name in parameters if f"exp_avg_sq/{name}" not in stored}
    assert without == {name for name, p in parameters.items() if takes_muon(name, p.shape)} != set()
    assert {name for name in parameters if f"exp_avg/{name}" in stored} == {*parameters}


def test_a_run_keeps_its_optimizer(runs, tmp_path):
    recipe = json.loads((runs / "recipe.json").read_text())["recipe"]
    del recipe["optim"]["name"], recipe["optim"]["muon"]
    other = tmp_path / "recipe.json"
    other.write_text(json.dumps({"recipe": recipe}))
    returncode, output = attempt(other, write_ds_json(tmp_path / "ds.json"), runs / "expected")
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert returncode == 2 and "optim.name" in error and "'muon'" in error and "'adamw'" in error
