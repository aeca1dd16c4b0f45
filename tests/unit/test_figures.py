"""tools/fill_benchmarks.py: the documents say what the figures that are kept say, and no other figures get in."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mdit.bench import figures, recipe_cost
from mdit.bench.figures import REGION, REGIONS, Figures
from mdit.bench.kernel_report import MAIN
from mdit.bench.row import Profile
from mdit.config import UserError
from tests import bench_rows
from tools import fill_benchmarks
from tools.fill_benchmarks import DOCUMENTS, KEPT

ROOT = Path(__file__).resolve().parents[2]
H100 = bench_rows.H100.model_dump()
RATES = {"res_256_pretrain": 1210.0, "res_256_finetune": 460.0, "res_512_pretrain": 310.0, "res_512_finetune": 105.0}


def row(name="res_256_pretrain", rate=None, problem=None, **setting):
    rate = None if problem else rate or RATES[name]
    return bench_rows.row(name, rate, setting=setting, problem=problem)


PROFILE = Profile(categories={"matmuls": 240.0}, step_ms=423.0, idle_ms=12.0, kernels=(), trace="t")


def write(folder, name, environment=H100, **content):
    path = folder / name / f"{name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"schema": figures.REPORTS[name], "environment": environment, **content}), encoding="utf-8"
    )
    return path


@pytest.fixture
def folder(tmp_path):
    """What a GPU's minutes have left, all made up."""
    measured = [row(name) for name in RATES]
    measured += [
        row(rate=640.0, micro_batch=128, kernels=()),
        row(rate=1150.0, zero_stage=2),
        row(rate=1300.0, fp8=True),
    ]
    measured += [row(problem="out of memory", micro_batch=512), bench_rows.row(kind="profile", profile=PROFILE)]
    rows = [one.model_dump(mode="json") for one in measured]
    write(tmp_path, "throughput", command="bench", rows=rows)
    op = {"op": "swiglu.swiglu_linear", "shape": {"N": 256}, "label": "N256", "stages": {"256 px": 19}}
    times = {way: {"forward_ms": ms, "both_ms": 3 * ms, "peak_mib": 9.0} for way, ms in zip(MAIN, (3, 2, 1))}
    op |= {"bytes": 3 * 10**9, "flops": 3, "measured": times, "error": 2e-3}
    ceilings = {"GB/s": 2800.0, "TFLOP/s": 790.0}
    write(tmp_path, "kernels", settings={"dtype": "bf16", "preset": "xl_2"}, ceilings=ceilings, rows=[op])
    ways = {"reduced": {"ms": 0.5, "error": 4e-3}, "exact": {"ms": 0.6, "error": 1.7e-3}}
    settings = {"recipe": "res_256_pretrain", "micro_batch": 256, "tiny": False}
    write(tmp_path, "reductions", settings=settings, rows=[{"calls": 40, **ways}])
    lines = [{"step": n, "loss": 1 / n, "step_seconds": 0.1, "images_per_second": 5000.0} for n in (25, 50)]
    (tmp_path / "training" / "samples").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "training" / "samples" / "step_00000050.png")
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 50, "validation_loss": 0.25}])
    (tmp_path / "training" / "metrics.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "first_contact.json").write_text('{"environment": {"rehearsal": false}}', encoding="utf-8")
    return tmp_path


@pytest.fixture
def root(tmp_path):
    """A copy of the documents."""
    for name in DOCUMENTS:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "root" / name)
    return tmp_path / "root"


def texts(root):
    return {name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS}


def test_the_documents_say_what_the_kept_figures_say():
    kept = figures.load(ROOT / KEPT)
    regions = []
    for text in texts(ROOT).values():
        assert figures.fill(text, kept, ROOT / KEPT) == text
        regions += [name for _, name, _, _ in REGION.findall(text)]
    assert {*regions} == {*REGIONS} and len(regions) == len(REGIONS) + 1  # one says the status twice
    assert all("not measured" in REGIONS[name](Figures(), Path()) for name in REGIONS if name != "status")


def test_one_command_fills_them(folder, root, capsys):
    fill_benchmarks.main([str(folder), "--root", str(root)])
    assert capsys.readouterr().out.count("filled") == 3
    found = texts(root)
    source = "NVIDIA H100 80GB HBM3, torch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0, DeepSpeed 0.19.8, 2026-12-01, commit"
    assert all(source in text for text in found.values())
    readme, benchmarks, kernels = found.values()
    hours = sum(recipe_cost.Stage(bench_rows.recipe(name), None).images / rate / 3600 for name, rate in RATES.items())
    assert "1,210" in readme and f"{hours * 3.75:,.0f} / {hours * 2:,.0f}" in readme
    for figure in ("105 ", "640 ", "out of memory", "not measured", "24.00 ms", "of 423.0 ms", "50 steps in 5 s"):
        assert figure in benchmarks
    assert "swiglu.swiglu_linear" in kernels
    for name in ("step_time", "roofline", "samples", "losses"):
        assert f"figures/{name}.png" in benchmarks and (root / KEPT / f"{name}.png").exists()

    fill_benchmarks.main([str(root / KEPT), "--root", str(root)])  # what is kept says the same
    assert texts(root) == found and capsys.readouterr().out.count("as it was") == 3


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("throughput", {"environment": {**H100, "gpu": "none"}}, "measured on a CPU"),
        ("throughput", {"rows": [{"kind": "stage", "recipe": "res_256_pretrain_tiny"}]}, "of tiny shapes"),
        ("kernels", {"settings": {"preset": "tiny"}}, "of tiny shapes"),
        ("reductions", {"settings": {"tiny": True}}, "of tiny shapes"),
        ("throughput", {"environment": {**H100, "commit": "unknown"}}, "of no known commit"),
        (
            "kernels",
            {"environment": {**H100, "gpu": "NVIDIA H200"}},
            "another report of .* has gpu 'NVIDIA H100",
        ),
        ("kernels", {"environment": {**H100, "commit": "0000000"}}, "commit 'abc1234', here it is '0000000'"),
        ("reductions", {"schema": "other"}, "no report of schema 'mdit-reductions/1'"),
        ("first_contact", {"environment": {"rehearsal": True}}, "of a rehearsal"),
    ],
)
def test_what_is_no_figure_of_a_gpu_fills_nothing(folder, root, name, change, reason):
    path = folder / name / f"{name}.json" if name != "first_contact" else folder / "first_contact.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    before = texts(root)
    with pytest.raises(UserError, match=reason):
        fill_benchmarks.main([str(folder), "--root", str(root)])
    assert texts(root) == before and not (root / KEPT).exists()


def test_nothing_at_all_is_an_error(tmp_path, root):
    with pytest.raises(UserError, match="has no figures"):
        fill_benchmarks.main([str(tmp_path), "--root", str(root)])


def test_a_region_that_nobody_knows_is_an_error():
    with pytest.raises(UserError, match="has a region 'speed'"):
        figures.fill("<!-- measured: speed -->\n<!-- /measured -->", Figures(), Path())
