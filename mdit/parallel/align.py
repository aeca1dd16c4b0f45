"""Representation alignment, put onto a model from outside: a projection of what one block of the backbone puts out.

REPA (Yu et al. 2024, arXiv 2410.06940): tokens in the middle of the network are drawn towards a frozen vision tower's
features of the same patches; here those that deferred masking keeps. The projection is `model.align`, whose parameters
have names that begin with PREFIX. It belongs to training: checkpoints hold it, snapshots do not.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.config import AlignConfig
from mdit.masking import Mask, drop_tokens
from mdit.models import MicroDiT
from mdit.parallel.fuse import PendingResidual
from mdit.parallel.swap import swap

PREFIX = "align."


class Projection(nn.Sequential):
    """(N, K, D) -> (N, K, C): three linear layers with SiLU between them. Keeps what it projected in a forward pass for
    `losses`.

    While not `active` it projects no tokens: its gradients are zeros, the block feels nothing of it, and weights and
    moments go on the same in every layout.
    """

    def __init__(self, dim: int, config: AlignConfig) -> None:
        width = config.width
        layers = nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, config.channels)
        super().__init__(*layers)
        self.config, self.active = config, True
        self.projected: Tensor | None = None

    def begin(self, step: int) -> None:
        """Before the forward passes of the step to `step + 1`."""
        self.active = step < self.config.stop_step

    def read(self, x_NKD: Tensor) -> None:
        self.projected = self(x_NKD if self.active else x_NKD.detach()[:, :0])

    def losses(self, features_NTC: Tensor | None, mask: Mask | None) -> Tensor:
        """(N,) float32: mean over the kept patches of 1 - cos(projection, feature), of the last forward pass; zeros
        while not active."""
        assert self.projected is not None
        projected_NKC, self.projected = self.projected.float(), None
        if not self.active:
            return projected_NKC.flatten(1).sum(1)
        assert features_NTC is not None
        features_NKC = features_NTC if mask is None else drop_tokens(features_NTC, mask)
        return 1 - F.cosine_similarity(projected_NKC, features_NKC.float(), dim=2).mean(1)


class ReadBlock(nn.Module):
    """A block whose output is read when it is called: outside of what is compiled, or computed again in the backward
    pass. The sum that a fused block leaves to its reader is taken here, once."""

    read: Callable[[Tensor], None]

    def __call__(self, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        out = super().__call__(*inputs)
        x_NKD = out.added() if isinstance(out, PendingResidual) else out
        self.read(x_NKD)
        return PendingResidual(x_NKD) if isinstance(out, PendingResidual) else x_NKD


def add_projection(model: MicroDiT, config: AlignConfig) -> None:
    """Give a model `align`, whose weights torch's global RNG draws."""
    model.align = Projection(model.config.dim, config)


def read_block(model: MicroDiT) -> None:
    """Let the projection of a model, if it has one, read its block, in place; after the block got its form."""
    if (projection := projection_of(model)) is not None:
        block = model.blocks[projection.config.block - 1]
        form = type(f"Read{type(block).__name__}", (ReadBlock, type(block)), {})
        swap(block, form, read=projection.read)


def projection_of(model: nn.Module) -> Projection | None:
    found = model._modules.get("align")
    return found if isinstance(found, Projection) else None


@cache
def projection_sizes(dim: int, config: AlignConfig | None) -> tuple[int, ...]:
    """Sizes of the projection's tensors, in numbers; none without [align]."""
    if config is None:
        return ()
    with torch.device("meta"):
        return tuple(p.numel() for p in Projection(dim, config).parameters())
