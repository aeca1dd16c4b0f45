"""tools/first_contact.py, rehearsed from end to end on a CPU, with a git that refuses; resumed, cut off and packed."""

import os
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mdit import cli
from mdit.config import load_config
from mdit.documents import UserError, read_json
from tests.processes import run_forked
from tests.training import write_recipe
from tools import first_contact
from tools.first_contact import PARTS, Contact, Task, parse_arguments
from tools.first_contact_kit import SCENES, arriving_pack

ROOT = Path(__file__).resolve().parents[2]
ALL = [part.name for part in PARTS]
HANGS = "-c 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'"


@pytest.fixture
def contact(tmp_path, monkeypatch):
    """Calls the tool in this process, rehearsing -> exit code. What all parts need is there."""
    monkeypatch.setattr(first_contact, "ENVIRONMENT", 'print(\'{"gpu": "none", "torch": "any"}\')')
    (tmp_path / "kit").mkdir()

    def call(*more: str) -> int:
        places = ["--kit", str(tmp_path / "kit"), "--out", str(tmp_path / "out")]
        monkeypatch.setattr(first_contact, "START", first_contact.time.monotonic())
        return Contact(parse_arguments([*places, "--rehearse", *more])).run()

    return call


def state(tmp_path: Path) -> dict[str, dict]:
    return read_json(tmp_path / "out" / "first_contact.json")["parts"]


def packed(tmp_path: Path) -> list[str]:
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        return archive.getnames()


def run_words(words: list[str]) -> None:
    """Do what `python WORDS` does, in a process that has imported most of it."""
    os.chdir(ROOT)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__")
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def test_a_rehearsal_from_end_to_end(contact, tmp_path, monkeypatch, capfd):
    started = []

    def run(command, environment, log, limit, grace):
        if command[0] != sys.executable or command[1] == "-c":
            return really_run(command, environment, log, limit, grace)
        started.append(command)
        ended = run_forked(run_words, command[1:], env=environment, timeout=100)
        log.write_text(ended.output, encoding="utf-8")
        return ended.returncode, False

    really_run = first_contact.run
    monkeypatch.setattr(first_contact, "run", run)
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\necho 'fatal: detected dubious ownership' >&2; exit 128\n", encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}:{os.environ['PATH']}")
    (tmp_path / "kit" / "COMMIT").write_text("1234567\n", encoding="utf-8")  # as git does not tell
    monkeypatch.setattr(first_contact, "LARGEST_BYTES", 1_000_000)
    with arriving_pack(tmp_path / "kit" / "training.tar.gz") as folder:  # all of it, however large
        write_recipe(folder, report={"sample_every": 4, "validate_every": 4}).with_name("large").write_bytes(
            bytes(10**6 + 1)
        )

    assert contact("--parts", *ALL[:3]) == 0, capfd.readouterr().out
    assert contact() == 0, capfd.readouterr().out
    assert "throughput: done before" in capfd.readouterr().out
    assert len(started) == len(ALL)
    assert [part["ended"] for part in state(tmp_path).values()] == ["exit code 0"] * len(ALL)
    assert state(tmp_path)["plain"]["command"].startswith("python -m tools.bench_train --resume --out DIR/throughput")

    out = tmp_path / "out"
    assert (out / "scratch" / "training" / "large").exists()
    report = read_json(out / "throughput" / "throughput.json")
    commits = {report["environment"]["commit"], read_json(out / "kernels" / "kernels.json")["environment"]["commit"]}
    assert commits == {read_json(out / "training" / "config.json")["commit"]} == {"1234567"}
    kinds = [row["kind"] for row in report["rows"]]
    assert kinds.count("profile") == 1 and kinds.count("stage") == 6  # of one stage two micro-batches and ZeRO-2
    assert not [row["problem"] for row in report["rows"] if row.get("problem")]
    assert read_json(out / "reductions" / "reductions.json")["rows"]
    names = packed(tmp_path)
    assert {"out/training/samples/step_00000004.png", "out/training/metrics.jsonl", "out/kernels/kernels.json"} <= {
        *names
    }
    assert not [name for name in names if {"scratch", "checkpoints", "snapshots"} & {*Path(name).parts}]


def test_a_part_that_hangs_costs_no_figures(contact, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(first_contact, "LARGEST_BYTES", 100_000)
    writes = "-c \"open('{out}/a', 'w').write('1'); open('{out}/b', 'w').write('b' * 200_000)\""
    (tmp_path / "kit" / "kernels.tar.gz").write_bytes(b"damaged")
    given = [("figures", 9, writes), ("hang", 0.3, HANGS), ("fails", 9, "-c 1/0"), ("long", 9, "-c 2")]
    more = [Task(name, 0, limit, arguments, "", grace=0.2) for name, limit, arguments in given]
    monkeypatch.setattr(first_contact, "PARTS", more)
    assert contact() == 1
    ended = {name: part["ended"] for name, part in state(tmp_path).items()}
    assert ended == {
        "figures": "exit code 0",
        "hang": "stopped after 0.3 s",
        "fails": "exit code 1",
        "long": "exit code 0",
    }
    assert "ZeroDivisionError" in (tmp_path / "out" / "logs" / "fails.log").read_text(encoding="utf-8")
    assert "out/a" in packed(tmp_path) and "out/b" not in packed(tmp_path)
    printed = capfd.readouterr().out
    assert "not packed: out/b" in printed and "kernels.tar.gz: done without: " in printed

    monkeypatch.setattr(first_contact, "PARTS", [Task("hang", 0, 9, "-c 3", ""), *more[2:]])
    (tmp_path / "out").rename(tmp_path / "lost")  # and the pack is brought to another machine
    (tmp_path / "out.tar.gz").rename(tmp_path / "kit" / "earlier.tar.gz")
    assert contact() == 1
    assert [part["done"] for part in state(tmp_path).values()] == [True, True, False, True]
    assert "out/a" in packed(tmp_path)

    monkeypatch.setattr(first_contact, "PARTS", [Task("new", 0, 9, "-c 4", "")])
    assert contact("--budget_s", "3.5") == 1
    assert state(tmp_path)["new"]["ended"].startswith("not begun: ")
    monkeypatch.setattr(first_contact, "ENVIRONMENT", 'print(\'{"gpu": "none", "torch": "other"}\')')
    with pytest.raises(UserError, match="torch = 'any', here it is 'other'; choose another --out"):
        contact()


def test_no_gpu_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(first_contact, "START", first_contact.time.monotonic())
    monkeypatch.setattr(first_contact, "ENVIRONMENT", 'print(\'{"gpu": "none"}\')')
    with pytest.raises(UserError, match="no GPU here; --rehearse"):
        Contact(parse_arguments(["--kit", str(tmp_path), "--out", str(tmp_path / "out")])).run()
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["--kit", str(tmp_path)])
    assert ended.value.code == cli.USER_ERROR


def test_it_begins_where_only_the_kit_has_the_packages():
    lacking = "pydantic", "safetensors", "xxhash", "deepspeed", "webdataset"
    code = f"import sys; sys.modules |= dict.fromkeys({lacking}); import tools.first_contact"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_scenes_are_the_recipes(tmp_path):
    config = load_config(ROOT / "configs" / "emoji_64.toml", SCENES)
    assert config.model == load_config(ROOT / "configs" / "emoji_64.toml").model
    assert config.data.precompute.source.scenes == 3500 and config.data.precompute.embeddings == "i8b64"
