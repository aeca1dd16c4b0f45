"""The exponential moving average of the weights, sharded as the optimizer's own state is."""

import torch
from torch import Tensor

from mdit.config import EMAConfig


class EMA:
    """Average of this rank's float32 master partitions: costs 4 bytes a parameter over the data-parallel group.

    Until `start_step` it follows the weights exactly; from then on ema <- decay * ema + (1 - decay) * weights.
    """

    def __init__(self, config: EMAConfig, masters: list[Tensor]) -> None:
        self.config, self.masters = config, masters
        self.partitions = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer step that ended in state `step` (the first one ends in 1)."""
        if step <= self.config.start_step:
            torch._foreach_copy_(self.partitions, self.masters)
        else:
            torch._foreach_lerp_(self.partitions, self.masters, 1 - self.config.decay)
