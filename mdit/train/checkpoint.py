"""Checkpoints, for resume: the same command again goes on where the last complete one was written.

    checkpoints/step_00000250/rank_00000_000.safetensors   this rank's pieces of masters, moments and EMA; at most 1 GiB
                              rank_00000_001.safetensors   ... and so on
                              state.json                   step, layout, size and xxh3 of every file; written last

A directory appears under its final name only when every byte of it is on disk; until then it is `*.partial`. There is
no pointer that could point elsewhere: the newest directory is the latest checkpoint.

Every tensor is a piece of one parameter, named KIND/PARAMETER, and the file's header says which elements it holds. A
run of the same layout reads its own pieces back as they are, bit for bit. A run of another layout (processes, ZeRO
stage, expert or tensor parallelism) takes its elements from whichever files hold them: the same numbers, with at most
one tensor in memory at a time. Nothing here is ever unpickled.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import safe_open
from torch import Tensor

from mdit.config import UserError
from mdit.dist import World, logger
from mdit.files import checksum, save_tensors, sync
from mdit.train.pieces import Piece, from_json, to_json

FORMAT = "mdit-checkpoint/2"
MAX_FILE_BYTES = 2**30  # bounds the copy in host memory that a file is written from


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, or one that is to be checked; `state` is its state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    def files_of(self, rank: int) -> list[Path]:
        return [self.path / name for name in sorted(self.state["files"]) if name.startswith(rank_prefix(rank))]

    def is_whole(self, name: str) -> bool:
        file, entry = self.path / name, self.state["files"][name]
        return file.exists() and file.stat().st_size == entry["bytes"] and checksum(file) == entry["xxh3"]


def save_training_state(
    directory: Path,
    step: int,
    tensors: dict[str, list[Tensor]],
    pieces: list[Piece],
    *,
    memory: dict[str, float],
    layout: dict,
    world: World,
    keep: int,
) -> None:
    """A collective: each rank writes its pieces of `tensors`, then rank 0 publishes. The newest `keep` stay.

    `tensors` has for each kind one flat tensor a partition; `memory` are the numbers that this rank has to remember.
    """
    final, partial = directory / step_name(step), directory / (step_name(step) + ".partial")
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    described = {path.name: describe(path) for path in write_pieces(partial, world.rank, tensors, pieces)}
    gathered = gather({"files": described, "memory": memory}, world)
    if world.is_first:
        state = partial / "state.json"
        files = {name: entry for rank in gathered for name, entry in rank["files"].items()}
        values = {"format": FORMAT, "step": step, "layout": layout, "files": files}
        text = json.dumps(values | {"memory": [rank["memory"] for rank in gathered]}, indent=1)
        state.write_text(text, encoding="utf-8")
        sync(state)
        sync(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(directory)
        for old in complete_checkpoints(directory)[keep:]:
            shutil.rmtree(old)
    torch.distributed.barrier()


def write_pieces(directory: Path, rank: int, tensors: dict[str, list[Tensor]], pieces: list[Piece]) -> Iterator[Path]:
    """File after file, so that host memory holds one of them at a time. At least one file, were it empty."""
    for number, chunk in enumerate(chunks(pieces, kinds=len(tensors))):
        path = directory / f"{rank_prefix(rank)}{number:03d}.safetensors"
        content = {f"{kind}/{p.name}": p.of(flat).to("cpu", copy=True) for kind, flat in tensors.items() for p in chunk}
        save_tensors(content, path, {"pieces": to_json(chunk)})
        yield path


def chunks(pieces: list[Piece], kinds: int) -> Iterator[list[Piece]]:
    """Runs of pieces that fill at most MAX_FILE_BYTES (or one piece that is larger)."""
    chunk, size = [], 0
    for piece in pieces:
        piece_bytes = 4 * piece.numel * kinds
        if chunk and size + piece_bytes > MAX_FILE_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(piece)
        size += piece_bytes
    yield chunk


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": checksum(path)}


def find_latest(directory: Path, world: World) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; None when there is none. A collective.

    A damaged one is passed over with a warning, on all ranks alike, and set aside as `*.damaged`, so that it does not
    count among the newest that are kept. The ranks share the work of reading the files.
    """
    for path in gather(complete_checkpoints(directory), world)[0]:  # on a shared file system one sees more than another
        checkpoint = read_state(path)
        found = [name for names in gather(damaged_files(checkpoint, world), world) for name in names]
        if not found:
            return checkpoint
        if world.is_first:
            logger.warning(f"{path}: damaged ({found[0]} is missing or not as it was written); trying the one before")
            set_aside(path)
    return None


def damaged_files(checkpoint: Checkpoint | None, world: World) -> list[str]:
    """Of those that are this rank's to check."""
    if checkpoint is None:
        return ["state.json"]
    mine = [name for name in checkpoint.state["files"] if rank_in(name) % world.size == world.rank]
    return [name for name in mine if not checkpoint.is_whole(name)]


def set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def read_state(path: Path) -> Checkpoint | None:
    """None where its state.json is damaged. Raises UserError for a checkpoint of another format."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if state.get("format") != FORMAT:
        raise UserError(f"{path / 'state.json'}: format is {state.get('format')!r}, this version reads {FORMAT!r}")
    return Checkpoint(path, state)


def load_into(
    checkpoint: Checkpoint, tensors: dict[str, list[Tensor]], pieces: list[Piece], *, layout: dict, world: World
) -> dict[str, float]:
    """Fill `tensors`, laid out as `pieces` says, from a checkpoint of any layout; -> this rank's `memory`.

    In another layout memories of equal keys are averaged over the ranks that wrote them. Raises UserError when the
    checkpoint lacks a parameter.
    """
    memories = checkpoint.state["memory"]
    same = checkpoint.state["layout"] == layout
    reader = Reader(checkpoint, ranks=[world.rank] if same else range(len(memories)))
    for piece in pieces:
        for kind, flat in tensors.items():
            reader.fill(kind, piece, piece.of(flat))
    if same:
        return memories[world.rank]
    before = checkpoint.state["layout"]
    differing = [key for key in layout if before.get(key) != layout[key]]
    written, now = (", ".join(f"{key} {each.get(key)}" for key in differing) for each in (before, layout))
    logger.info(f"{checkpoint.path}: written with {written}; this run has {now}: taken over tensor by tensor")
    return {key: sum(memory[key] for memory in memories) / len(memories) for key in memories[0]}


class Reader:
    """The tensors of a checkpoint by name, as `ranks` wrote them."""

    def __init__(self, checkpoint: Checkpoint, ranks) -> None:
        self.path = checkpoint.path
        self.files = [safe_open(file, "pt") for rank in ranks for file in checkpoint.files_of(rank)]

    @cached_property
    def stored(self) -> dict[str, list[tuple[Any, Piece]]]:
        """Parameter name -> (file, piece in it)."""
        found = defaultdict(list)
        for file in self.files:
            for piece in from_json(file.metadata()["pieces"]):
                found[piece.name].append((file, piece))
        return found

    def fill(self, kind: str, piece: Piece, out: Tensor) -> None:
        """Set `out` (numel,) to the elements of a piece, whoever wrote them."""
        stored = self.stored[piece.name]
        if not stored:
            raise UserError(f"{self.path}: has no {piece.name}, which the recipe's model needs")
        if same_part := [(file, other) for file, other in stored if other.shard == piece.shard]:
            self.fill_from_runs(kind, piece, out, same_part, place=attrgetter("start"))
        elif piece.first is not None and all(other.first is not None for _, other in stored):
            self.fill_from_runs(kind, piece, out, stored, place=attrgetter("first"))
        else:
            part = piece.shard.take(self.whole(kind, piece.name))
            out.copy_(part.flatten()[piece.start : piece.start + piece.numel])

    def fill_from_runs(self, kind: str, piece: Piece, out: Tensor, stored, place: Callable[[Piece], int]) -> None:
        """From pieces that `place` puts on one line with this one. Only what is needed is read."""
        begin, end, held = place(piece), place(piece) + piece.numel, 0
        # Tensor-parallel ranks hold what is not cut several times over: the last copy counts, each like the others.
        for file, other in {place(other): (file, other) for file, other in stored}.values():
            low, high = max(begin, place(other)), min(end, place(other) + other.numel)
            if low < high:
                run = file.get_slice(f"{kind}/{piece.name}")[low - place(other) : high - place(other)]
                out[low - begin : high - begin].copy_(run)
                held += high - low
        self.check_all_there(kind, piece.name, held, piece.numel)

    def whole(self, kind: str, name: str) -> Tensor:
        """A parameter's whole tensor, or a moment's or average's of it, float32 in host memory."""
        stored = self.stored[name]
        first = stored[0][1]
        parts = [torch.empty(first.size) for _ in range(first.shard.count)]
        spans = {(piece.shard.index, piece.start): (file, piece) for file, piece in stored}
        for (index, start), (file, piece) in spans.items():
            parts[index][start : start + piece.numel] = file.get_tensor(f"{kind}/{name}")
        held = sum(piece.numel for _, piece in spans.values())
        self.check_all_there(kind, name, held, first.size * first.shard.count)
        return first.shard.join([part.view(first.shape) for part in parts])

    def check_all_there(self, kind: str, name: str, held: int, needed: int) -> None:
        if held != needed:
            raise UserError(f"{self.path}: holds {held} of {needed} elements that are needed of {kind}/{name}")


def latest_step(directory: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    complete = complete_checkpoints(directory)
    return int(complete[0].name.removeprefix("step_")) if complete else 0


def complete_checkpoints(directory: Path) -> list[Path]:
    """Newest first."""
    found = directory.glob("step_*[0-9]") if directory.is_dir() else ()
    return sorted((path for path in found if (path / "state.json").exists()), reverse=True)


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def rank_prefix(rank: int) -> str:
    return f"rank_{rank:05d}_"


def rank_in(file_name: str) -> int:
    return int(file_name.split("_")[1])


def gather(value, world: World) -> list:
    """One small object of every rank, on every rank."""
    values = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values
