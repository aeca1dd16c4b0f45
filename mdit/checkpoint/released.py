"""Weights as the paper's authors published them: a state dict of tensors, recognised by its shapes, made a snapshot."""

import math
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdit.checkpoint.snapshot import check_numbers, check_weights, save_snapshot
from mdit.config import CONFIGS, DEFAULT_RECIPE, ModelConfig, TrainConfig, load_config, parse_section, portable
from mdit.documents import UserError, one_line
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


def import_released(source: Path, out: Path) -> str:
    """Write `out`, a snapshot of one set of weights (raw, no EMA), at step 0 of a run that has not begun -> a line that
    says what was found. Raises UserError naming what does not fit."""
    if out.exists():
        raise UserError(f"{out}: exists already")
    weights, dropped = _network_weights(_load_tensors(source), source)
    name, model = recognise(weights, source)
    if (claimed := sum(value.nbytes for value in weights.values())) > (size := source.stat().st_size):
        raise UserError(f"{source}: has {size} bytes, and its tensors would take {claimed}")
    check_numbers(weights, source, DTYPES)
    if model.latent_channels not in IMAGE_ENCODERS:
        raise UserError(f"no autoencoder of {model.latent_channels} channels is known, only of {list(IMAGE_ENCODERS)}")
    text = {"id": TEXT_ENCODER, "max_tokens": model.caption_length, "channels": model.caption_channels}
    config_json = {"recipe": portable(_recipe(model, source), DEFAULT_RECIPE), "imported_from": one_line(source.name)}
    encoders = {"image": IMAGE_ENCODERS[model.latent_channels], "text": text}
    save_snapshot(out, step=0, config_json=config_json, raw=weights, ema=None, encoders=encoders)
    found = f"{name}, {model.latent_channels} channels, latents of {model.latent_size} x {model.latent_size}"
    return found + f"; {dropped} entries of other networks (autoencoder, text encoder) left out" * bool(dropped)


def _load_tensors(source: Path) -> dict[str, Any]:
    """The file's content, by PyTorch's loader that builds tensors and containers and runs nothing."""
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:  # as torch.save packs it: another one may unpack to anything
                if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                    raise ValueError("compressed")
                if member := archive.testzip():  # PyTorch compares no checksum
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


def _network_weights(state: dict[str, Any], source: Path) -> tuple[dict[str, Tensor], int]:
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


def _recipe(model: ModelConfig, source: Path) -> TrainConfig:
    """The paper's last recipe at this resolution with this model, and no EMA: the file holds one set of weights."""
    base = "res_512_finetune.toml" if model.latent_size > 32 else "res_256_finetune.toml"
    values = load_config(CONFIGS / base).model_dump()
    return parse_section(TrainConfig, {**values, "model": model.model_dump(), "ema": None}, source)
