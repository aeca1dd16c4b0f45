"""What is done to a plain MicroDiT before an engine takes it: recomputation and compilation, block by block."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from mdit.models import MicroDiT
from mdit.parallel.settings import RunSettings


def parallelize(model: MicroDiT, settings: RunSettings) -> None:
    """In place, and without renaming a parameter: the blocks' forward is wrapped, the blocks stay."""
    for block in (*model.patch_mixer, *model.blocks):
        if settings.activation_checkpointing == "block":
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if settings.compile:
            block.compile()
