"""Recipes that follow one another, as a TOML file says: each stage goes on from the weights of the one before.

    name = "micro_budget_plus"
    stages = ["res_256_pretrain.toml", "res_256_finetune.toml"]     from this file's folder; or with names of their own,
                                                                    { name = "finetune", recipe = "pretrain.toml" }

    [base]                                  what all stages have otherwise than their recipes
    optim.name = "muon"

    [changes.res_256_finetune]              and what this one has
    moments = true                          its optimizer goes on with the moments of the stage before
    training.num_steps = 15000

A table of changes is merged into the recipe's table of that name; the key `replace` names tables that take the place of
the recipe's instead, as `replace = ["noise"]`.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mdit.config import (
    CONFIGS,
    Section,
    TrainConfig,
    UserError,
    free_differences,
    near_key,
    parse_recipe,
    parse_section,
)
from mdit.differences import DifferenceOptions, flattened, one_after_the_other, overrides, split
from mdit.documents import read_toml
from mdit.sections import Location

MICRO_BUDGET = CONFIGS / "micro_budget.toml"  # the paper's


Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]  # of a folder, too


class NamedStage(Section):
    name: Name
    recipe: Location


class StagesFile(Section):
    """The file as it is written."""

    name: Name
    stages: Annotated[tuple[Location | NamedStage, ...], Field(min_length=1)]
    base: dict[str, Any] = {}
    changes: dict[str, dict[str, Any]] = {}


class StageOptions(DifferenceOptions):
    moments: bool = Field(False, description="the optimizer goes on with the moments of the stage before")


@dataclass(frozen=True)
class RecipeStage:
    """A recipe file and what the run is to have otherwise, as --set takes it; `config` is what they make. `moments`:
    the optimizer's go on from the stage before."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    config: TrainConfig
    moments: bool = False


@dataclass(frozen=True)
class StagedRecipe:
    name: str
    stages: tuple[RecipeStage, ...]

    def stage(self, name: str | None, path: Path) -> RecipeStage:
        """The stage of this name; without one, the first. Raises UserError naming `path`."""
        names = {stage.name: stage for stage in self.stages}
        if name is not None and name not in names:
            raise UserError(f"--stage {name}: {path} has {', '.join(names)}{near_key(name, names)}")
        return self.stages[0] if name is None else names[name]


def load_stages(path: Path) -> StagedRecipe:
    """Raises UserError, naming the file and the stage, for what cannot be run."""
    file = parse_section(StagesFile, read_toml(path, "the stages"), path)
    named = [NamedStage(name=Path(each).stem, recipe=each) if isinstance(each, str) else each for each in file.stages]
    recipes = {stage.name: path.parent / stage.recipe for stage in named}
    if len(recipes) < len(named):
        raise UserError(f"{path}: stages has two of one name: {', '.join(stage.name for stage in named)}")
    for name in file.changes:
        if name not in recipes:
            raise UserError(f"{path}: changes.{name} is of no stage{near_key(name, recipes)}: {', '.join(recipes)}")
    stages = tuple(_stage(file, name, recipe, path) for name, recipe in recipes.items())
    if stages[0].moments:
        raise UserError(f"{path}: changes.{stages[0].name}: moments is true, but no stage is before it")
    for before, stage in itertools.pairwise(stages):
        try:
            free_differences(before.config.model, stage.config.model)
        except UserError as error:
            told = f"cannot go on from {before.name}: {error}"
            raise UserError(f"{path}: stage {stage.name}: {told}") from None
        if stage.moments and stage.config.optim.name != (had := before.config.optim.name):
            told = f"moments is true, but optim.name is {stage.config.optim.name!r} and was {had!r}"
            raise UserError(f"{path}: stage {stage.name}: {told}")
    return StagedRecipe(file.name, stages)


@cache
def paper_stages() -> tuple[RecipeStage, ...]:
    """The four of the paper, of which benchmarks and costs are."""
    return load_stages(MICRO_BUDGET).stages


def _stage(file: StagesFile, name: str, recipe: Path, path: Path) -> RecipeStage:
    raw = read_toml(recipe, "the recipe")
    base, of_all = split(DifferenceOptions, file.base, f"{path}: base")
    own, of_this = split(StageOptions, file.changes.get(name, {}), f"{path}: changes.{name}")
    tables = flattened(of_all, raw, base.replace), flattened(of_this, raw, own.replace)
    sets = overrides(one_after_the_other(*tables))
    try:
        return RecipeStage(name, recipe, sets, parse_recipe(raw, recipe, sets), own.moments)
    except UserError as error:
        raise UserError(f"{path}: stage {name}: {error}") from None
