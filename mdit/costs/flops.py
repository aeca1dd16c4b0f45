"""FLOPs of a training run, counted while the model itself runs forward and backward on the meta device: mixer, masking,
experts at capacity, attention and its backward included. 2 for a multiply-add; norms and elementwise work count as 0.
"""

from collections import Counter
from functools import cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from mdit.config import AlignConfig, ModelConfig, TrainConfig
from mdit.costs.layouts import Layout
from mdit.costs.muon import orthogonalisation_flops
from mdit.costs.trace import Form, fused_attention, on_meta
from mdit.kernels import dispatch
from mdit.masking import mask_ratio

ALONE = Layout(gpus=1, stage=1, micro_batch=1, accumulation=1)


@cache
def image_flops(config: ModelConfig, mask_ratio: float, align: AlignConfig | None = None) -> int:
    """FLOPs of one image, forward and backward; with the projection of `align`."""
    model, loss_of_batch, _ = on_meta(config, 1, mask_ratio, Form(triton=False), align)
    with dispatch.using(), fused_attention(), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(loss_of_batch(), list(model.parameters()))
    return counter.get_total_flops()


def run_flops(config: TrainConfig, steps: int | None = None) -> int:
    """FLOPs of a run's first `steps` steps; of all of them by default."""
    steps, training, align = config.training.num_steps if steps is None else steps, config.training, config.align

    def counted(steps: int) -> dict[float, int]:
        """Mask ratio -> how many of the first steps have it."""
        if len(training.mask_ratios) == 1:
            return {training.fixed_mask_ratio: steps}
        return Counter(mask_ratio(config, step) for step in range(steps))

    flops = sum(n * image_flops(config.model, ratio) for ratio, n in counted(steps).items())
    for ratio, n in counted(min(steps, align.stop_step)).items() if align else ():
        flops += n * (image_flops(config.model, ratio, align) - image_flops(config.model, ratio))
    return training.global_batch_size * flops


def optimizer_flops(config: TrainConfig, steps: int | None = None) -> int:
    """FLOPs of matmuls in the optimizer's first `steps` steps, on however many GPUs: Muon's, whose number does not grow
    with the batch; AdamW has none."""
    steps = config.training.num_steps if steps is None else steps
    return steps * orthogonalisation_flops(config, ALONE)


def total_flops(config: TrainConfig, steps: int | None = None) -> int:
    """FLOPs of model and optimizer."""
    return run_flops(config, steps) + optimizer_flops(config, steps)
