"""MicroDiT step by step, as the paper describes it, over the weights of a model that is already there.

    with as_published(model):                       # or compiled=True: torch.compile of every block
        loss = edm_loss(engine, ...)                # the same engine, weights and optimizer

Nothing is fused and nothing is reordered: norm, then scale and shift, then the layer, then its gate and the residual
sum; the experts by one-hot products (Zhou et al. 2022, section 3.2; arXiv 2407.15811, section 2). It is what a plain
implementation of the paper costs, the ladder's first rung, and a second formula that the fused model's losses are held
against. Only instances' `forward` are exchanged: parameters, their names and an engine's hooks stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.kernels.expert_choice.reference import one_hot_expert_choice
from mdit.masking import Mask
from mdit.models.dit import Block, CaptionBlock, MicroDiT, MixerExit
from mdit.models.layers import CrossAttention, FinalLayer, PatchEmbed, SelfAttention, StreamNorm, SwiGLU
from mdit.models.moe import ExpertChoice
from mdit.parallel.apply import compile_each

MISSING = object()


@contextmanager
def as_published(model: MicroDiT, *, compiled: bool = False, backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, `model` computes in the paper's form, without activation checkpointing. Experts and tensors must be
    whole, not spread over processes; parameters may be sharded by ZeRO 1 and 2."""
    forms = {module: MethodType(FORMS[type(module)], module) for module in model.modules() if type(module) in FORMS}
    blocks = blocks_of(model)
    with uncompiled(blocks), having("forward", forms), compiling(blocks, backend) if compiled else nullcontext():
        yield


def blocks_of(model: MicroDiT) -> list[nn.Module]:
    """What is compiled one by one."""
    return [*model.patch_mixer, *model.blocks]


@contextmanager
def having(attribute: str, values: dict[nn.Module, Any]) -> Iterator[None]:
    """Inside, instances have these values; afterwards those that they had, or none but their class's."""
    before = {module: module.__dict__.get(attribute, MISSING) for module in values}
    try:
        for module, value in values.items():
            module.__dict__[attribute] = value
        yield
    finally:
        for module, value in before.items():
            module.__dict__.pop(attribute, None)
            if value is not MISSING:
                module.__dict__[attribute] = value


def uncompiled(blocks: list[nn.Module]) -> AbstractContextManager[None]:
    """Inside, blocks on which `compile()` was called run as if it had not been."""
    return having("_compiled_call_impl", dict.fromkeys(blocks))


@contextmanager
def compiling(blocks: list[nn.Module], backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, every block is compiled as a run does it; afterwards all that was compiled is forgotten."""
    try:
        with uncompiled(blocks):
            compile_each(blocks, backend)
            yield
    finally:
        torch.compiler.reset()


# The forms. `self` is a module of mdit.models, whose parts are called as modules, so that their hooks run.


def _model(
    self: MicroDiT, x_NCHW: Tensor, c_noise_N: Tensor, caption_NLC: Tensor, *, mask: Mask | None = None
) -> Tensor:
    dtype = self.final_layer.linear.weight.dtype
    x = (self.x_embedder(x_NCHW.to(dtype)) + self.pos_embed).to(dtype)
    y = self.y_emb_preprocess(self.y_embedder(caption_NLC.to(dtype)))
    condition = self.t_embedder(c_noise_N) + self.pooled_y_emb_process(y.mean(dim=1))
    if self.patch_mixer:
        x, y_mixer = self.patch_mixer_map_xin(x), self.patch_mixer_map_y(y)
        for block in self.patch_mixer:
            x = block(x, y_mixer, condition)
    if mask is not None:
        x = x.gather(1, _everywhere(mask.keep_NK, x.shape[2]))
    if self.patch_mixer:
        x = self.patch_mixer_map_xout(x)
    for block in self.blocks:
        x = block(x, y, condition)
    x = self.final_layer(x, condition)
    if mask is not None:
        zeros = x.new_zeros(len(x), mask.num_patches, x.shape[2])
        x = zeros.scatter(1, _everywhere(mask.keep_NK, x.shape[2]), x)
    p, grid = self.config.patch_size, self.config.latent_size // self.config.patch_size
    x = torch.einsum("nhwpqc->nchpwq", x.view(len(x), grid, grid, p, p, -1))
    return x.reshape(len(x), -1, grid * p, grid * p)


def _everywhere(index_NK: Tensor, width: int) -> Tensor:
    return index_NK.unsqueeze(-1).expand(-1, -1, width)


def _block(self: Block, x_NTD: Tensor, caption_NLD: Tensor, condition_ND: Tensor) -> Tensor:
    modulation = self.adaLN_modulation(condition_ND).unsqueeze(1)
    shift1, scale1, gate1, shift3, scale3, gate3 = modulation.chunk(6, dim=-1)
    x = x_NTD + gate1 * self.attn(self.norm1(x_NTD) * (1 + scale1) + shift1)
    x = x + self.cross_attn(self.norm2(x), caption_NLD)
    return x + gate3 * self.mlp(self.norm3(x) * (1 + scale3) + shift3)


def _caption_block(self: CaptionBlock, y_NLD: Tensor) -> Tensor:
    y = y_NLD + self.attn(self.norm1(y_NLD))
    return y + self.mlp(self.norm2(y))


def _self_attention(self: SelfAttention, x_NTD: Tensor) -> Tensor:
    q, k, v = self.qkv(x_NTD).chunk(3, dim=-1)
    return self.proj(_attend(q, k, v, self.num_heads, self.eps))


def _cross_attention(self: CrossAttention, x_NTD: Tensor, caption_NLD: Tensor) -> Tensor:
    k, v = self.kv_linear(caption_NLD).chunk(2, dim=-1)
    return self.proj(_attend(self.q_linear(x_NTD), k, v, self.num_heads, self.eps))


def _attend(q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, eps: float) -> Tensor:
    """LayerNorm of q and k over all heads at once, without a scale; then attention head by head. -> (N, T, A)"""
    q, k = F.layer_norm(q_NTA, q_NTA.shape[-1:], eps=eps), F.layer_norm(k_NLA, k_NLA.shape[-1:], eps=eps)
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v_NLA))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def _swiglu(self: SwiGLU, x: Tensor) -> Tensor:
    return self.w3(F.silu(self.w1(x)) * self.w2(x))


def _experts(self: ExpertChoice, x_NTD: Tensor) -> Tensor:
    return one_hot_expert_choice(x_NTD, self.gate.weight, self.w1, self.w2, self.tokens_per_expert(x_NTD.shape[1]))


def _norm(self: StreamNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], self.weight, eps=self.eps)


def _mixer_exit(self: MixerExit, x: Tensor) -> Tensor:
    for layer in self:
        x = layer(x)
    return x


def _patch_embed(self: PatchEmbed, x_NCHW: Tensor) -> Tensor:
    return self.proj(x_NCHW).flatten(2).transpose(1, 2)


def _final_layer(self: FinalLayer, x_NTD: Tensor, condition_ND: Tensor) -> Tensor:
    shift, scale = self.adaLN_modulation(condition_ND).unsqueeze(1).chunk(2, dim=-1)
    return self.linear(self.norm_final(x_NTD) * (1 + scale) + shift)


FORMS: dict[type[nn.Module], Callable] = {
    MicroDiT: _model,
    Block: _block,
    CaptionBlock: _caption_block,
    SelfAttention: _self_attention,
    CrossAttention: _cross_attention,
    SwiGLU: _swiglu,
    ExpertChoice: _experts,
    StreamNorm: _norm,
    MixerExit: _mixer_exit,
    PatchEmbed: _patch_embed,
    FinalLayer: _final_layer,
}
