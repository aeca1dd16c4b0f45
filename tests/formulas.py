"""The network written out by hand, in float64: what `mdit.models` has to compute.

Functions of a state dict `w` and elementary operations only. They are the paper's: adaLN blocks (DiT), q and k
layer-normed over the full width, SwiGLU, expert choice as a loop, sine-cosine positions as in DiT.
"""

import math

import numpy as np
import torch

EPS = 1e-6


def norm(x, weight=1.0):
    centred = x - x.mean(-1, keepdim=True)
    return centred / ((centred**2).mean(-1, keepdim=True) + EPS) ** 0.5 * weight


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def part(w, prefix):
    return {key.removeprefix(prefix + "."): value for key, value in w.items() if key.startswith(prefix + ".")}


def rotary(x, head_dim, places):
    """Each head's pairs (i, i + head_dim / 2) as complex numbers, turned by row, then by column; places (N, T, 2)."""
    pairs, heads = head_dim // 2, []
    for start in range(0, x.shape[-1], head_dim):
        points = torch.complex(x[..., start : start + pairs], x[..., start + pairs : start + head_dim])
        angles = [places[..., 2 * i // pairs] * 100 ** -(i % (pairs // 2) / (pairs // 2)) for i in range(pairs)]
        points = points * torch.exp(1j * torch.stack(angles, -1))
        heads += [points.real, points.imag]
    return torch.cat(heads, dim=-1)


def softmax_attention(q, k, v, head_dim, places=None):
    q, k = norm(q), norm(k)
    if places is not None:
        q, k = rotary(q, head_dim, places), rotary(k, head_dim, places)
    out = []
    for start in range(0, q.shape[-1], head_dim):
        head = slice(start, start + head_dim)
        weights = torch.exp(q[..., head] @ k[..., head].transpose(1, 2) / head_dim**0.5)
        out.append(weights / weights.sum(-1, keepdim=True) @ v[..., head])
    return torch.cat(out, dim=-1)


def self_attention(w, x, head_dim, places=None):
    qkv = affine(w, "qkv", x)
    width = qkv.shape[-1] // 3
    out = softmax_attention(qkv[..., :width], qkv[..., width : 2 * width], qkv[..., 2 * width :], head_dim, places)
    return affine(w, "proj", out)


def cross_attention(w, x, caption, head_dim):
    q, kv = affine(w, "q_linear", x), affine(w, "kv_linear", caption)
    width = q.shape[-1]
    return affine(w, "proj", softmax_attention(q, kv[..., :width], kv[..., width:], head_dim))


def swiglu(w, x):
    a = affine(w, "w1", x)
    return affine(w, "w3", a / (1 + torch.exp(-a)) * affine(w, "w2", x))


def experts(w, x, capacity_factor):
    num_experts = len(w["w1"])
    taken = int(capacity_factor * x.shape[1] / num_experts)
    scores = torch.exp(x @ w["gate.weight"].T)
    scores = scores / scores.sum(-1, keepdim=True)
    images = []
    for n in range(len(x)):
        tokens = [torch.zeros(x.shape[-1], dtype=x.dtype)] * x.shape[1]
        for e in range(num_experts):
            for t in scores[n, :, e].argsort(descending=True)[:taken].tolist():
                tokens[t] = tokens[t] + scores[n, t, e] * (gelu(x[n, t] @ w["w1"][e]) @ w["w2"][e])
        images.append(torch.stack(tokens))
    return torch.stack(images)


def block(w, x, caption, condition, config, places=None):
    modulation = affine(w, "adaLN_modulation.1", gelu_tanh(condition))[:, None]
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = modulation.split(x.shape[-1], dim=-1)
    tokens = norm(x, w["norm1.weight"]) * (1 + scale_a) + shift_a
    x = x + gate_a * self_attention(part(w, "attn"), tokens, config.head_dim, places)
    x = x + cross_attention(part(w, "cross_attn"), norm(x, w["norm2.weight"]), caption, config.head_dim)
    tokens, feed_forward = norm(x, w["norm3.weight"]) * (1 + scale_f) + shift_f, part(w, "mlp")
    if "gate.weight" in feed_forward:
        return x + gate_f * experts(feed_forward, tokens, config.capacity_factor)
    return x + gate_f * swiglu(feed_forward, tokens)


def caption_block(w, y, head_dim):
    y = y + self_attention(part(w, "attn"), norm(y, w["norm1.weight"]), head_dim)
    return y + swiglu(part(w, "mlp"), norm(y, w["norm2.weight"]))


def mlp(w, x):
    return affine(w, "fc2", norm(gelu_tanh(affine(w, "fc1", x)), w["norm.weight"]))


def timestep(w, c_noise):
    frequencies = torch.tensor([10000 ** (-i / 256) for i in range(256)], dtype=torch.float64)
    angles = c_noise.double()[:, None] * frequencies
    return affine(w, "mlp.2", gelu_tanh(affine(w, "mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], dim=1))))


def final(w, x, condition):
    shift, scale = affine(w, "adaLN_modulation.1", gelu_tanh(condition))[:, None].split(x.shape[-1], dim=-1)
    return affine(w, "linear", norm(x, w["norm_final.weight"]) * (1 + scale) + shift)


def sincos_table(grid, dim, interp_scale):
    """DiT's table as numpy: the half of the column first, each half [sin, cos]."""

    def axis(position):
        angles = [position / 10000 ** (2 * i / (dim / 2)) for i in range(dim // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    return np.array([axis(c / interp_scale) + axis(r / interp_scale) for r in range(grid) for c in range(grid)])


def pixels_of(patch, config):
    """(rows, columns) of a patch in the latent image."""
    p, grid = config.patch_size, config.latent_size // config.patch_size
    row, column = patch // grid * p, patch % grid * p
    return slice(row, row + p), slice(column, column + p)


def project(w, x):
    return affine(w, "1", norm(x, w["0.weight"])) if w else x


def network(w, config, latents, c_noise, caption, keep=None):
    """The whole forward pass; `keep` lists the kept patches of every image."""
    p, images = config.patch_size, []
    for image in latents:
        patches = [image[(slice(None), *pixels_of(i, config))].reshape(-1) for i in range(config.num_patches)]
        images.append(torch.stack(patches))
    x = torch.stack(images) @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"]
    grid, places = config.latent_size // p, None
    if config.rotary:
        places = torch.tensor([[(i // grid, i % grid) for i in range(config.num_patches)]]) / config.pos_interp_scale
        places = places.double().expand(len(images), -1, -1)
    y = caption_block(part(w, "y_emb_preprocess"), mlp(part(w, "y_embedder.y_proj"), caption), config.head_dim)
    condition = timestep(part(w, "t_embedder"), c_noise) + mlp(part(w, "pooled_y_emb_process"), y.mean(1))
    if config.use_patch_mixer and config.mixer_depth:
        narrow = {name: part(w, f"patch_mixer_map_{name}") for name in ("xin", "xout", "y")}
        x, y_mixer = project(narrow["xin"], x), project(narrow["y"], y)
        for i in range(config.mixer_depth):
            x = block(part(w, f"patch_mixer.{i}"), x, y_mixer, condition, config, places)
    if keep is not None:
        x = torch.stack([tokens[rows] for tokens, rows in zip(x, keep)])
        places = places if places is None else torch.stack([of[rows] for of, rows in zip(places, keep)])
    if config.use_patch_mixer and config.mixer_depth:
        x = project(narrow["xout"], x)
    for i in range(config.depth):
        x = block(part(w, f"blocks.{i}"), x, y, condition, config, places)
    x = final(part(w, "final_layer"), x, condition)
    out = torch.zeros_like(latents)
    for n in range(len(latents)):
        for k, patch in enumerate(range(config.num_patches) if keep is None else keep[n].tolist()):
            out[(n, slice(None), *pixels_of(patch, config))] = x[n, k].reshape(p, p, -1).permute(2, 0, 1)
    return out
