"""What is done to a plain MicroDiT before an engine takes it: recomputation and compilation, block by block."""

from functools import partial

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mdit.models import MicroDiT
from mdit.models.layers import Stream
from mdit.parallel.settings import RunSettings


def parallelize(model: MicroDiT, settings: RunSettings) -> None:
    """In place, and without renaming a parameter: the blocks' forward is wrapped, the blocks stay."""
    for block in (*model.patch_mixer, *model.blocks):
        if settings.activation_checkpointing == "block":
            block.forward = partial(checkpoint, partial(added, block.forward), use_reentrant=False)
        if settings.compile:
            block.compile()


def added(forward, stream: Stream, caption_NLD: Tensor, condition_ND: Tensor) -> Stream:
    """A block whose result is added up inside, so that one tensor is kept between two blocks and not three."""
    return Stream(forward(stream, caption_NLD, condition_ND).added())
