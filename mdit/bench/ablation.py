"""An ablation: variants of one recipe, each trained from several seeds within one budget, as a TOML file says.

    name = "paper"                          of the report, and of its region in docs/ablations.md
    recipe = "../paper_32.toml"             the base recipe, from this file's folder
    budget = "flops"                        of all as many as the baseline takes: one of `Budget`
    seeds = [0, 1, 2]
    baseline = "deferred_50"                the variant that all are compared with: recipe and [base] as they are
    pictures = 128                          drawn of held-out captions, to be scored

    [base]                                  differences from the recipe that all variants have
    report.validate_every = 65

    [variants.deferred_50]

    [variants.deferred_75]
    seeds = [0]                             its own
    training.mask_ratio = 0.75

    [variants.deferred_75.finetune]         a second run, from the EMA of the first
    share = 0.2                             of the budget
    training.mask_ratio = 0.0

All that is wrong with it is found when it is read. A table of differences is merged into the recipe's table of that
name; the key `replace` names tables that take the place of the recipe's instead, as `replace = ["noise"]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mdit.config import (
    DEFAULT_DS_CONFIG,
    Section,
    TrainConfig,
    UserError,
    parse_recipe,
    parse_section,
)
from mdit.costs.flops import run_flops, total_flops
from mdit.differences import DifferenceOptions, flattened, one_after_the_other, overrides, split, toml
from mdit.documents import read_toml
from mdit.sections import Location, Seed

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=100)]  # of a folder, too
Seeds = Annotated[tuple[Seed, ...], Field(min_length=1)]
Budget = Literal["steps", "flops", "flops_with_optimizer", "seconds"]
# Reports that a run need not make: its snapshots are measured when it has ended, all variants by one recipe's noise.
QUIET = {"report.validate_every": 0, "report.sample_every": 0, "report.prompts": "validation"}
SAVING = ("report.snapshot_every", "report.checkpoint_every")
DECIDED = {"seed", *QUIET, *SAVING, "report.keep_checkpoints"}  # no difference between variants


class AblationFile(Section):
    """The file as it is written; variants are tables of differences with a few keys of `VariantOptions`."""

    name: Annotated[str, Field(pattern=r"^\w+$", max_length=100)]
    recipe: Location
    ds_config: Location | None = None
    budget: Budget
    seeds: Seeds
    baseline: Name
    pictures: Annotated[int, Field(ge=2, le=10_000)]
    base: dict[str, Any] = {}
    variants: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]


class VariantOptions(DifferenceOptions):
    seeds: Seeds | None = None
    finetune: dict[str, Any] | None = None


class FinetuneOptions(DifferenceOptions):
    share: Annotated[float, Field(gt=0, lt=1)] = Field(description="of the budget; the first run has the rest")


@dataclass(frozen=True)
class TrainingStage:
    """A run of the launcher. `overrides` are its --set; `config` is what they make of the recipe."""

    name: str
    overrides: tuple[str, ...]
    config: TrainConfig


@dataclass(frozen=True)
class VariantRun:
    """One variant from one seed: its stages, each from the weights of the one before."""

    variant: str
    seed: int
    stages: tuple[TrainingStage, ...]

    @property
    def name(self) -> str:
        return f"{self.variant}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / self.variant / f"seed_{self.seed}"

    def run_dir(self, out: Path, stage: TrainingStage) -> Path:
        return self.folder(out) / stage.name

    @property
    def steps(self) -> int:
        return sum(stage.config.training.num_steps for stage in self.stages)

    @property
    def flops(self) -> int:
        return sum(run_flops(stage.config) for stage in self.stages)


@dataclass(frozen=True)
class Differences:
    """A stage of a variant as the file has it: its share of the budget, and the recipe's keys with their new values."""

    name: str
    share: float
    values: dict[str, Any]


class Ablation:
    """The file, read and checked. Raises UserError, naming the file and the variant, where it cannot be run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = parse_section(AblationFile, read_toml(path, "the ablation"), path)
        self.recipe = path.parent / self.file.recipe
        self.ds_config = path.parent / self.file.ds_config if self.file.ds_config else DEFAULT_DS_CONFIG
        self.raw = read_toml(self.recipe, "the recipe")
        options, changes = split(DifferenceOptions, self.file.base, f"{path}: base")
        self.base_values = flattened(changes, self.raw, options.replace)
        # The baseline's recipe: its noise and seed are those of every validation loss, its length is the budget.
        self.base = self._parse("base", self.base_values)
        if self.base.report.validate_every == 0:
            raise UserError(f"{path}: base: report.validate_every is 0, but losses are compared all along a run")
        if self.file.baseline not in self.file.variants:
            known = ", ".join(self.file.variants)
            raise UserError(f"{path}: baseline = {self.file.baseline!r} is none of the variants: {known}")
        self.seeds: dict[str, tuple[int, ...]] = {}
        self.stages: dict[str, list[Differences]] = {}
        for variant, values in self.file.variants.items():
            self._read(variant, values)
        if len(stages := self.stages[self.file.baseline]) > 1 or stages[0].values:
            raise UserError(f"{path}: {_place(self.file.baseline)} is the baseline: what it changes belongs in base")

    def runs(self, step_seconds: Callable[[str, str], float]) -> list[VariantRun]:
        """Every variant from each of its seeds, at the length that the budget gives it. `step_seconds(variant, stage)`
        is the time of a step, asked for where the budget is of seconds. Every variant's first seed comes before any
        second one: a report of the first ones compares all variants."""
        points = -(-self.base.training.num_steps // self.base.report.validate_every)
        found = []
        for variant, stages in self.stages.items():
            lengths = [self._length(variant, stage, step_seconds) for stage in stages]
            every = max(1, round(sum(lengths) / points))
            for seed in self.seeds[variant]:
                made = [self.resolve(variant, stage, n, seed, every) for stage, n in zip(stages, lengths)]
                found.append(VariantRun(variant, seed, tuple(made)))
        return sorted(found, key=lambda run: self.seeds[run.variant].index(run.seed))

    def resolve(
        self, variant: str, stage: Differences, steps: int, seed: int, every: int, **more: Any
    ) -> TrainingStage:
        """A stage of `steps` steps, saved every `every` of them; `more` are other keys of [report]."""
        decided = {"seed": seed, "training.num_steps": steps, **QUIET, **dict.fromkeys(SAVING, every)}
        decided |= {"report.keep_checkpoints": 1, **{f"report.{key}": value for key, value in more.items()}}
        values = one_after_the_other(self.base_values, stage.values, decided)
        config = self._parse(_place(variant, stage.name), values)
        return TrainingStage(stage.name, overrides(values), config)

    def differences(self, variant: str) -> str:
        """training.mask_ratio=0.75, then training.mask_ratio=0.0"""
        texts, before = [], dict[str, Any]()
        for stage in self.stages[variant]:
            new = {key: value for key, value in stage.values.items() if (key, value) not in before.items()}
            texts.append(", ".join(f"{key}={toml(value)}" for key, value in new.items()) or "the baseline")
            before = stage.values
        return ", then ".join(texts)

    def recorded(self, variant: str, seed: int, recipes: dict[str, dict[str, Any]]) -> VariantRun:
        """A variant at the length of a result, whose `recipes` are those of its stages."""
        made = []
        for stage in self.stages[variant]:
            found = recipes.get(stage.name, recipes["train"])
            steps, every = found["training"]["num_steps"], found["report"]["snapshot_every"]
            made.append(self.resolve(variant, stage, steps, seed, every))
        return VariantRun(variant, seed, tuple(made))

    def _read(self, variant: str, values: dict[str, Any]) -> None:
        options, changes = split(VariantOptions, values, f"{self.path}: variants.{variant}")
        seeds = self.seeds[variant] = options.seeds or self.file.seeds
        if len({*seeds}) < len(seeds):
            twice = next(seed for seed in seeds if seeds.count(seed) > 1)
            whose = f"variants.{variant}.seeds" if options.seeds else "seeds"
            raise UserError(f"{self.path}: {whose} has {twice} twice")
        own = flattened(changes, self.raw, options.replace)
        stages = self.stages[variant] = [Differences("train", 1.0, own)]
        if options.finetune is not None:
            finetune, changes = split(FinetuneOptions, options.finetune, f"{self.path}: variants.{variant}.finetune")
            tail = flattened(changes, self.raw, finetune.replace)
            stages[:] = [Differences("train", 1 - finetune.share, own)]
            stages += [Differences("finetune", finetune.share, one_after_the_other(own, tail))]
        for stage in stages:
            lengthened = "training.num_steps" in stage.values and (self.file.budget != "steps" or len(stages) > 1)
            if refused := sorted(DECIDED & {*stage.values} | ({"training.num_steps"} if lengthened else set())):
                where = _place(variant, stage.name)
                raise UserError(f"{self.path}: {where}: {refused[0]} is the same for all variants, or the budget's")
            self.resolve(variant, stage, self.base.training.num_steps, seeds[0], 1)

    def _parse(self, where: str, values: dict[str, Any]) -> TrainConfig:
        try:
            return parse_recipe(self.raw, self.recipe, overrides(values))
        except UserError as error:
            raise UserError(f"{self.path}: {where}: {error}") from None

    def _length(self, variant: str, stage: Differences, step_seconds: Callable[[str, str], float]) -> int:
        """Steps of a stage: its share of the budget."""
        budget = self.base.training.num_steps
        if self.file.budget == "seconds":
            base, own = step_seconds(self.file.baseline, "train"), step_seconds(variant, stage.name)
            return max(1, round(stage.share * budget * base / own))
        if self.file.budget == "steps":
            return max(1, round(stage.share * stage.values.get("training.num_steps", budget)))
        count = total_flops if self.file.budget == "flops_with_optimizer" else run_flops
        wanted, seed = stage.share * count(self.base), self.seeds[variant][0]

        def flops(steps: int) -> int:
            return count(self.resolve(variant, stage, steps, seed, 1).config)

        low, high = 1, 2
        while flops(high) < wanted:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if flops(middle) <= wanted else (low, middle)
        return min(low, high, key=lambda steps: abs(flops(steps) - wanted))


def _place(variant: str, stage: str = "train") -> str:
    return f"variants.{variant}" + f".{stage}" * (stage != "train")
