"""The smallest complete recipe and sets for it: 16 patches of 2 x 2 latent pixels, every kind of block, nothing large.

Runs of it are real, on CPUs, in steps of some hundredths of a second: for tests and for tools/torture.py.
"""

import json
from pathlib import Path

import numpy as np

from mdit.config import TrainConfig
from mdit.data.writer import SHARD_BYTES, ShardWriter

TINY = {
    "name": "tiny",
    "seed": 0,
    "model": {
        "latent_size": 8,
        "latent_channels": 4,
        "patch_size": 2,
        "dim": 32,
        "depth": 4,
        "head_dim": 8,
        "multiple_of": 16,
        "caption_length": 5,
        "caption_channels": 12,
        "pos_interp_scale": 1.0,
        "norm_eps": 1e-6,
        "use_bias": False,
        "qkv_ratio": (0.5, 1.0),
        "ffn_ratio": (0.5, 4.0),
        "use_patch_mixer": True,
        "mixer_depth": 2,
        "mixer_dim": 24,
        "mixer_qkv_ratio": 1.0,
        "mixer_ffn_ratio": 4.0,
        "num_experts": 4,
        "capacity_factor": 2.0,
        "experts_every_n": 2,
    },
    "noise": {"P_mean": -0.6, "P_std": 1.2, "sigma_data": 0.9},
    "data": {"train": ("data/tiny/train",), "validation": "data/tiny/validation", "caption_drop": 0.1},
    "training": {"num_steps": 4, "global_batch_size": 8, "mask_ratio": 0.75},
    "optim": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 0.25,
        "warmup_steps": 2,
        "schedule": "cosine",
        "final_lr_ratio": 0.33,
    },
    "ema": {"decay": 0.9, "start_step": 1},
    "report": {
        "log_every": 1,
        "validate_every": 0,
        "sample_every": 0,
        "snapshot_every": 0,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
        "prompts": "validation",
        "num_samples": 2,
        "guidance": 5.0,
        "sampler_steps": 3,
    },
}
# Decodes by itself and embeds nothing: enough for runs whose prompts are the validation set's.
ENCODERS = {"image": {"id": "pixels", "scale": 1.0}, "text": {"id": "none", "max_tokens": 3, "channels": 64}}


def tiny_config(**changes) -> TrainConfig:
    """The tiny recipe, changed: tiny_config(seed=1, training={"num_steps": 9}) leaves the rest of [training] alone."""
    recipe = dict(TINY)
    for key, value in changes.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) and recipe.get(key) else value
    as_json = json.dumps(recipe, default=lambda section: section.model_dump(mode="json"))
    return TrainConfig.model_validate_json(as_json)  # where a list may stand for a tuple


def write_shards(directory: Path, config: TrainConfig, samples: int, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Random latents whose mean depends on the caption, so that there is something to learn."""
    model, rng = config.model, np.random.default_rng(seed)
    latent_shape = (model.latent_channels, model.latent_size, model.latent_size)
    embedding_shape = (model.caption_length, model.caption_channels)
    features_shape, encoders = None, dict(ENCODERS)
    if config.align is not None:
        features_shape, encoders["features"] = (model.num_patches, config.align.channels), {"id": config.align.tower}
    with ShardWriter(
        directory, latent_shape, embedding_shape, encoders, {}, shard_bytes, features_shape=features_shape
    ) as writer:
        for i in range(samples):
            kind = i % 3
            embedding = np.full(embedding_shape, kind - 1, dtype=np.float16)
            latent = rng.normal(kind - 1, 0.3, latent_shape).astype(np.float16)
            features = None if features_shape is None else np.random.default_rng(i).normal(kind, 1, features_shape)
            writer.write(f"{i:06d}", latent, embedding, f"kind {kind}", features)
