"""The two sizes of the released code. A preset is the model part of a recipe; `latent_size` 64 is for 512 px."""

from mdit.config import ModelConfig

COMMON = dict(
    latent_channels=4,
    patch_size=2,
    multiple_of=256,
    caption_length=77,
    caption_channels=1024,
    norm_eps=1e-6,
    use_bias=False,
    qkv_ratio=(0.5, 1.0),
    ffn_ratio=(0.5, 4.0),
    use_patch_mixer=True,
    mixer_qkv_ratio=1.0,
    mixer_ffn_ratio=4.0,
    num_experts=8,
    capacity_factor=2.0,
    experts_every_n=2,
)


def tiny_2(latent_size: int = 32, **changes) -> ModelConfig:
    """MicroDiT_Tiny_2: 200.7 M parameters."""
    sizes = dict(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512)
    return _preset(latent_size, sizes, changes)


def xl_2(latent_size: int = 32, **changes) -> ModelConfig:
    """MicroDiT_XL_2: 1.165 B parameters, 0.604 B of them in experts."""
    sizes = dict(dim=1024, depth=28, head_dim=64, mixer_depth=6, mixer_dim=768)
    return _preset(latent_size, sizes, changes)


def _preset(latent_size: int, sizes: dict, changes: dict) -> ModelConfig:
    scale = {"latent_size": latent_size, "pos_interp_scale": latent_size / 32}
    return ModelConfig(**{**COMMON, **sizes, **scale, **changes})
