"""The field's metrics in a run and of its snapshot, on any number of processes; FID as torch-fidelity itself says."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from mdit.config import MetricsConfig
from mdit.eval.distances import cmmd, frechet_distance
from mdit.eval.metrics import PictureMetrics
from mdit.eval.picture_sets import open_pictures, read_batches
from mdit.precompute import precompute
from tests.end_to_end.test_long_captions import write_pictures
from tests.picture_sets import png
from tests.processes import run_forked
from tests.recipes import tiny_config
from tests.towers import save_clip, save_t5
from tests.training import REPOSITORY, attempt, launch, read_metrics, train, write_ds_json

NAMES = ("fd_efflite0", "cmmd", "clip_score")
FIDELITY = REPOSITORY / ".venv" / "fidelity"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two processes with metrics on the way, run/, and the towers that judge."""
    folder = tmp_path_factory.mktemp("metrics")
    for name, save in (("t5", save_t5), ("clip", lambda path: save_clip(path, with_vision=True))):
        (folder / name).mkdir()
        save(folder / name)
    made = {
        "source": {"name": "folder", "path": write_pictures(folder / "pictures"), "validation_share": 0.3},
        "image_size": 8,
        "image_encoder": "pixels",
        "text_encoder": str(folder / "t5"),
        "captions": {"alt": 1.0},
    }
    towers = {name: str(folder / "clip") for name in ("clip", "cmmd_clip")}
    config = tiny_config(
        model={"latent_channels": 3, "caption_length": 20, "caption_channels": 16},
        data={"train": (str(folder / "train"),), "validation": str(folder / "validation"), "precompute": made},
        training={"num_steps": 3, "global_batch_size": 4},
        metrics={"names": NAMES, "every": 2, "num_pictures": 5, **towers},
    )
    (folder / "recipe.json").write_text(json.dumps({"recipe": config.model_dump(mode="json", exclude_none=True)}))
    precompute(config, progress=False)
    train(folder / "recipe.json", write_ds_json(folder / "ds.json"), folder / "run", processes=2)
    return folder


def evaluate(folder, out, *extra, processes=1):
    script = str(REPOSITORY / "launchers" / "evaluate.py")
    given = ["--snapshot", str(folder / "run/snapshots/latest"), "--out", str(out), "--num_pictures", "5", *extra]
    ended = run_forked(launch, script, given, processes=processes)
    return ended.returncode, ended.output


def test_a_run_is_scored_as_its_snapshot_is(folder, tmp_path):
    """The run on two processes as it trains, the launcher on one: the same pictures, the same figures."""
    code, told = evaluate(folder, tmp_path, "--metrics", ",".join(("val_loss", *NAMES)))
    assert code == 0, told
    found = json.loads((tmp_path / "scores.json").read_text())
    for name in NAMES:
        on_the_way = read_metrics(folder / "run", name)
        assert [*on_the_way] == [2, 3]
        assert found["scores"][name] == pytest.approx(on_the_way[3], rel=1e-3), name
    assert found["reference_pictures"] == 8 and found["pictures"] == 5 and found["scores"]["val_loss"] > 0
    assert "CLIP score" in told and (tmp_path / "grid.png").exists()


def test_figures_are_those_of_the_drawn_pictures(folder, tmp_path):
    """By the formulas, of what lies in OUT; and any number of processes draw the same."""
    for processes in (1, 2):
        code, told = evaluate(folder, tmp_path / str(processes), "--metrics", ",".join(NAMES), processes=processes)
        assert code == 0, told
    scores = [json.loads((tmp_path / n / "scores.json").read_text()) for n in "12"]
    assert scores[0] == scores[1]
    towers = {name: str(folder / "clip") for name in ("clip", "cmmd_clip")}
    metrics = PictureMetrics(MetricsConfig(names=NAMES, every=1, num_pictures=5, **towers), CPU)
    ((pictures, captions),) = read_batches(open_pictures(str(tmp_path / "1/pictures"), CPU), 8)
    ((true, _),) = read_batches(open_pictures(str(folder / "validation"), CPU), 8)
    prompts = [text for _, texts in read_batches(open_pictures(str(folder / "validation"), CPU), 8) for text in texts]
    drawn, others = metrics.features([(pictures, prompts[:5])]), metrics.features([(true, prompts)])
    expected = {
        "fd_efflite0": frechet_distance(drawn["efficientnet"], others["efficientnet"]),
        "cmmd": cmmd(drawn["clip"], others["clip"]),
        "clip_score": float(drawn["clip_score"].mean()),
    }
    assert scores[0]["scores"] == pytest.approx(expected, rel=1e-5)
    kept = load_file(tmp_path / "1/reference.safetensors")
    torch.testing.assert_close(kept["clip"], others["clip"])
    again = tmp_path / "again"
    code, told = evaluate(folder, again, "--metrics", "cmmd", "--reference", str(tmp_path / "1/reference.safetensors"))
    assert code == 0, told
    assert json.loads((again / "scores.json").read_text())["scores"]["cmmd"] == scores[0]["scores"]["cmmd"]


def test_a_stopped_evaluation_goes_on(folder, tmp_path):
    code, told = evaluate(folder, tmp_path, "--metrics", "fd_efflite0")
    assert code == 0, told
    shard = tmp_path / "pictures/00000.tar"
    before, written = shard.read_bytes(), shard.stat().st_mtime_ns
    assert evaluate(folder, tmp_path, "--metrics", "clip_score")[0] == 0
    assert shard.stat().st_mtime_ns == written, "what is drawn is not drawn again"
    shard.unlink()
    assert evaluate(folder, tmp_path, "--metrics", "clip_score")[0] == 0 and shard.read_bytes() == before
    code, told = evaluate(folder, tmp_path, "--metrics", "clip_score", "--seed", "1")
    assert code == 2 and told.splitlines()[-1].endswith("settings.json: seed is 0, now it is 1; choose another --out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--metrics", "fidd"], "--metrics fidd: is not known (did you mean fid?)"),
        (["--metrics", "fd_dinov2", "--dinov2", "{folder}/clip"], "metric fd_dinov2: dinov2 {folder}/clip: is a clip"),
        (["--metrics", "cmmd", "--reference", "{folder}/nothing"], "nothing: there is no such file or directory"),
        (["--metrics", "cmmd", "--reference", "{folder}/nothing.safetensors"], "no features of a reference"),
        (["--metrics", "cmmd", "--num_pictures", "9"], "validation: has 8 captions for --num_pictures 9"),
        (["--metrics", "cmmd", "--num_pictures", "1"], "num_pictures"),
        (["--prompts", "a.txt"], "--prompts a.txt: changes nothing without --metrics"),
    ],
)
def test_what_cannot_be_scored_is_one_line(folder, tmp_path, arguments, message):
    code, told = evaluate(folder, tmp_path / "out", *(word.format(folder=folder) for word in arguments))
    assert code == 2 and message.format(folder=folder) in told.splitlines()[-1], told
    assert not [*tmp_path.rglob("*.tar")]


def test_a_run_whose_metrics_cannot_be_had_takes_no_step(folder, tmp_path):
    for change, message in (
        (f'metrics.clip="{folder}/t5"', "is a t5 model; expected the local path or hub id of a CLIP model"),
        ("metrics.num_pictures=9", "validation has 8 samples"),
    ):
        options = ["--set", change]
        code, told = attempt(folder / "recipe.json", folder / "ds.json", tmp_path / "run", *options)
        assert code == 2 and message in told.splitlines()[-1], told
        assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.skipif(not FIDELITY.is_dir(), reason="no torch-fidelity in .venv/fidelity: make test installs it")
def test_fid_is_that_of_torch_fidelitys_command(tmp_path):
    """On the same two folders, with random weights in its format; and from statistics in a file."""
    for name, numbers in (("one", range(9)), ("other", range(20, 32))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.png").write_bytes(png(i, (40, 40)))
    path = os.pathsep.join([str(REPOSITORY), str(FIDELITY)])
    command, env = [sys.executable, "-m", "tests.fidelity", str(tmp_path)], {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stderr
    theirs, ours, by_statistics = json.loads(ran.stdout)
    assert (
        theirs > 1e-3 and ours == pytest.approx(theirs, rel=1e-6) and by_statistics == pytest.approx(theirs, rel=1e-3)
    )
