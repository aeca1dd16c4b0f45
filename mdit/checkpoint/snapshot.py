"""Snapshots: the small directory that a trained model is used from (a checkpoint, to resume from, is another thing).

    snapshots/step_00001000/raw.safetensors   the weights: a full float32 state dict, buffers included
                            ema.safetensors   their moving average, when the recipe has an [ema] section
                            config.json       {"recipe": ..., "step": 1000, ...}; itself a valid --recipe
                            encoders.json     the frozen encoders: how to embed a caption and decode latents
                            checksums.json    {"config.json": {"bytes": 1687, "xxh3": "83d9..."}, ...}
    snapshots/latest -> step_00001000         a link, or a text file with that name where there are no links

A directory appears under its name only when all of it is on disk, and no file is used that is not what was written.
Nothing here is ever unpickled. `tools/convert_checkpoint.py seal` accepts a config.json or encoders.json that somebody
edited on purpose, as with the path that a tower has on another machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mdit.config import POSITION_KEYS, ModelConfig, TrainConfig, UserError, free_differences, load_config
from mdit.descriptions import check_descriptions
from mdit.documents import read_json
from mdit.files import follow, measure, point_to, replacing_directory, save_tensors, write_json
from mdit.models import MicroDiT

WeightKind = Literal["ema", "raw"]

DOCUMENTS = ("config.json", "encoders.json")
REQUIRED = (*DOCUMENTS, "raw.safetensors")
CHECKSUMS = "checksums.json"


@dataclass(frozen=True)
class Snapshot:
    """`path` is the directory itself, never the `latest` link; `encoders` is as in a latent data set's manifest;
    `checksums` is what checksums.json says of every file."""

    path: Path
    step: int
    config: TrainConfig
    encoders: dict[str, Any]
    checksums: dict[str, Any]

    def weights_file(self, kind: WeightKind = "ema") -> Path:
        """ "ema" means "raw" when there is no average."""
        averaged = kind == "ema" and (self.config.ema or "ema.safetensors" in self.checksums)
        return self.path / ("ema.safetensors" if averaged else "raw.safetensors")

    def weights(self, kind: WeightKind = "ema") -> dict[str, Tensor]:
        """State dict on the CPU, checked against the recipe's model.

        Raises UserError when the file is missing or damaged, does not fit the recipe, or holds NaN or infinities.
        """
        path = self.weights_file(kind)
        _compare(path, self.checksums)
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot read the weights: {error}") from None
        check_weights(weights, self.config.model, path)
        check_numbers(weights, path)
        return weights


def save_snapshot(
    path: Path,
    *,
    step: int,
    config_json: dict[str, Any],
    raw: dict[str, Tensor],
    ema: dict[str, Tensor] | None,
    encoders: dict[str, Any],
    latest: Path | None = None,
) -> None:
    """Write a snapshot at `path`, all of it or nothing, in place of what was there (a run that went on from before
    its step left it), then point `latest` at it. One process only. Raises UserError for weights that are not finite."""
    kinds = {kind: weights for kind, weights in (("raw", raw), ("ema", ema)) if weights is not None}
    with replacing_directory(path) as partial:
        for kind, weights in kinds.items():
            full = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in weights.items()}
            check_numbers(full, f"{path}: not written: {kind} weights")
            save_tensors(full, partial / f"{kind}.safetensors")
        write_json(partial / "config.json", {**config_json, "step": step})
        write_json(partial / "encoders.json", encoders)
        write_json(partial / CHECKSUMS, {file.name: measure(file) for file in sorted(partial.iterdir())})
    if latest is not None:
        point_to(latest, path.name)


def load_snapshot(path: str | Path) -> Snapshot:
    """Read all but the weights, whose sizes alone are checked. Raises UserError naming the file that is missing or not
    what was written."""
    directory, checksums = _open(path)
    return _read(directory, checksums)


def seal_snapshot(path: str | Path) -> Snapshot:
    """Accept the documents as they are now: once they, and weights that nobody touched, are a snapshot."""
    directory, checksums = _open(path)
    checksums |= {name: measure(directory / name) for name in DOCUMENTS}
    snapshot = _read(directory, checksums)
    snapshot.weights("raw")
    snapshot.weights("ema")
    write_json(directory / CHECKSUMS, checksums)
    return snapshot


def load_model(
    snapshot: Snapshot,
    kind: WeightKind = "ema",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weights: dict[str, Tensor] | None = None,
) -> MicroDiT:
    """The snapshot's network, or with other `weights` in place of its own, in eval mode and without gradients."""
    with torch.device("meta"):  # nothing is drawn: every weight comes from the file
        model = MicroDiT(snapshot.config.model)
    model.load_state_dict(snapshot.weights(kind) if weights is None else weights, strict=True, assign=True)
    return model.to(device, dtype).eval().requires_grad_(False)


def initial_weights(snapshot: Snapshot, model: ModelConfig, kind: WeightKind = "ema") -> dict[str, Tensor]:
    """Weights from which a new run of `model` starts: the snapshot's EMA (its raw weights if its recipe has none).

    `pos_embed` is left out, to be rebuilt, when latent_size or pos_interp_scale differ (as from 256 to 512 px). Any
    other difference that weights depend on raises a UserError naming the key and both values.
    """
    try:
        differing = free_differences(snapshot.config.model, model)
    except UserError as error:
        raise UserError(f"{snapshot.path}: cannot initialise from this snapshot: {error}") from None
    weights = snapshot.weights(kind)
    if any(key in POSITION_KEYS for key in differing):
        del weights["pos_embed"]
    return weights


def check_weights(weights: dict[str, Tensor], model: ModelConfig, source: str | Path) -> None:
    """Raise UserError unless names and shapes are exactly those of MicroDiT(model)."""
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


def check_numbers(weights: dict[str, Tensor], source: object, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> None:
    """Raise UserError naming the first tensor of another dtype, or with a NaN or an infinity in it."""
    for name, tensor in weights.items():
        if tensor.dtype not in dtypes:
            raise UserError(f"{source}: {name} is of {tensor.dtype}, not of {' or '.join(map(str, dtypes))}")
        if not tensor.isfinite().all():
            raise UserError(f"{source}: {name} is not finite")


def _open(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The directory that `path` names and what its checksums.json says."""
    path = Path(path)
    directory = follow(path)
    for name in (*REQUIRED, CHECKSUMS):
        if not (directory / name).is_file():
            latest = path / "snapshots" / "latest"
            hint = f"; did you mean {latest}?" if latest.exists() else ""
            raise UserError(f"{path}: not a snapshot: it has no {name}{hint}")
    file = directory.resolve() / CHECKSUMS
    content = read_json(file)
    checksums = content if isinstance(content, dict) else {}
    for name in {**dict.fromkeys(REQUIRED), **checksums}:
        entry = checksums.get(name)
        if not isinstance(entry, dict) or {*entry} != {"bytes", "xxh3"}:
            raise UserError(f"{file}: does not give bytes and xxh3 of {name}")
    return file.parent, checksums


def _read(directory: Path, checksums: dict[str, Any]) -> Snapshot:
    for name in checksums:
        _compare(directory / name, checksums, content=name in DOCUMENTS)
    file = directory / "config.json"
    config, step = load_config(file), read_json(file).get("step")
    if type(step) is not int or step < 0:
        raise UserError(f"{file}: step is {step!r}, which is no number of steps")
    file = directory / "encoders.json"
    return Snapshot(directory, step, config, check_descriptions(read_json(file), file), checksums)


def _compare(file: Path, checksums: dict[str, Any], content: bool = True) -> None:
    """Raise UserError unless a file has the size, and the content, that it was written with."""
    if file.name not in checksums or not file.is_file():
        raise UserError(f"{file}: is missing, here or in {CHECKSUMS}")
    written = checksums[file.name]
    found = measure(file) if content else {"bytes": file.stat().st_size, "xxh3": written["xxh3"]}
    if found != written:
        both = "{bytes} bytes, xxh3 {xxh3}".format_map
        way = f"; edited on purpose? tools/convert_checkpoint.py seal {file.parent}" if file.name in DOCUMENTS else ""
        raise UserError(f"{file}: damaged or changed: {both(found)}; {CHECKSUMS} says {both(written)}{way}")
