"""tools/plan.py: its tables, its file, its errors."""

import json
import re
from pathlib import Path

import pytest

from mdit import cli
from mdit.config import UserError, load_config
from mdit.costs.layouts import candidates
from mdit.costs.machines import MACHINES
from mdit.costs.prediction import fitted, predict
from mdit.costs.time import PARTS
from tools import plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRETRAIN = str(CONFIGS / "res_256_pretrain.toml")
QUICKSTART = str(CONFIGS / "quickstart.toml")


def test_every_layout_then_the_best_of_every_size(capsys, tmp_path):
    plan.main(["--recipe", PRETRAIN, "--gpus", "64", "--gpu", "h100", "--json", str(tmp_path / "plan.json")])
    printed = capsys.readouterr().out
    first, second = printed.split("\n\nthe fastest")
    assert "res_256_pretrain, global batch 2048, on 64 h100 (8 nodes): predicted, not measured" in first
    assert "predicted, not measured" in second
    assert len(printed.splitlines()) < 60 and max(map(len, printed.splitlines())) <= 140

    config = load_config(PRETRAIN)
    layouts = candidates(config, 64, micro_batch=None, checkpointing="none", triton=True)
    rows = [line for line in first.splitlines() if line.startswith("ZeRO")]
    assert sorted(row.split("  ")[0] for row in rows) == sorted(layout.label for layout in layouts)
    sizes = [line.split()[0] for line in second.split("\n\nbatch:")[0].splitlines() if "ZeRO" in line]
    assert sizes == ["8", "16", "32", "64", "128", "256", "512", "1024"]

    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["note"] == "predicted, not measured" and written["machine"]["name"] == "h100"
    speeds = [row["images_per_second"] for row in written["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    best = max((predict(config, layout, MACHINES["h100"]) for layout in layouts), key=lambda p: p.images_per_second)
    assert speeds[0] == best.images_per_second and rows[0].startswith(best.layout.label)
    assert f"{best.images_per_second:,.0f}" in rows[0] and f"{best.memory.peak / 2**30:.1f}" in rows[0]
    assert written["sizes"][3]["images_per_second"] == speeds[0]
    assert written["assumed"]["dollars_per_gpu_hour"] == 3.75 and written["assumed"]["memory_share"] == 0.75


def test_stages_and_their_sum(capsys, tmp_path):
    stages = str(CONFIGS / "micro_budget.toml")
    plan.main(
        ["--stages", stages, "--gpus", "16", "--dollars_per_gpu_hour", "2", "--json", str(tmp_path / "plan.json")]
    )
    printed = capsys.readouterr().out
    assert printed.startswith("micro_budget on 16 h100: predicted, not measured\n")
    rows = {line.split()[0]: re.split("  +", line) for line in printed.splitlines() if line.startswith(("res_", "sum"))}
    hours = []
    for name in ("res_256_pretrain", "res_256_finetune", "res_512_pretrain", "res_512_finetune"):
        config = load_config(CONFIGS / f"{name}.toml")
        layouts = candidates(config, 16, micro_batch=None, checkpointing="none", triton=True)
        machine = MACHINES["h100"]
        fitting = [predict(config, fitted(config, layout, machine), machine) for layout in layouts]
        images = config.training.num_steps * config.training.global_batch_size
        hours.append(16 * images / max(p.images_per_second for p in fitting if p.fits) / 3600)
        assert rows[name][-3:] == [f"{images / 1e6:,.1f}", f"{hours[-1]:,.1f}", f"{2 * hours[-1]:,.0f}"]
    assert rows["sum"][-2:] == [f"{sum(hours):,.1f}", f"{2 * sum(hours):,.0f}"]
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["recipe"] == "micro_budget" and len(written["stages"]) == 4
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--stages", stages, "--set", "seed=1"])
    assert "--set changes one recipe" in capsys.readouterr().err


def test_where_a_micro_batch_goes_on_one_gpu(capsys, tmp_path):
    plan.main(["--micro_batch", "256", "--json", str(tmp_path / "plan.json")])
    table = capsys.readouterr().out.split("where a micro-batch goes")[1]
    assert "on one h100, ZeRO-1 dp1: 256 images, of which 8 make a step; predicted, not measured" in table
    rows = {name: cells for name, *cells in (re.split("  +", line) for line in table.splitlines()[2:])}
    titles = [title for part, title in PARTS.items() if part != "muon"]
    assert [name for name in rows if name in titles] == titles
    for column in range(2):
        values = [float(rows[name][column]) for name in titles]
        waiting, kernels, host = values[-1], sum(values[:-1]), float(rows["the host meanwhile needs"][column])
        assert (waiting > 0) == (host > kernels), "the more that launches, the more there is to wait for"
        assert sum(values) == pytest.approx(float(rows["sum"][column]), abs=0.06 * len(values))
    written = json.loads((tmp_path / "plan.json").read_text())["one_gpu"]
    assert [row["layout"]["fp8"] for row in written] == [False, True]
    assert rows["images/s"] == [f"{row['images_per_second']:,.0f}" for row in written]
    assert rows["quantising to float8"][0] == "0.0"


def test_who_waits_for_the_host_is_marked(capsys):
    def marks(*asked):
        plan.main(["--recipe", PRETRAIN, *asked])
        first, rest = capsys.readouterr().out.split("\n\nthe fastest")
        rows = [line for line in first.splitlines() if re.match(r"ZeRO-[12] dp\d+ ", line) and " tp" not in line]
        return {bool(re.search(r"\d\.\dh +\d", row)) for row in rows}, "h: bound by the host" in rest

    assert marks("--gpus", "1024") == ({True}, True)
    assert marks("--gpus", "8", "--micro_batch", "256")[0] == {False}


def test_float8_is_planned_where_a_run_would_take_it(capsys, tmp_path):
    plan.main(["--recipe", PRETRAIN, "--gpus", "8", "--fp8"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ZeRO")]
    assert [row.split()[2] for row in rows] == ["fp8"] * 3 and not any("ep" in row for row in rows)
    with pytest.raises(UserError, match="float8 on a100 is not what a run would take"):
        plan.main(["--recipe", PRETRAIN, "--gpu", "a100", "--fp8"])


def test_one_layout_of_a_json(capsys, tmp_path):
    ds_json = tmp_path / "ds.json"
    mdit = {"expert_parallel": 4, "activation_checkpointing": "block"}
    ds_json.write_text(json.dumps({"zero_optimization": {"stage": 2}, "mdit": mdit}))
    asked = ["--recipe", PRETRAIN, "--gpus", "16", "--gpu", "a100", "--ds_config", str(ds_json)]
    plan.main([*asked, "--micro_batch", "64", "--dollars_per_gpu_hour", "2", "--json", str(tmp_path / "plan.json")])
    first, _ = capsys.readouterr().out.split("\n\nthe fastest")
    (row,) = [line for line in first.splitlines() if line.startswith("ZeRO")]
    assert row.split()[:4] == ["ZeRO-2", "dp16", "ep4", "64x2"]
    (layout,) = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert layout["layout"]["checkpointing"] == "block" and layout["layout"]["triton"] is False


def test_what_does_not_fit_is_marked(capsys):
    asked = ["--recipe", PRETRAIN, "--gpus", "8", "--gpu", "rtx4090"]
    plan.main([*asked, "--micro_batch", "256"])
    printed = capsys.readouterr().out
    assert "! more than the GPU has" in printed and "*" not in printed
    plan.main(asked)
    printed = capsys.readouterr().out
    assert "* fewer images at once" in printed
    plan.main([*asked, "--activation_checkpointing", "block", "--micro_batch", "32"])
    assert "! more" not in capsys.readouterr().out.split("\n\nthe fastest")[0].split("batch: ")[0]


def test_a_batch_that_no_size_can_share(capsys):
    plan.main(["--recipe", QUICKSTART, "--gpus", "5", "--set", "training.global_batch_size=5"])
    printed = capsys.readouterr().out
    assert "ZeRO-2 dp5" in printed and "none of 8, 16, 32, 64, 128, 256, 512, 1024 GPUs can share" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpus", "24"], "cannot be shared evenly by 24 processes"),
        (["--micro_batch", "100"], "train_micro_batch_size_per_gpu = 100 does not divide"),
        (["--recipe", "nowhere.toml"], "nowhere.toml: cannot read the recipe"),
        (["--ds_config", "nowhere.json"], "nowhere.json: cannot read the DeepSpeed JSON"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json"),
    ],
)
def test_errors_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as raised:
        cli.run(lambda: plan.main(["--recipe", QUICKSTART, *arguments]))
    printed = capsys.readouterr().err
    assert raised.value.code == 2 and printed.startswith("error: ") and message in printed
    assert len(printed.splitlines()) == 1
