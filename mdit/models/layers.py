"""Attention, feed-forward and embedding layers. Parameter names are those of the released checkpoints.

Shapes: N batch, T image tokens, L caption tokens, D width of the stream, A width of the attention (heads x head_dim).
Every norm is a LayerNorm without bias; q and k are normalised over the full width A, without a scale.

A block hands its result on as a `Stream`, a sum that is not yet taken: whoever reads it next adds, normalises and
modulates in one pass over memory (mdit.kernels.patch_mixing).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.kernels import masked_attention, patch_mixing, swiglu
from mdit.masking import Mask, drop_tokens


class Stream(NamedTuple):
    """The residual stream x + gate * y, not yet added. No gate: x + y; no y: x alone."""

    x_NTD: Tensor
    y_NTD: Tensor | None = None
    gate_ND: Tensor | None = None

    def added(self) -> Tensor:
        if self.y_NTD is None:
            return self.x_NTD
        if self.gate_ND is None:
            return self.x_NTD + self.y_NTD
        return torch.addcmul(self.x_NTD, self.gate_ND.unsqueeze(1), self.y_NTD)

    def kept(self, mask: Mask | None) -> "Stream":
        """Only the tokens that the mask keeps; what is dropped is not even added."""
        if mask is None:
            return self
        y_NKD = None if self.y_NTD is None else drop_tokens(self.y_NTD, mask)
        return Stream(drop_tokens(self.x_NTD, mask), y_NKD, self.gate_ND)


class StreamNorm(nn.Module):
    """LayerNorm without bias of what a stream adds up to, then * (1 + scale) + shift."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(
        self,
        stream: Stream,
        shift_ND: Tensor | None = None,
        scale_ND: Tensor | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, Tensor]:
        """-> (the stream, added up; its normalised and modulated form), of the tokens that the mask keeps."""
        keep_NK = None if mask is None else mask.keep_NK
        return patch_mixing.add_norm_modulate(
            stream.x_NTD, stream.y_NTD, stream.gate_ND, self.weight, shift_ND, scale_ND, self.eps, keep_NK
        )


def layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=eps, bias=False)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, width: int, head_dim: int, eps: float, use_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = width // head_dim, eps
        self.qkv = nn.Linear(dim, 3 * width, bias=use_bias)
        self.proj = nn.Linear(width, dim, bias=use_bias)

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.proj(masked_attention.self_attention(self.qkv(x_NTD), self.num_heads, self.eps))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)


class CrossAttention(nn.Module):
    """Image tokens attend to all caption tokens; there is no caption mask (as in the paper)."""

    def __init__(self, dim: int, head_dim: int, eps: float, use_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = dim // head_dim, eps
        self.q_linear = nn.Linear(dim, dim, bias=use_bias)
        self.kv_linear = nn.Linear(dim, 2 * dim, bias=use_bias)
        self.proj = nn.Linear(dim, dim, bias=use_bias)

    def forward(self, x_NTD: Tensor, caption_NLD: Tensor) -> Tensor:
        q_NTD, kv_NLX = self.q_linear(x_NTD), self.kv_linear(caption_NLD)
        return self.proj(masked_attention.cross_attention(q_NTD, kv_NLX, self.num_heads, self.eps))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.q_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.kv_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), of width 2/3 `hidden` rounded up to `multiple_of`; w1 and w2 are one matmul."""

    def __init__(self, dim: int, hidden: int, multiple_of: int, use_bias: bool) -> None:
        super().__init__()
        width = round_up(int(2 * hidden / 3), multiple_of)
        self.w1 = nn.Linear(dim, width, bias=use_bias)
        self.w2 = nn.Linear(dim, width, bias=use_bias)
        self.w3 = nn.Linear(width, dim, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu.swiglu_linear(F.linear(x, *side_by_side(self.w1, self.w2)), self.w3.weight, self.w3.bias)

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        nn.init.trunc_normal_(self.w2.weight, std=out_std)
        nn.init.trunc_normal_(self.w3.weight, std=out_std)


def side_by_side(*layers: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one linear layer that gives the outputs of these, one after the other.

    A copy of weights, a few MB, saves passes over all tokens: they are read once, and have one gradient.
    """
    biases = [layer.bias for layer in layers]
    return torch.cat([layer.weight for layer in layers]), None if biases[0] is None else torch.cat(biases)


class Mlp(nn.Module):
    """fc2(norm(gelu(fc1 x)))"""

    def __init__(self, in_dim: int, dim: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, dim)
        self.norm = layer_norm(dim, eps)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x), approximate="tanh")))

    def init_weights(self) -> None:
        nn.init.normal_(self.fc1.weight, std=0.02)
        nn.init.normal_(self.fc2.weight, std=0.02)


class PatchEmbed(nn.Module):
    """(N, C, H, W) -> (N, T, D), one linear map of each patch. Its weight has a convolution's shape (D, C, p, p)."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        n, c, height, width = x_NCHW.shape
        p = self.patch_size
        patches = x_NCHW.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.reshape(n, -1, c * p * p), self.proj.weight.flatten(1), self.proj.bias)

    def init_weights(self) -> None:
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))  # a view: fills the parameter itself


class TimestepEmbedder(nn.Module):
    """c_noise -> sinusoidal features of 512 frequencies -> (N, D)"""

    NUM_FEATURES = 512

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.NUM_FEATURES, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))

    def forward(self, c_noise_N: Tensor) -> Tensor:
        half = self.NUM_FEATURES // 2
        steps = torch.arange(half, dtype=torch.float32, device=c_noise_N.device)
        angles = c_noise_N.float().unsqueeze(1) * torch.exp(-math.log(10000) * steps / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))

    def init_weights(self) -> None:
        nn.init.normal_(self.mlp[0].weight, std=0.02)
        nn.init.normal_(self.mlp[2].weight, std=0.02)


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to p * p * C outputs a token."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(dim, 2 * dim))
        self.norm_final = StreamNorm(dim, eps)

    def forward(self, stream: Stream, condition_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_ND).chunk(2, dim=1)
        _, h = self.norm_final(stream, shift, scale)
        return self.linear(h)

    def init_weights(self) -> None:
        nn.init.zeros_(self.adaLN_modulation[1].weight)
        nn.init.zeros_(self.linear.weight)


def position_embedding(grid_size: int, dim: int, interp_scale: float) -> Tensor:
    """Sine-cosine positions of a square grid, (1, T, D) float32; `interp_scale` 2 squeezes a doubled grid to fit."""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    position = torch.arange(grid_size, dtype=torch.float64) / interp_scale
    angles = torch.outer(position, omega)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, D / 2)
    columns = axis.expand(grid_size, grid_size, -1)  # the released code puts the column's half first
    rows = axis.unsqueeze(1).expand(grid_size, grid_size, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid_size**2, dim).float()


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
