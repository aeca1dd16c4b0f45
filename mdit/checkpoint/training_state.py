"""Checkpoints, for resume: the same command again goes on where the last complete one was written.

    checkpoints/step_00000250/rank_00000_000.safetensors   this rank's fragments of weights, moments and EMA; <= 1 GiB
                              rank_00000_001.safetensors   ... and so on
                              state.json                   step, run, layout, size and xxh3 of every file and of itself

A directory appears under its final name only when every byte of it is on disk. There is no pointer that could point
elsewhere: the newest directory of such a name, and of no other, is the latest checkpoint.

Every tensor is a fragment of one parameter, named KIND/PARAMETER, and the file's header says which elements it holds. A
run of the same layout reads its own fragments back as they are, bit for bit. A run of another layout (processes, ZeRO
stage, expert or tensor parallelism) takes its elements from whichever files hold them: the same numbers, with at most
one tensor in memory at a time. Nothing here is ever unpickled.
"""

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdit.checkpoint.fragments import FRAGMENTS, Fragment, Partitions
from mdit.config import UserError
from mdit.dist import World, gather, logger, on_all_ranks, on_rank_zero, shared
from mdit.documents import parse_json, read_bytes
from mdit.files import (
    DEFINITE,
    in_the_name_of,
    measure,
    partial_name,
    patiently,
    remove_directory,
    replacing_directory,
    save_tensors,
    write_json,
)

FORMAT = "mdit-checkpoint/4"
MAX_FILE_BYTES = 2**30  # bounds the copy in host memory that a file is written from


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, or one that is to be checked; `state` is its state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def is_whole(self, name: str) -> bool:
        """Raises OSError where a file cannot be read, which says nothing about its content. One that is not there is
        looked for again: network file systems may show a file late."""
        try:
            return patiently(partial(measure, self.path / name), definite=()) == self.state["files"][name]
        except DEFINITE:
            return False


class Damaged(Exception):
    """A checkpoint that is not as it was written; the message says in what."""


def save_training_state(
    directory: Path,
    step: int,
    tensors: dict[str, Partitions],
    fragments: list[Fragment],
    *,
    numbers: dict[str, float],
    run: dict,
    layout: dict,
    world: World,
    keep: int,
) -> None:
    """A collective: each rank writes its fragments of `tensors`, then rank 0 publishes. The newest `keep` stay.

    `tensors` has for each kind one flat tensor a partition, or None; `numbers` are all else that this rank has to
    remember; `run`, rank 0's, says what is trained. Raises on all ranks alike when one of them cannot write: nothing
    has changed then.
    """
    final = directory / step_name(step)
    hidden = partial_name(final)

    def write() -> dict[str, dict]:
        with in_the_name_of(final, hidden):
            return {path.name: measure(path) for path in write_fragments(hidden, world.rank, tensors, fragments)}

    def write_state() -> None:
        files = {name: entry for rank in gathered for name, entry in rank["files"].items()}
        values = {"format": FORMAT, "step": step, "run": run, "layout": layout, "files": files}
        write_json(hidden / "state.json", seal(values | {"numbers": [rank["numbers"] for rank in gathered]}))

    with ExitStack() as publishing:
        on_rank_zero(world, lambda: publishing.enter_context(replacing_directory(final)))
        written = on_all_ranks(world, write)
        gathered = gather({"files": written, "numbers": finite(numbers)}, world)
        on_rank_zero(world, write_state)
        on_rank_zero(world, publishing.close)
    on_rank_zero(world, partial(remove_beyond, directory, keep))


def remove_beyond(directory: Path, keep: int) -> None:
    """Remove all but the newest checkpoints. One that cannot be removed costs space, not the run."""
    for old in complete_checkpoints(directory)[keep:]:
        try:
            remove_directory(old)
        except OSError as error:
            logger.warning(f"{old}: cannot be removed: {error.strerror or error}")


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """A state with the checksum of all else that is in it."""
    values = {key: value for key, value in values.items() if key != "xxh3"}
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return values | {"xxh3": xxhash.xxh3_64_hexdigest(canonical.encode())}


def finite(numbers: dict[str, float]) -> dict[str, float | str]:
    """JSON has no NaN and no infinities; "nan", "inf" and "-inf" stand for them."""
    return {key: value if math.isfinite(value) else str(value) for key, value in numbers.items()}


def write_fragments(
    directory: Path, rank: int, tensors: dict[str, Partitions], fragments: list[Fragment]
) -> Iterator[Path]:
    """File after file, so that host memory holds one of them at a time. At least one file, were it empty."""
    for number, chunk in enumerate(chunks(fragments, kinds=len(tensors))):
        path = directory / f"{rank_prefix(rank)}{number:03d}.safetensors"
        content = {f"{kind}/{p.name}": part.cpu() for p in chunk for kind, part in p.kinds(tensors)}
        save_tensors(content, path, {"fragments": FRAGMENTS.dump_json(chunk).decode()})
        yield path


def chunks(fragments: list[Fragment], kinds: int) -> Iterator[list[Fragment]]:
    """Runs of fragments that fill at most MAX_FILE_BYTES (or one fragment that is larger)."""
    chunk, size = [], 0
    for fragment in fragments:
        fragment_bytes = 4 * fragment.numel * kinds
        if chunk and size + fragment_bytes > MAX_FILE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(fragment)
        size += fragment_bytes
    yield chunk


def find_latest(directory: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; None when there is none at all. A collective.

    Damaged ones are passed over with a warning, on all ranks alike, and set aside as `*.damaged`, so that they do not
    count among the newest that are kept. The ranks share the work of reading the files. Raises UserError, and leaves
    all where it is, when every checkpoint is damaged, or one cannot be read for now.
    """
    damaged: dict[Path, str] = {}
    # On a shared file system one rank may see more than another: all look at what rank 0 sees.
    for path in on_rank_zero(world, lambda: complete_checkpoints(directory)):
        checkpoint, reason = on_all_ranks(world, partial(examine, path, world))
        reasons = [each for each in gather(reason, world) if each]
        if not reasons:
            on_rank_zero(world, partial(set_aside, damaged))
            return checkpoint
        damaged[path] = reasons[0]
    if damaged:
        told = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise shared(f"{directory}: every checkpoint is damaged ({told}); put a copy back, or start anew: --restart")
    return None


def require_whole(path: Path, world: World) -> Checkpoint:
    """A checkpoint whose every byte is as it was written. A collective; raises UserError on all ranks alike."""
    checkpoint, reason = on_all_ranks(world, partial(examine, path, world))
    for each in filter(None, gather(reason, world)):
        raise shared(f"{path}: damaged ({each})")
    assert checkpoint is not None
    return checkpoint


def examine(path: Path, world: World) -> tuple[Checkpoint | None, str]:
    """A checkpoint, and in what it is damaged as far as it is this rank's to look at it: "" where it is not.

    Raises UserError where that cannot be told because the file system fails.
    """
    try:
        checkpoint = read_state(path)
        mine = [name for name in sorted(checkpoint.state["files"]) if rank_in(name) % world.size == world.rank]
        damaged = [name for name in mine if not checkpoint.is_whole(name)]
        return checkpoint, f"{damaged[0]} is missing or not as it was written" if damaged else ""
    except Damaged as damage:
        return None, str(damage)
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be read: {error.strerror or error}; start again when it can, or move "
            f"{path} away to go on from the checkpoint before it"
        ) from None


def set_aside(damaged: dict[Path, str]) -> None:
    for path, reason in damaged.items():
        logger.warning(f"{path}: damaged ({reason}); the checkpoint before it is taken, this one is *.damaged now")
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def read_state(path: Path) -> Checkpoint:
    """Raises Damaged where its state.json is not as it was written, OSError where it cannot be read for now, UserError
    for a checkpoint of another format."""
    file = path / "state.json"
    try:
        state = parse_json(patiently(partial(read_bytes, file)), file)
    except DEFINITE:
        raise Damaged("state.json is missing") from None
    except (UserError, ValueError):
        raise Damaged("state.json is not as it was written") from None
    if isinstance(state, dict) and state.get("format") != FORMAT:
        raise UserError(f"{file}: format is {state.get('format')!r}, this version reads {FORMAT!r}")
    if not isinstance(state, dict) or seal(state) != state or not _is_state(state):
        raise Damaged("state.json is not as it was written")
    if path.name != step_name(state["step"]):
        raise Damaged(f"state.json is that of {step_name(state['step'])}")
    return Checkpoint(path, state)


def _is_state(state: dict[str, Any]) -> bool:
    """Whether a state, whoever sealed it, has all that a checkpoint is read by, and names no files but its own."""
    files, numbers = state.get("files"), state.get("numbers")
    return (
        type(state.get("step")) is int
        and isinstance(files, dict)
        and all(re.fullmatch(r"rank_\d{5}_\d{3,}\.safetensors", name) for name in files)
        and isinstance(numbers, list)
        and all(isinstance(each, dict) for each in (state.get("run"), state.get("layout"), *numbers))
    )


def load_into(
    checkpoint: Checkpoint, tensors: dict[str, Partitions], fragments: list[Fragment], *, layout: dict, world: World
) -> dict[str, float]:
    """Fill `tensors`, laid out as `fragments` says, from a checkpoint of any layout; -> this rank's numbers.

    In another layout numbers of equal keys are averaged over the ranks that wrote them. Raises UserError when the
    checkpoint lacks a parameter.
    """
    numbers = checkpoint.state["numbers"]
    same = checkpoint.state["layout"] == layout
    reader = Reader(checkpoint, ranks=[world.rank] if same else range(len(numbers)))
    for fragment in fragments:
        for kind, part in fragment.kinds(tensors):
            reader.fill(kind, fragment, part)
    if same:
        return {key: float(value) for key, value in numbers[world.rank].items()}
    before = checkpoint.state["layout"]
    differing = [key for key in layout if before.get(key) != layout[key]]
    written, now = (", ".join(f"{key} {each.get(key)}" for key in differing) for each in (before, layout))
    logger.info(f"{checkpoint.path}: written with {written}; this run has {now}: taken over tensor by tensor")
    return {key: sum(float(of_rank[key]) for of_rank in numbers) / len(numbers) for key in numbers[0]}


class Reader:
    """The tensors of a checkpoint by name, as `ranks` wrote them."""

    def __init__(self, checkpoint: Checkpoint, ranks) -> None:
        self.path, files = checkpoint.path, sorted(checkpoint.state["files"])
        self.ranks = 1 + max(map(rank_in, files), default=0)  # that wrote it: each has a file
        names = [name for name in files if rank_in(name) in ranks]
        try:
            self.files = [safe_open(checkpoint.path / name, "pt") for name in names]
        except SafetensorError as error:
            raise self._not_as_written(error) from None

    @cached_property
    def stored(self) -> dict[str, list[tuple[Any, Fragment]]]:
        """Parameter name -> (file, fragment in it)."""
        found = defaultdict(list)
        for file in self.files:
            try:
                fragments = FRAGMENTS.validate_json((file.metadata() or {}).get("fragments", ""))
                for shard in {fragment.shard for fragment in fragments}:
                    if not (0 <= shard.index < shard.count <= self.ranks and 0 < shard.blocks <= 3 and shard.dim >= 0):
                        raise ValueError(f"{shard} of {self.ranks} processes")
            except ValueError as error:  # also pydantic's
                raise self._not_as_written(error) from None
            for fragment in fragments:
                found[fragment.name].append((file, fragment))
        return found

    def _not_as_written(self, error: Exception) -> UserError:
        return UserError(f"{self.path}: is not as it was written: {error}")

    def fill(self, kind: str, fragment: Fragment, out: Tensor) -> None:
        """Set `out` (numel,) to the elements of a fragment, whoever wrote them."""
        stored = self.stored[fragment.name]
        if not stored:
            raise UserError(f"{self.path}: has no {fragment.name}, which the recipe's model needs")
        for _, other in stored:
            if other.whole_shape != fragment.whole_shape:
                raise UserError(
                    f"{self.path}: {fragment.name} has shape {other.whole_shape}, the recipe's model needs "
                    f"{fragment.whole_shape}"
                )
        if any(other.shard == fragment.shard for _, other in stored):
            self.fill_from_part(kind, fragment, out)
        elif fragment.first is not None and all(other.first is not None for _, other in stored):
            self.fill_from_runs(kind, fragment, out, stored, place=attrgetter("first"))
        else:
            part = fragment.shard.take(self.whole(kind, stored[0][1]))
            out.copy_(part.flatten()[fragment.start : fragment.start + fragment.numel])

    def fill_from_part(self, kind: str, fragment: Fragment, out: Tensor) -> None:
        """From fragments of the same part of the parameter."""
        same = [(file, other) for file, other in self.stored[fragment.name] if other.shard == fragment.shard]
        self.fill_from_runs(kind, fragment, out, same, place=attrgetter("start"))

    def fill_from_runs(
        self, kind: str, fragment: Fragment, out: Tensor, stored, place: Callable[[Fragment], int]
    ) -> None:
        """From fragments that `place` puts on one line with this one. Only what is needed is read."""
        begin, end, held = place(fragment), place(fragment) + fragment.numel, 0
        # Tensor-parallel ranks hold what is not cut several times over: the last copy counts, each like the others.
        for file, other in {place(other): (file, other) for file, other in stored}.values():
            low, high = max(begin, place(other)), min(end, place(other) + other.numel)
            if low < high:
                try:
                    run = file.get_slice(f"{kind}/{fragment.name}")[low - place(other) : high - place(other)]
                    out[low - begin : high - begin].copy_(run)
                except (SafetensorError, RuntimeError) as error:  # RuntimeError: fewer elements than it says
                    raise self._not_as_written(error) from None
                held += high - low
        if held != fragment.numel:
            name = f"{kind}/{fragment.name}"
            raise UserError(f"{self.path}: holds {held} of {fragment.numel} elements that are needed of {name}")

    def whole(self, kind: str, part: Fragment) -> Tensor:
        """The whole tensor that `part` is of: a parameter, a moment or average of one; float32 in host memory."""
        parts = []
        for index in range(part.shard.count):
            each = replace(part, shard=replace(part.shard, index=index), start=0, numel=part.size)
            parts.append(torch.empty(part.shape))
            self.fill_from_part(kind, each, parts[-1].view(-1))
        return part.shard.join(parts)


def latest_step(directory: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    return next((step_in(path.name) or 0 for path in complete_checkpoints(directory)), 0)


def complete_checkpoints(directory: Path) -> list[Path]:
    """Everything that has a checkpoint's name, newest first: such a name is given to complete ones only."""
    try:
        found = patiently(lambda: list(directory.iterdir()))
    except FileNotFoundError:
        return []
    steps = {path: step for path in found if (step := step_in(path.name)) is not None}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def step_in(name: str) -> int | None:
    """The step of a checkpoint or snapshot of that very name; None for every other name."""
    digits = name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() and name == step_name(int(digits)) else None


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_prefix(rank: int) -> str:
    return f"rank_{rank:05d}_"


def rank_in(file_name: str) -> int:
    return int(file_name.split("_")[1])
