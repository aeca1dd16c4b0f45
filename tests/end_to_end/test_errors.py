"""What a user can get wrong: one clear line, exit code 2, nothing half-written."""

import json
import pathlib
import runpy
import sys

import pytest
from PIL import Image

from tests.training import LAUNCHER, REPOSITORY, write_ds_json, write_recipe


@pytest.fixture
def good(tmp_path):
    """Arguments of a run that would work."""
    recipe, ds_json = write_recipe(tmp_path), write_ds_json(tmp_path / "ds.json")
    return {"--recipe": str(recipe), "--ds_config": str(ds_json), "--run_dir": str(tmp_path / "run")}


def launch(arguments, monkeypatch, capsys, *extra, launcher=LAUNCHER) -> tuple[int, str]:
    """Run the launcher in this process (every mistake below is found before processes meet). -> exit code, stderr"""
    argv = [part for pair in arguments.items() for part in pair]
    monkeypatch.setattr(sys, "argv", [str(launcher), *argv, *extra])
    try:
        runpy.run_path(str(launcher), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


def edit(path, change):
    content = json.loads(open(path).read())
    change(content)
    open(path, "w").write(json.dumps(content))


def misspell_recipe_key(arguments):
    edit(arguments["--recipe"], lambda c: c["recipe"]["training"].update(global_batchsize=8))
    return ["recipe.json", "training.global_batchsize", "global_batch_size"]


def misspell_json_key(arguments):
    edit(arguments["--ds_config"], lambda c: c.update(gradient_cliping=1.0))
    return ["ds.json", "gradient_cliping", "gradient_clipping"]


def contradict_recipe(arguments):
    edit(arguments["--ds_config"], lambda c: c.update(train_batch_size=16))
    return ["ds.json", "train_batch_size = 16", "training.global_batch_size = 8"]


def missing_shards(arguments):
    edit(arguments["--recipe"], lambda c: c["recipe"]["data"].update(train=["nowhere/shards"]))
    return ["nowhere/shards", "docs/data.md"]


def deleted_shard(arguments):
    recipe = json.load(open(arguments["--recipe"]))["recipe"]
    shard = next(pathlib.Path(recipe["data"]["train"][0]).glob("*.tar"))
    shard.unlink()
    return [shard.name]


def shards_of_another_shape(arguments):
    edit(arguments["--recipe"], lambda c: c["recipe"]["model"].update(caption_length=7))
    return ["manifest.json", "caption_length", "7", "5"]


def no_recipe(arguments):
    arguments["--recipe"] = "absent.toml"
    return ["absent.toml"]


def no_snapshot(arguments):
    arguments["--init_from"] = "absent/snapshots/latest"
    return ["absent/snapshots/latest"]


def batch_larger_than_the_set(arguments):
    edit(arguments["--recipe"], lambda c: c["recipe"]["training"].update(global_batch_size=128))
    return ["64", "128"]


def captions_of_no_kind(arguments):
    edit(arguments["--recipe"], lambda c: c["recipe"]["data"].update(captions={"recaption": 1}))
    return ["data.captions.recaption", "they have one a sample"]


def ask_for_a_folder(arguments, captions: str):
    """Make the recipe precompute its own sets from a folder of pictures with this captions.jsonl."""
    folder = pathlib.Path(arguments["--recipe"]).parent / "pictures"
    folder.mkdir()
    (folder / "captions.jsonl").write_text(captions)
    Image.new("RGB", (9, 9), "red").save(folder / "good.png")
    (folder / "torn.png").write_bytes((folder / "good.png").read_bytes()[:40])
    source = {"name": "folder", "path": str(folder), "validation_share": 0.5}
    precompute = {"source": source, "image_size": 8, "image_encoder": "pixels", "text_encoder": "minilm"}
    sets = {"train": [str(folder.parent / "made/train")], "validation": str(folder.parent / "made/validation")}

    def change(content):
        content["recipe"]["data"].update(precompute=precompute, **sets)
        content["recipe"]["model"].update(latent_channels=3, caption_channels=384)

    edit(arguments["--recipe"], change)


def unreadable_picture(arguments):
    lines = [{"file": name, "caption": "a picture"} for name in ("good.png", "torn.png")]
    ask_for_a_folder(arguments, "".join(json.dumps(line) + "\n" for line in lines))
    return ["torn.png", "captions.jsonl:2"]


def empty_caption_file(arguments):
    ask_for_a_folder(arguments, "")
    return ["captions.jsonl"]


MISTAKES = [
    misspell_recipe_key,
    misspell_json_key,
    contradict_recipe,
    missing_shards,
    deleted_shard,
    unreadable_picture,
    empty_caption_file,
    shards_of_another_shape,
    no_recipe,
    no_snapshot,
    captions_of_no_kind,
    batch_larger_than_the_set,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_one_line_and_exit_code_2(mistake, good, tmp_path, monkeypatch, capsys):
    parts = mistake(good)
    code, err = launch(good, monkeypatch, capsys)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2, err
    assert len(errors) == 1 and "Traceback" not in err
    assert all(part in errors[0] for part in parts), errors[0]
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob("made/*")), "nothing may be written"


def test_muon_under_tensor_parallelism(good, tmp_path, monkeypatch, capsys):
    pytest.importorskip("megatron.core")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    edit(good["--recipe"], lambda c: c["recipe"]["model"].update(mixer_dim=16))
    edit(good["--recipe"], lambda c: c["recipe"]["optim"].update(name="muon", muon={"lr": 0.02, "weight_decay": 0.1}))
    edit(good["--ds_config"], lambda c: c.update(mdit={"tensor_parallel": 2}))
    code, err = launch(good, monkeypatch, capsys)
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and "recipe.json: optim.name = 'muon': " in error and '"tensor_parallel": 2' in error
    assert not (tmp_path / "run").exists()


def test_processes_that_cannot_share_the_batch(good, tmp_path, monkeypatch, capsys):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    code, err = launch(good, monkeypatch, capsys)
    assert code == 2 and "3 processes" in err and "global_batch_size 8" in err


@pytest.mark.parametrize("stage", ["res_256_pretrain", "res_512_finetune"])
def test_paper_recipe_without_data_names_the_ways_to_get_it(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, err = launch({"--recipe": str(REPOSITORY / "configs" / f"{stage}.toml")}, monkeypatch, capsys)
    assert code == 2
    assert "data/sa1b/" in err and "precompute" in err and "docs/data.md" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prompts", [[], ["--prompt", " "]], ids=["none", "blank"])
def test_sampling_without_a_prompt(prompts, tmp_path, monkeypatch, capsys):
    """The prompts are checked before the snapshot is looked for."""
    launcher = REPOSITORY / "launchers" / "sample.py"
    arguments = {"--snapshot": str(tmp_path), "--out": str(tmp_path / "grid.png")}
    code, err = launch(arguments, monkeypatch, capsys, *prompts, launcher=launcher)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and "prompt" in err
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.parametrize("mistake", [deleted_shard, shards_of_another_shape, batch_larger_than_the_set])
def test_dry_run_refuses_what_a_run_would(mistake, good, monkeypatch, capsys):
    """Sets that are there already are checked too."""
    parts = mistake(good)
    code, err = launch(good, monkeypatch, capsys, "--dry_run")
    assert code == 2 and all(part in err for part in parts), err


def test_dry_run_prints_everything_and_writes_nothing(good, tmp_path, monkeypatch, capsys):
    argv = [part for pair in good.items() for part in pair]
    monkeypatch.setattr(sys, "argv", [str(LAUNCHER), *argv, "--dry_run", "--set", "training.num_steps=77"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(LAUNCHER), run_name="__main__")
    assert not stop.value.code
    printed = capsys.readouterr().out
    assert '"num_steps": 77' in printed and "M parameters" in printed and '"stage": 2' in printed
    assert not (tmp_path / "run").exists()
