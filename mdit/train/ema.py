"""The exponential moving average of the weights, sharded as the optimizer's own state is."""

from typing import Any

import torch
from torch import Tensor

from mdit.config import EMAConfig


class EMA:
    """Average of this rank's float32 master weights: costs 4 bytes a parameter over the data-parallel group.

    Until `start_step` it follows the weights exactly; from then on ema <- decay * ema + (1 - decay) * weights.
    Without a `config` nothing is averaged, and `partitions` is None.
    """

    def __init__(self, config: EMAConfig | None, master_weights: list[Tensor]) -> None:
        self.config, self.master_weights = config, master_weights
        self.partitions = [master.detach().clone() for master in master_weights] if config else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer step that ended in state `step` (the first one ends in 1)."""
        if self.config is None or self.partitions is None:
            return
        if step <= self.config.start_step:
            torch._foreach_copy_(self.partitions, self.master_weights)
        else:
            torch._foreach_lerp_(self.partitions, self.master_weights, 1 - self.config.decay)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.partitions is None else {"ema": self.partitions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.partitions is not None:
            torch._foreach_copy_(self.partitions, state["ema"])
