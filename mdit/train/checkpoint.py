"""Checkpoints, for resume: the same command again goes on where the last complete one was written.

    checkpoints/step_00000250/rank_00000.safetensors   each rank's masters, Adam moments, EMA and loss sums
                              state.json               step, layout, size and xxh3 of every file; written last

A directory appears under its final name only when every byte of it is on disk; until then it is `*.partial`.
"""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed
from safetensors.torch import load_file, save_file
from torch import Tensor

from mdit.config import UserError
from mdit.dist import World, logger
from mdit.files import checksum, sync


def save_training_state(
    directory: Path, step: int, tensors: dict[str, Tensor], *, layout: dict, world: World, keep: int
) -> None:
    """A collective: each rank writes `tensors`, rank 0 publishes. The newest `keep` checkpoints stay."""
    final, partial = directory / step_name(step), directory / (step_name(step) + ".partial")
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    path = partial / rank_file(world.rank)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
    described = gather({path.name: {"bytes": path.stat().st_size, "xxh3": checksum(path)}}, world)
    if world.is_first:
        files = {name: entry for part in described for name, entry in part.items()}
        state = partial / "state.json"
        state.write_text(json.dumps({"step": step, "layout": layout, "files": files}, indent=1))
        sync(state)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync(directory)
        for old in complete_checkpoints(directory)[keep:]:
            shutil.rmtree(old)
    torch.distributed.barrier()


def load_latest(directory: Path, *, layout: dict, world: World) -> tuple[int, dict[str, Tensor]] | None:
    """(step, this rank's tensors) of the newest checkpoint that is whole; None when there is none.

    A damaged checkpoint is passed over with a warning, on all ranks alike. Raises UserError when the newest one was
    written by another layout (world size, ZeRO stage, precision): its partitions would not fit.
    """
    for path in complete_checkpoints(directory):
        state = read_state(path, layout)
        file = path / rank_file(world.rank)
        entry = state["files"][file.name]
        whole = file.exists() and file.stat().st_size == entry["bytes"] and checksum(file) == entry["xxh3"]
        if all(gather(whole, world)):
            return state["step"], load_file(file)
        logger.warning(f"{path}: damaged (a file is missing or its checksum is wrong); trying the one before")
    return None


def read_state(path: Path, layout: dict) -> dict:
    """A checkpoint's state.json. Raises UserError naming both layouts when it was written by another one."""
    state = json.loads((path / "state.json").read_text())
    if state["layout"] != layout:
        raise UserError(
            f"{path}: written with {state['layout']}, but this run has {layout}; resume with the same layout, or "
            "start a new --run_dir with --init_from and the run's snapshot"
        )
    return state


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


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def gather(value, world: World) -> list:
    """One small object of every rank, on every rank."""
    values = [None] * world.size
    torch.distributed.all_gather_object(values, value)
    return values
