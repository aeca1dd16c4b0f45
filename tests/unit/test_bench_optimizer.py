"""tools/bench_optimizer.py on tiny shapes: both optimizers take steps, and the ratios follow from their times."""

import json

import pytest

from tests.processes import run_forked
from tests.training import REPOSITORY, launch


def test_both_take_steps(tmp_path):
    arguments = ["--tiny", "--steps", "1", "--turns", "1", "--images", "800", "--out", str(tmp_path)]
    ended = run_forked(launch, str(REPOSITORY / "tools/bench_optimizer.py"), arguments)
    assert ended.returncode == 0, ended.output
    report = json.loads((tmp_path / "optimizer.json").read_text())
    adamw, muon = (report["milliseconds"][name] for name in ("adamw", "muon"))
    for ms in (adamw, muon):
        assert ms["extrapolated"] == pytest.approx(100 * ms["model"] + ms["optimizer"]) and ms["optimizer"] > 0
    model = (adamw["model"] + muon["model"]) / 2
    expected = (100 * model + muon["optimizer"]) / (100 * model + adamw["optimizer"])
    assert report["ratios"]["800"] == pytest.approx(expected)
