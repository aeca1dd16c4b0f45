"""Snapshots: the small directory that a trained model is used from (a checkpoint, to resume from, is another thing).

    snapshots/step_00001000/raw.safetensors   the weights: a full float32 state dict, buffers included
                            ema.safetensors   their moving average, when the recipe has an [ema] section
                            config.json       {"recipe": ..., "step": 1000, ...}; itself a valid --recipe
                            encoders.json     the frozen encoders: how to embed a caption and decode latents
    snapshots/latest -> step_00001000

A directory appears under its name only when all of it is on disk. Nothing here is ever unpickled.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mdit.config import ModelConfig, TrainConfig, UserError, load_config
from mdit.files import save_tensors, sync
from mdit.models import MicroDiT

WeightKind = Literal["ema", "raw"]

# Model keys that change no weight but the position embedding, which is rebuilt when one of the first two differs.
POSITION_KEYS = ("latent_size", "pos_interp_scale")
FREE_KEYS = POSITION_KEYS + ("capacity_factor", "caption_length")


@dataclass(frozen=True)
class Snapshot:
    """`path` is the directory itself, never the `latest` link; `encoders` is as in a latent data set's manifest."""

    path: Path
    step: int
    config: TrainConfig
    encoders: dict[str, Any]

    def weights_file(self, kind: WeightKind = "ema") -> Path:
        """ "ema" means "raw" when the recipe has no EMA."""
        return self.path / ("ema.safetensors" if kind == "ema" and self.config.ema else "raw.safetensors")

    def weights(self, kind: WeightKind = "ema") -> dict[str, Tensor]:
        """State dict on the CPU, checked against the recipe's model.

        Raises UserError when the file is missing or damaged, or does not fit the recipe.
        """
        path = self.weights_file(kind)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read the weights: {error}") from None
        check_weights(weights, self.config.model, path)
        return weights


def save_snapshot(
    directory: str | Path,
    *,
    step: int,
    config_json: dict[str, Any],
    raw: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    encoders: dict[str, Any],
) -> Path:
    """Write `directory/step_XXXXXXXX`, then point `directory/latest` at it. One process only. -> its path

    A snapshot of the same step (left by a run that was stopped and went on from before it) is replaced.
    """
    path = Path(directory) / f"step_{step:08d}"
    write_snapshot(path, step=step, config_json=config_json, raw=raw, ema=ema, encoders=encoders)
    link = path.parent / ".latest.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.parent / "latest")
    sync(path.parent)
    return path


def write_snapshot(
    path: Path,
    *,
    step: int,
    config_json: dict[str, Any],
    raw: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    encoders: dict[str, Any],
) -> None:
    """Write a snapshot at `path`: under a hidden name beside it first, renamed when it is complete and on disk."""
    partial, replaced = (path.parent / f".{path.name}.{state}" for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    for kind, weights in (("raw", raw), ("ema", ema)):
        if weights is not None:
            full = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in weights.items()}
            save_tensors(full, partial / f"{kind}.safetensors")
    (partial / "config.json").write_text(json.dumps({**config_json, "step": step}, indent=2) + "\n", encoding="utf-8")
    (partial / "encoders.json").write_text(json.dumps(encoders, indent=2) + "\n", encoding="utf-8")
    for file in (*partial.iterdir(), partial):
        sync(file)
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load_snapshot(path: str | Path) -> Snapshot:
    """Read all but the weights. Raises UserError naming the file that is missing or damaged."""
    path = Path(path)
    for name in ("config.json", "encoders.json", "raw.safetensors"):
        if not (path / name).is_file():
            latest = path / "snapshots" / "latest"
            hint = f"; did you mean {latest}?" if latest.exists() else ""
            raise UserError(f"{path}: not a snapshot: it has no {name}{hint}")
    path = path.resolve()
    config = load_config(path / "config.json")
    return Snapshot(path, _read_json(path / "config.json").get("step", 0), config, _read_json(path / "encoders.json"))


def load_model(snapshot: Snapshot, kind: WeightKind = "ema", device: torch.device | str = "cpu") -> MicroDiT:
    """The snapshot's network, float32, in eval mode and without gradients."""
    with torch.device("meta"):  # nothing is drawn: every weight comes from the file
        model = MicroDiT(snapshot.config.model)
    model.load_state_dict(snapshot.weights(kind), strict=True, assign=True)
    return model.to(device).eval().requires_grad_(False)


def initial_weights(snapshot: Snapshot, model: ModelConfig, kind: WeightKind = "ema") -> dict[str, Tensor]:
    """What a new run of `model` starts from: the snapshot's EMA (its raw weights if its recipe has none).

    `pos_embed` is left out, to be rebuilt, when latent_size or pos_interp_scale differ (as from 256 to 512 px). Any
    other difference that weights depend on raises a UserError naming the key and both values.
    """
    old, new = snapshot.config.model.model_dump(), model.model_dump()
    differing = [key for key in new if old[key] != new[key]]
    fixed = [key for key in differing if key not in FREE_KEYS]
    if fixed:
        clauses = "; ".join(f"model.{key} is {old[key]}, the new recipe's is {new[key]}" for key in fixed)
        raise UserError(f"{snapshot.path}: cannot initialise from this snapshot: {clauses}")
    weights = snapshot.weights(kind)
    if any(key in POSITION_KEYS for key in differing):
        del weights["pos_embed"]
    return weights


def check_weights(weights: dict[str, Tensor], model: ModelConfig, source: str | Path) -> None:
    """Raise UserError unless the names and shapes are exactly those of MicroDiT(model)."""
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in MicroDiT(model).state_dict().items()}
    found = {name: tuple(t.shape) for name, t in weights.items()}
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{source}: has no {name}, which the recipe's model needs with shape {shape}")
        if found[name] != shape:
            raise UserError(f"{source}: {name} has shape {found[name]}, the recipe's model needs {shape}")
    for name, shape in found.items():
        if name not in wanted:
            raise UserError(f"{source}: {name} {shape} belongs to no part of the recipe's model")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
