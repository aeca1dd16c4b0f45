"""Matmuls of the blocks in float8 (mdit.kernels.fp8_linear), switched on a model from outside.

In float8: queries, keys, values and projections of both attentions, the three matrices of a dense feed-forward network
and both of every expert, in mixer and backbone. Not: the router, whose choices a rounding would change, adaLN, the
embedders, the caption's block and the final layer, a few per cent of the FLOPs together. A matrix with a dimension that
is not a multiple of 16 stays in the computing dtype.

The norm in front of such a layer writes its result in float8 as well, where it would have to be read again to be
quantised, and the caption is quantised once for all blocks. Only the class of a layer changes: parameters, their names
and what hooks are on it stay.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mdit.config import UserError
from mdit.kernels.expert_choice import Routing
from mdit.kernels.fp8_linear import (
    MULTIPLE,
    InFloat8,
    fp8_add_norm_modulate,
    fp8_experts,
    fp8_linear,
    fp8_swiglu,
    quantise,
)
from mdit.models import MicroDiT
from mdit.models.dit import Block
from mdit.models.layers import SwiGLU
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.fuse import (
    AddNormModulate,
    FusedExpertChoiceMoE,
    FusedMicroDiT,
    FusedSwiGLU,
    side_by_side,
)
from mdit.parallel.settings import RunSettings
from mdit.parallel.swap import swap

OLDEST_GPU = (8, 9)  # Ada: the first with float8 in its tensor cores


class Fp8AddNormModulate(AddNormModulate):
    """Hands on its result in both forms: as written, for gradients of weights, and in float8, for the matmul itself."""

    def compute(self, *inputs) -> tuple[Tensor, InFloat8]:
        return fp8_add_norm_modulate(*inputs)


class Fp8Linear(nn.Linear):
    def forward(self, x: Tensor | InFloat8) -> Tensor:
        return fp8_linear(x, self.weight, self.bias)


class Fp8SwiGLU(FusedSwiGLU):
    def forward(self, x: Tensor | InFloat8) -> Tensor:
        return fp8_swiglu(x, *side_by_side(self.w1, self.w2), self.w3.weight, self.w3.bias)


class Fp8ExpertChoiceMoE(FusedExpertChoiceMoE):
    def experts(self, x_NTD: Tensor, routing: Routing) -> Tensor:
        return fp8_experts(x_NTD, self.w1, self.w2, routing)


class Fp8MicroDiT(FusedMicroDiT):
    def caption_for(self, blocks: list[Block], y_NLD: Tensor) -> Tensor | InFloat8:
        """Quantised once for the keys and values of all blocks."""
        in_float8 = all(isinstance(block.cross_attn.kv_linear, Fp8Linear) for block in blocks)
        return quantise(y_NLD) if in_float8 else y_NLD


IN_FP8 = {
    nn.Linear: Fp8Linear,
    FusedSwiGLU: Fp8SwiGLU,
    FusedExpertChoiceMoE: Fp8ExpertChoiceMoE,
    AddNormModulate: Fp8AddNormModulate,
    FusedMicroDiT: Fp8MicroDiT,
}


def use_fp8(model: MicroDiT) -> None:
    """Let the blocks' matmuls of a fused model compute in float8, in place, before anything is compiled."""
    for layer in (model, *matmuls(model), *norms(model)):
        if type(layer) in IN_FP8:
            swap(layer, IN_FP8[type(layer)])


def matmuls(model: MicroDiT) -> Iterator[nn.Module]:
    """The layers that can be in float8, whether they are or not."""
    for block in (*model.patch_mixer, *model.blocks):
        for part in (block.attn, block.cross_attn, block.mlp):
            layers = [part] if isinstance(part, SwiGLU | ExpertChoiceMoE) else [*part.children()]
            yield from (layer for layer in layers if fits(layer))


def norms(model: MicroDiT) -> Iterator[nn.Module]:
    """The norms whose readers are all in float8 then. (Experts have a router, and gather what they quantise.)"""
    for block in (*model.patch_mixer, *model.blocks):
        readers: dict[nn.Module, nn.Module] = {block.norm1: block.attn.qkv, block.norm2: block.cross_attn.q_linear}
        if isinstance(block.mlp, SwiGLU):
            readers[block.norm3] = block.mlp
        yield from (norm for norm, reader in readers.items() if fits(reader))


def fits(layer: nn.Module) -> bool:
    """Are all dimensions of its matrices what torch._scaled_mm takes?"""
    weights = [layer.w1, layer.w2] if isinstance(layer, ExpertChoiceMoE) else list(layer.parameters())
    return not any(size % MULTIPLE for weight in weights for size in weight.shape[-2:])


def check_fp8(settings: RunSettings, device: torch.device, bf16: bool, in_triton: frozenset[str], path) -> None:
    """Raise UserError, naming the JSON at `path`, where this GPU or what runs on it is not made for float8.

    `bf16`: does the model compute in bfloat16; `in_triton`: the ops that run in their kernels. A CPU takes float8 as it
    comes, slowly.
    """
    if not settings.fp8 or device.type != "cuda":
        return
    found = None
    if torch.cuda.get_device_capability(device) < OLDEST_GPU:
        oldest = ".".join(map(str, OLDEST_GPU))
        found = f"{torch.cuda.get_device_name(device)} is older than compute capability {oldest}"
    elif not bf16:
        found = 'bf16.enabled = false: expected true or "auto"'
    elif "fp8_linear" not in in_triton:
        found = 'the kernels of fp8_linear do not run here (see "kernels"): it would be slower than no float8 at all'
    if found:
        raise UserError(f'{path}: "mdit": fp8 = true, but {found}')
