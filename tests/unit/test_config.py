"""Recipes: what is read, what is refused and in which words, and the paper's four stages pinned number by number."""

import copy
import json
import os
import tomllib
from pathlib import Path

import pydantic
import pytest
import torch

from mdit.config import CONFIGS, DEFAULT_RECIPE, TrainConfig, UserError, kept_tokens, load_config, portable
from tests.recipes import TINY, tiny_config, tiny_model

RECIPES = sorted(path for path in CONFIGS.glob("*.toml") if "\nstages = " not in path.read_text())
EMOJI = {
    "image_size": 32,
    "image_encoder": "pixels",
    "text_encoder": "minilm",
    "source": {
        "name": "emoji",
        "objects": 30,
        "styles": ["twemoji"],
        "scenes": 100,
        "validation_scenes": 10,
        "held_out": 0.1,
        "seed": 0,
    },
}


def toml(values: dict, table: str = "") -> str:
    """Plain values of a table, then its sub-tables."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, value in values.items():
        if isinstance(value, dict):
            name = f"{table}.{key}" if table else key
            lines += [f"[{name}]", toml(value, name)]
    return "\n".join(lines)


@pytest.fixture
def recipe(tmp_path):
    """Writes the tiny recipe after `change` has had its way with it; returns the path."""

    def write(change=lambda values: None) -> Path:
        values = copy.deepcopy(TINY)
        values["data"].update(train=[str(tmp_path / "train")], validation=str(tmp_path / "validation"))
        change(values)
        path = tmp_path / "tiny.toml"
        path.write_text(toml(values))
        return path

    return write


def complaint(path, overrides=()) -> str:
    """The one line a user reads."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is read


def test_a_recipe_is_read_whole(recipe):
    path = recipe()
    places = {"train": [str(path.parent / "train")], "validation": str(path.parent / "validation")}
    assert load_config(path) == tiny_config(data=places)


def test_the_json_of_an_earlier_run_is_a_recipe(tmp_path):
    config = tiny_config(data={"train": ["/data/train"], "validation": "/data/validation"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": config.model_dump(mode="json"), "versions": {"mdit": "0.1.0"}}))
    assert load_config(path) == config
    assert load_config(path, ["training.num_steps=9"]).training.num_steps == 9


def test_what_may_be_left_out_and_what_takes_two_forms(recipe):
    config = load_config(recipe(lambda values: values.pop("ema")))
    assert config.ema is None and config.data.precompute is None and config.report.prompts == "validation"
    folder = {**EMOJI, "source": {"name": "folder", "path": "/pictures", "validation_share": 0.1}}
    path = recipe(lambda values: values["data"].update(precompute=folder))
    config = load_config(path, ['report.prompts=["a cat", "a dog"]', "ema={decay=0.5, start_step=3}"])
    assert config.report.prompts == ("a cat", "a dog") and config.ema.start_step == 3
    assert config.data.precompute.source.path == "/pictures"


def test_a_config_cannot_change():
    config = tiny_config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model.dim = 64
    assert isinstance(config.data.train, tuple) and isinstance(config.optim.betas, tuple)


@pytest.mark.parametrize("num_patches, ratio, kept", [(256, 0.75, 64), (256, 0.0, 256), (10, 0.25, 7), (16, 0.99, 0)])
def test_kept_tokens_rounds_down(num_patches, ratio, kept):
    assert kept_tokens(num_patches, ratio) == kept


@pytest.mark.parametrize(
    "override, read",
    [
        ("training.num_steps=12", lambda c: c.training.num_steps == 12),
        ("optim.lr=8e-5", lambda c: c.optim.lr == 8e-5),
        ("model.use_bias=true", lambda c: c.model.use_bias is True),
        ('data.train=["a", "b"]', lambda c: c.data.train == (os.path.abspath("a"), os.path.abspath("b"))),
        ("data.validation=elsewhere/set", lambda c: c.data.validation == os.path.abspath("elsewhere/set")),
        ('data.validation="elsewhere/set"', lambda c: c.data.validation == os.path.abspath("elsewhere/set")),
        ("name=2024-01-01", lambda c: c.name == "2024-01-01"),
        ("data.validation=/a=b", lambda c: c.data.validation == "/a=b"),
        ("data.precompute.source.scenes=7", lambda c: c.data.precompute.source.scenes == 7),
        (f"seed={2**64 - 1}", lambda c: torch.Generator().manual_seed(c.seed)),
    ],
)
def test_set_overrides_one_key_and_the_last_one_counts(recipe, override, read):
    path = recipe(lambda values: values["data"].update(precompute=EMOJI))
    assert read(load_config(path, ["seed=7", f"{override.partition('=')[0]}=1", override]))


# What is refused: an override, and what the one line names beside the file

REFUSED = [
    ("training.num_step=12", ["unknown key training.num_step = 12 (did you mean num_steps?)"]),
    ("trainings.num_steps=12", ["(did you mean training?)"]),
    ("sede=0.1", ["unknown key sede = 0.1 (did you mean seed?)"]),
    ("data.precompute.source.scene=0.1", ["unknown key data.precompute.source.scene = 0.1 (did you mean scenes?)"]),
    ("optim.zzz=1", ["unknown key optim.zzz = 1"]),
    ("name.first=a", ["name.first=a", "name is not a table"]),
    ("seed", ["--set seed", "key.sub=value"]),
    (".=3", ["key.sub=value"]),
    ("model..dim=3", ["--set model..dim=3", "key.sub=value"]),
    ("data.train.0=x", ["train is not a table"]),
    ("__proto__.dim=3", ["unknown key __proto__"]),
    ("seed=1\nname='b'", ["seed", "1\\nname"]),
    ("seed=" + "9" * 100, ["seed", "9999"]),
    (f"seed={2**64}", ["seed = '18446744073709551616'"]),
    ("seed=2024-01-01", ["seed", "2024-01-01"]),
    ("name=\udcff", ["--set name=", "not Unicode"]),
    ("\udcff=1", ["--set ", "not Unicode"]),
    ("ema=" + "[" * 10**5, ["ema = ", "[["]),
    (".".join("a" * 10**4) + "=1", ["--set a.a", "nested more than 64 deep"]),
    ("training.num_steps=", ["training.num_steps"]),
    ("model=3", ["model", "3"]),
    ("optim.betas=[0.9]", ["optim.betas"]),
    ("data.precompute.source.name=imagenet", ["data.precompute.source", "imagenet"]),
    ("model.latent_size=9", ["latent_size 9", "patch_size 2"]),
    ("model.head_dim=5", ["dim 32", "head_dim 5"]),
    ("model.mixer_dim=20", ["mixer_dim 20", "head_dim 8"]),
    ("model.qkv_ratio=[1e-9, 1.0]", ["dim 32", "qkv_ratio 1e-09"]),
    ("model.mixer_ffn_ratio=1e-9", ["mixer_dim 24", "mixer_ffn_ratio 1e-09"]),
    ("model.capacity_factor=5", ["capacity_factor 5", "num_experts 4"]),
    ("training.mask_ratio=0.99", ["mask_ratio 0.99", "16 patches"]),
    ("model.capacity_factor=0.5", ["capacity_factor 0.5", "4 experts", "mask_ratio 0.75"]),
    ("training.mask_ratio=often", ["training.mask_ratio = 'often'"]),
    ('training.mask_ratio={schedule="steps", start=0.5}', ["training.mask_ratio", 'expected "linear"']),
    ('training.mask_ratio={schedule="linear", start=0.5, final=0.5, share=0.1}', ["start and final are both 0.5"]),
    (
        'training.mask_ratio={schedule="linear", start=0.7, fnal=0.5, final=0.5, share=0.1}',
        ["unknown key training.mask_ratio.fnal = 0.5 (did you mean final?)"],
    ),
    (
        'training.mask_ratio={schedule="linear", start=0.0, final=0.99, share=0.1}',
        ["mask_ratio 0.99 keeps none of 16 patches"],
    ),
    ("optim.schedule=constant", ["final_lr_ratio", "0.33", "constant"]),
    ("optim.schedule=wsd", ['schedule "wsd" needs decay_share']),
    ("optim.decay_share=0.2", ["decay_share is 0.2", 'schedule is "cosine"']),
    ("noise.target=vp", ["noise = ", "'vp'", 'target: expected "edm" or "flow"']),
    ("noise.shift=3.0", ["unknown key noise.shift = 3.0"]),
    ('noise={target="flow", sigma_data=1.0, P_std=1.2}', ["unknown key noise.P_std = 1.2 (did you mean std?)"]),
    ('noise={target="flow", times="uniform", std=0.5, sigma_data=1.0}', ["noise: ", "std 0.5", "uniform"]),
    ("report.prompts=[]", ["prompts"]),
    ("data.precompute.captions={phrasing=0}", ["data.precompute.captions: the weights of phrasing sum to 0"]),
    ("data.precompute.captions={a=-1, b=2}", ["data.precompute.captions: the weight of a is -1.0"]),
    ("data.captions={a=0, b=0}", ["data.captions: the weights of a, b sum to 0"]),
    ("data.precompute.captions={a=true}", ["data.precompute.captions.a = True"]),
    ("data.weights=[2.0, 1.0]", ["weights has 2 values, but train has 1 directories"]),
]


@pytest.mark.parametrize("override, named", REFUSED, ids=lambda value: str(value)[:30])
def test_an_override_that_cannot_be_is_refused(recipe, override, named):
    path = recipe(lambda values: values["data"].update(precompute=copy.deepcopy(EMOJI)))
    message = complaint(path, [override])
    assert all(part in message for part in named), message
    assert message.startswith((f"{path}: ", "--set ")) and ("did you mean" in message) == ("did you mean" in named[0])


WRONG_VALUES = """
training.num_steps = 1.5
training.num_steps = "100"
training.num_steps = true
training.num_steps = 0
model.use_bias = 1
data.validation = 3
data.validation = ""
data.validation = "a\\u0000b"
data.train = []
data.caption_drop = 1.5
optim.lr = "1e-4"
optim.lr = inf
optim.lr = 0
optim.schedule = "linear"
noise.P_mean = nan
training.mask_ratio = 1.0
training.mask_ratio = -0.1
training.global_batch_size = 18_446_744_073_709_551_615
ema.decay = 1
seed = -1
name = "two words"
name = ".."
name = "-rf"
model.dim = 1_000_000_000_000_000
model.depth = 1_000_000
model.ffn_ratio = 1e300
model.pos_interp_scale = 1e-300
report.sampler_steps = 1_000_000_000_000
report.sampler_steps = 1
report.prompts = 3
data.precompute.source.objects = -1
"""


@pytest.mark.parametrize("line", WRONG_VALUES.strip().splitlines())
def test_a_wrong_value_is_named_with_its_key_as_it_is_written(recipe, line):
    """Once, and not by the branches of a union, such as report.prompts.literal['validation']."""
    path = recipe(lambda values: values["data"].update(precompute=copy.deepcopy(EMOJI)))
    key, value = line.split(" = ")
    message = complaint(path, [f"{key}={value}"])
    read = tomllib.loads(f"v = {value}")["v"]
    assert message.startswith(f"{path}: {key} = {read!r}: ") and message.count(f"{key} = ") == 1


def test_the_mixers_width_is_not_checked_when_there_is_no_mixer():
    assert tiny_model(mixer_dim=20, use_patch_mixer=False).mixer_dim == 20


def test_two_sets_are_not_made_in_one_directory(recipe):
    path = recipe(lambda values: values["data"].update(precompute=EMOJI))
    assert "data: train and validation are both" in complaint(path, ['data.train=["a", "b"]', "data.validation=a"])


def test_missing_keys_and_everything_wrong_are_told_at_once(recipe):
    def change(values):
        values["optim"].pop("lr")
        values.pop("noise")
        values["model"]["detph"] = 3

    path = recipe(change)
    told = complaint(path).removeprefix(f"{path}: ").split("; ")
    assert {*told} == {"missing key optim.lr", "missing key noise", "unknown key model.detph = 3 (did you mean depth?)"}


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("broken.toml", b"name = ", "not valid TOML"),
        ("date.toml", b"name = 2024-01-01", "not valid TOML: name = 2024-01-01 is a date, which no key takes"),
        ("binary.toml", b"\xff\xfe\x00", "not valid"),
        ("broken.json", b"{", "not valid JSON"),
        ("ds.json", b'{"train_batch_size": 8}', "config.json of a run"),
        ("list.json", b"[1, 2]", "config.json of a run"),
        ("text.json", b'{"recipe": 3}', "config.json of a run"),
        ("nowhere/x.toml", None, "cannot read the recipe: No such file or directory"),
        ("many.json", json.dumps({"recipe": {f"{n}" * 20: n for n in range(10**4)}}).encode(), " more"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, file, content, expected):
    path = tmp_path / file
    if content is not None:
        path.write_bytes(content)
    for overrides in ([], ["seed=1"]):
        message = complaint(path, overrides)
        assert message.startswith(f"{path}: ") and expected in message and len(message) < 2100
    assert str(tmp_path) in complaint(tmp_path)


def test_a_byte_order_mark_is_read_over(recipe):
    path = recipe()
    config = load_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path) == config


# Places of data


def places(config: TrainConfig) -> list[str]:
    return [*config.data.train, config.data.validation, config.data.precompute.source.path]


@pytest.fixture
def project(recipe, tmp_path):
    """A project with a recipe that names its data from there, and one of them elsewhere."""
    source = {"name": "folder", "path": "pictures", "validation_share": 0.1}

    def change(values):
        values["data"].update(
            train=["data/a", "/elsewhere/b"], validation="data/v", precompute={**EMOJI, "source": source}
        )

    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    recipe(change).rename(folder / "configs" / "tiny.toml")
    return folder


def test_relative_places_are_those_of_the_project_from_any_directory(project, tmp_path, monkeypatch):
    expected = [f"{project}/data/a", "/elsewhere/b", f"{project}/data/v", f"{project}/pictures"]
    for directory, path in ((project, "configs/tiny.toml"), (project / "configs", "tiny.toml"), (tmp_path, None)):
        monkeypatch.chdir(directory)
        assert places(load_config(path or project / "configs" / "tiny.toml")) == expected


def test_places_on_the_command_line_are_those_of_the_current_directory(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ['data.train=["x", "/y"]', "data.precompute.source.path=../z"]
    config = load_config(project / "configs" / "tiny.toml", overrides)
    assert places(config) == [f"{tmp_path}/x", "/y", f"{project}/data/v", f"{tmp_path.parent}/z"]


def test_without_a_project_relative_places_are_beside_the_recipe(project, tmp_path):
    path = (project / "configs" / "tiny.toml").rename(tmp_path / "tiny.toml")
    assert places(load_config(path))[0] == f"{tmp_path}/data/a"


def test_a_project_moves_with_its_runs(project, tmp_path):
    config = load_config(project / "configs" / "tiny.toml")
    inside, outside = project / "runs" / "tiny" / "config.json", tmp_path / "scratch" / "config.json"
    for path in (inside, outside):
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"recipe": portable(config, path)}))
        assert load_config(path) == config
    moved = project.rename(tmp_path / "moved")
    assert load_config(moved / "runs" / "tiny" / "config.json") == load_config(moved / "configs" / "tiny.toml")
    assert places(load_config(outside)) == places(config)


# The recipes of this repository


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_under_its_name_and_opens_with_source_command_and_cost(path, tmp_path):
    config = load_config(path)
    assert config.name == path.stem and config.training.num_steps > config.optim.warmup_steps
    assert config.ema is None or config.ema.start_step < config.training.num_steps
    opening = path.read_text().split("\n\n")[0]
    assert all(word in opening for word in ("Source:", "Cost:", "launchers/train.py"))
    assert path == DEFAULT_RECIPE or f"--recipe configs/{path.name}" in opening
