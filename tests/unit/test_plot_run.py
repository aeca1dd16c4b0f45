"""Curves of runs: what is drawn, and a directory that is no run."""

import json

import pytest

from mdit.config import UserError
from tools import plot_run

pytest.importorskip("matplotlib")


def write_run(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_stages_lie_one_behind_the_other(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append((k.get("label"), *a)) or plot(self, *a, **k))
    one = write_run(
        tmp_path / "one", [{"step": 5, "loss": 2.0}, {"step": 10, "loss": 1.0}, {"step": 10, "validation_loss": 0.5}]
    )
    two = write_run(tmp_path / "two", [{"step": 4, "loss": 0.9}, {"step": 8, "loss": None}])
    plot_run.main([one, two, "--out", str(tmp_path / "losses.png")])
    assert drawn == [("loss", (5, 10), (2.0, 1.0)), ("validation loss", (10,), (0.5,)), (None, (14,), (0.9,))]
    assert (tmp_path / "losses.png").stat().st_size > 0


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match="is no run directory"):
        plot_run.main([str(tmp_path), "--out", str(tmp_path / "losses.png")])
