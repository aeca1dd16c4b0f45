"""Released MicroDiT weights to a snapshot and back.

    python tools/convert_checkpoint.py import dit_4_channel_37M_real_and_synthetic_data.pt snapshots/released
    python tools/convert_checkpoint.py export runs/res_512_finetune/snapshots/latest dit.pt --weights ema

`import` takes the state dict of the network alone (the published files), of the whole latent-diffusion model, or a
Composer checkpoint of it. Size, channels and resolution are recognised from the shapes. Only tensors are ever read: a
file that would have to be unpickled is refused. Weights are stored as float32, and those come back bit for bit.
"""

import argparse
import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdit.config import DEFAULT_RECIPE, ModelConfig, TrainConfig, UserError, load_config, parse_section
from mdit.models import presets
from mdit.snapshot import check_weights, load_snapshot, write_snapshot

PRESETS = {"xl_2": presets.xl_2, "tiny_2": presets.tiny_2}
FIRST_LAYER = "x_embedder.proj.weight"
CAPTION_LAYER = "y_embedder.y_proj.fc1.weight"

# What the released models' latents are decoded and their captions embedded with (`create_latent_diffusion`), by latent
# channels. An autoencoder without a scale here brings its own.
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
    recipe = recipe_for(model, source)
    write_snapshot(
        out,
        step=0,
        config_json={"recipe": recipe.model_dump(mode="json", exclude_none=True), "imported_from": source.name},
        raw=weights,
        ema=None,
        encoders=encoders_for(model),
    )
    print(f"{out}: {name}, {model.latent_channels} channels, latents of {model.latent_size} x {model.latent_size}")
    if dropped:
        print(f"{dropped} entries of other networks (autoencoder, text encoder) left out")


def export_checkpoint(snapshot: Path, out: Path, kind: str) -> None:
    """Write a plain state dict, as the released code's network loads it."""
    if not out.parent.is_dir():
        raise UserError(f"{out}: the directory {out.parent} does not exist")
    torch.save(load_snapshot(snapshot).weights(kind), out)
    print(out)


def load_tensors(source: Path) -> dict[str, Any]:
    """The file's content, by PyTorch's loader that builds tensors and containers and runs nothing."""
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{source}: cannot read: {error.strerror}") from None
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it would run {blocked[1]}" if blocked else "damaged, or not written by torch.save"
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
    return own, len(state) - len(own)


def recognise(weights: dict[str, Tensor], source: Path) -> tuple[str, ModelConfig]:
    """The preset whose shapes these are. Raises UserError naming the first parameter that does not fit."""
    for name in (FIRST_LAYER, CAPTION_LAYER, "pos_embed"):
        if name not in weights:
            raise UserError(f"{source}: has no {name}, which every MicroDiT has")
    dim, channels, patch_size, _ = weights[FIRST_LAYER].shape
    latent_size = math.isqrt(weights["pos_embed"].shape[1]) * patch_size
    known = {name: preset().dim for name, preset in PRESETS.items()}
    for name, width in known.items():
        if width == dim:
            caption_channels = weights[CAPTION_LAYER].shape[1]
            model = PRESETS[name](latent_size, latent_channels=channels, caption_channels=caption_channels)
            check_weights(weights, model, f"{source} ({name})")
            return name, model
    raise UserError(f"{source}: width {dim} is of no known model ({known})")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser("import", help="a released .pt to a snapshot")
    importing.add_argument("source", type=Path)
    importing.add_argument("out", type=Path, help="the snapshot directory to write")
    exporting = commands.add_parser("export", help="a snapshot to a .pt that the released code loads")
    exporting.add_argument("snapshot", type=Path)
    exporting.add_argument("out", type=Path)
    exporting.add_argument("--weights", choices=("ema", "raw"), default="ema")
    args = parser.parse_args()
    try:
        if args.command == "import":
            import_checkpoint(args.source, args.out)
        else:
            export_checkpoint(args.snapshot, args.out, args.weights)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
