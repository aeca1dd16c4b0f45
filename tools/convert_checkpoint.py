"""Released MicroDiT weights to a snapshot and back; a snapshot whose documents were edited on purpose sealed again.

    python tools/convert_checkpoint.py import dit_4_channel_37M_real_and_synthetic_data.pt snapshots/released
    python tools/convert_checkpoint.py export runs/res_512_finetune/snapshots/latest dit.pt --weights ema
    python tools/convert_checkpoint.py seal runs/res_512_finetune/snapshots/latest

`import` takes the state dict of the network alone (the published files), of the whole latent-diffusion model, or a
Composer checkpoint of it. Size, channels and resolution are recognised from the shapes. Only tensors are ever read: a
file that would have to be unpickled is refused. Weights are stored as float32, and those come back bit for bit.

`seal` is for a config.json or encoders.json changed by hand, as when a tower has another path on this machine: it
checks the snapshot and writes what the two files are now into checksums.json. Weights must be those that were written.
"""

import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mdit import cli
from mdit.checkpoint.snapshot import check_numbers, check_weights, load_snapshot, seal_snapshot, write_snapshot
from mdit.config import DEFAULT_RECIPE, ModelConfig, TrainConfig, UserError, load_config, parse_section, portable
from mdit.documents import one_line
from mdit.files import replacing, try_to_write
from mdit.models import presets

PRESETS = {"xl_2": presets.xl_2, "tiny_2": presets.tiny_2}
FIRST_LAYER = "x_embedder.proj.weight"
CAPTION_LAYER = "y_embedder.y_proj.fc1.weight"
DIMENSIONS = {FIRST_LAYER: 4, CAPTION_LAYER: 2, "pos_embed": 3}  # of the parameters a model is recognised by
LARGEST = 512  # latents, for pictures of 4096 pixels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # float32 holds all of them

# Decoders of the released models' latents by latent channels, and the encoder of their captions
# (`create_latent_diffusion`). An autoencoder without a scale here brings its own.
IMAGE_ENCODERS = {
    4: {"id": "stabilityai/stable-diffusion-xl-base-1.0", "scale": 0.13025, "shift": 0.0},
    16: {"id": "ostris/vae-kl-f8-d16"},
}
TEXT_ENCODER = "openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378"


def import_checkpoint(source: Path, out: Path) -> None:
    """Write `out`, a snapshot of one set of weights (raw, no EMA), at step 0 of a run that has not begun."""
    if out.exists():
        raise UserError(f"{out}: exists already")
    weights, dropped = network_weights(load_tensors(source), source)
    name, model = recognise(weights, source)
    check_numbers(weights, source, DTYPES)
    recipe = recipe_for(model, source)
    write_snapshot(
        out,
        step=0,
        config_json={"recipe": portable(recipe, DEFAULT_RECIPE), "imported_from": one_line(source.name)},
        raw=weights,
        ema=None,
        encoders=encoders_for(model),
    )
    print(f"{out}: {name}, {model.latent_channels} channels, latents of {model.latent_size} x {model.latent_size}")
    if dropped:
        print(f"{dropped} entries of other networks (autoencoder, text encoder) left out")


def export_checkpoint(snapshot: Path, out: Path, kind: str, overwrite: bool = False) -> None:
    """Write a plain state dict, as the released code's network loads it."""
    if out.is_file() and not overwrite:
        raise UserError(f"{out}: exists already; --overwrite replaces it")
    try_to_write(out)
    weights = load_snapshot(snapshot).weights(kind)
    with replacing(out) as partial, open(partial, "wb") as file:
        save_pickled(weights, file)
    print(out)


def save_pickled(weights: dict[str, Tensor], file: IO[bytes]) -> None:
    """torch.save. Raises OSError where the disk is full, in place of PyTorch's own account of it."""
    try:
        torch.save(weights, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_tensors(source: Path) -> dict[str, Any]:
    """The file's content, by PyTorch's loader that builds tensors and containers and runs nothing."""
    try:
        if zipfile.is_zipfile(source) and (member := zipfile.ZipFile(source).testzip()):  # PyTorch compares no checksum
            raise ValueError(f"checksum of {member}")
        with warnings.catch_warnings(action="ignore"):  # of formats that PyTorch will give up
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # damage can raise whatever the loader stumbles over
        if isinstance(error, OSError) and error.filename:
            raise
        reason = "damaged, or not written by torch.save"
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = "damaged, or larger than the memory here"
        elif isinstance(error, pickle.UnpicklingError) and (blocked := re.search(r"GLOBAL (\S+)", str(error))):
            reason = f"it would run {blocked[1]}"
        raise UserError(f"{source}: refused, since it is no plain file of tensors: {reason}") from None
    for key in ("state", "model"):  # a Composer checkpoint
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, not a state dict")
    return {str(key): value for key, value in content.items()}


def network_weights(state: dict[str, Any], source: Path) -> tuple[dict[str, Tensor], int]:
    """The transformer's tensors without their prefix (`dit.`, `state.model.dit.`), and the number of other entries."""
    prefixes = [key.removesuffix(FIRST_LAYER) for key in state if key.endswith(FIRST_LAYER)]
    if len(prefixes) != 1:
        raise UserError(f"{source}: {FIRST_LAYER} occurs {len(prefixes)} times; a MicroDiT has it once")
    prefix = prefixes[0]
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    for key, value in own.items():
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserError(f"{source}: {key} is no plain tensor")
    return own, len(state) - len(own)


def recognise(weights: dict[str, Tensor], source: Path) -> tuple[str, ModelConfig]:
    """The preset whose shapes these are. Raises UserError naming the first parameter that does not fit."""
    for name, dimensions in DIMENSIONS.items():
        if name not in weights:
            raise UserError(f"{source}: has no {name}, which every MicroDiT has")
        if len(shape := tuple(weights[name].shape)) != dimensions:
            raise UserError(f"{source}: {name} has shape {shape}, and {dimensions} dimensions in a MicroDiT")
    dim, channels, patch_size, _ = weights[FIRST_LAYER].shape
    latent_size = math.isqrt(weights["pos_embed"].shape[1]) * patch_size
    if not 0 < latent_size <= LARGEST:
        raise UserError(f"{source}: pos_embed is of latents {latent_size} wide; at most {LARGEST} are known")
    known = {preset().dim: name for name, preset in PRESETS.items()}
    if (name := known.get(dim)) is None:
        raise UserError(f"{source}: width {dim} is of no known model ({known})")
    try:
        caption_channels = weights[CAPTION_LAYER].shape[1]
        model = PRESETS[name](latent_size, latent_channels=channels, caption_channels=caption_channels)
    except ValueError as error:
        raise UserError(f"{source}: no {name}: {error}") from None
    check_weights(weights, model, f"{source} ({name})")
    return name, model


def recipe_for(model: ModelConfig, source: Path) -> TrainConfig:
    """The paper's last recipe at this resolution with this model, and no EMA: the file holds one set of weights."""
    base = "res_512_finetune.toml" if model.latent_size > 32 else "res_256_finetune.toml"
    values = load_config(DEFAULT_RECIPE.parent / base).model_dump()
    return parse_section(TrainConfig, {**values, "model": model.model_dump(), "ema": None}, source)


def encoders_for(model: ModelConfig) -> dict[str, Any]:
    """Descriptions for `mdit.encoders`, as a latent data set's manifest has them."""
    if model.latent_channels not in IMAGE_ENCODERS:
        raise UserError(f"no autoencoder of {model.latent_channels} channels is known, only of {list(IMAGE_ENCODERS)}")
    text = {"id": TEXT_ENCODER, "max_tokens": model.caption_length, "channels": model.caption_channels}
    return {"image": IMAGE_ENCODERS[model.latent_channels], "text": text}


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="a released .pt to a snapshot")
    importing.add_argument("source", type=Path)
    importing.add_argument("out", type=Path, help="the snapshot directory to write")
    exporting = commands.add_parser("export", help="a snapshot to a .pt that the released code loads")
    exporting.add_argument("snapshot", type=Path)
    exporting.add_argument("out", type=Path)
    exporting.add_argument("--weights", choices=("ema", "raw"), default="ema")
    exporting.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    sealing = commands.add_parser("seal", help="accept the documents of a snapshot as they are now")
    sealing.add_argument("snapshot", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "import":
        import_checkpoint(args.source, args.out)
    elif args.command == "export":
        export_checkpoint(args.snapshot, args.out, args.weights, args.overwrite)
    else:
        print(seal_snapshot(args.snapshot).path)


if __name__ == "__main__":
    cli.run(main)
