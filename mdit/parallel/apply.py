"""Steps from a plain MicroDiT to the one that an engine takes: fusion, shards, float8, recomputation, compilation."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mdit.mask_schedule import MAX_MASK_RATIOS
from mdit.models import MicroDiT
from mdit.parallel.align import read_block
from mdit.parallel.fp8 import use_fp8
from mdit.parallel.fuse import fuse
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.recompute import recompute
from mdit.parallel.settings import RunSettings

# Of a block: with and without gradients, behind another block or first; for each number of tokens that a run keeps.
FORMS = 4 * MAX_MASK_RATIOS


def parallelize(model: MicroDiT, settings: RunSettings, plan: ParallelPlan) -> None:
    """In place, and without renaming a parameter.

    Every rank has drawn the whole model from the same seed and keeps its part: equal weights under any plan.
    """
    fuse(model)
    if plan.expert_group is not None:
        from mdit.parallel import expert  # needs deepspeed

        expert.shard_experts(model, plan.expert_group)
    if plan.tensor_group is not None:
        from mdit.parallel import tensor  # needs megatron-core

        tensor.shard_blocks(model, plan.tensor_group)
    if settings.fp8:
        use_fp8(model)
    for block in blocks_of(model):
        recompute(block, settings.activation_checkpointing)
    read_block(model)
    if settings.compile:
        compile_each(blocks_of(model))


def blocks_of(model: MicroDiT) -> list[nn.Module]:
    """The blocks that are recomputed and compiled one by one."""
    return [*model.patch_mixer, *model.blocks]


def compile_each(blocks: list[nn.Module], backend: str | Callable = "inductor") -> None:
    """Each for the very shapes that it meets, as a run knows no others. Blocks are of many widths but share the code of
    one forward, of which Dynamo compiles 8 forms unless told otherwise: the other blocks would run as they are."""
    from torch._dynamo import config  # takes a second to import

    forms = FORMS * len(blocks)
    config.recompile_limit = max(forms, config.recompile_limit)
    config.accumulated_recompile_limit = max(forms, config.accumulated_recompile_limit)
    for block in blocks:
        block.compile(backend=backend, dynamic=False)


@contextmanager
def compiling(blocks: list[nn.Module], backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, every block is compiled as a run does it; afterwards all that was compiled is forgotten."""
    try:
        compile_each(blocks, backend)
        yield
    finally:
        for block in blocks:
            vars(block).pop("_compiled_call_impl", None)  # set by compile() on the instance
        torch.compiler.reset()
