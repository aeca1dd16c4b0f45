"""Activation checkpointing: what of a block's forward is kept for its backward pass, and what is computed again.

    none       all that gradients need is kept
    selective  results of matmuls, attention, routing and communication are kept; norms, modulation, gates, GELU and the
               moves of tokens to their experts and back are computed again
    block      one tensor between two blocks is kept; each block's whole forward runs again, communication included

Outputs are the same bits in all three, gradients as well with "selective"; with "block" those of the residual stream
are added up in another order. Where blocks are compiled, each way is fused, and so rounded, otherwise.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from mdit.parallel.fuse import FusedBlock, PendingResidual
from mdit.parallel.swap import swap

# Small, and safer kept: a choice made again could fall otherwise where what leads to it is rounded otherwise.
ROUTING = ("aten.topk.", "mdit.expert_route.")
DEAR = (
    *("aten.mm.", "aten.addmm.", "aten.bmm.", "aten._scaled_dot_product_"),
    *("mdit.masked_attention.", "mdit.swiglu_linear.", "mdit.expert_gelu_bmm."),
    *("mdit.fp8_linear.", "mdit.fp8_swiglu.", "mdit.fp8_experts."),
    # Expert parallelism's exchange, and all communication of compiled blocks.
    "_c10d_functional.",
    # Tensor parallelism's sum over ranks, which overwrites a matmul's result. As that is kept, what the second run
    # finds is the sum: it must not be summed again.
    "c10d.allreduce_.",
)


def recompute(block: nn.Module, mode: str) -> None:
    """Let a `FusedBlock` compute as `mode` says, in place, before `block.compile()`."""
    if mode != "none":
        swap(block, {"selective": SelectiveRecompute, "block": BlockRecompute}[mode])


class SelectiveRecompute(FusedBlock):
    def forward(self, *arguments) -> PendingResidual:
        return checkpoint(super().forward, *arguments, **OPTIONS, context_fn=keeping_the_dear)


class BlockRecompute(FusedBlock):
    """The result is added up inside, so that one tensor is kept between two blocks and not three.

    (Selectively that would save nothing: what is added is a matmul's result, or with experts as large as one.)
    """

    def forward(self, *arguments) -> PendingResidual:
        # Compiled, the second run is fused and so rounded in its own way; else it gives the same bits.
        context_fn = keeping_the_routing if torch.compiler.is_compiling() else noop_context_fn
        return PendingResidual(checkpoint(self.added, *arguments, **OPTIONS, context_fn=context_fn))

    def added(self, *arguments) -> Tensor:
        return super().forward(*arguments).added()


def keep(kept: tuple[str, ...], _, op, *args, **kwargs) -> CheckpointPolicy:
    """A policy of torch's selective checkpointing, by the names of operations as Python has them in torch.ops."""
    return CheckpointPolicy.MUST_SAVE if str(op).startswith(kept) else CheckpointPolicy.PREFER_RECOMPUTE


OPTIONS: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # a block draws no random numbers
keeping_the_routing = partial(create_selective_checkpoint_contexts, partial(keep, ROUTING))
keeping_the_dear = partial(create_selective_checkpoint_contexts, partial(keep, ROUTING + DEAR))
