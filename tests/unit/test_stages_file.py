"""Files of several stages: what their recipes become, and what is refused in one line."""

from pathlib import Path

import pytest

from mdit.config import CONFIGS, UserError, load_config
from mdit.stages import MICRO_BUDGET, load_stages

FILES = sorted(path for path in CONFIGS.glob("*.toml") if "\nstages = " in path.read_text())


def written(folder: Path, text: str) -> Path:
    for name, batch in (("first", 8), ("second", 16)):
        recipe = (CONFIGS / "paper_32.toml").read_text().replace('"paper_32"', f'"{name}"')
        (folder / f"{name}.toml").write_text(recipe.replace("global_batch_size = 32", f"global_batch_size = {batch}"))
    path = folder / "stages.toml"
    path.write_text(text)
    return path


def test_the_papers_stages_are_its_recipes():
    names = ["res_256_pretrain", "res_256_finetune", "res_512_pretrain", "res_512_finetune"]
    stages = load_stages(MICRO_BUDGET).stages
    assert [stage.config for stage in stages] == [load_config(CONFIGS / f"{name}.toml") for name in names]
    assert all(not stage.overrides for stage in stages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_loads_under_its_name_and_opens_with_source_and_command(path):
    assert load_stages(path).name == path.stem
    opening = path.read_text().split("\n\n")[0]
    assert "Source:" in opening and f" configs/{path.name}" in opening


def test_a_stage_has_its_own_changes_after_those_of_all(tmp_path):
    text = """
        name = "two"
        stages = ["first.toml", "second.toml"]
        [base]
        replace = ["noise"]
        noise = { target = "flow", sigma_data = 0.5 }
        training.num_steps = 200
        [changes.second]
        training.num_steps = 300
        optim.lr = 1e-4
    """
    first, second = load_stages(written(tmp_path, text)).stages
    assert first.config == load_config(first.recipe, first.overrides)
    assert second.config == load_config(second.recipe, second.overrides)
    assert first.config.noise == second.config.noise and first.config.noise.target == "flow"
    assert [s.config.training.num_steps for s in (first, second)] == [200, 300]
    assert [s.config.training.global_batch_size for s in (first, second)] == [8, 16]
    assert [s.config.optim.lr for s in (first, second)] == [3e-3, 1e-4]


def test_one_recipe_may_be_several_stages(tmp_path):
    text = """
        name = "two"
        stages = [{ name = "masked", recipe = "first.toml" }, { name = "whole", recipe = "first.toml" }]
        [changes.whole]
        moments = true
        training.mask_ratio = 0.0
    """
    masked, whole = load_stages(written(tmp_path, text)).stages
    assert (masked.name, whole.name) == ("masked", "whole") and masked.recipe == whole.recipe
    assert [stage.config.training.mask_ratio for stage in (masked, whole)] == [0.5, 0.0]
    assert [stage.moments for stage in (masked, whole)] == [False, True]


TWO = 'name = "a"\nstages = ["first.toml", "second.toml"]\n'
MUON = 'optim.name = "muon"\noptim.muon = { lr = 0.1, weight_decay = 0.0 }'


@pytest.mark.parametrize(
    "text, message",
    [
        ('stages = ["first.toml"]', "name"),
        ('name = "a"\nstages = []', "stages"),
        ('name = "a"\nstages = ["none.toml"]', "none.toml: cannot read the recipe"),
        ('name = "a"\nstages = ["first.toml", "first.toml"]', "two of one name: first, first"),
        ('name = "a"\nstages = ["first.toml"]\nchanges.frist.seed = 1', "of no stage (did you mean first?)"),
        ('name = "a"\nstages = ["first.toml"]\nbase.model.dmi = 1', "stage first: "),
        ('name = "a"\nstages = ["first.toml"]\nbase.replace = 1', "base: replace"),
        ('name = "a"\nstage = ["first.toml"]', "did you mean stages?"),
        ('name = "a"\nstages = ["first.toml"]\nchanges.first.moments = true', "moments is true, but no stage is"),
        (f"{TWO}[changes.second]\nmodel.dim = 64", "cannot go on from first: model.dim is 128, the new recipe's is 64"),
        (f"{TWO}[changes.second]\nmoments = true\n{MUON}", "moments is true, but optim.name is 'muon' and was 'adamw'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path, text, message):
    with pytest.raises(UserError) as raised:
        load_stages(written(tmp_path, text))
    assert "stages.toml: " in str(raised.value) or "none.toml" in str(raised.value)
    assert message in str(raised.value) and "\n" not in str(raised.value)
