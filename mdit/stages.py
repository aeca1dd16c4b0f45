"""Recipes that follow one another, as a TOML file says: each stage goes on from the weights of the one before.

    name = "micro_budget_plus"
    stages = ["res_256_pretrain.toml", "res_256_finetune.toml"]     from this file's folder

    [base]                                  what all stages have otherwise than their recipes
    optim.name = "muon"

    [changes.res_256_finetune]              and what this one has
    training.num_steps = 15000

A table of changes is merged into the recipe's table of that name; the key `replace` names tables that take the place of
the recipe's instead, as `replace = ["noise"]`.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mdit.config import CONFIGS, Section, TrainConfig, UserError, near_key, parse_recipe, parse_section
from mdit.differences import DifferenceOptions, flattened, one_after_the_other, overrides, split
from mdit.documents import read_toml
from mdit.sections import Location

MICRO_BUDGET = CONFIGS / "micro_budget.toml"  # the paper's


class StagesFile(Section):
    """The file as it is written."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]
    stages: Annotated[tuple[Location, ...], Field(min_length=1)]
    base: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class RecipeStage:
    """A recipe file and what the run is to have otherwise, as --set takes it; `config` is what they make."""

    recipe: Path
    overrides: tuple[str, ...]
    config: TrainConfig


@dataclass(frozen=True)
class StagedRecipe:
    name: str
    stages: tuple[RecipeStage, ...]


def load_stages(path: Path) -> StagedRecipe:
    """Raises UserError, naming the file and the stage, for what cannot be run."""
    file = parse_section(StagesFile, read_toml(path, "the stages"), path)
    recipes = {Path(recipe).stem: path.parent / recipe for recipe in file.stages}
    if len(recipes) < len(file.stages):
        raise UserError(f"{path}: stages has two recipes of one name: {', '.join(file.stages)}")
    for name in file.changes:
        if name not in recipes:
            raise UserError(f"{path}: changes.{name} is of no stage{near_key(name, recipes)}: {', '.join(recipes)}")
    return StagedRecipe(file.name, tuple(_stage(file, name, recipe, path) for name, recipe in recipes.items()))


@cache
def paper_stages() -> tuple[RecipeStage, ...]:
    """The four of the paper, of which benchmarks and costs are."""
    return load_stages(MICRO_BUDGET).stages


def _stage(file: StagesFile, name: str, recipe: Path, path: Path) -> RecipeStage:
    raw, tables = read_toml(recipe, "the recipe"), []
    for where, changes in (("base", file.base), (f"changes.{name}", file.changes.get(name, {}))):
        options, values = split(DifferenceOptions, changes, f"{path}: {where}")
        tables.append(flattened(values, raw, options.replace))
    sets = overrides(one_after_the_other(*tables))
    try:
        return RecipeStage(recipe, sets, parse_recipe(raw, recipe, sets))
    except UserError as error:
        raise UserError(f"{path}: stage {name}: {error}") from None
