"""The two sizes of the released code. A preset is the model part of a recipe; `latent_size` 64 is for 512 px."""

from mdit.config import CONFIGS, ModelConfig, load_config


def tiny_2(latent_size: int = 32, **changes) -> ModelConfig:
    """MicroDiT_Tiny_2: 200.7 M parameters."""
    return xl_2(latent_size, **{**dict(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512), **changes})


def xl_2(latent_size: int = 32, **changes) -> ModelConfig:
    """MicroDiT_XL_2, the paper's: 1.165 B parameters, 0.604 B of them in experts."""
    paper = load_config(CONFIGS / "res_256_pretrain.toml").model.model_dump()
    return ModelConfig(**paper | {"latent_size": latent_size, "pos_interp_scale": latent_size / 32} | changes)
