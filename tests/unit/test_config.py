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
from mdit.models import presets
from tests.recipes import TINY, tiny_config, tiny_model

RECIPES = sorted(CONFIGS.glob("*.toml"))
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


def test_ema_and_prepare_may_be_left_out(recipe):
    config = load_config(recipe(lambda values: values.pop("ema")))
    assert config.ema is None and config.data.precompute is None


def test_prompts_are_a_list_or_those_of_the_validation_set(recipe):
    assert load_config(recipe()).report.prompts == "validation"
    path = recipe(lambda values: values["report"].update(prompts=["a cat", "a dog"]))
    assert load_config(path).report.prompts == ("a cat", "a dog")


def test_sources_are_told_apart_by_name(recipe):
    emoji = load_config(recipe(lambda values: values["data"].update(precompute=EMOJI)))
    assert (emoji.data.precompute.source.name, emoji.data.precompute.source.objects) == ("emoji", 30)
    folder = {**EMOJI, "source": {"name": "folder", "path": "/pictures", "validation_share": 0.1}}
    config = load_config(recipe(lambda values: values["data"].update(precompute=folder)))
    assert config.data.precompute.source.path == "/pictures"


def test_a_config_cannot_change():
    config = tiny_config()
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.model.dim = 64
    assert isinstance(config.data.train, tuple) and isinstance(config.optim.betas, tuple)


@pytest.mark.parametrize("num_patches, ratio, kept", [(256, 0.75, 64), (256, 0.0, 256), (10, 0.25, 7), (16, 0.99, 0)])
def test_kept_tokens_rounds_down(num_patches, ratio, kept):
    assert kept_tokens(num_patches, ratio) == kept


# --set


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
        ("name=other-name", lambda c: c.name == "other-name"),
        ("ema.decay=0.5", lambda c: c.ema.decay == 0.5),
        ("ema={decay = 0.5, start_step = 3}", lambda c: c.ema.start_step == 3),
        ("data.validation=/a=b", lambda c: c.data.validation == "/a=b"),
        ("data.precompute.source.scenes=7", lambda c: c.data.precompute.source.scenes == 7),
    ],
)
def test_set_overrides_one_key(recipe, override, read):
    path = recipe(lambda values: values["data"].update(precompute=EMOJI))
    assert read(load_config(path, [override]))


def test_set_adds_a_table_that_the_recipe_leaves_out(recipe):
    path = recipe(lambda values: values.pop("ema"))
    config = load_config(path, ["ema.decay=0.5", "ema.start_step=2"])
    assert (config.ema.decay, config.ema.start_step) == (0.5, 2)


def test_the_last_set_of_a_key_counts(recipe):
    assert load_config(recipe(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    "override, expected",
    [
        ("training.num_step=12", ["training.num_step", "12", "num_steps"]),
        ("trainings.num_steps=12", ["trainings"]),
        ("name.first=a", ["name.first=a", "name is not a table"]),
        ("seed", ["--set seed", "key.sub=value"]),
        ("=3", ["key.sub=value"]),
        (".=3", ["key.sub=value"]),
        ("model..dim=3", ["--set model..dim=3", "key.sub=value"]),
        ("model.dim.x=3", ["dim is not a table"]),
        ("data.train.0=x", ["train is not a table"]),
        ("__proto__.dim=3", ["unknown key __proto__"]),
        ("seed=1\nname='b'", ["seed", "1\\nname"]),
        ("seed=" + "9" * 100, ["seed", "9999"]),
        ("seed=2024-01-01", ["seed", "2024-01-01"]),
        ("name=\udcff", ["--set name=", "not Unicode"]),
        ("\udcff=1", ["--set ", "not Unicode"]),
        ("ema=" + "[" * 10**5, ["ema = ", "[["]),
        (".".join("a" * 10**4) + "=1", ["--set a.a", "nested more than 64 deep"]),
        ("training.num_steps=many", ["training.num_steps", "many"]),
        ("training.num_steps=", ["training.num_steps"]),
        ("model=3", ["model", "3"]),
    ],
)
def test_an_override_that_cannot_be_is_refused(recipe, override, expected):
    message = complaint(recipe(), [override])
    assert all(part in message for part in expected), message


# What is refused


MISSPELLED = [
    ("sede", "seed"),
    ("model.patchsize", "patch_size"),
    ("noise.p_mean", "P_mean"),
    ("data.captions_drop", "caption_drop"),
    ("training.mask_ration", "mask_ratio"),
    ("optim.learning_lr", "lr"),
    ("ema.start_steps", "start_step"),
    ("report.sample_steps", "sampler_steps"),
    ("data.precompute.image_sizes", "image_size"),
    ("data.precompute.source.scene", "scenes"),
]


@pytest.mark.parametrize("key, meant", MISSPELLED)
def test_a_misspelled_key_is_named_with_its_file_its_value_and_the_nearest_key(recipe, key, meant):
    path = recipe(lambda values: values["data"].update(precompute=copy.deepcopy(EMOJI)))
    message = complaint(path, [f"{key}=0.123"])
    assert str(path) in message and f"unknown key {key} = 0.123" in message
    if meant != "lr":  # "lr" is too short to be near to anything
        assert f"did you mean {meant}?" in message


def test_a_key_like_no_other_is_refused_without_a_guess(recipe):
    message = complaint(recipe(lambda values: values["optim"].update(zzz=1)))
    assert "unknown key optim.zzz = 1" in message and "did you mean" not in message


def test_a_missing_key_is_named_with_its_file(recipe):
    path = recipe(lambda values: values["optim"].pop("lr"))
    assert complaint(path) == f"{path}: missing key optim.lr"


def test_every_training_directory_has_its_weight(recipe):
    config = load_config(recipe(lambda values: values["data"].update(train=["a", "b"], weights=[2.0, 1.0])))
    assert config.data.weights == (2.0, 1.0)
    message = complaint(recipe(lambda values: values["data"].update(train=["a", "b"], weights=[2.0])))
    assert "weights has 1 values, but train has 2 directories" in message


def test_two_sets_are_not_made_in_one_directory(recipe):
    def change(values):
        values["data"].update(train=["a", "b"], validation="a")

    assert load_config(recipe(change)).data.validation.endswith("/a")
    message = complaint(recipe(lambda values: change(values) or values["data"].update(precompute=EMOJI)))
    assert "data: train and validation are both" in message


def test_a_missing_section_is_named(recipe):
    assert "missing key noise" in complaint(recipe(lambda values: values.pop("noise")))


def test_everything_wrong_is_told_at_once(recipe):
    def change(values):
        values["optim"].pop("lr")
        values["model"]["detph"] = 3

    message = complaint(recipe(change))
    assert "missing key optim.lr" in message and "unknown key model.detph" in message


@pytest.mark.parametrize(
    "key, value",
    [
        ("training.num_steps", '"many"'),
        ("training.num_steps", "1.5"),
        ("training.num_steps", '"100"'),
        ("training.num_steps", "true"),
        ("model.use_bias", '"yes"'),
        ("model.use_bias", "1"),
        ("data.validation", "3"),
        ("optim.lr", '"1e-4"'),
        ("optim.schedule", '"linear"'),
        ("noise.P_mean", "nan"),
        ("optim.lr", "inf"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(recipe, key, value):
    message = complaint(recipe(), [f"{key}={value}"])
    assert key in message and str(tomllib.loads(f"v = {value}")["v"]) in message


def test_a_list_of_the_wrong_length_is_named(recipe):
    assert "optim.betas" in complaint(recipe(), ["optim.betas=[0.9]"])
    assert "optim.betas" in complaint(recipe(), ["optim.betas=[0.9, 0.99, 0.999]"])


@pytest.mark.parametrize(
    "key, value",
    [
        ("training.num_steps", "0"),
        ("training.global_batch_size", "-8"),
        ("training.mask_ratio", "1.0"),
        ("training.mask_ratio", "-0.1"),
        ("data.caption_drop", "1.5"),
        ("data.train", "[]"),
        ("noise.P_std", "0"),
        ("optim.lr", "0"),
        ("optim.final_lr_ratio", "1.5"),
        ("ema.decay", "1"),
        ("seed", "-1"),
        ("name", '"two words"'),
        ("name", '".."'),
        ("name", '"."'),
        ("name", '"-rf"'),
        ("name", f'"{"x" * 101}"'),
        ("model.dim", "1_000_000_000_000_000"),
        ("model.depth", "1_000_000"),
        ("model.mixer_depth", "1_000_000"),
        ("model.num_experts", "9_223_372_036_854_775_807"),
        ("model.latent_size", "4_000_000_000"),
        ("model.ffn_ratio", "[0.5, 1e300]"),
        ("model.pos_interp_scale", "1e-300"),
        ("training.global_batch_size", "18_446_744_073_709_551_615"),
        ("report.sampler_steps", "1_000_000_000_000"),
        ("report.num_samples", "1_000_000_000_000"),
        ("data.validation", '""'),
        ("data.validation", '"a\\u0000b"'),
        ("report.sampler_steps", "1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(recipe, key, value):
    message, value = complaint(recipe(), [f"{key}={value}"]), tomllib.loads(f"v = {value}")["v"]
    assert key in message and repr(max(value) if value and isinstance(value, list) else value) in message


@pytest.mark.parametrize(
    "override, values_named",
    [
        ("model.latent_size=9", ["latent_size 9", "patch_size 2"]),
        ("model.head_dim=5", ["dim 32", "head_dim 5"]),
        ("model.mixer_dim=20", ["mixer_dim 20", "head_dim 8"]),
        ("model.qkv_ratio=[1e-9, 1.0]", ["dim 32", "qkv_ratio 1e-09"]),
        ("model.mixer_ffn_ratio=1e-9", ["mixer_dim 24", "mixer_ffn_ratio 1e-09"]),
        ("model.capacity_factor=5", ["capacity_factor 5", "num_experts 4"]),
        ("training.mask_ratio=0.99", ["mask_ratio 0.99", "16 patches"]),
        ("model.capacity_factor=0.5", ["capacity_factor 0.5", "4 experts", "mask_ratio 0.75"]),
        ("optim.schedule=constant", ["final_lr_ratio", "0.33", "constant"]),
        ("report.prompts=[]", ["prompts"]),
    ],
)
def test_values_that_contradict_each_other_are_both_named(recipe, override, values_named):
    path = recipe()
    message = complaint(path, [override])
    assert message.startswith(f"{path}: ") and all(part in message for part in values_named), message


def test_the_mixers_width_is_not_checked_when_there_is_no_mixer():
    assert tiny_model(mixer_dim=20, use_patch_mixer=False).mixer_dim == 20


@pytest.mark.parametrize("key, value", [("report.prompts", 3), ("data.precompute.source.objects", "-1")])
def test_a_key_that_takes_two_types_is_named_as_it_is_written(recipe, key, value):
    """Not by the branches of the union, such as report.prompts.literal['validation'], and not once for each."""
    path = recipe(lambda values: values["data"].update(precompute=copy.deepcopy(EMOJI)))
    message = complaint(path, [f"{key}={value}"])
    assert message.startswith(f"{path}: {key} = {value}: ") and message.count(key) == 1


def test_a_source_that_does_not_exist_is_refused(recipe):
    precompute = {**EMOJI, "source": {**EMOJI["source"], "name": "imagenet"}}
    message = complaint(recipe(lambda values: values["data"].update(precompute=precompute)))
    assert "data.precompute.source" in message and "imagenet" in message


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("broken.toml", b"name = ", "not valid TOML"),
        ("broken.json", b"{", "not valid JSON"),
        ("ds.json", b'{"train_batch_size": 8}', "config.json of a run"),
        ("list.json", b"[1, 2]", "config.json of a run"),
        ("text.json", b'{"recipe": 3}', "text.json"),
        ("binary.toml", b"\xff\xfe\x00", "not valid"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, file, content, expected):
    path = tmp_path / file
    path.write_bytes(content)
    message = complaint(path)
    assert str(path) in message and expected in message


def test_an_override_of_a_file_that_is_no_recipe_is_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"recipe": 3}')
    assert str(path) in complaint(path, ["seed=1"])


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    path = tmp_path / "nowhere.toml"
    assert complaint(path) == f"{path}: cannot read the recipe: No such file or directory"
    assert str(tmp_path) in complaint(tmp_path)


def test_a_date_is_no_text(tmp_path, recipe):
    path = recipe()
    path.write_text(path.read_text().replace('name = "tiny"', "name = 2024-01-01"))
    assert complaint(path) == f"{path}: not valid TOML: name = 2024-01-01 is a date, which no key takes"


def test_of_many_wrong_keys_a_few_are_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"recipe": {f"{number}" * 20: number for number in range(10**4)}}))
    assert "more" in complaint(path) and len(complaint(path)) < 2100


def test_a_seed_is_what_torch_takes(recipe):
    assert load_config(recipe(), [f"seed={2**64 - 1}"]).seed == 2**64 - 1
    torch.manual_seed(2**64 - 1)
    assert "seed" in complaint(recipe(), [f"seed={2**64}"])


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


def test_there_are_recipes():
    assert {"quickstart", "res_256_pretrain", "res_512_finetune"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_under_its_own_name(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.training.num_steps > config.optim.warmup_steps
    assert config.ema is None or config.ema.start_step < config.training.num_steps


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_a_comment_that_gives_source_command_and_cost(path):
    lines = path.read_text().splitlines()
    opening = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    assert all(any(word in line for line in opening) for word in ("Source:", "Cost:"))
    assert any("launchers/train.py" in line for line in opening)
    assert path == DEFAULT_RECIPE or any(f"--recipe configs/{path.name}" in line for line in opening)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_survives_being_written_to_a_runs_config_json(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "config.json"
    written.write_text(json.dumps({"recipe": config.model_dump(mode="json")}))
    assert load_config(written) == config


# steps, mask, lr, warm-up, schedule, final ratio, clip, P_mean, P_std, EMA (decay, start), latent size
STAGES = {
    "res_256_pretrain": (250_000, 0.75, 2.4e-4, 2_500, "cosine", 0.33, 0.25, -0.6, 1.2, None, 32),
    "res_256_finetune": (30_000, 0.0, 8e-5, 0, "constant", 1.0, 0.25, -0.6, 1.2, None, 32),
    "res_512_pretrain": (50_000, 0.75, 8e-5, 500, "constant", 1.0, 0.5, 0.0, 0.6, (0.99975, 25_000), 64),
    "res_512_finetune": (5_000, 0.0, 8e-5, 0, "constant", 1.0, 0.5, 0.0, 0.6, (0.9975, 1_000), 64),
}


def stage(name: str) -> TrainConfig:
    path = CONFIGS / f"{name}.toml"
    if not path.exists():
        pytest.fail(f"{path} is gone")
    return load_config(path)


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_the_papers(name):
    config = stage(name)
    steps, mask, lr, warmup, schedule, final, clip, P_mean, P_std, ema, latent_size = STAGES[name]
    assert (config.training.num_steps, config.training.mask_ratio) == (steps, mask)
    assert config.training.global_batch_size == 2048
    assert (config.optim.lr, config.optim.warmup_steps) == (lr, warmup)
    assert (config.optim.schedule, config.optim.final_lr_ratio) == (schedule, final)
    assert config.optim.max_grad_norm == clip
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.1)
    assert (config.noise.P_mean, config.noise.P_std, config.noise.sigma_data) == (P_mean, P_std, 0.9)
    assert (None if config.ema is None else (config.ema.decay, config.ema.start_step)) == ema
    assert config.model == presets.xl_2(latent_size)
    assert config.data.caption_drop == 0.1
    assert (config.report.guidance, config.report.sampler_steps) == (5.0, 30)


def test_the_four_stages_see_686_million_samples():
    trainings = [stage(name).training for name in STAGES]
    assert sum(t.num_steps * t.global_batch_size for t in trainings) == 686_080_000


def test_diffusiondb_is_left_out_at_512_px_and_nothing_else_is():
    def sets(name):
        return {Path(directory).parent.name for directory in stage(name).data.train}

    assert "diffusiondb" in sets("res_256_pretrain")
    for name in ("res_512_pretrain", "res_512_finetune"):
        assert sets(name) == sets("res_256_pretrain") - {"diffusiondb"}
    assert sets("res_256_finetune") == sets("res_256_pretrain")
