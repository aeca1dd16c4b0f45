"""A report's pictures: which are drawn, how long bars are, and where points lie."""

import builtins

import pytest
from PIL import Image

from mdit.bench.plots import MARKS, draw, roofline_points
from mdit.bench.profile import CATEGORIES
from mdit.bench.report import Report
from mdit.bench.row import Profile, Work
from mdit.config import UserError
from tests.bench_rows import CPU, H100, row


def profile(**changes):
    work = {"matmuls": Work(flops=5.6e14, bytes=1e12), "experts": Work(flops=1e11, bytes=2e11)}
    work["SwiGLU"] = Work(flops=1.0, bytes=1.0)
    categories = {"matmuls": 900.0, "experts": 100.0, "copies": 20.0}
    found = Profile(categories=categories, step_ms=1020.0, idle_ms=0.0, kernels=(), work=work)
    return row(kind="profile", **({"profile": found} | changes))


@pytest.mark.parametrize("environment", [H100, CPU], ids=["gpu", "cpu"])
def test_the_pictures_that_rows_have_figures_for_are_drawn(tmp_path, environment):
    failed = row("res_512_finetune", problem="out of memory")
    rows = [row(rate=1400.0), row(rate=1300.0, data="data/cc12m/256"), failed]
    rows += [row(rate=600.0, kind="ladder", name="eager"), row(kind="ladder", name="fp8", problem="broke")]
    for drawn, expected in (
        (rows, ["step_time.png"]),
        ([failed], ["step_time.png"]),
        ([*rows, profile(), profile(profile=None, problem="out of memory")], ["step_time.png", "roofline.png"]),
        ([], []),
    ):
        paths = draw(Report(environment=environment, command="bench", rows=drawn), tmp_path / "new")
        assert [path.name for path in paths] == expected
        for path in paths:
            with Image.open(path) as picture:
                assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_bars_are_as_long_as_a_thousand_images_take(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    drawn = []
    monkeypatch.setattr(Axes, "barh", lambda self, y, width, left=0.0, **options: drawn.append((left, [*width])))
    monkeypatch.setattr(Axes, "legend", lambda *args, **options: None)
    rows = [row(rate=1000.0), row("res_512_finetune", rate=100.0)]
    draw(Report(environment=H100, command="bench", rows=rows), tmp_path)
    left, width = drawn[-1]
    assert [a + b for a, b in zip(left, width)] == pytest.approx([1000.0, 10_000.0])


def test_points_are_work_over_time():
    assert roofline_points(profile().profile) == [
        ("matmuls", 560.0, pytest.approx(622.2, 1e-3)),
        ("experts", 0.5, 1.0),
    ]
    assert MARKS.keys() < CATEGORIES.keys()


def test_without_matplotlib_it_says_what_to_install(monkeypatch, tmp_path):
    def without(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'mdit\[bench\]'"):
        draw(Report(environment=H100, command="bench", rows=[profile()]), tmp_path)
