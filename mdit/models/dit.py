"""MicroDiT (arXiv 2407.15811, section 2): patch-mixer, deferred masking, sparse backbone.

    latents (N, C, H, W) -> patches (N, T, D) -> patch-mixer sees all T -> drop to K kept -> backbone -> (N, C, H, W)

Parameter and buffer names and shapes are exactly those of the released checkpoints.
"""

from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mdit.config import ModelConfig
from mdit.masking import Mask, drop_tokens, restore_tokens
from mdit.models.layers import (
    CrossAttention,
    FinalLayer,
    Mlp,
    PatchEmbed,
    SelfAttention,
    SwiGLU,
    TimestepEmbedder,
    layer_norm,
    modulate,
    position_embedding,
    rotary_table,
    round_up,
)
from mdit.models.moe import ExpertChoiceMoE


class Block(nn.Module):
    """adaLN self-attention, cross-attention to the caption, adaLN feed-forward (dense SwiGLU, or experts)."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dim: int,
        qkv_ratio: float,
        ffn_ratio: float,
        has_experts: bool,
        out_std: float,
    ) -> None:
        super().__init__()
        eps, use_bias, head_dim = config.norm_eps, config.use_bias, config.head_dim
        width = dim if qkv_ratio == 1 else round_up(int(dim * qkv_ratio), 2 * head_dim)
        hidden = int(dim * ffn_ratio)
        self.out_std = out_std
        self.norm1 = layer_norm(dim, eps)
        self.attn = SelfAttention(dim, width, head_dim, eps, use_bias)
        self.norm2 = layer_norm(dim, eps)
        self.cross_attn = CrossAttention(dim, head_dim, eps, use_bias)
        self.norm3 = layer_norm(dim, eps)
        self.mlp = (
            ExpertChoiceMoE(dim, hidden, config.multiple_of, config.num_experts, config.capacity_factor)
            if has_experts
            else SwiGLU(dim, hidden, config.multiple_of, use_bias)
        )
        self.adaLN_modulation = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(config.dim, 6 * dim))

    def forward(
        self, x_NTD: Tensor, caption_NLD: Tensor, condition_ND: Tensor, rotary_NTC: Tensor | None = None
    ) -> Tensor:
        modulation = self.adaLN_modulation(condition_ND).unsqueeze(1)
        shift1, scale1, gate1, shift3, scale3, gate3 = modulation.chunk(6, dim=-1)
        x = x_NTD + gate1 * self.attn(modulate(self.norm1(x_NTD), shift1, scale1), rotary_NTC=rotary_NTC)
        x = x + self.cross_attn(self.norm2(x), caption_NLD)
        return x + gate3 * self.mlp(modulate(self.norm3(x), shift3, scale3))

    def init_weights(self) -> None:
        for layer in (self.attn, self.cross_attn, self.mlp):
            layer.init_weights(self.out_std)
        nn.init.zeros_(self.adaLN_modulation.get_parameter("1.weight"))


class CaptionBlock(nn.Module):
    """One plain attention block over the caption's tokens."""

    FFN_RATIO = 4

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, eps, use_bias = config.dim, config.norm_eps, config.use_bias
        self.norm1 = layer_norm(dim, eps)
        self.attn = SelfAttention(dim, dim, config.head_dim, eps, use_bias)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = SwiGLU(dim, self.FFN_RATIO * dim, config.multiple_of, use_bias)

    def forward(self, y_NLD: Tensor) -> Tensor:
        y = y_NLD + self.attn(self.norm1(y_NLD))
        return y + self.mlp(self.norm2(y))

    def init_weights(self) -> None:
        self.attn.init_weights(0.02)
        self.mlp.init_weights(0.02)
        nn.init.zeros_(self.attn.proj.weight)
        nn.init.zeros_(self.mlp.w3.weight)


class CaptionProjection(nn.Module):
    """(N, L, caption_channels) -> (N, L, D)"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.y_proj = Mlp(config.caption_channels, config.dim, config.norm_eps)

    def forward(self, caption_NLC: Tensor) -> Tensor:
        return self.y_proj(caption_NLC)


class MicroDiT(nn.Module):
    """The network F(c_in * x; c_noise, caption) inside EDM's preconditioning. Torch's global RNG draws the weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.x_embedder = PatchEmbed(patch, config.latent_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        for name, value in buffers(config).items():
            self.register_buffer(name, value)
        self.y_embedder = CaptionProjection(config)
        self.y_emb_preprocess = CaptionBlock(config)
        self.pooled_y_emb_process = Mlp(dim, dim, config.norm_eps)
        self.patch_mixer = cast(list[Block], nn.ModuleList(mixer_blocks(config)))
        if self.patch_mixer:
            self.patch_mixer_map_xin = projection(dim, config.mixer_dim, config)
            self.patch_mixer_map_xout = projection(config.mixer_dim, dim, config)
            self.patch_mixer_map_y = projection(dim, config.mixer_dim, config)
        self.blocks = cast(list[Block], nn.ModuleList(backbone_blocks(config)))
        self.final_layer = FinalLayer(dim, patch**2 * config.latent_channels, config.norm_eps)
        self.init_weights()

    @classmethod
    def without_weights(cls, config: ModelConfig, device: torch.device | str, dtype=torch.float32) -> "MicroDiT":
        """The network as wide as its memory, in which nothing is drawn: every weight is to come from elsewhere."""
        with torch.device("meta"):
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        for name, value in buffers(config).items():
            model.get_buffer(name).copy_(value)
        return model

    def forward(self, x_NCHW: Tensor, c_noise_N: Tensor, caption_NLC: Tensor, *, mask: Mask | None = None) -> Tensor:
        """-> (N, C, H, W) in the parameters' dtype. With a mask the backbone sees kept patches; the others are zero."""
        x, y, condition = self.embed(x_NCHW, c_noise_N, caption_NLC)
        x = self.transform(x, y, condition, mask)
        if mask is not None:
            x = restore_tokens(x, mask)
        return self.unpatchify(x)

    def embed(self, x_NCHW: Tensor, c_noise_N: Tensor, caption_NLC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> patches (N, T, D), caption (N, L, D), and what modulates the blocks, of noise level and caption (N, D)."""
        dtype = self.final_layer.linear.weight.dtype
        x = (self.x_embedder(x_NCHW.to(dtype)) + self.pos_embed).to(dtype)
        y = self.y_emb_preprocess(self.y_embedder(caption_NLC.to(dtype)))
        return x, y, self.t_embedder(c_noise_N) + self.pooled_y_emb_process(y.mean(dim=1))

    def transform(self, x_NTD: Tensor, caption_NLD: Tensor, condition_ND: Tensor, mask: Mask | None) -> Tensor:
        """Patch-mixer, deferred masking, backbone, head. -> (N, K, p * p * C) of the kept patches."""
        x = x_NTD
        if self.patch_mixer:
            x, caption_mixer = self.patch_mixer_map_xin(x), self.patch_mixer_map_y(caption_NLD)
            rotary = self.rotary(None)
            for block in self.patch_mixer:
                x = block(x, caption_mixer, condition_ND, rotary)
        if mask is not None:
            x = drop_tokens(x, mask)
        if self.patch_mixer:
            x = self.patch_mixer_map_xout(x)
        rotary = self.rotary(mask)
        for block in self.blocks:
            x = block(x, caption_NLD, condition_ND, rotary)
        return self.final_layer(x, condition_ND)

    def rotary(self, mask: Mask | None) -> Tensor | None:
        """The rows of `rotary_table` of all patches, (1, T, C), or of those that each image keeps, (N, K, C)."""
        config, device = self.config, self.final_layer.linear.weight.device
        if not config.rotary:
            return None
        grid = config.latent_size // config.patch_size
        rotary_TC = rotary_table(grid, config.head_dim, config.pos_interp_scale, device)
        return rotary_TC.unsqueeze(0) if mask is None else rotary_TC[mask.keep_NK]

    def unpatchify(self, x_NTP: Tensor) -> Tensor:
        """(N, T, p * p * C) -> (N, C, H, W)"""
        p, grid = self.config.patch_size, self.config.latent_size // self.config.patch_size
        x = x_NTP.unflatten(2, (p, p, -1)).unflatten(1, (grid, grid))
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, grid * p, grid * p)

    def init_weights(self) -> None:
        """The released code's initialisation: identity-like blocks (zero gates), zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for part in (self.x_embedder, self.t_embedder, self.pooled_y_emb_process, self.y_embedder.y_proj):
            part.init_weights()
        for block in (*self.blocks, *self.patch_mixer, self.y_emb_preprocess, self.final_layer):
            block.init_weights()


def buffers(config: ModelConfig) -> dict[str, Tensor]:
    """Whatever of a state dict is no weight, but a function of the recipe: float32."""
    grid = config.latent_size // config.patch_size
    return {
        "pos_embed": position_embedding(grid, config.dim, config.pos_interp_scale),
        # Always zero, as the released checkpoints have it: dropped patches come out as zeros.
        "mask_token": torch.zeros(1, 1, config.patch_size**2 * config.latent_channels),
    }


def backbone_blocks(config: ModelConfig) -> list[Block]:
    """Widths grow linearly with depth; experts in every n-th block but the last."""
    # Widths of released checkpoints hang on how NumPy rounds.
    qkv_ratios, ffn_ratios = (np.linspace(*ratio, config.depth) for ratio in (config.qkv_ratio, config.ffn_ratio))
    return [
        Block(
            config,
            dim=config.dim,
            qkv_ratio=float(qkv_ratios[i]),
            ffn_ratio=float(ffn_ratios[i]),
            has_experts=is_expert_block(i, config.experts_every_n) and i < config.depth - 1,
            out_std=0.02 / (2 * (i + 1)) ** 0.5,
        )
        for i in range(config.depth)
    ]


def mixer_blocks(config: ModelConfig) -> list[Block]:
    if not config.use_patch_mixer:
        return []
    return [
        Block(
            config,
            dim=config.mixer_dim,
            qkv_ratio=config.mixer_qkv_ratio,
            ffn_ratio=config.mixer_ffn_ratio,
            has_experts=is_expert_block(i, config.experts_every_n),
            out_std=0.02 / (2 * config.depth) ** 0.5,
        )
        for i in range(config.mixer_depth)
    ]


def is_expert_block(index: int, every_n: int) -> bool:
    return every_n > 0 and index > 0 and (index + 1) % every_n == 0


def projection(in_dim: int, out_dim: int, config: ModelConfig) -> nn.Sequential:
    """Norm and linear map between the widths of mixer and backbone; empty where they are one (as in tiny_2)."""
    if in_dim == out_dim:
        return nn.Sequential()
    return nn.Sequential(layer_norm(in_dim, config.norm_eps), nn.Linear(in_dim, out_dim, bias=config.use_bias))


@cache
def meta_model(config: ModelConfig) -> MicroDiT:
    """The network on the meta device, one per config: names and shapes without memory. Not to be changed."""
    with torch.device("meta"):
        return MicroDiT(config)
