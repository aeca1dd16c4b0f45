"""Tables of differences from a recipe, in files about several runs (ablations, stages), as overrides of its keys."""

import itertools
import json
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from mdit.config import AnySection, Section, parse_section


class DifferenceOptions(Section):
    replace: tuple[str, ...] = Field((), description="tables that take the place of the recipe's")


def split(section: type[AnySection], values: dict[str, Any], where: str) -> tuple[AnySection, dict[str, Any]]:
    """The keys of `section`, checked, and the others, which are the recipe's."""
    own = {key: value for key, value in values.items() if key in section.model_fields}
    return parse_section(section, own, where), {key: value for key, value in values.items() if key not in own}


def flattened(
    changes: dict[str, Any], of: dict[str, Any], replace: Sequence[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """Dotted keys of a recipe and their new values: tables are merged into those `of` the recipe, but those to
    `replace`, and those that are no table there, are one value."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        name, there = f"{prefix}{key}", of.get(key, {})
        if isinstance(value, dict) and isinstance(there, dict) and name not in replace:
            flat |= flattened(value, there, replace, f"{name}.")
        else:
            flat[name] = value
    return flat


def one_after_the_other(*tables: dict[str, Any]) -> dict[str, Any]:
    """The keys of all tables in their order, so that a key comes behind a table that it is in."""
    values: dict[str, Any] = {}
    for key, value in itertools.chain(*(table.items() for table in tables)):
        values.pop(key, None)
        values[key] = value
    return values


def overrides(values: dict[str, Any]) -> tuple[str, ...]:
    """key.sub=value, as --set takes them."""
    return tuple(f"{key}={toml(value)}" for key, value in values.items())


def toml(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inside)}" for key, inside in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
