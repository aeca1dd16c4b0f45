"""Model FLOPs: matmuls and attention of one image, experts at capacity, kept tokens only, no recompute, no dispatch.

The convention behind every MFU in this project: 2 FLOPs per multiply-add, backward twice the forward.
"""

import torch

from mdit.config import ModelConfig, kept_tokens
from mdit.models.dit import Block, CaptionBlock, MicroDiT
from mdit.models.moe import ExpertChoice


def training_flops(config: ModelConfig, mask_ratio: float) -> int:
    """Forward and backward FLOPs of one image at a mask ratio."""
    return 3 * forward_flops(config, kept_tokens(config.num_patches, mask_ratio))


def forward_flops(config: ModelConfig, kept: int) -> int:
    """Forward FLOPs of one image whose backbone sees `kept` of the T patches."""
    with torch.device("meta"):
        model = MicroDiT(config)
    all_tokens, caption = config.num_patches, config.caption_length
    flops = all_tokens * linear(model.x_embedder) + linear(model.t_embedder) + linear(model.pooled_y_emb_process)
    flops += caption * linear(model.y_embedder) + caption_block_flops(model.y_emb_preprocess, caption)
    if model.patch_mixer:
        flops += all_tokens * linear(model.patch_mixer_map_xin) + caption * linear(model.patch_mixer_map_y)
        flops += sum(block_flops(block, all_tokens, caption) for block in model.patch_mixer)
        flops += kept * linear(model.patch_mixer_map_xout)
    flops += sum(block_flops(block, kept, caption) for block in model.blocks)
    return flops + kept * linear(model.final_layer.linear) + linear(model.final_layer.adaLN_modulation)


def linear(module: torch.nn.Module) -> int:
    """FLOPs of applying a module's matrices to one token."""
    return 2 * sum(p.numel() for p in module.parameters() if p.ndim > 1)


def attention(tokens: int, keys: int, width: int) -> int:
    return 4 * tokens * keys * width


def block_flops(block: Block, tokens: int, caption: int) -> int:
    cross = block.cross_attn
    flops = tokens * (linear(block.attn) + linear(cross.q_linear) + linear(cross.proj)) + caption * linear(
        cross.kv_linear
    )
    flops += attention(tokens, tokens, block.attn.proj.in_features)
    flops += attention(tokens, caption, cross.proj.in_features) + linear(block.adaLN_modulation)
    if isinstance(block.mlp, ExpertChoice):
        per_expert = 2 * (block.mlp.w1[0].numel() + block.mlp.w2[0].numel())
        chosen = block.mlp.num_experts * block.mlp.tokens_per_expert(tokens)
        return flops + tokens * linear(block.mlp.gate) + chosen * per_expert
    return flops + tokens * linear(block.mlp)


def caption_block_flops(block: CaptionBlock, tokens: int) -> int:
    return tokens * (linear(block.attn) + linear(block.mlp)) + attention(tokens, tokens, block.attn.proj.in_features)
