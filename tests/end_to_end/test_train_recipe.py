"""Recipes of several stages in one command: the same weights as stage by stage by hand, wherever it was stopped."""

import re
import shutil
import sys
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from mdit.config import CONFIGS, load_config
from mdit.costs.layouts import layout_of
from mdit.costs.machines import MACHINES
from mdit.costs.prediction import predict
from mdit.dist import World
from mdit.parallel.settings import Execution
from mdit.stages import load_stages
from mdit.train.run import Run
from mdit.train.staged import forecast
from tests.processes import run_forked
from tests.training import REPOSITORY, launch, read_metrics, train, write_ds_json, write_recipe, write_toml

STEPS = 4
PLAN = f"""
name = "tiny_stages"
stages = ["pretrain.toml", "finetune.toml", "pretrain_large.toml", "finetune_large.toml"]
[base]
training.num_steps = {STEPS}
[changes.finetune]
moments = true
training.mask_ratio = 0.0
[changes.finetune_large]
moments = true
training.mask_ratio = 0.0
"""
WEIGHTS = "snapshots/latest/raw.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plan, its recipes and its data; stages/ is trained by one command of two processes."""
    folder = tmp_path_factory.mktemp("recipe")
    for name in ("pretrain", "finetune", "pretrain_large", "finetune_large"):
        size = {"latent_size": 16, "pos_interp_scale": 2.0} if "large" in name else {}
        written = write_recipe(folder / ("large" if size else "small"), model=size, report={"checkpoint_every": 2})
        write_toml(folder / f"{name}.toml", load_config(written, [f"name={name}"]))
    (folder / "plan.toml").write_text(PLAN)
    write_ds_json(folder / "ds.json")
    code, told = train_recipe(folder, processes=2)
    assert code == 0, told
    assert all(f"stage {n} of 4, " in told for n in (1, 2, 3, 4)) and told.count(" minutes on 2 ") == 4
    return folder


def train_recipe(folder, *extra, processes=1, run_dir="stages"):
    options = {"--plan": folder / "plan.toml", "--ds_config": folder / "ds.json", "--run_dir": folder / run_dir}
    arguments = [str(word) for pair in options.items() for word in pair]
    script = str(REPOSITORY / "launchers" / "train_recipe.py")
    ended = run_forked(launch, script, [*arguments, *extra], processes=processes)
    return ended.returncode, ended.output


def test_one_command_is_the_stages_one_by_one(folder, tmp_path):
    before = None
    for stage in load_stages(folder / "plan.toml").stages:
        run, sets = tmp_path / stage.name, [word for text in stage.overrides for word in ("--set", text)]
        weights = [] if before is None else ["--init_from", str(before / "snapshots/latest")]
        weights += ["--with_moments"] if stage.moments else []
        train(stage.recipe, folder / "ds.json", run, *sets, *weights, processes=2)
        ours, theirs = (load_file(path / WEIGHTS) for path in (folder / "stages" / stage.name, run))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        before = run


def test_the_same_command_goes_on_in_the_middle_of_a_stage(folder, tmp_path):
    whole = {path.name: load_file(path / WEIGHTS) for path in (folder / "stages").iterdir()}
    shutil.copytree(folder / "stages", tmp_path / "stages")
    for kind in ("checkpoints", "snapshots"):
        shutil.rmtree(tmp_path / f"stages/pretrain_large/{kind}/step_{STEPS:08d}")
    shutil.rmtree(tmp_path / "stages/finetune_large")
    code, told = train_recipe(folder, processes=2, run_dir=tmp_path / "stages")
    assert code == 0 and told.count("resuming at step 2 of 4") == 1 and told.count("finished at step 4; snapshot") == 2
    for name, theirs in whole.items():
        ours = load_file(tmp_path / "stages" / name / WEIGHTS)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_moments_go_on_from_the_stage_before(folder, tmp_path):
    """After a step of the same gradient, b1 m + (1 - b1) g with them and (1 - b1) g without."""
    stage, before = folder / "pretrain.toml", folder / "stages/pretrain"
    for name, more in (("with", ["--with_moments"]), ("without", [])):
        weights = ["--init_from", str(before / "snapshots/latest"), "--set", "training.num_steps=1"]
        train(stage, folder / "ds.json", tmp_path / name, *weights, *more)
    moments = [all_tensors(tmp_path / name / "checkpoints/step_00000001") for name in ("with", "without")]
    old = all_tensors(before / f"checkpoints/step_{STEPS:08d}")
    for name in (name for name in old if name.startswith("exp_avg/")):
        with_, without = (found[name] for found in moments)
        torch.testing.assert_close(with_ - without, 0.9 * old[name], rtol=1e-4, atol=1e-8)
    assert read_metrics(tmp_path / "with") == read_metrics(tmp_path / "without")


def all_tensors(checkpoint):
    """One process's fragments are whole; of two, those of a parameter are joined in order."""
    found = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, value in load_file(file).items():
            found[name] = torch.cat([found[name], value]) if name in found else value
    return found


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--stage", "finetun"], "(did you mean finetune?)"),
        (["--stage", "finetune", "--run_dir", "{tmp}"], "pretrain has not ended"),
    ],
)
def test_what_cannot_be_run_is_one_line(folder, tmp_path, arguments, message):
    code, told = train_recipe(folder, *(word.format(tmp=tmp_path) for word in arguments))
    assert code == 2 and message in told.splitlines()[-1] and not [*tmp_path.iterdir()]


def test_list_names_the_stages(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_recipe.py", "--plan", str(folder / "plan.toml"), "--list"])
    with pytest.raises(SystemExit, match="0"):
        launch(str(REPOSITORY / "launchers" / "train_recipe.py"), sys.argv[1:])
    assert capsys.readouterr().out.split() == ["pretrain", "finetune", "pretrain_large", "finetune_large"]


def test_dry_run_tells_of_every_stage_and_writes_nothing(folder, tmp_path):
    code, told = train_recipe(folder, "--dry_run", run_dir=tmp_path / "stages")
    assert code == 0 and not [*tmp_path.iterdir()]
    stages = re.findall(r"stage (\d) of 4, (\w+): 3.2e-05 M images, (\S+) PFLOP$", told, re.MULTILINE)
    assert [name for _, name, _ in stages] == ["pretrain", "finetune", "pretrain_large", "finetune_large"]
    assert float(stages[1][2]) > float(stages[0][2]), "without a mask there is more to compute"


def test_on_a_known_gpu_hours_and_dollars_are_predicted(tmp_path):
    pytest.importorskip("triton")
    config = load_config(CONFIGS / "res_256_pretrain.toml")
    ds_json = {"zero_optimization": {"stage": 2}}
    execution = Execution.resolve(ds_json, config, processes=8, bf16_works=True, path="ds.json")
    run = Run(config, execution, tmp_path, World(0, 8, 0, torch.device("cuda")))
    layout = layout_of(execution, config, 8, triton=False, path="ds.json")
    hours = 250_000 * 2048 / predict(config, layout, MACHINES["h100"]).images_per_second / 3600
    for name, known in (("NVIDIA H100 80GB HBM3", True), ("some other GPU", False)):
        with mock.patch("torch.cuda.get_device_name", return_value=name):
            told = forecast(run, price=2.0)
        assert told.startswith("512 M images, 1.45e+05 PFLOP") and ("predicted" in told) == known
        assert not known or f"{8 * hours:,.1f} GPU-hours, ${16 * hours:,.2f} at $2 a GPU-hour" in told
