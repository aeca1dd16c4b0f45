"""tools/bench_train.py on a CPU: rows, tables, ladder, profile and plots; interrupted and resumed; its errors."""

import json
import os
import signal
from pathlib import Path

import pytest

from mdit import cli
from mdit.bench.report import Report
from mdit.bench.row import FORMULA, BenchmarkRow
from mdit.bench.session import Session
from tests.processes import run_forked
from tests.training import write_recipe

CPU = {"CUDA_VISIBLE_DEVICES": ""}
QUICK = ["--steps", "1", "--warm_up", "0", "--seconds", "0.001"]


def bench(arguments: list[str]) -> None:
    from tools.bench_train import main, tells

    cli.run(lambda: main(arguments), tells=tells)


def bench_until_the_first_row(arguments: list[str]) -> None:
    """Somebody types Ctrl-C when the first row is there."""
    add = Session.add

    def add_and_interrupt(self, *found):
        add(self, *found)
        os.kill(os.getpid(), signal.SIGINT)

    Session.add = add_and_interrupt
    bench(arguments)


def run(*arguments: str, processes: int = 1, function=bench) -> tuple[int, str]:
    ended = run_forked(function, [str(a) for a in arguments], processes=processes, env=CPU, timeout=200)
    return ended.returncode, ended.output


def read(directory: Path) -> list[BenchmarkRow]:
    return Report.load(directory / "throughput.json").rows


def test_four_stages_interrupted_and_resumed(tmp_path):
    code, output = run(*QUICK, "--out", tmp_path, function=bench_until_the_first_row)
    assert code == 130 and f"interrupted; {tmp_path} has the rows so far, --resume goes on" in output
    [first] = read(tmp_path)
    code, output = run(*QUICK, "--out", tmp_path, "--resume")
    assert code == 0, output
    found = read(tmp_path)
    assert found[0] == first
    assert [row.name for row in found] == [f"{px} px, mask {mask}" for px in (64, 128) for mask in (0.75, 0)]
    assert [row.images for row in found] == [8 * steps for steps in (250_000, 30_000, 50_000, 5_000)]
    for row in found:
        ms = row.figures.milliseconds
        assert ms.data + ms.forward + ms.backward + ms.optimizer == pytest.approx(ms.step)
        assert row.kind == "stage" and row.mfu is None
    assert "no GPU here: tiny shapes on the CPU" in output and "Tiny shapes" in output
    assert FORMULA in output and "GiB by part" in output
    assert (tmp_path / "throughput.md").read_text().count("| 64 px, mask 0") == 2
    assert sum("images/s, " in line and "ms a step" in line for line in output.splitlines()) == 3  # the missing ones


def test_two_processes_with_a_recipes_own_data(tmp_path):
    recipe = write_recipe(tmp_path)
    asked = ["--recipe", recipe, "--data", "recipe", "--micro_batch", "2", "4", "--out", tmp_path, "--local_rank", "0"]
    code, output = run(*asked, *QUICK, processes=2)
    assert code == 0, output
    found = read(tmp_path)
    assert [row.setting.micro_batch for row in found] == [2, 4]
    for row in found:
        assert row.recipe == "tiny" and row.data == str(tmp_path / "train")
        assert row.setting.gpus == 2 and row.setting.global_batch == 8
        assert row.figures.milliseconds.communication > 0
    assert found[0].figures.losses[0] == pytest.approx(found[1].figures.losses[0], rel=1e-5)  # the same samples
    assert output.count("images/s, ") == 2  # of one rank
    assert "64 px, mask 0.75, micro-batch 2 of 8" in output


def test_the_whole_report(tmp_path):
    recipe, out = write_recipe(tmp_path), tmp_path / "report"
    code, output = run("--recipe", recipe, *QUICK, "--parity_steps", "2", "--budget_s", "150", "--report", out)
    assert code == 0, output
    report = Report.load(out / "throughput.json")
    assert {row.kind for row in report.rows} == {"stage", "profile", "ladder"}
    [profile] = [row.profile for row in report.of_kind("profile")]
    assert (out / profile.trace).exists() and sum(profile.categories.values()) > 0
    ladder = report.of_kind("ladder")
    measured = {row.name: row.figures for row in ladder if not row.problem}
    assert {"as published", "experts by index", "experts by index, compiled"} <= measured.keys()
    assert all(found.parity.largest < 1e-3 for found in measured.values() if found.parity)
    assert all(row.problem == "needs a GPU" for row in ladder if row.name not in measured)
    assert "Where a step of" in output and "as published" in (out / "throughput.md").read_text()
    drawn = [line for line in output.splitlines() if line.startswith(("drawn: ", "not drawn: the plots need"))]
    assert drawn and all(Path(line.split(": ")[1]).exists() for line in drawn if line.startswith("drawn"))

    code, output = run("--recipe", recipe, *QUICK, "--parity_steps", "2", "--report", out, "--resume")
    assert code == 0 and "images/s, " not in output, output  # all is there

    pictures = sorted(out.glob("*.png"))
    for picture in pictures:
        picture.unlink()
    code, output = run("--draw", out)
    assert code == 0 and sorted(out.glob("*.png")) == pictures, output


def test_a_budget_that_ends_early(tmp_path):
    code, output = run(*QUICK, "--report", tmp_path, "--budget_s", "0.001")
    assert code == 0, output
    assert "not measured, for want of time: " in output and "64 px, mask 0.75 (profile)" in output
    assert "+ torch.compile (ladder)" in output and "--resume goes on" in output
    assert all(row.problem.startswith("not measured: no time was left") for row in read(tmp_path))


def test_no_memory_for_a_micro_batch(tmp_path):
    code, output = run(*QUICK, "--recipe", write_recipe(tmp_path), "--out", tmp_path, function=bench_without_memory)
    assert code == 0, output
    found = [(row.setting.micro_batch, row.problem) for row in read(tmp_path)]
    assert found == [(8, "out of memory at micro-batch 8"), (4, "out of memory at micro-batch 4"), (2, None)]
    assert "- 64 px, mask 0.75, 8 x 1: out of memory at micro-batch 8" in output


def bench_without_memory(arguments: list[str]) -> None:
    """A device on which two images fit at once."""
    import torch

    from mdit.bench.run import TimedEngine

    call = TimedEngine.__call__

    def limited(self, x_NCHW, *args, **kwargs):
        if len(x_NCHW) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, x_NCHW, *args, **kwargs)

    TimedEngine.__call__ = limited
    bench(arguments)


def bench_with_a_broken_kernel(arguments: list[str]) -> None:
    """At the first micro-batch that is tried."""
    from mdit.bench.run import BenchmarkRun

    measure = BenchmarkRun.measure

    def breaking(self, **keys):
        if self.engine.execution.micro_batch == 2:
            raise RuntimeError("no kernel image is available\nand more")
        return measure(self, **keys)

    BenchmarkRun.measure = breaking
    bench(arguments)


def test_a_row_that_fails_leaves_the_others(tmp_path):
    asked = ["--recipe", write_recipe(tmp_path), "--micro_batch", "2", "4", "--out", tmp_path]
    code, output = run(*QUICK, *asked, function=bench_with_a_broken_kernel)
    assert code == 1 and "Traceback" in output
    assert [row.problem for row in read(tmp_path)] == ["RuntimeError: no kernel image is available and more", None]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--recipe", "nowhere.toml"], "nowhere.toml: cannot read the recipe"),
        (["--ds_config", "nowhere.json"], "nowhere.json: cannot read the DeepSpeed JSON"),
        (["--micro_batch", "3"], "train_micro_batch_size_per_gpu = 3 does not divide the 8 samples"),
        (["--global_batch", "-8"], "--global_batch: -8 is not between 1 and"),
        (["--dollars_per_gpu_hour", "nan"], "--dollars_per_gpu_hour: nan: expected more than 0"),
        (["--resume"], "--resume requires --out or --report"),
        (["--report", "a", "--out", "b"], "--report: has a directory"),
        (["--set", "training.mask_ratio=2"], "training.mask_ratio"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        bench(arguments)
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.startswith("error: ") and message in error
    assert len(error.splitlines()) == 1


def test_data_that_is_not_there(tmp_path):
    recipe = json.loads(write_recipe(tmp_path).read_text())
    recipe["recipe"]["data"]["train"] = [str(tmp_path / "missing")]
    (tmp_path / "other.json").write_text(json.dumps(recipe))
    code, output = run("--recipe", tmp_path / "other.json", "--data", "recipe")
    assert code == 2 and f"error: {tmp_path / 'missing' / 'manifest.json'}: is missing" in output
    assert "docs/data.md" in output
