"""A recipe (`mdit.recipe`) read from one TOML file, with overrides, and what is wrong with it in one line.

Every key is checked; an unknown one is an error that names the file and the key.
"""

import copy
import difflib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mdit.documents import UserError, check, parse_toml, read_json, read_toml

# The sections and their types are imported from here all over mdit.
from mdit.recipe import (  # noqa: F401
    POSITION_KEYS,
    AlignConfig,
    AveragesConfig,
    EDMNoise,
    EMAConfig,
    EmojiSource,
    FlowNoise,
    FolderSource,
    MetricsConfig,
    ModelConfig,
    NoiseConfig,
    OptimConfig,
    ReportConfig,
    TrainConfig,
    TrainingConfig,
    free_differences,
    kept_tokens,
)
from mdit.sections import AnySection, Embeddings, NonNegativeInt, PositiveFloat, PositiveInt, Section  # noqa: F401

PACKAGED = Path(__file__).absolute().parent / "configs"  # in a checkout a link to the top-level folder
CONFIGS = PACKAGED.resolve()
DEFAULT_RECIPE, DEFAULT_DS_CONFIG = CONFIGS / "quickstart.toml", CONFIGS / "zero2.json"
MAX_CLAUSES = 20  # of one error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a recipe: a TOML file, or the `config.json` that an earlier run left in its directory.

    `overrides` are `key.sub=value` strings; the value is read as TOML and, failing that, as a bare string.
    Raises UserError naming the file, the key and the value.
    """
    if Path(path).suffix != ".json":
        return parse_recipe(read_toml(path, "the recipe"), path, overrides)
    values = read_json(path, "the recipe")
    if not isinstance(values, dict) or not isinstance(values.get("recipe"), dict):
        raise UserError(f'{path}: has no table "recipe"; expected the config.json of a run')
    return parse_recipe(values["recipe"], path, overrides)


def parse_recipe(values: dict[str, Any], path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Check what the file `path` has for a recipe. Relative places of data become absolute: those of the file below the
    folder of its project, which has the pyproject.toml, or else beside it; those of overrides, and of the recipes in an
    installed package, below the current directory."""
    folder = Path(os.path.abspath(path)).parent
    installed = folder == CONFIGS and not PACKAGED.is_symlink()
    values, root = copy.deepcopy(values), Path.cwd() if installed else _project(path) or folder
    _change_locations(values, lambda place: os.path.join(root, place))
    for override in overrides:
        _apply_override(values, override)
    _change_locations(values, os.path.abspath)
    return parse_section(TrainConfig, values, path)


def portable(config: TrainConfig, path: str | Path) -> dict[str, Any]:
    """The recipe as the file `path` is to hold it: data of its project are named from there, so that a project may move
    with its runs."""
    values, root = config.model_dump(mode="json", exclude_none=True), _project(path)
    if root is not None:
        _change_locations(values, lambda place: place.removeprefix(f"{root}{os.sep}"))
    return values


def _project(path: str | Path) -> Path | None:
    return next((up for up in Path(os.path.abspath(path)).parents if os.path.exists(up / "pyproject.toml")), None)


def parse_section(section: type[AnySection], values: Any, path: object) -> AnySection:
    """Check `values` against a section; what is wrong comes in one UserError, one clause for each key."""
    try:
        # As JSON, where a list may become a tuple though all else is strict: "3" is no number and 1 no truth value.
        return section.model_validate_json(json.dumps(values))
    except ValidationError as error:
        told = error.errors(include_url=False)[:MAX_CLAUSES]
        clauses = list({_written(e, values): _explain(e, values, section) for e in told}.values())
        more = [f"and {error.error_count() - len(told)} more"] if error.error_count() > len(told) else []
        raise UserError(f"{path}: " + "; ".join(clauses + more)) from None


def near_key(key: str, known: Iterable[str]) -> str:
    """ " (did you mean seed?)", or nothing."""
    match = difflib.get_close_matches(key[:100], known, n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _change_locations(values: dict, change: Callable[[str], str]) -> None:
    """`change` every place of data in a recipe that nobody has checked yet."""

    def changed(place: Any) -> Any:
        return change(place) if isinstance(place, str) and place and "\0" not in place else place

    for *parents, key in (("data", "train"), ("data", "validation"), ("data", "precompute", "source", "path")):
        table: Any = values
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        if isinstance(table, dict) and key in table:
            place = table[key]
            table[key] = [changed(each) for each in place] if isinstance(place, list) else changed(place)


def _apply_override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    *parents, leaf = key.split(".")
    if not separator or not all((*parents, leaf)):
        raise UserError(f"--set {override}: expected key.sub=value")
    table = values
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {parent} is not a table")
    table[leaf] = _value(text)
    try:
        check(values)
    except ValueError as error:
        raise UserError(f"--set {override}: {error}") from None


def _value(text: str) -> Any:
    """As TOML where all of the text is one value, else as a bare string."""
    try:
        read = parse_toml(f"value = {text}", "--set")
    except UserError:
        return text
    return read["value"] if read.keys() == {"value"} else text


def _explain(error: ErrorDetails, values: Any, section: type[Section]) -> str:
    key = _written(error, values)
    if error["type"] == "extra_forbidden":
        nearest = near_key(str(error["loc"][-1]), _known_keys(error["loc"], section))
        return f"unknown key {key} = {error['input']!r}{nearest}"
    if error["type"] == "missing":
        return f"missing key {key}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # from a validator of ours: it names the values itself
        return f"{key}: {message}" if key else message
    return f"{key} = {error['input']!r}: {message}"


def _written(error: ErrorDetails, values: Any) -> str:
    """The key as the recipe has it: without the names that pydantic gives to the branches of a union."""
    key = []
    for part in error["loc"]:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or part != error["loc"][-1]:
                continue
        key.append(str(part))
    return ".".join(key)


def _known_keys(location: tuple, section: type[Section]) -> list[str]:
    """The keys that may stand beside the last part of a location."""
    sections = [section]
    for part in location[:-1]:
        inside = [s for parent in sections if part in parent.model_fields for s in _sections(parent, part)]
        # No field: pydantic's name for a branch of a union, the value of the key that tells them apart.
        named = [s for s in sections if any(part in get_args(field.annotation) for field in s.model_fields.values())]
        sections = inside or named or sections
    return [key for section in sections for key in section.model_fields]


def _sections(parent: type[Section], key: str) -> list[type[Section]]:
    """The sections that a key takes: one, none, or those of a union."""
    found, kinds = [parent.model_fields[key].annotation], []
    while found:
        kind = found.pop()
        found += get_args(kind)
        kinds += [kind] if isinstance(kind, type) and issubclass(kind, Section) else []
    return kinds
