"""Names and shapes of the released checkpoints, said once more: from the paper's description, not from our modules."""

import math

SIZES = {
    "tiny_2": dict(dim=512, depth=16, head_dim=32, mixer_depth=4, mixer_dim=512),
    "xl_2": dict(dim=1024, depth=28, head_dim=64, mixer_depth=6, mixer_dim=768),
}
PATCH, CAPTION, FREQUENCIES, EXPERTS = 2 * 2 * 4, 1024, 512, 8


def up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def linear(name: str, rows: int, columns: int, bias: bool = False) -> dict:
    return {f"{name}.weight": [rows, columns]} | ({f"{name}.bias": [rows]} if bias else {})


def attention(name: str, dim: int, width: int) -> dict:
    return linear(f"{name}.qkv", 3 * width, dim) | linear(f"{name}.proj", dim, width)


def swiglu(name: str, dim: int, hidden: int) -> dict:
    width = up(int(2 * hidden / 3), 256)
    return linear(f"{name}.w1", width, dim) | linear(f"{name}.w2", width, dim) | linear(f"{name}.w3", dim, width)


def mlp(name: str, inputs: int, dim: int) -> dict:
    return (
        linear(f"{name}.fc1", dim, inputs, bias=True)
        | {f"{name}.norm.weight": [dim]}
        | linear(f"{name}.fc2", dim, dim, bias=True)
    )


def block(name: str, dim: int, width: int, hidden: int, condition: int, experts: bool) -> dict:
    norms = {f"{name}.norm{i}.weight": [dim] for i in (1, 2, 3)}
    cross = (
        linear(f"{name}.cross_attn.q_linear", dim, dim)
        | linear(f"{name}.cross_attn.kv_linear", 2 * dim, dim)
        | linear(f"{name}.cross_attn.proj", dim, dim)
    )
    wide = up(hidden, 256)
    moe = {
        f"{name}.mlp.w1": [EXPERTS, dim, wide],
        f"{name}.mlp.w2": [EXPERTS, wide, dim],
        f"{name}.mlp.gate.weight": [EXPERTS, dim],
    }
    feed_forward = moe if experts else swiglu(f"{name}.mlp", dim, hidden)
    modulation = linear(f"{name}.adaLN_modulation.1", 6 * dim, condition, bias=True)
    return norms | attention(f"{name}.attn", dim, width) | cross | feed_forward | modulation


def released(size: str) -> dict[str, list[int]]:
    """Every parameter and buffer of the checkpoint of a size at 256 px -> its shape."""
    dim, depth, head_dim, mixer_depth, mixer_dim = SIZES[size].values()
    state = {"x_embedder.proj.weight": [dim, 4, 2, 2], "x_embedder.proj.bias": [dim]}
    state |= {"pos_embed": [1, 256, dim], "mask_token": [1, 1, PATCH]}
    state |= linear("t_embedder.mlp.0", dim, FREQUENCIES, bias=True) | linear("t_embedder.mlp.2", dim, dim, bias=True)
    state |= mlp("y_embedder.y_proj", CAPTION, dim) | mlp("pooled_y_emb_process", dim, dim)
    state |= attention("y_emb_preprocess.attn", dim, dim) | swiglu("y_emb_preprocess.mlp", dim, 4 * dim)
    state |= {f"y_emb_preprocess.norm{i}.weight": [dim] for i in (1, 2)}
    for i in range(mixer_depth):
        name = f"patch_mixer.{i}"
        state |= block(name, mixer_dim, mixer_dim, 4 * mixer_dim, dim, experts=i % 2 == 1)
    if mixer_dim != dim:
        for name, inputs, outputs in (("xin", dim, mixer_dim), ("xout", mixer_dim, dim), ("y", dim, mixer_dim)):
            state[f"patch_mixer_map_{name}.0.weight"] = [inputs]
            state |= linear(f"patch_mixer_map_{name}.1", outputs, inputs)
    for i in range(depth):
        growth = i / (depth - 1)
        width = up(int(dim * (0.5 + 0.5 * growth)), 2 * head_dim)
        hidden = int(dim * (0.5 + 3.5 * growth))
        state |= block(f"blocks.{i}", dim, width, hidden, dim, experts=i % 2 == 1 and i < depth - 1)
    state["final_layer.norm_final.weight"] = [dim]
    state |= linear("final_layer.linear", PATCH, dim, bias=True)
    return state | linear("final_layer.adaLN_modulation.1", 2 * dim, dim, bias=True)
