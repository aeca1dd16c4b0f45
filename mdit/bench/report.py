"""A report on disk, DIR/throughput.json and DIR/throughput.md: written after every row, so that no row is lost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed

from mdit.bench.rows import FORMULA, SCHEMA, Row, environment, load, same_measurement, save, table
from mdit.bench.stages import TINY
from mdit.config import UserError
from mdit.dist import World
from mdit.files import write_text

JSON, MARKDOWN = "throughput.json", "throughput.md"
NO_TIME = "not measured"  # begins the problem of a row that another run may still measure


class Report:
    """Rows, and the files that hold them where a `directory` is given; rank 0 reads and writes those.

    With `resume` the rows of an earlier run are kept. Raises UserError where that was on another machine, with other
    versions or at another commit: one report has one environment. A collective of all ranks.
    """

    def __init__(
        self, directory: Path | None, world: World, *, command: str, prices: Sequence[float], resume: bool = False
    ) -> None:
        self.directory, self.world, self.prices = directory, world, prices
        here = environment(world)
        self.content: dict[str, Any] = {"schema": SCHEMA, "environment": here, "command": command, "formula": FORMULA}
        self.content["rows"] = self._earlier(here) if resume else []

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def add(self, *rows: Row) -> None:
        """Rows that say the same of themselves as earlier ones take their places, unless they have less to tell."""
        for row in rows:
            places = [place for place, other in enumerate(self.rows) if _same(row, other)]
            if not places:
                self.rows.append(row)
            elif not is_open(row) or is_open(self.rows[places[0]]):
                self.rows[places[0]] = row
        self.write()

    def find(self, row: Row) -> Row | None:
        """An earlier row of the same measurement that is settled: measured, or found to be impossible."""
        return next((other for other in self.rows if _same(row, other) and not is_open(other)), None)

    def write(self) -> None:
        if self.directory is None or not self.world.is_first:
            return
        save(self.directory / JSON, self.content)
        write_text(self.directory / MARKDOWN, self.markdown())

    def markdown(self) -> str:
        facts = {**self.content["environment"], "command": f"`{self.content['command']}`"}
        told = "\n".join(f"- {name}: {'unknown' if value is None else value}" for name, value in facts.items())
        return "\n\n".join(["# Training throughput", told, self.tables()]) + "\n"

    def tables(self) -> str:
        tiny = any(row["recipe"].endswith(TINY) for row in self.rows)
        parts = ["Tiny shapes: these figures say nothing of the recipes whose names they bear." if tiny else ""]
        parts += [table(self.rows, self.prices), memory_lines(self.rows), FORMULA]
        return "\n\n".join(part for part in parts if part)

    def _earlier(self, here: dict[str, Any]) -> list[Row]:
        """Rank 0's, told to all: others may not see its disk."""
        if self.world.size == 1:
            return self._read(here)
        found: list[Any] = [None]
        if self.world.is_first:
            try:
                found = [self._read(here)]
            except UserError as error:
                found = [error]
        torch.distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def _read(self, here: dict[str, Any]) -> list[Row]:
        path = self.directory / JSON
        if not path.exists():
            return []
        before = load(path)
        for name, value in here.items():
            if name != "date" and (found := before["environment"].get(name)) != value:
                raise UserError(
                    f"--resume: {path} has {name} {found!r}, here it is {value!r}; choose another directory"
                )
        return before["rows"]


def _same(one: Row, other: Row) -> bool:
    """Rungs and profiles are known by their names: what runs in Triton may differ where something failed."""
    if one["kind"] == other["kind"] != "stage":
        batch = "global_batch"
        keys = ("name", "recipe", "data", "parameters")
        return all(one[key] == other[key] for key in keys) and one["setting"][batch] == other["setting"][batch]
    return same_measurement(one, other)


def is_open(row: Row) -> bool:
    return (row["problem"] or "").startswith(NO_TIME)


def memory_lines(rows: Sequence[Row]) -> str:
    """Where a GPU's memory goes, for every stage that was measured."""
    lines = [
        f"- {row['name']}, micro-batch {row['setting']['micro_batch']}: "
        + ", ".join(f"{part} {gib:.2f}" for part, gib in row["memory_gib"].items())
        for row in rows
        if row.get("memory_gib")
    ]
    return "\n".join(["GiB by part, and the peak:", *lines]) if lines else ""
