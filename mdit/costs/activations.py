"""What autograd keeps of a forward pass, and what backward needs besides, by formula: no tensor is made.

In numbers of the computing dtype a block keeps, with U = N T D, V = N L D (the caption), R = N E K D and H = N E K F:

                            PyTorch                                    Triton
    norm1 (modulated)       x', y, norm, h              4 U            x', y, h            3 U
    norm2                   x', y, h                    3 U            x', y, h            3 U
    norm3 (modulated)       x', norm, h                 3 U            x', h               2 U
    self-attention          qkv, q^, k^, out            6 N T A        qkv, out            4 N T A
    cross-attention         q, q^, out; k, v, k^        3 U + 3 V      q, out; k, v        2 U + 2 V
    dense feed-forward      a, b, silu(a), product      4 N T F        a, b                2 N T F
    experts                 in, out, w out; h, gelu(h)  3 R + 2 H      in; h               R + H

and router weights, indices, adaLN vectors, float32 statistics of rows, 2 D F of both weights side by side. y is the
result of the part before, which its gate's gradient needs; the first block of a stream has none. Tensor parallelism
divides A, F of the dense networks and the cross-attention's U and V, and its attention is PyTorch's.

Shapes: N micro-batch, T image tokens, L caption tokens, D width of the stream, A width of the attention, E experts,
K tokens an expert, F width of the feed-forward network.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mdit.config import ModelConfig, kept_tokens
from mdit.models import MicroDiT, meta_model
from mdit.models.dit import Block
from mdit.models.layers import SelfAttention, SwiGLU
from mdit.models.moe import ExpertChoice

ROW_STATISTICS = 8  # bytes a LayerNorm keeps for a row: mean and reciprocal deviation, float32
INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Setting:
    """`itemsize`: bytes of a number in the computing dtype; `triton`: do kernels run, or PyTorch; `ep` and `tp`: sizes
    of the groups; `checkpointing`: "none", "block" or "selective", as in the JSON's "mdit" section."""

    micro_batch: int
    itemsize: int = 2
    triton: bool = False
    ep: int = 1
    tp: int = 1
    checkpointing: str = "none"

    @property
    def fused_attention(self) -> bool:
        return self.triton and self.tp == 1


@dataclass(frozen=True)
class Part:
    """Bytes of one part of the model: `kept` until its backward pass, `work` that its backward pass takes besides."""

    name: str
    kept: int
    work: int = 0


def kept_bytes(config: ModelConfig, mask_ratio: float, setting: Setting) -> int:
    """What autograd holds between forward and backward, in bytes, without parameters."""
    return sum(part.kept for part in parts(config, mask_ratio, setting))


def peak_bytes(config: ModelConfig, mask_ratio: float, setting: Setting) -> int:
    """The most that activations and their gradients take while backward runs: it frees part after part from the end."""
    kept = peak = 0
    for part in parts(config, mask_ratio, setting):
        kept += part.kept
        peak = max(peak, kept + part.work)
    return peak


def parts(config: ModelConfig, mask_ratio: float, setting: Setting) -> Iterator[Part]:
    """In the order of the forward pass."""
    model, all_tokens = meta_model(config), config.num_patches
    kept = kept_tokens(all_tokens, mask_ratio)
    yield Part("embeddings", _embeddings(model, setting))
    yield Part("caption", _caption(model, setting))
    for i, block in enumerate(model.patch_mixer):
        yield _block(f"patch_mixer.{i}", block, config, all_tokens, setting, first=i == 0)
    yield Part("mixer exit", _exit(model, kept, setting))
    for i, block in enumerate(model.blocks):
        waiting = len(model.patch_mixer) > 0 and len(model.patch_mixer_map_xout) == 0
        yield _block(f"blocks.{i}", block, config, kept, setting, first=i == 0 and not waiting)
    yield Part("head", _head(config, kept, setting))


def _block(name: str, block: Block, config: ModelConfig, tokens: int, s: Setting, *, first: bool) -> Part:
    """With recomputation (mdit.parallel.recompute) its input is kept, "selective" and every product; all else is work.
    "block" adds up what comes out, so that a block's own y takes the place of the one that came in."""
    dim, rows = block.norm1.weight.numel(), s.micro_batch * tokens
    streams, vectors = (8, config.dim + 6 * dim) if s.triton else (10, config.dim + 8 * dim)
    streams -= first and s.checkpointing != "block"
    all_of_it = s.itemsize * (streams * rows * dim + s.micro_batch * vectors) + 3 * ROW_STATISTICS * rows
    all_of_it += _self_attention(block.attn, tokens, s) + _cross_attention(block, tokens, config, s)
    all_of_it += _mlp(block.mlp, tokens, s)
    work = s.itemsize * (3 * rows * dim + _ffn_gradients(block.mlp, tokens, s))
    if s.checkpointing == "none":
        return Part(name, all_of_it, work)
    kept = s.itemsize * rows * dim
    if s.checkpointing == "selective":
        kept += (not first) * kept + _products(block, config, tokens, s)
    return Part(name, kept, max(0, all_of_it - kept) + work)


def _self_attention(attention: SelfAttention, tokens: int, s: Setting) -> int:
    width, heads = attention.proj.in_features // s.tp, attention.num_heads // s.tp
    numbers = (4 if s.fused_attention else 6) * width
    return s.micro_batch * tokens * (s.itemsize * numbers + 2 * ROW_STATISTICS + 4 * heads)


def _cross_attention(block: Block, tokens: int, config: ModelConfig, s: Setting) -> int:
    attention, length = block.cross_attn, config.caption_length
    numbers = (2 if s.fused_attention else 3) * (tokens + length) * attention.proj.in_features // s.tp
    statistics = ROW_STATISTICS * (tokens + length) + 4 * tokens * attention.num_heads // s.tp
    return s.micro_batch * (s.itemsize * numbers + statistics)


def _mlp(mlp: SwiGLU | ExpertChoice, tokens: int, s: Setting) -> int:
    n = s.micro_batch
    if not isinstance(mlp, ExpertChoice):
        tensors, dim = (2 if s.triton else 4) * n * tokens, mlp.w3.out_features
        return s.itemsize * (tensors + 2 * dim) * mlp.w3.in_features // s.tp
    experts, dim, width = mlp.w1.shape
    chosen, logits = n * experts * mlp.tokens_per_expert(tokens), n * experts * tokens
    if s.triton:  # weights float32, tokens int64; logits and slots int32
        return s.itemsize * (chosen * (dim + width) + logits) + (4 + INDEX) * chosen + 4 * logits
    # weights; tokens, rows of the gather and rows of the scatter, int64; probabilities float32
    return s.itemsize * chosen * (3 * dim + 2 * width + 1) + 3 * INDEX * chosen + 4 * logits


def _ffn_gradients(mlp: SwiGLU | ExpertChoice, tokens: int, s: Setting) -> int:
    """Numbers of the gradients that a feed-forward network's backward pass holds at once."""
    if not isinstance(mlp, ExpertChoice):
        return 2 * s.micro_batch * tokens * mlp.w3.in_features // s.tp
    experts, dim, width = mlp.w1.shape
    return s.micro_batch * experts * mlp.tokens_per_expert(tokens) * (dim + width)


def _products(block: Block, config: ModelConfig, tokens: int, s: Setting) -> int:
    """Bytes of the results of a block's matmuls, attentions, routing and exchanges; of a dense feed-forward network's
    last matmul the next block keeps the result, as its y."""
    dim, length = block.norm1.weight.numel(), config.caption_length
    own, cross = block.attn.proj.in_features // s.tp, block.cross_attn.proj.in_features // s.tp
    numbers, others = tokens * (4 * own + 2 * cross + 2 * dim) + 2 * length * cross + 6 * dim, 0
    if isinstance(block.mlp, ExpertChoice):
        experts, _, width = block.mlp.w1.shape
        chosen = experts * block.mlp.tokens_per_expert(tokens)
        numbers += experts * tokens + chosen * (width + (3 if s.ep > 1 else 1) * dim)
        others = (4 + INDEX + (4 if s.ep > 1 else 0)) * chosen + (4 * experts * tokens if s.triton else 0)
    else:
        numbers += tokens * 2 * block.mlp.w3.in_features // s.tp
    heads = (block.attn.num_heads + block.cross_attn.num_heads) // s.tp
    others += 4 * heads * tokens + (ROW_STATISTICS * (3 * tokens + length) if s.fused_attention else 0)
    return s.micro_batch * (s.itemsize * numbers + others)


def _embeddings(model: MicroDiT, s: Setting) -> int:
    """Patches, and the input and result of the norm before the mixer; the condition's small networks."""
    config, n = model.config, s.micro_batch
    numbers = config.num_patches * config.patch_size**2 * config.latent_channels
    numbers += model.t_embedder.NUM_FEATURES + 7 * config.dim
    if model.patch_mixer and config.mixer_dim != config.dim:
        numbers += 2 * config.num_patches * config.dim
    return n * (s.itemsize * numbers + ROW_STATISTICS * (config.num_patches + 1))


def _caption(model: MicroDiT, s: Setting) -> int:
    """The caption as it comes, its projection, its block, and what it becomes for the backbone and for the mixer."""
    config, block = model.config, model.y_emb_preprocess
    numbers = config.caption_channels + 8 * config.dim
    if model.patch_mixer and config.mixer_dim != config.dim:
        numbers += config.dim + config.mixer_dim
    rows = s.micro_batch * config.caption_length
    others = rows * (s.itemsize * numbers + 4 * ROW_STATISTICS)
    return others + _self_attention(block.attn, config.caption_length, s) + _mlp(block.mlp, config.caption_length, s)


def _exit(model: MicroDiT, kept: int, s: Setting) -> int:
    """The way from the mixer, or from the patches, to the backbone."""
    n, all_tokens = s.micro_batch, model.config.num_patches
    index = INDEX * n * kept if kept < all_tokens else 0
    if not model.patch_mixer:
        return index
    if len(model.patch_mixer_map_xout) == 0:
        return 2 * index
    y_rows = 0 if s.checkpointing == "block" else all_tokens if s.triton else kept
    return n * (s.itemsize * (2 * kept + y_rows) * model.config.mixer_dim + ROW_STATISTICS * kept) + index


def _head(config: ModelConfig, kept: int, s: Setting) -> int:
    """The last norm, and the loss, whose numbers are float32."""
    pixels, masked = config.latent_size**2, kept < config.num_patches
    streams = (3 if s.triton else 4) - (s.checkpointing == "block")
    numbers = streams * kept * config.dim + (3 if s.triton else 4) * config.dim
    loss = 4 * pixels * (config.latent_channels + masked) + INDEX * kept * masked
    return s.micro_batch * (s.itemsize * numbers + ROW_STATISTICS * kept + loss)
