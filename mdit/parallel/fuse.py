"""The fused form of a MicroDiT: the same function of the same parameters in fewer passes over memory (mdit.kernels).

A block does not add its last result to the tokens: it hands on a `PendingResidual`, and whoever reads that next adds,
normalises and modulates in one pass. Where the mixer ends the same pass gathers the kept tokens, so that dropped ones
are never written. w1 and w2 of a SwiGLU are one matmul; tokens reach their experts by index.

    model = fuse(MicroDiT(config))
"""

from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.kernels import expert_choice, masked_attention, patch_mixing, swiglu
from mdit.kernels.expert_choice import Routing
from mdit.masking import Mask, drop_tokens
from mdit.models import MicroDiT
from mdit.models.dit import Block, CaptionBlock
from mdit.models.layers import CrossAttention, FinalLayer, PatchEmbed, SelfAttention, SwiGLU
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.swap import swap

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Give a plain model, or a part of one, its fused form in place -> the model."""
    for module in model.modules():
        if type(module) in FUSED:
            swap(module, FUSED[type(module)])
        if isinstance(module, FusedMicroDiT) and module.patch_mixer:
            swap(module.patch_mixer_map_xout, MixerToBackbone)
        if isinstance(module, FusedBlock | FusedCaptionBlock | FusedFinalLayer | MixerToBackbone):
            for norm in module.children():
                if type(norm) is nn.LayerNorm:
                    swap(norm, AddNormModulate)
    return model


class PendingResidual(NamedTuple):
    """The sum x + gate * y, not yet taken. No gate: x + y; no y: x alone."""

    x_NTD: Tensor
    y_NTD: Tensor | None = None
    gate_ND: Tensor | None = None

    def added(self) -> Tensor:
        if self.y_NTD is None:
            return self.x_NTD
        if self.gate_ND is None:
            return self.x_NTD + self.y_NTD
        return torch.addcmul(self.x_NTD, self.gate_ND.unsqueeze(1), self.y_NTD)

    def kept(self, mask: Mask | None) -> "PendingResidual":
        """Only the tokens that the mask keeps; what is dropped is not even added."""
        if mask is None:
            return self
        y_NKD = None if self.y_NTD is None else drop_tokens(self.y_NTD, mask)
        return PendingResidual(drop_tokens(self.x_NTD, mask), y_NKD, self.gate_ND)


class AddNormModulate(nn.LayerNorm):
    """LayerNorm of a sum that is taken in the same pass, then * (1 + scale) + shift."""

    def forward(
        self,
        pending: PendingResidual,
        shift_ND: Tensor | None = None,
        scale_ND: Tensor | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Any]:
        """-> (the sum; its normalised and modulated form), of the tokens that the mask keeps."""
        keep_NK = None if mask is None else mask.keep_NK
        return self.compute(*pending, self.weight, shift_ND, scale_ND, self.eps, keep_NK)

    def compute(self, *inputs) -> tuple[Tensor, Any]:
        return patch_mixing.add_norm_modulate(*inputs)


class FusedBlock(Block):
    def forward(
        self,
        pending: PendingResidual,
        caption_NLD: Tensor,
        condition_ND: Tensor,
        rotary_NTC: Tensor | None = None,
    ) -> PendingResidual:
        shift1, scale1, gate1, shift3, scale3, gate3 = self.adaLN_modulation(condition_ND).chunk(6, dim=1)
        x, h = self.norm1(pending, shift1, scale1)
        x, h = self.norm2(PendingResidual(x, self.attn(h, rotary_NTC=rotary_NTC), gate1))
        x, h = self.norm3(PendingResidual(x, self.cross_attn(h, caption_NLD)), shift3, scale3)
        return PendingResidual(x, self.mlp(h), gate3)


class FusedCaptionBlock(CaptionBlock):
    def forward(self, y_NLD: Tensor) -> Tensor:
        y, h = self.norm1(PendingResidual(y_NLD))
        y, h = self.norm2(PendingResidual(y, self.attn(h)))
        return y + self.mlp(h)


class FusedFinalLayer(FinalLayer):
    def forward(self, pending: PendingResidual, condition_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_ND).chunk(2, dim=1)
        _, h = self.norm_final(pending, shift, scale)
        return self.linear(h)


class MixerToBackbone(nn.Sequential):
    """The kept tokens leave the mixer: gathered, added up and normalised in one pass, then projected; only gathered
    where mixer and backbone have one width."""

    def forward(self, pending: PendingResidual, mask: Mask | None) -> PendingResidual:
        if not self:
            return pending.kept(mask)
        norm, linear = self
        _, h = norm(pending, mask=mask)
        return PendingResidual(linear(h))


class FusedMicroDiT(MicroDiT):
    def transform(self, x_NTD: Tensor, caption_NLD: Tensor, condition_ND: Tensor, mask: Mask | None) -> Tensor:
        if self.patch_mixer:
            caption_mixer = self.caption_for(self.patch_mixer, self.patch_mixer_map_y(caption_NLD))
            pending, rotary = PendingResidual(self.patch_mixer_map_xin(x_NTD)), self.rotary(None)
            for block in self.patch_mixer:
                pending = block(pending, caption_mixer, condition_ND, rotary)
            pending = self.patch_mixer_map_xout(pending, mask)
        else:
            pending = PendingResidual(x_NTD).kept(mask)
        caption, rotary = self.caption_for(self.blocks, caption_NLD), self.rotary(mask)
        for block in self.blocks:
            pending = block(pending, caption, condition_ND, rotary)
        return self.final_layer(pending, condition_ND)

    def caption_for(self, blocks: list[Block], caption_NLD: Tensor) -> Tensor:
        """The form in which these blocks, all alike in this, read the caption."""
        return caption_NLD


class FusedSelfAttention(SelfAttention):
    def forward(self, x_NTD: Tensor, rotary_NTC: Tensor | None = None) -> Tensor:
        return self.proj(masked_attention.self_attention(self.qkv(x_NTD), self.num_heads, self.eps, rotary_NTC))


class FusedCrossAttention(CrossAttention):
    def forward(self, x_NTD: Tensor, caption_NLD: Tensor) -> Tensor:
        q_NTD, kv_NLX = self.q_linear(x_NTD), self.kv_linear(caption_NLD)
        return self.proj(masked_attention.cross_attention(q_NTD, kv_NLX, self.num_heads, self.eps))


class FusedSwiGLU(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return swiglu.swiglu_linear(F.linear(x, *side_by_side(self.w1, self.w2)), self.w3.weight, self.w3.bias)


def side_by_side(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one linear layer that gives the outputs of these, one after the other.

    A copy of weights, a few MB, saves passes over all tokens: they are read once, and have one gradient.
    """
    weight = torch.cat([layer.weight for layer in layers])
    return weight, None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])


class FusedExpertChoiceMoE(ExpertChoiceMoE):
    """By index. Two seams: where the tokens' experts are (`dispatch`, `combine`), and how they compute (`experts`)."""

    def forward(self, x_NTD: Tensor) -> Tensor:
        routing = expert_choice.route(self.gate(x_NTD), self.tokens_per_expert(x_NTD.shape[1]))
        return self.experts(x_NTD, routing)

    def experts(self, x_NTD: Tensor, routing: Routing) -> Tensor:
        tokens_EMD, weights_NEK = self.dispatch(x_NTD, routing)
        hidden_EMF = torch.bmm(tokens_EMD, self.w1)
        return self.combine(expert_choice.gelu_bmm(hidden_EMF, self.w2, weights_NEK), routing)

    def dispatch(self, x_NTD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """-> tokens (E, M, D) and router weights (N, E, K) of the experts here, M = N * K."""
        return expert_choice.gather_tokens(x_NTD, routing), routing.weights_NEK

    def combine(self, out_EMD: Tensor, routing: Routing) -> Tensor:
        """-> (N, T, D): what the experts made of each token, added up."""
        return expert_choice.scatter_tokens(out_EMD, routing)


class FusedPatchEmbed(PatchEmbed):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        (n, c, height, width), p = x_NCHW.shape, self.proj.kernel_size[0]
        patches = x_NCHW.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, -1, c * p * p), self.proj.weight.flatten(1), self.proj.bias)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    MicroDiT: FusedMicroDiT,
    Block: FusedBlock,
    CaptionBlock: FusedCaptionBlock,
    FinalLayer: FusedFinalLayer,
    SelfAttention: FusedSelfAttention,
    CrossAttention: FusedCrossAttention,
    SwiGLU: FusedSwiGLU,
    ExpertChoiceMoE: FusedExpertChoiceMoE,
    PatchEmbed: FusedPatchEmbed,
}
