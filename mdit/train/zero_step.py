"""DeepSpeed's optimizers under ZeRO 1 and 2 with one host wait a step, and gradient sums that keep their float32.

DeepSpeed 0.19.8 makes the host wait three times a step under ZeRO 1 in bf16, four times under ZeRO 2: for a constant
that it copies to the GPU, for whether a gradient is not finite, whether the norm is not, whether that is above the
clip. Here the norm comes to the host once, before the optimizer, and all of that is asked there: what is
not finite makes the norm so. Where DeepSpeed computes in the same dtypes, the weights are bit for bit the same.
"""

from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime import utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import get_global_norm_of_tensors, is_invalid_grad_norm
from deepspeed.runtime.zero import stage3, stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups
from torch import Tensor

INVALID = -1.0  # DeepSpeed's word for a norm that is not finite


def improve(engine: Any) -> None:
    """Give a DeepSpeed engine the optimizer of this file that goes with its own. Under ZeRO 3 it has none."""
    engine.optimizer.__class__ = IMPROVED.get(type(engine.optimizer), type(engine.optimizer))
    if isinstance(engine.optimizer, BF16Sums):
        engine.allreduce_and_copy = AllReduce(engine)


def mark_invalid(norm: Tensor, device: torch.device | None = None, val: float = INVALID) -> None:
    """Replace, in place, what is not finite. DeepSpeed's own copies `val` to the device, for which the host waits."""
    norm.masked_fill_(~norm.isfinite(), val)


modules: tuple[Any, ...] = (utils, stage_1_and_2, stage3)
for module in modules:
    assert callable(module.mask_nan_or_inf_with_val_inplace)
    module.mask_nan_or_inf_with_val_inplace = mark_invalid


class BF16Sums(BF16_Optimizer):
    """Optimizer of ZeRO 1 in bf16. It sums each micro-batch's bf16 gradients in float32, on every rank all of them."""

    @torch.no_grad()
    def update_hp_grads(self, clear_lp_grads: bool = False) -> None:
        """Add this micro-batch's gradients: 10 bytes a number are read and written, where a float32 copy of them makes
        it 18. Autograd then gives the next micro-batch's gradients as they are, with nothing to be zeroed and added."""
        if self.immediate_grad_update:  # hooks have done it
            return
        for group, sums, has_gradients in zip(
            self.bf16_groups, self.fp32_groups_gradients, self.fp32_groups_has_gradients, strict=True
        ):
            used = [i for i, parameter in enumerate(group) if parameter.grad is not None]
            if used:
                torch._foreach_add_([sums[i] for i in used], [group[i].grad.view(-1) for i in used])
            for i in used:
                group[i].grad, has_gradients[i] = None, True

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Clip, step the masters and fill the bf16 weights; nothing, and `overflow`, where the norm is not finite. The
        engine calls `zero_grad` behind it."""
        norm = self.global_norm()
        self.overflow = is_invalid_grad_norm(norm)
        self._global_grad_norm = float("inf") if self.overflow else norm
        if self.overflow:
            return
        scale = self.clip_grad / (norm + 1e-6) if self.clip_grad > 0 else norm.new_ones(())
        for master, gradient in zip(self.fp32_groups_flat_partition, self.fp32_groups_gradient_flat_partition):
            if scale < 1:  # of all sums this rank needs those of its own masters
                gradient.mul_(scale)
            master.grad = gradient
        self.optimizer.step()
        self._lazy_init_hp_params_optimizer_state()
        self.update_lp_params()

    def global_norm(self) -> Tensor:
        """Norm over all parameters, a scalar in host memory; INVALID where it is not finite. The step's host wait."""
        gradients, of_experts = self.get_grads_for_norm()
        norms = [get_global_norm_of_tensors(gradients, mpu=self.mpu)]
        for name, tensors in of_experts.items():
            group = groups._get_expert_parallel_group(name)
            norms.append(get_global_norm_of_tensors(tensors, mpu=self.mpu, moe_ep_group=group))
        norms = torch.stack(norms).cpu()
        if is_invalid_grad_norm(norms):
            return norms.new_tensor(INVALID)
        return norms[0] if len(norms) == 1 else norms.pow(2).sum().double().sqrt()


class AllReduce:
    """DeepSpeedEngine.allreduce_and_copy, which rounds float32 gradients to bf16 to send them: not where a group has
    one rank, as on one GPU, or for experts of which every rank has its own."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine) -> None:
        self.several_ranks = engine.allreduce_and_copy

    def __call__(self, gradients: list[Tensor], group, num_averaged: float | None = None) -> None:
        """`num_averaged`: whose mean it is, the number of ranks of the group if None."""
        if comm.get_world_size(group) > 1:
            for gradient in gradients:  # of a parameter group; DeepSpeed would first copy several into one
                self.several_ranks([gradient], group, num_averaged)
        elif num_averaged not in (None, 1):
            torch._foreach_mul_(gradients, 1 / num_averaged)


class OneWait(DeepSpeedZeroOptimizer):
    """Optimizer of ZeRO 2, and of ZeRO 1 in float32 or with the optimizer in host memory."""

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing, as the norm says the same, but with the optimizer in host memory, where that has been noted."""
        if self.cpu_offload:
            super().check_overflow(partition_gradients)

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """A scalar in host memory; infinite where it is not finite. The step's host wait."""
        return super().scaled_global_norm(norm_type).cpu()


IMPROVED = {BF16_Optimizer: BF16Sums, DeepSpeedZeroOptimizer: OneWait}
