"""Which kernels one micro-batch of MicroDiT calls, how often and at what shapes; derived from the model's own layers.

    for call in kernel_calls(xl_2(), micro_batch=256, mask_ratio=0.75):
        outputs = call.function(*call.inputs("cuda", torch.bfloat16))

Every call knows what it must cost: the bytes it cannot help moving (each tensor read or written once) and the FLOPs of
its matmuls, counted as in `mdit.costs.trace`. Shapes: N micro-batch, T tokens, L caption tokens, K kept or chosen
tokens, D width of the stream, A width of the attention, E experts, F width of the feed-forward network; of a matmul in
float8 M rows, IN inputs and OUT outputs.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from mdit.config import ModelConfig, kept_tokens
from mdit.kernels import expert_choice, fp8_linear, masked_attention, patch_mixing, swiglu
from mdit.kernels.expert_choice import Routing
from mdit.models.dit import Block, MicroDiT
from mdit.models.moe import ExpertChoiceMoE

EPS = 1e-6
STAGES = {  # of the paper: latent_size, mask_ratio, and a micro-batch of 16,384 kept tokens
    "256 px, mask 0.75": (32, 0.75, 256),
    "256 px, mask 0": (32, 0.0, 64),
    "512 px, mask 0.75": (64, 0.75, 64),
    "512 px, mask 0": (64, 0.0, 16),
}
INDEX_BYTES = {"tokens_NEK": 8, "slots_NTE": 4, "weights_NEK": 4, "keep_NK": 8}  # whatever the dtype of the others


@dataclass(frozen=True)
class Work:
    """One call: a function, its inputs, and how many numbers it must move (besides `fixed_bytes` in each direction and
    `float8_bytes` in forward).

    Forward reads `read` and writes `written`; backward reads `saved` and the cotangents of what was written, and writes
    `gradients`, by default of everything read.
    """

    function: Callable
    inputs: list[Tensor | None]
    read: int
    written: int
    saved: int
    gradients: int | None = None
    fixed_bytes: int = 0
    float8_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class KernelCall:
    """`op` is a public function of mdit.kernels, `count` how often a micro-batch calls it in this part of the model."""

    op: str
    where: str  # caption, mixer or backbone
    shape: dict[str, int]
    count: int = 1

    @cached_property
    def _work(self) -> Work:
        return self._on("meta", torch.bfloat16, torch.empty)

    def _on(self, device: torch.device | str, dtype: torch.dtype, fill: Callable) -> Work:
        return WORK[self.op](partial(fill, device=device, dtype=dtype), **self.shape)

    def inputs(
        self, device: torch.device | str, dtype: torch.dtype, fill: Callable[..., Tensor] = torch.randn
    ) -> list[Tensor | None]:
        """New inputs, with the strides that they have in the model."""
        return self._on(device, dtype, fill).inputs

    @property
    def function(self) -> Callable:
        """Takes the inputs; what runs is what `mdit.kernels.dispatch` says at that time."""
        return self._work.function

    def forward_bytes(self, itemsize: int = 2) -> int:
        work = self._work
        return itemsize * (work.read + work.written) + work.fixed_bytes + work.float8_bytes

    def backward_bytes(self, itemsize: int = 2) -> int:
        gradients = self._work.read if self._work.gradients is None else self._work.gradients
        return itemsize * (self._work.saved + self._work.written + gradients) + self._work.fixed_bytes

    @property
    def forward_flops(self) -> int:
        return self._work.flops

    @property
    def backward_flops(self) -> int:
        return 2 * self._work.flops

    @property
    def label(self) -> str:
        """N256 T64 D1024 y gate modulated"""
        return " ".join(name if value is True else f"{name}{value:d}" for name, value in self.shape.items() if value)


def kernel_calls(config: ModelConfig, micro_batch: int, mask_ratio: float) -> list[KernelCall]:
    """Calls of one forward pass, equal ones of a part as one; each has its backward. In the order of the model."""
    return [call for call in _calls(config, micro_batch, mask_ratio, _of_model) if call.op != EXPERT_LAYER]


def expert_layers(config: ModelConfig, micro_batch: int, mask_ratio: float) -> list[KernelCall]:
    """The layers that the calls of `expert_choice` are parts of, router and first matmul included."""
    return [call for call in _calls(config, micro_batch, mask_ratio, _of_model) if call.op == EXPERT_LAYER]


def fp8_calls(config: ModelConfig, micro_batch: int, mask_ratio: float) -> list[KernelCall]:
    """The matmuls of the blocks that can be in float8 (mdit.parallel.fp8), as calls of mdit.kernels.fp8_linear, and the
    norms that write float8 for them."""
    return _calls(config, micro_batch, mask_ratio, _fp8_of_model)


def _calls(config: ModelConfig, n: int, mask_ratio: float, of_model: Callable) -> list[KernelCall]:
    with torch.device("meta"):
        model = MicroDiT(config)
    found = Counter((op, where, tuple(shape.items())) for op, where, shape in of_model(model, n, mask_ratio))
    return [KernelCall(op, where, dict(shape), count) for (op, where, shape), count in found.items()]


def _of_model(model: MicroDiT, n: int, mask_ratio: float) -> Iterator[tuple[str, str, dict[str, int]]]:
    config, caption = model.config, model.y_emb_preprocess
    all_tokens, length = config.num_patches, config.caption_length
    kept = kept_tokens(all_tokens, mask_ratio)

    yield NORM, "caption", _norm(n, length, caption.norm1)
    yield SELF_ATTENTION, "caption", _heads(n, length, caption.attn)
    yield NORM, "caption", _norm(n, length, caption.norm2, y=True)
    yield SWIGLU, "caption", _swiglu(n, length, caption.mlp)
    for i, block in enumerate(model.patch_mixer):
        yield from _of_block(block, "mixer", n, all_tokens, length, first=i == 0 and _starts_anew(model, "mixer"))
    exit_norm = [*model.patch_mixer_map_xout][:1] if model.patch_mixer else []
    for norm in exit_norm:
        chosen = kept if mask_ratio > 0 else 0
        yield NORM, "mixer", _norm(n, all_tokens, norm, y=True, gate=True, K=chosen)
    for i, block in enumerate(model.blocks):
        yield from _of_block(block, "backbone", n, kept, length, first=i == 0 and _starts_anew(model, "backbone"))
    yield NORM, "backbone", _norm(n, kept, model.final_layer.norm_final, y=True, gate=True, modulated=True)


def _of_block(
    block: Block, where: str, n: int, tokens: int, length: int, *, first: bool
) -> Iterator[tuple[str, str, dict[str, int]]]:
    norm1, norm2, norm3 = _norms(block, n, tokens, first)
    yield NORM, where, norm1
    yield SELF_ATTENTION, where, _heads(n, tokens, block.attn)
    yield NORM, where, norm2
    yield CROSS_ATTENTION, where, {**_heads(n, tokens, block.cross_attn), "L": length}
    yield NORM, where, norm3
    mlp = block.mlp
    if not isinstance(mlp, ExpertChoiceMoE):
        yield SWIGLU, where, _swiglu(n, tokens, mlp)
        return
    num_experts, dim, width = mlp.w1.shape
    shape = {"N": n, "T": tokens, "E": num_experts, "K": mlp.tokens_per_expert(tokens)}
    yield EXPERT_LAYER, where, {**shape, "D": dim, "F": width}
    yield "expert_choice.route", where, shape
    yield "expert_choice.gather_tokens", where, {**shape, "D": dim}
    yield "expert_choice.gelu_bmm", where, {**shape, "D": dim, "F": width}
    yield "expert_choice.scatter_tokens", where, {**shape, "D": dim}


def _starts_anew(model: MicroDiT, where: str) -> bool:
    """Does a stream come into the first block with nothing to be added?"""
    return where == "mixer" or not model.patch_mixer or len(model.patch_mixer_map_xout) > 0


def _norms(block: Block, n: int, tokens: int, first: bool) -> list[dict[str, int]]:
    """`first`: nothing is waiting to be added to the stream that comes in."""
    return [
        _norm(n, tokens, block.norm1, y=not first, gate=not first, modulated=True),
        _norm(n, tokens, block.norm2, y=True, gate=True),
        _norm(n, tokens, block.norm3, y=True, modulated=True),
    ]


def _fp8_of_model(model: MicroDiT, n: int, mask_ratio: float) -> Iterator[tuple[str, str, dict[str, int]]]:
    config, length = model.config, model.config.caption_length
    kept = kept_tokens(config.num_patches, mask_ratio)
    for where, blocks, tokens in (("mixer", model.patch_mixer, config.num_patches), ("backbone", model.blocks, kept)):
        for i, block in enumerate(blocks):
            first = i == 0 and _starts_anew(model, where)
            for op, shape in _fp8_of_block(block, n, tokens, length, first):
                yield op, where, shape


def _fp8_of_block(block: Block, n: int, tokens: int, length: int, first: bool) -> Iterator[tuple[str, dict[str, int]]]:
    attn, cross, mlp, rows = block.attn, block.cross_attn, block.mlp, n * tokens
    norm1, norm2, norm3 = _norms(block, n, tokens, first)
    linear = [(rows, attn.qkv, norm1), (rows, attn.proj, None), (rows, cross.q_linear, norm2), (rows, cross.proj, None)]
    linear.append((n * length, cross.kv_linear, None))
    if isinstance(mlp, ExpertChoiceMoE):
        (num_experts, dim, width), k = mlp.w1.shape, mlp.tokens_per_expert(tokens)
        if _in_float8(dim, width):
            yield FP8_EXPERTS, {"N": n, "T": tokens, "E": num_experts, "K": k, "D": dim, "F": width}
    elif _in_float8(mlp.w3.in_features, mlp.w3.out_features):
        yield NORM_FP8, norm3
        yield FP8_SWIGLU, {"M": rows, "D": mlp.w3.out_features, "F": mlp.w3.in_features}
    for m, layer, norm in linear:
        if _in_float8(layer.in_features, layer.out_features):
            if norm is not None:
                yield NORM_FP8, norm
            yield FP8_LINEAR, {"M": m, "IN": layer.in_features, "OUT": layer.out_features}


def _in_float8(*sizes: int) -> bool:
    return not any(size % fp8_linear.MULTIPLE for size in sizes)


def _norm(n: int, tokens: int, norm, *, y=False, gate=False, modulated=False, K: int = 0) -> dict[str, int]:
    return {"N": n, "T": tokens, "D": norm.weight.numel(), "K": K, "y": y, "gate": gate, "modulated": modulated}


def _heads(n: int, tokens: int, attention) -> dict[str, int]:
    return {"N": n, "T": tokens, "A": attention.proj.in_features, "heads": attention.num_heads}


def _swiglu(n: int, tokens: int, mlp) -> dict[str, int]:
    return {"N": n, "T": tokens, "F": mlp.w3.in_features, "D": mlp.w3.out_features}


# What each op does. `make(*shape)` gives a tensor.


def _self_attention(make: Callable[..., Tensor], N: int, T: int, A: int, heads: int) -> Work:
    function = partial(masked_attention.self_attention, num_heads=heads, eps=EPS)
    out = N * T * A
    return Work(function, [make(N, T, 3 * A)], 3 * out, out, saved=4 * out, flops=4 * T * out)


def _cross_attention(make: Callable[..., Tensor], N: int, T: int, L: int, A: int, heads: int) -> Work:
    function = partial(masked_attention.cross_attention, num_heads=heads, eps=EPS)
    out, read = N * T * A, N * (T + 2 * L) * A
    return Work(function, [make(N, T, A), make(N, L, 2 * A)], read, out, saved=read + out, flops=4 * L * out)


def _add_norm_modulate(
    make: Callable[..., Tensor], N: int, T: int, D: int, K: int, y: bool, gate: bool, modulated: bool
) -> Work:
    """Backward starts from the sum x' that forward wrote; x and y share a gradient where there is no gate. Where x' is
    x itself it is not written, but its cotangent is read."""

    def function(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, keep_NK):
        return patch_mixing.add_norm_modulate(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, EPS, keep_NK)

    x, weight = make(N, T, D), make(D)
    shift, scale, gates = make(N, 6 * D).chunk(6, dim=1)[:3]
    keep = torch.rand(N, T, device=x.device).argsort(dim=1)[:, :K] if K else None  # as sample_mask has it
    inputs = [x, make(N, T, D) if y else None, gates if gate else None, weight]
    inputs += [shift, scale, keep] if modulated else [None, None, keep]
    rows, vectors = N * (K or T) * D, N * D * (gate + 2 * modulated) + D
    return Work(
        function,
        inputs,
        read=rows * (1 + y) + vectors,
        written=rows * (2 if y or K else 1),
        saved=rows * (1 + gate) + N * D * (gate + modulated) + D + (0 if y or K else rows),
        gradients=N * T * D * (1 + gate) + vectors,
        fixed_bytes=INDEX_BYTES["keep_NK"] * N * K,
    )


def _fp8_add_norm_modulate(make: Callable[..., Tensor], **shape: int) -> Work:
    def function(x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, keep_NK):
        arguments = x_NTD, y_NTD, gate_ND, weight_D, shift_ND, scale_ND, EPS, keep_NK
        out, h = fp8_linear.fp8_add_norm_modulate(*arguments)
        return out, h.plain

    rows = shape["N"] * (shape["K"] or shape["T"])
    return replace(_add_norm_modulate(make, **shape), function=function, float8_bytes=rows * (shape["D"] + 4))


def _swiglu_linear(make: Callable[..., Tensor], N: int, T: int, F: int, D: int) -> Work:
    read = N * T * 2 * F + D * F
    inputs = [make(N, T, 2 * F), make(D, F)]
    return Work(swiglu.swiglu_linear, inputs, read, N * T * D, saved=read, flops=2 * N * T * F * D)


def _routing(make: Callable[..., Tensor], N: int, T: int, E: int, K: int) -> Routing:
    return expert_choice.reference.route(make(N, T, E), K)


def _bytes_of(*names: str, N: int, T: int, E: int, K: int) -> int:
    return sum(INDEX_BYTES[name] * N * E * (T if name == "slots_NTE" else K) for name in names)


def _route(make: Callable[..., Tensor], N: int, T: int, E: int, K: int) -> Work:
    logits, fixed = N * T * E, _bytes_of("weights_NEK", "tokens_NEK", "slots_NTE", N=N, T=T, E=E, K=K)
    function = partial(expert_choice.route, tokens_per_expert=K)
    return Work(function, [make(N, T, E)], logits, 0, saved=logits, fixed_bytes=fixed)


def _gather_tokens(make: Callable[..., Tensor], N: int, T: int, E: int, K: int, D: int) -> Work:
    def function(x_NTD, weights_NEK, tokens_NEK, slots_NTE):
        return expert_choice.gather_tokens(x_NTD, Routing(weights_NEK, tokens_NEK, slots_NTE))

    fixed = _bytes_of("tokens_NEK", N=N, T=T, E=E, K=K)
    inputs = [make(N, T, D), *_routing(make, N, T, E, K)]
    return Work(function, inputs, N * T * D, N * E * K * D, saved=0, fixed_bytes=fixed)


def _gelu_bmm(make: Callable[..., Tensor], N: int, T: int, E: int, K: int, D: int, F: int) -> Work:
    read, out = E * (N * K * F + F * D), E * N * K * D
    inputs = [make(E, N * K, F), make(E, F, D), _routing(make, N, T, E, K).weights_NEK]
    fixed = _bytes_of("weights_NEK", N=N, T=T, E=E, K=K)
    return Work(expert_choice.gelu_bmm, inputs, read, out, saved=read, fixed_bytes=fixed, flops=2 * F * out)


def _scatter_tokens(make: Callable[..., Tensor], N: int, T: int, E: int, K: int, D: int) -> Work:
    def function(y_EMD, weights_NEK, tokens_NEK, slots_NTE):
        return expert_choice.scatter_tokens(y_EMD, Routing(weights_NEK, tokens_NEK, slots_NTE))

    fixed = _bytes_of("slots_NTE", N=N, T=T, E=E, K=K)
    inputs = [make(E, N * K, D), *_routing(make, N, T, E, K)]
    return Work(function, inputs, E * N * K * D, N * T * D, saved=0, fixed_bytes=fixed)


def _expert_layer(make: Callable[..., Tensor], N: int, T: int, E: int, K: int, D: int, F: int) -> Work:
    def function(x_NTD, router_ED, w1_EDF, w2_EFD):
        routing = expert_choice.route(torch.nn.functional.linear(x_NTD, router_ED), K)
        hidden_EMF = torch.bmm(expert_choice.gather_tokens(x_NTD, routing), w1_EDF)
        out_EMD = expert_choice.gelu_bmm(hidden_EMF, w2_EFD, routing.weights_NEK)
        return expert_choice.scatter_tokens(out_EMD, routing)

    out, read = N * T * D, N * T * D + D * E + 2 * E * D * F
    flops = 2 * N * T * D * E + 4 * N * E * K * D * F
    return Work(function, [make(N, T, D), make(E, D), make(E, D, F), make(E, F, D)], read, out, saved=read, flops=flops)


def _fp8_linear(make: Callable[..., Tensor], M: int, IN: int, OUT: int) -> Work:
    read = M * IN + IN * OUT
    inputs = [make(M, IN), make(OUT, IN)]
    return Work(fp8_linear.fp8_linear, inputs, read, M * OUT, saved=read, flops=2 * M * IN * OUT)


def _fp8_swiglu(make: Callable[..., Tensor], M: int, D: int, F: int) -> Work:
    def function(x, weight_XD, weight_DF):
        return fp8_linear.fp8_swiglu(x, weight_XD, None, weight_DF)

    read = M * D + 3 * D * F
    inputs = [make(M, D), make(2 * F, D), make(D, F)]
    return Work(function, inputs, read, M * D, saved=read + 2 * M * F, flops=6 * M * D * F)


def _fp8_experts(make: Callable[..., Tensor], N: int, T: int, E: int, K: int, D: int, F: int) -> Work:
    def function(x_NTD, w1_EDF, w2_EFD, weights_NEK, tokens_NEK, slots_NTE):
        return fp8_linear.fp8_experts(x_NTD, w1_EDF, w2_EFD, Routing(weights_NEK, tokens_NEK, slots_NTE))

    out, read = N * T * D, N * T * D + 2 * E * D * F
    inputs = [make(N, T, D), make(E, D, F), make(E, F, D), *_routing(make, N, T, E, K)]
    fixed, hidden = _bytes_of("weights_NEK", "tokens_NEK", "slots_NTE", N=N, T=T, E=E, K=K), N * E * K * F
    return Work(function, inputs, read, out, saved=read + hidden, fixed_bytes=fixed, flops=4 * N * E * K * D * F)


NORM = "patch_mixing.add_norm_modulate"
NORM_FP8 = "fp8_linear.fp8_add_norm_modulate"
SELF_ATTENTION = "masked_attention.self_attention"
CROSS_ATTENTION = "masked_attention.cross_attention"
SWIGLU = "swiglu.swiglu_linear"
EXPERT_LAYER = "expert_choice"
FP8_LINEAR, FP8_SWIGLU = "fp8_linear.fp8_linear", "fp8_linear.fp8_swiglu"
FP8_EXPERTS = "fp8_linear.fp8_experts"

WORK: dict[str, Callable[..., Work]] = {
    NORM: _add_norm_modulate,
    NORM_FP8: _fp8_add_norm_modulate,
    SELF_ATTENTION: _self_attention,
    CROSS_ATTENTION: _cross_attention,
    SWIGLU: _swiglu_linear,
    EXPERT_LAYER: _expert_layer,
    "expert_choice.route": _route,
    "expert_choice.gather_tokens": _gather_tokens,
    "expert_choice.gelu_bmm": _gelu_bmm,
    "expert_choice.scatter_tokens": _scatter_tokens,
    FP8_LINEAR: _fp8_linear,
    FP8_SWIGLU: _fp8_swiglu,
    FP8_EXPERTS: _fp8_experts,
}
