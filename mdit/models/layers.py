"""Attention, feed-forward and embedding layers. Parameter names are those of the released checkpoints.

Shapes: N batch, T image tokens, L caption tokens, D width of the tokens, A width of the attention (heads x head_dim).
Every norm is a LayerNorm without bias; q and k are normalised over the full width A, without a scale.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x_NTD: Tensor, shift_N1D: Tensor, scale_N1D: Tensor) -> Tensor:
    return x_NTD * (1 + scale_N1D) + shift_N1D


def unscaled_norm(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def softmax_attention(
    q_NTA: Tensor, k_NLA: Tensor, v_NLA: Tensor, num_heads: int, rotary_NTC: Tensor | None = None
) -> Tensor:
    """-> (N, T, A), by head. `rotary_NTC`: q and k are of the same tokens, and turned by their places."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_NTA, k_NLA, v_NLA))
    if rotary_NTC is not None:
        q, k = apply_rotary(q, rotary_NTC), apply_rotary(k, rotary_NTC)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def layer_norm(dim: int, eps: float) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=eps, bias=False)


class SelfAttention(nn.Module):
    def __init__(self, dim: int, width: int, head_dim: int, eps: float, use_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.eps = width // head_dim, eps
        self.qkv = nn.Linear(dim, 3 * width, bias=use_bias)
        self.proj = nn.Linear(width, dim, bias=use_bias)

    def forward(self, x_NTD: Tensor, rotary_NTC: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_NTD).chunk(3, dim=-1)
        q, k = unscaled_norm(q, self.eps), unscaled_norm(k, self.eps)
        return self.proj(softmax_attention(q, k, v, self.num_heads, rotary_NTC))

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
        k, v = self.kv_linear(caption_NLD).chunk(2, dim=-1)
        q, k = unscaled_norm(self.q_linear(x_NTD), self.eps), unscaled_norm(k, self.eps)
        return self.proj(softmax_attention(q, k, v, self.num_heads))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.q_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.kv_linear.weight, std=0.02)
        nn.init.trunc_normal_(self.proj.weight, std=out_std)


class SwiGLU(nn.Module):
    """w3(silu(w1 x) * w2 x), of width 2/3 `hidden` rounded up to `multiple_of`."""

    def __init__(self, dim: int, hidden: int, multiple_of: int, use_bias: bool) -> None:
        super().__init__()
        width = round_up(int(2 * hidden / 3), multiple_of)
        self.w1 = nn.Linear(dim, width, bias=use_bias)
        self.w2 = nn.Linear(dim, width, bias=use_bias)
        self.w3 = nn.Linear(width, dim, bias=use_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))

    def init_weights(self, out_std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        nn.init.trunc_normal_(self.w2.weight, std=out_std)
        nn.init.trunc_normal_(self.w3.weight, std=out_std)


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
    """(N, C, H, W) -> (N, T, D), one linear map of each patch."""

    def __init__(self, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.proj(x_NCHW).flatten(2).transpose(1, 2)

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
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp.get_parameter("0.weight").dtype))

    def init_weights(self) -> None:
        nn.init.normal_(self.mlp.get_parameter("0.weight"), std=0.02)
        nn.init.normal_(self.mlp.get_parameter("2.weight"), std=0.02)


class FinalLayer(nn.Module):
    """Modulated norm and the linear map to p * p * C outputs a token."""

    def __init__(self, dim: int, out_dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.GELU(approximate="tanh"), nn.Linear(dim, 2 * dim))
        self.norm_final = layer_norm(dim, eps)

    def forward(self, x_NTD: Tensor, condition_ND: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition_ND).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x_NTD), shift, scale))

    def init_weights(self) -> None:
        nn.init.zeros_(self.adaLN_modulation.get_parameter("1.weight"))
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


def rotary_table(grid_size: int, head_dim: int, interp_scale: float, device: torch.device) -> Tensor:
    """Cosines, then sines, of the angles by which the pairs of a head are turned at every patch: (T, C) float32, C the
    width of a head.

    One half of the pairs turns with the row, the other with the column, at frequencies from 1 to 1 / 100 radian a patch
    (axial RoPE; Heo et al. 2024). `interp_scale` as in `position_embedding`.
    """
    pairs = head_dim // 4
    frequencies = 100.0 ** -(torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    angles = torch.outer(torch.arange(grid_size, dtype=torch.float32, device=device) / interp_scale, frequencies)
    rows, columns = angles.unsqueeze(1), angles.unsqueeze(0)
    both = torch.cat([rows.expand(-1, grid_size, -1), columns.expand(grid_size, -1, -1)], dim=-1).flatten(0, 1)
    return torch.cat([both.cos(), both.sin()], dim=-1)


def apply_rotary(x_NHTC: Tensor, rotary_NTC: Tensor) -> Tensor:
    """Elements i and i + C / 2 of every head turned as the coordinates of a point; in float32, rounded once."""
    cos, sin = rotary_NTC.unsqueeze(1).chunk(2, dim=-1)
    a, b = x_NHTC.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x_NHTC.dtype)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
