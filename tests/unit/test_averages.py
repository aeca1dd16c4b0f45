"""Averages of any length after training: their profiles, what the run keeps, and combinations against brute force."""

import json
import math

import numpy as np
import pytest
import torch

from mdit.checkpoint.averages import combination, exponent, profile, reconstruct, save_averages, stored_averages
from mdit.checkpoint.snapshot import load_snapshot
from mdit.config import AveragesConfig, UserError
from mdit.train.ema import EMA
from tests.processes import run_forked
from tests.training import REPOSITORY, launch, train, write_ds_json, write_recipe

LENGTHS = (0.05, 0.10)
STEPS = 40


@pytest.mark.parametrize("length", [0.01, 0.05, 0.1, 0.25])
def test_the_profile_has_its_length(length):
    """Standard deviation of a continuous profile t^gamma on [0, 1], as a share of 1."""
    gamma = exponent(length)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(length, rel=1e-6)
    weights = profile(length, 5000)
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all()
    places = (np.arange(5000) + 0.5) / 5000
    assert math.sqrt((weights * places**2).sum() - (weights * places).sum() ** 2) == pytest.approx(length, rel=1e-3)


def test_published_exponents():
    """Table 2 and section 3.1 of arXiv 2312.02696."""
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01) and exponent(0.10) == pytest.approx(6.94, abs=0.01)


def walked(seed=0):
    """-> weights after every step of a walk (STEPS, 6), and the averages that EMA keeps, by step."""
    generator = torch.Generator().manual_seed(seed)
    walk = torch.randn(STEPS, 6, generator=generator, dtype=torch.float64).cumsum(0)
    weights = torch.zeros(6, dtype=torch.float64)
    ema = EMA(None, [weights], AveragesConfig(lengths=LENGTHS, every=1))
    kept = {}
    for step, value in enumerate(walk, 1):
        weights.copy_(value)
        ema.update(step)
        kept[step] = [average[0].clone() for average in ema.of_lengths]
    return walk, kept


def test_training_keeps_the_profiles_averages():
    walk, kept = walked()
    for step, averages in kept.items():
        for length, average in zip(LENGTHS, averages, strict=True):
            expected = torch.from_numpy(profile(length, step)) @ walk[:step]
            torch.testing.assert_close(average, expected, rtol=1e-9, atol=1e-12)


def write_kept(folder, kept, every):
    for step in range(every, STEPS + 1, every):
        averages = [{"weight": average.float()} for average in kept[step]]
        save_averages(folder / "averages" / f"step_{step:08d}", LENGTHS, averages)
    return stored_averages(folder, STEPS)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.07, 0.15, 0.25])
def test_any_length_from_averages_of_every_step_is_the_brute_force_average(tmp_path, length):
    walk, kept = walked()
    found = dict(reconstruct(write_kept(tmp_path, kept, every=1), length, STEPS))["weight"]
    expected = torch.from_numpy(profile(length, STEPS)) @ walk
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("length", [0.05, 0.07, 0.15])
def test_from_few_averages_it_is_the_nearest_combination(tmp_path, length):
    walk, kept = walked()
    stored = write_kept(tmp_path, kept, every=8)
    profiles = np.stack([profile(each.length, each.step, 0, STEPS) for each in stored])
    nearest, *_ = np.linalg.lstsq(profiles.T, profile(length, STEPS), rcond=None)
    found = dict(reconstruct(stored, length, STEPS))["weight"]
    expected = torch.from_numpy(nearest @ profiles) @ walk
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=2e-5)
    factors = combination([(each.length, each.step) for each in stored], length, STEPS)
    error = np.linalg.norm(factors @ profiles - profile(length, STEPS)) / np.linalg.norm(profile(length, STEPS))
    assert error < 0.1
    if length in LENGTHS:
        torch.testing.assert_close(found, kept[STEPS][LENGTHS.index(length)].float(), rtol=1e-6, atol=1e-5)


def test_a_run_stores_them_resumes_with_them_and_makes_one(tmp_path):
    """Stopped and resumed in another layout; the tool's snapshot is used like any other."""
    averages = {"lengths": LENGTHS, "every": 2}
    recipe = write_recipe(tmp_path, training={"num_steps": 6}, averages=averages, report={"checkpoint_every": 3})
    for name, layouts in (("whole", [(6, 1)]), ("parts", [(3, 2), (6, 1)])):
        for until, processes in layouts:
            more = ["--set", f"training.num_steps={until}", "--set", 'optim.schedule="constant"']
            more += ["--set", "optim.final_lr_ratio=1.0"]
            train(recipe, write_ds_json(tmp_path / "ds.json"), tmp_path / name, *more, processes=processes)
    whole, parts = (stored_averages(tmp_path / name, 6) for name in ("whole", "parts"))
    assert [(each.length, each.step) for each in whole] == [(length, step) for step in (2, 4, 6) for length in LENGTHS]
    parts = [each for each in parts if each.step != 3]  # where the first part ended
    for length in (0.05, 0.2):
        ours, theirs = (dict(reconstruct(stored, length, 6)) for stored in (parts, whole))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)
    script = str(REPOSITORY / "tools" / "reconstruct_ema.py")
    run = ["--run_dir", str(tmp_path / "whole")]
    ended = run_forked(launch, script, [*run, "--length", "0.2", "--out", str(tmp_path / "averaged")])
    assert ended.returncode == 0, ended.output
    found = load_snapshot(tmp_path / "averaged").weights("ema")
    assert all(torch.equal(found[name], value) for name, value in dict(reconstruct(whole, 0.2, 6)).items())
    assert json.loads((tmp_path / "averaged/config.json").read_text())["average"]["length"] == 0.2
    again = run_forked(launch, script, [*run, "--length", "0.2", "--out", str(tmp_path / "averaged")])
    assert again.returncode == 2 and "is there already" in again.output
    told = run_forked(launch, script, [*run, "--sweep", "0.05", "0.2", "--plot", str(tmp_path / "plot.png")])
    assert told.returncode == 0 and "| EMA, decay 0.9" in told.output and (tmp_path / "plot.png").exists()


def test_without_averages_and_with_a_damaged_one_it_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has no averages up to step 40; a recipe's table \[averages\]"):
        stored_averages(tmp_path, STEPS)
    stored = write_kept(tmp_path, walked()[1], every=20)
    stored[0].file.write_bytes(b"")
    with pytest.raises(UserError, match="length_0.safetensors: damaged or missing"):
        stored_averages(tmp_path, STEPS)
