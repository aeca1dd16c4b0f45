"""What is done to a plain MicroDiT before an engine takes it: sharding, recomputation, compilation, in this order."""

from mdit.models import MicroDiT
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.recompute import recompute
from mdit.parallel.settings import RunSettings


def parallelize(model: MicroDiT, settings: RunSettings, plan: ParallelPlan) -> None:
    """In place, and without renaming a parameter.

    Every rank has drawn the whole model from the same seed and keeps its part: equal weights under any plan.
    """
    if plan.expert_group is not None:
        from mdit.parallel import expert  # needs deepspeed

        expert.shard_experts(model, plan.expert_group)
    if plan.tensor_group is not None:
        from mdit.parallel import tensor  # needs megatron-core

        tensor.shard_blocks(model, plan.tensor_group)
    for block in (*model.patch_mixer, *model.blocks):
        recompute(block, settings.activation_checkpointing)
        if settings.compile:
            block.compile()
