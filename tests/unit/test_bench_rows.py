"""mdit/bench/rows.py and report.py: what follows from a measured rate, tables, and rows that survive."""

import json

import pytest
import torch

from mdit.bench import rows
from mdit.bench.report import Report, is_open
from mdit.bench.stages import settle, tiny_form
from mdit.config import CONFIGS, UserError, load_config
from mdit.dist import World
from mdit.parallel.settings import RunSettings

H100 = "NVIDIA H100 80GB HBM3"
MS = {"step": 399.0, "data": 1.0, "forward": 120.0, "backward": 260.0, "optimizer": 18.0, "communication": 30.0}
MEASURED = {"steps": 9, "images_per_second": 8 * 641.0, "milliseconds": MS, "peak_gib": 70.1, "losses": [1.0]}


def world(size: int = 8) -> World:
    return World(0, size, 0, torch.device("cpu"))


def facts(kind="stage", name="256 px, mask 0.75", recipe="res_256_pretrain", gpus=8, bf16=True, **settings) -> dict:
    ds_config = {
        "train_batch_size": 2048,
        "train_micro_batch_size_per_gpu": 256,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 1},
    }
    return dict(
        kind=kind,
        name=name,
        config=load_config(CONFIGS / f"{recipe}.toml"),
        settings=RunSettings(**settings),
        ds_config=ds_config,
        world=world(gpus),
        kernels=["swiglu", "patch_mixing"],
        data="made up",
    )


def on(monkeypatch, device: str) -> None:
    monkeypatch.setattr(rows, "device_name", lambda _: device)


def test_the_papers_own_figures_follow_from_its_rate(monkeypatch):
    """641 images/s a GPU in stage 1: 181 TFLOP/s, 18 % of an H100; 512 M images at $3.75 a GPU-hour."""
    on(monkeypatch, H100)
    row = rows.measured_row(measured=MEASURED, **facts())
    assert round(row["flops_per_image"] / 1e9) == 282 and round(row["parameters"] / 1e6) == 1165
    assert row["tflops"] == pytest.approx(181, abs=0.5)
    assert row["mfu"] == pytest.approx(181 / 989, abs=1e-3)
    assert row["images"] == 250_000 * 2048
    assert rows.dollars_per_million(row, 3.75) == pytest.approx(1e6 / 641 / 3600 * 3.75)
    hours_on_eight = 512e6 / 5128 / 3600
    assert rows.stage_dollars(row, 3.75) == pytest.approx(hours_on_eight * 8 * 3.75)
    assert rows.stage_dollars(row, 2) == pytest.approx(hours_on_eight * 8 * 2)


@pytest.mark.parametrize("recipe, gigaflops", [("256_finetune", 714), ("512_pretrain", 1069), ("512_finetune", 3003)])
def test_flops_of_the_other_stages(recipe, gigaflops):
    row = rows.problem_row(problem="not measured", **facts(recipe=f"res_{recipe}"))
    assert round(row["flops_per_image"] / 1e9) == gigaflops


@pytest.mark.parametrize(
    "device, changes, has_mfu",
    [
        (H100, {}, True),
        (H100, {"fp8": True}, False),
        (H100, {"bf16": False}, False),
        ("NVIDIA A100-SXM4-80GB", {}, True),
        ("NVIDIA H100 PCIe", {}, False),  # another peak than that of the data sheet we have
        ("none", {}, False),
    ],
)
def test_where_there_is_an_mfu(monkeypatch, device, changes, has_mfu):
    on(monkeypatch, device)
    row = rows.measured_row(measured=MEASURED, **facts(**changes))
    assert (row["mfu"] is not None) == has_mfu
    assert row["tflops"] == pytest.approx(181, abs=0.5)
    assert row["setting"]["kernels"] == ["patch_mixing", "swiglu"]


def test_a_table_fits_a_terminal_and_says_everything(monkeypatch):
    on(monkeypatch, H100)
    measured = rows.measured_row(measured=MEASURED, **facts())
    failed = rows.problem_row(problem="out of memory at micro-batch 256", **facts(name="512 px, mask 0"))
    rung = rows.measured_row(
        measured=MEASURED | {"images_per_second": 3 * 5128.0},
        parity={"steps": 50, "largest": 2e-3, "mean_first": 0.0, "mean_last": 1e-3},
        **facts("ladder", "+ torch.compile"),
    )
    first = rows.measured_row(measured=MEASURED, **facts("ladder", "as published"))
    shown = rows.table([measured, failed, first, rung], [3.75, 2.0])
    assert max(map(len, shown.splitlines())) <= 160
    line = next(line for line in shown.splitlines() if line.startswith("| 256 px"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == ["256 x 1", "5,128, 641 a GPU", "399.0 = 1.0 + 120.0 + 260.0 + 18.0"]
    assert cells[4:] == ["30.0", "181", "18.3%", "70.1", "1.63 / 0.87", "832 / 444"]
    assert "- 512 px, mask 0, 256 x 1: out of memory at micro-batch 256" in shown
    assert "15,384, 3.00x" in shown and "2.0e-03 in 50" in shown
    assert "8 processes; bf16; ZeRO-1; not compiled; in Triton patch_mixing, swiglu; data made up:" in shown


def test_a_report_is_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "throughput.json"
    report = {"schema": rows.SCHEMA, "environment": {}, "rows": [rows.problem_row(problem="no", **facts())]}
    rows.save(path, report)
    assert rows.load(path) == report
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "half of")
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rows.save(path, report)
    assert rows.load(path) == report


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read the report: No such file"),
        ("{", "not valid JSON"),
        ("[]", "schema = None"),
        ('{"schema": "mdit-kernels/1", "rows": []}', "schema = 'mdit-kernels/1': expected 'mdit-throughput/1'"),
        ('{"schema": "mdit-throughput/1", "environment": {}}', "rows = None"),
    ],
)
def test_a_file_that_is_no_report(tmp_path, text, message):
    path = tmp_path / "throughput.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        rows.load(path)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)


def open_report(directory, resume=False) -> Report:
    return Report(directory, world(1), command="bench", prices=[3.75], resume=resume)


def test_rows_are_kept_found_and_replaced(tmp_path):
    report = open_report(tmp_path)
    waiting = rows.problem_row(problem="not measured: no time", **facts(gpus=1))
    report.add(waiting)
    assert is_open(waiting) and report.find(waiting) is None
    done = rows.measured_row(measured=MEASURED, **facts(gpus=1))
    report.add(done)
    report.add(waiting)  # has less to tell
    report.add(rows.measured_row(measured=MEASURED, **facts(gpus=1, compile=True)))
    again = open_report(tmp_path, resume=True)
    assert [row["setting"]["compile"] for row in again.rows] == [False, True]
    assert again.find(waiting)["images_per_second"] == 5128
    assert again.find(rows.problem_row(problem="", **facts(gpus=2))) is None
    assert "5,128" in (tmp_path / "throughput.md").read_text()


def test_rows_of_another_commit_are_refused(tmp_path):
    open_report(tmp_path).write()
    path = tmp_path / "throughput.json"
    content = rows.load(path)
    rows.save(path, content | {"environment": content["environment"] | {"date": "2020-01-01"}})
    assert open_report(tmp_path, resume=True).rows == []
    rows.save(path, content | {"environment": content["environment"] | {"commit": "0123abc"}})
    with pytest.raises(UserError, match=f"--resume: {path} has commit '0123abc', here it is "):
        open_report(tmp_path, resume=True)


def test_tiny_shapes_do_not_pass_for_the_recipe():
    config = tiny_form(load_config(CONFIGS / "res_512_finetune.toml"))
    assert config.name == "res_512_finetune_tiny" and rows.stage_name(config) == "128 px, mask 0"
    assert config.optim == load_config(CONFIGS / "res_512_finetune.toml").optim


def job(**options):
    return settle(CONFIGS / "res_256_pretrain.toml", CONFIGS / "zero1.json", world(1), **options)


def test_a_job_is_settled_like_a_run():
    assert job().micro_batch == 256 and job().share == 2048 and job().images == 512_000_000
    changed = job(global_batch=1536, micro_batch=384, mdit={"compile": True})
    assert changed.micro_batch == 384 and changed.share == 1536 and changed.images == 512_000_000
    assert changed.settings.compile and not job().settings.compile
    sizes, half = [], changed
    while half := half.halved():
        sizes.append(half.micro_batch)
        assert half.micro_batch * half.ds_config["gradient_accumulation_steps"] == 1536
    assert sizes == [192, 96, 48, 24, 12, 6, 3, 1]
    short = job().short
    assert (short.micro_batch, short.share, short.config.training.global_batch_size) == (256, 512, 512)
    assert short.short == short and short.images == 512_000_000
    assert job().learning(10).config.optim.warmup_steps == 10
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu = 100 does not divide the 2048 samples"):
        job(micro_batch=100)
