"""Averages of the weights, sharded as the optimizer's own state is."""

from typing import Any

import torch
from torch import Tensor

from mdit.checkpoint.averages import exponent
from mdit.config import AveragesConfig, EMAConfig


class EMA:
    """Averages of this rank's float32 master weights: each costs 4 bytes a parameter over the data-parallel group.

    With an `ema`: until `start_step` it follows the weights exactly; from then on ema <- decay * ema + (1 - decay) *
    weights; `partitions` has it, and is None without. With `averages`: two more, `of_lengths`, for AveragesConfig.
    """

    def __init__(
        self, ema: EMAConfig | None, master_weights: list[Tensor], averages: AveragesConfig | None = None
    ) -> None:
        self.config, self.master_weights = ema, master_weights
        self.partitions = self._copy() if ema else None
        self.exponents = [exponent(length) for length in averages.lengths] if averages else []
        self.of_lengths = [self._copy() for _ in self.exponents]

    def _copy(self) -> list[Tensor]:
        return [master.detach().clone() for master in self.master_weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimizer step that ended in state `step` (the first one ends in 1)."""
        if self.config is not None and self.partitions is not None:
            if step <= self.config.start_step:
                torch._foreach_copy_(self.partitions, self.master_weights)
            else:
                torch._foreach_lerp_(self.partitions, self.master_weights, 1 - self.config.decay)
        for gamma, average in zip(self.exponents, self.of_lengths, strict=True):
            torch._foreach_lerp_(average, self.master_weights, 1 - (1 - 1 / step) ** (gamma + 1))

    def state_dict(self) -> dict[str, Any]:
        found = {} if self.partitions is None else {"ema": self.partitions}
        return found | {f"average_{number}": average for number, average in enumerate(self.of_lengths)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, average in self.state_dict().items():
            torch._foreach_copy_(average, state[name])
