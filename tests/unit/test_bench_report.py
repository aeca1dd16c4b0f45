"""mdit/bench/row.py and report.py: what follows from a measured rate, tables, files, and rows that survive."""

import pytest
import torch

from mdit.bench import row as row_module
from mdit.bench.report import Report, earlier_rows, environment, table
from mdit.bench.row import Parity
from mdit.bench.stages import Job, resolve_job, tiny_form
from mdit.config import CONFIGS, UserError, load_config
from mdit.dist import World
from mdit.parallel.settings import Execution, RunSettings
from tests.bench_rows import CPU, H100, figures, row

HERE = World(0, 1, 0, torch.device("cpu"))


def test_the_papers_own_figures_follow_from_its_rate():
    """641 images/s a GPU in stage 1: 181 TFLOP/s, 18 % of an H100; 512 M images at $3.75 a GPU-hour."""
    measured = row(rate=8 * 641.0, setting={"gpus": 8})
    assert round(measured.flops_per_image / 1e9) == 282 and round(measured.parameters / 1e6) == 1165
    assert measured.tflops == pytest.approx(181, abs=0.5)
    assert measured.mfu == pytest.approx(181 / 989, abs=1e-3)
    assert measured.images == 250_000 * 2048
    assert measured.dollars_per_million(3.75) == pytest.approx(1e6 / 641 / 3600 * 3.75)
    assert measured.stage_dollars(2) == pytest.approx(512e6 / 5128 / 3600 * 8 * 2)


@pytest.mark.parametrize(
    "device, changes, has_mfu",
    [
        (H100.gpu, {}, True),
        (H100.gpu, {"fp8": True}, False),
        (H100.gpu, {"bf16": False}, False),
        ("NVIDIA A100-SXM4-80GB", {}, True),
        ("NVIDIA H100 PCIe", {}, False),  # another peak than that of the data sheet we have
        ("none", {}, False),
    ],
)
def test_where_there_is_an_mfu(monkeypatch, device, changes, has_mfu):
    monkeypatch.setattr(row_module, "device_name", lambda _: device)
    bf16 = changes.pop("bf16", True)
    ds_config = {"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 256}
    ds_config |= {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": 1}}
    execution = Execution(RunSettings(**changes), ds_config, frozenset(["swiglu", "patch_mixing"]))
    found = Job(load_config(CONFIGS / "res_256_pretrain.toml"), execution).row(HERE)
    assert (found.with_(measured=figures(641.0)).mfu is not None) == has_mfu
    assert found.setting.kernels == ("patch_mixing", "swiglu")


def test_tables_hold_figures_and_problems_and_fit_a_terminal():
    parity = Parity(steps=50, largest=2e-3, mean_first=0.0, mean_last=1e-3)
    ladder = [row(rate=641.0, kind="ladder", name="as published")]
    ladder.append(row(kind="ladder", name="+ torch.compile", measured=figures(1923.0, parity=parity)))
    failed = row("res_512_finetune", problem="out of memory at micro-batch 256")
    report = Report(environment=H100, command="bench", rows=[row(rate=641.0), failed, *ladder])
    shown = report.tables([3.75, 2.0])
    assert max(map(len, shown.splitlines())) <= 160
    lines = {line.split("|")[1].strip(): line for line in shown.splitlines() if line.startswith("|")}
    for cell in (" 641 ", "18.3%", "1.63 / 0.87", "832 / 444", "256 x 8"):
        assert cell in lines["256 px, mask 0.75"]
    assert "3.00" in lines["+ torch.compile"] and "2.0e-03 in 50" in lines["+ torch.compile"]
    assert "- 512 px, mask 0, 256 x 8: out of memory at micro-batch 256" in shown


def test_tables_align_their_columns():
    lines = [["gpu", "ms"], ["a long name", 3], ["b"]]
    assert table(lines, markdown=False) == "gpu          ms\na long name   3\nb"
    assert table(lines[:2]) == "| gpu         | ms |\n| ----------- | -- |\n| a long name | 3  |"


def test_a_report_is_read_as_it_was_written(tmp_path):
    report = Report(environment=CPU, command="bench", rows=[row(rate=9.0), row(problem="no")])
    report.save(tmp_path / "new" / "throughput.json")
    assert Report.load(tmp_path / "new" / "throughput.json") == report


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "cannot read the report: No such file"),
        ("{", "not valid JSON"),
        ("[]", "schema = None"),
        ('{"schema": "mdit-kernels/1", "rows": []}', "schema = 'mdit-kernels/1': expected 'mdit-throughput/2'"),
        ('{"schema": "mdit-throughput/2", "command": ""}', "missing key environment"),
        ('{"schema": "mdit-throughput/2", "rows": [{"nmae": ""}]}', "unknown key rows.0.nmae = ''"),
    ],
)
def test_a_file_that_is_no_report(tmp_path, text, message):
    path = tmp_path / "throughput.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as raised:
        Report.load(path)
    assert str(raised.value).startswith(f"{path}: ") and message in str(raised.value)


def test_rows_are_kept_found_and_replaced():
    waiting = row(problem="not measured: no time")
    report = Report(environment=CPU, command="bench", rows=[waiting])
    assert waiting.is_open and report.find(waiting) is None
    report.add(row(rate=5128.0), waiting, row(rate=7000.0, setting={"compile": True}))  # `waiting` has less to tell
    assert [found.setting.compile for found in report.rows] == [False, True]
    assert report.find(waiting).figures.images_per_second == 5128
    assert report.find(row(setting={"gpus": 2})) is None
    by_name = row(kind="ladder", problem="needs a GPU", setting={"kernels": ()})
    report.add(by_name)
    assert report.find(row(kind="ladder")) is by_name  # whatever ran in Triton


def test_rows_of_another_commit_are_refused(tmp_path):
    path, here = tmp_path / "throughput.json", environment(HERE.device)
    assert here.gpu == "none" and earlier_rows(path, here) == []
    for change in ({"date": "2020-01-01"}, {"commit": "0123abc"}):
        Report(environment=here.model_copy(update=change), command="bench", rows=[row()]).save(path)
        if "date" in change:
            assert earlier_rows(path, here) == [row()]
    with pytest.raises(UserError, match=f"--resume: {path} has commit '0123abc', here it is "):
        earlier_rows(path, here)


def test_tiny_shapes_do_not_pass_for_the_recipe():
    config = tiny_form(load_config(CONFIGS / "res_512_finetune.toml"))
    assert config.name == "res_512_finetune_tiny" and config.model.latent_size == 16
    assert config.optim == load_config(CONFIGS / "res_512_finetune.toml").optim
    report = Report(environment=CPU, command="bench", rows=[row(rate=9.0).with_(recipe=config.name)])
    assert "Tiny shapes" in report.tables([3.75])


def job(**options):
    return resolve_job(CONFIGS / "res_256_pretrain.toml", CONFIGS / "zero1.json", HERE, **options)


def test_a_job_is_settled_like_a_run():
    assert job().micro_batch == 256 and job().share == 2048 and job().images == 512_000_000
    changed = job(global_batch=1536, micro_batch=384, mdit={"compile": True})
    assert changed.micro_batch == 384 and changed.share == 1536 and changed.images == 512_000_000
    assert changed.execution.settings.compile and not job().execution.settings.compile
    sizes, half = [], changed
    while half := half.halved():
        sizes.append(half.micro_batch)
        assert half.micro_batch * half.execution.accumulation_steps == 1536
    small = changed.sized(2, 4)
    same, more = small.enlarged(2), small.enlarged(3)
    assert (same.micro_batch, same.share, same.config.training.global_batch_size) == (4, 8, 8)
    assert (more.micro_batch, more.share, more.execution.global_batch) == (6, 24, 24)
    assert sizes == [192, 96, 48, 24, 12, 6, 3, 1]
    short = job().shortened()
    assert (short.micro_batch, short.share, short.config.training.global_batch_size) == (256, 512, 512)
    assert short.shortened() == short and short.images == 512_000_000
    assert job().learning(10).config.optim.warmup_steps == 10
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu = 100 does not divide the 2048 samples"):
        job(micro_batch=100)
