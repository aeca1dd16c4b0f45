"""A report's pictures: which are drawn, what stands in them, and what is told instead of drawn."""

import builtins

import pytest
from PIL import Image

from mdit.bench.plots import MARKS, draw, roofline_points
from mdit.bench.profile import CATEGORIES
from mdit.config import UserError

GPU = dict(gpu="NVIDIA H100 80GB HBM3", cpu="x86_64, 16 cores", peak_tflops=989.0, bandwidth_gbs=3350.0)
ENVIRONMENT = {**GPU, "commit": "1234567", "date": "2026-11-23"}
CPU = {**ENVIRONMENT, "gpu": "none", "peak_tflops": None, "bandwidth_gbs": None}


def row(name, rate, kind="stage", mfu=0.4, data="made up", problem=None):
    step = rate and 2048e3 / rate
    shares = {"data": 0.01, "forward": 0.3, "backward": 0.64, "optimizer": 0.05}
    milliseconds = rate and {"step": step, **{part: share * step for part, share in shares.items()}}
    found = {"kind": kind, "name": name, "data": data, "images_per_second": rate, "mfu": mfu, "problem": problem}
    return found | {"milliseconds": milliseconds, "setting": {"global_batch": 2048}}


def profile(name="256 px", problem=None):
    work = {"matmuls": {"flops": 5.6e14, "bytes": 1e12}, "experts": {"flops": 1e11, "bytes": 2e11}, "SwiGLU": None}
    categories = {"matmuls": 900.0, "experts": 100.0, "copies": 20.0}
    found = {"kind": "profile", "name": name, "problem": problem}
    return found if problem else found | {"categories": categories, "work": work}


def texts(monkeypatch, report, folder):
    """Every text of the figures that are drawn, by file name."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found = {}

    def savefig(self, path, save=Figure.savefig, **options):
        save(self, path, **options)
        found[path.name] = [text.get_text() for text in self.findobj(Text) if text.get_text()]

    monkeypatch.setattr(Figure, "savefig", savefig)
    paths = draw(report, folder)
    assert [path.name for path in paths] == list(found) and all(path.parent == folder for path in paths)
    for path in paths:
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10
    return found


def test_stages_and_ladder_are_bars_with_their_figures(monkeypatch, tmp_path):
    rows = [row("256 px, mask 0.75", 1400.0), row("256 px, mask 0.75", 1300.0, mfu=None, data="data/cc12m/256")]
    rows += [
        row("eager", 600.0, "ladder"),
        row("compiled", 900.0, "ladder"),
        row("fp8", None, "ladder", problem="broke"),
    ]
    found = texts(monkeypatch, {"environment": ENVIRONMENT, "rows": rows}, tmp_path / "new")
    assert found.keys() == {"step_time.png"}
    lines = found["step_time.png"]
    assert "Training steps: NVIDIA H100 80GB HBM3, 2026-11-23, commit 1234567" in [" ".join(t.split()) for t in lines]
    assert {"256 px, mask 0.75", "256 px, mask 0.75, real data", "eager", "compiled"} <= set(lines)
    assert {"1,400 images/s, MFU 40 %", "1,300 images/s", "600 (1.00x), MFU 40 %", "900 (1.50x), MFU 40 %"} <= set(
        lines
    )
    assert {"data", "forward", "backward", "optimizer"} <= set(lines)
    assert "fp8: not measured (broke)" in lines and "fp8" not in lines  # told, and no bar


def test_bars_are_as_long_as_a_thousand_images_take(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    drawn = []

    def barh(self, y, width, left=0.0, **options):
        drawn.append((options["label"], [*left], [*width]))

    monkeypatch.setattr(Axes, "barh", barh)
    monkeypatch.setattr(Axes, "legend", lambda *args, **options: None)
    draw({"environment": ENVIRONMENT, "rows": [row("256 px", 1000.0), row("512 px", 100.0)]}, tmp_path)
    assert [label for label, _, _ in drawn] == ["data", "forward", "backward", "optimizer"]
    _, left, width = drawn[-1]
    assert [a + b for a, b in zip(left, width)] == pytest.approx([1000.0, 10_000.0])


def test_the_roofline_has_roof_and_points_on_a_gpu_and_says_so_without(monkeypatch, tmp_path):
    rows = [profile(), profile("512 px", problem="out of memory at micro-batch 16")]
    found = texts(monkeypatch, {"environment": ENVIRONMENT, "rows": rows}, tmp_path)
    lines = found["roofline.png"]
    assert "roof: 989 TFLOP/s (bf16), 3,350 GB/s" in lines
    assert "matmuls: 622 TFLOP/s, 1,111 GB/s" in lines and "experts: 1 TFLOP/s, 2,000 GB/s" in lines
    assert "256 px\nno formula: copies" in lines
    assert "512 px: not measured (out of memory at micro-batch 16)" in lines
    found = texts(monkeypatch, {"environment": CPU, "rows": rows[:1]}, tmp_path)
    assert not any("roof:" in line for line in found["roofline.png"])
    assert any("no peak known, no roof" in " ".join(line.split()) for line in found["roofline.png"])
    assert any("CPU (x86_64, 16 cores)" in " ".join(line.split()) for line in found["roofline.png"])


def test_points_are_work_over_time():
    assert roofline_points(profile()) == [("matmuls", 560.0, pytest.approx(622.2, 1e-3)), ("experts", 0.5, 1.0)]
    assert roofline_points({"categories": {"matmuls": 1.0}}) == []
    assert MARKS.keys() < CATEGORIES.keys()


def test_rows_without_figures_alone_are_told(monkeypatch, tmp_path):
    report = {"environment": ENVIRONMENT, "rows": [row("256 px", None, problem="out of memory")]}
    found = texts(monkeypatch, report, tmp_path)
    assert "256 px: not measured (out of memory)" in found["step_time.png"]
    assert draw({"environment": ENVIRONMENT, "rows": []}, tmp_path) == []


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    def without(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'mdit\[bench\]'"):
        draw({"environment": ENVIRONMENT, "rows": [profile()]}, tmp_path)
