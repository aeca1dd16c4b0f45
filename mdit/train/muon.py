"""Muon for the blocks' matrices and AdamW for all else, as one optimizer of ZeRO's flat partitions.

    m = momentum m + (1 - momentum) g        u = (1 - momentum) g + momentum m          (Nesterov)
    w = w - lr weight_decay w - lr sqrt(max(1, rows / columns)) newton_schulz(u)        (matrix by matrix)

torch.optim.Muon steps whole 2-D parameters, in bfloat16, and ZeRO's partitions are flat. DeepSpeed's Muon clips the
orthogonalised update in place of the gradient, lets every holder of a matrix orthogonalise it again, and refuses
experts under ZeRO 1 in bfloat16 as well as ZeRO 3's reduce-scatter. `mdit.parallel.muon` spreads the matrices.
"""

from typing import Any

import torch
from torch import Tensor

from mdit.parallel.muon import Exchange


class MuonAdamW(torch.optim.AdamW):
    """AdamW, except for groups with a key "newton_schulz_steps": these are Muon's, with "momentum" as another key.

    `exchanges` has for each of Muon's partitions its matrices. It is filled when DeepSpeed has made the partitions,
    before the first step. Muon's state is "exp_avg" alone, its momentum: the same average as AdamW's first moment. All
    ranks step the same groups in the same order.
    """

    exchanges: dict[Tensor, Exchange]

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.exchanges = {}

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Step the parameters that have a gradient now. Those of Muon's are overwritten."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["params"] and "newton_schulz_steps" not in group]
            if self.param_groups:
                super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if "newton_schulz_steps" in group:
                for master in group["params"]:
                    if master.grad is not None:
                        self._step_matrices(master, group)

    def _step_matrices(self, master: Tensor, group: dict[str, Any]) -> None:
        assert master.grad is not None
        state, momentum = self.state[master], group["momentum"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(master)
        mean = state["exp_avg"].lerp_(master.grad, 1 - momentum)
        update = master.grad.lerp_(mean, momentum)
        self.exchanges[master].orthogonalise(update, group["newton_schulz_steps"], group["eps"])
        master.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
