"""Deferred masking (paper section 2): which patches the backbone sees, shared by model and loss."""

import bisect
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mdit.config import TrainConfig, kept_tokens
from mdit.mask_schedule import LinearMask


@dataclass(frozen=True)
class Mask:
    """Kept patches of every sample: `keep_NK` int64, indices into the T patches; `num_patches` is T."""

    keep_NK: Tensor
    num_patches: int

    def __getitem__(self, rows: slice) -> "Mask":
        return Mask(self.keep_NK[rows], self.num_patches)

    def rows(self) -> Tensor:
        """(N * K,) int64: the kept tokens' rows in x_NTD.flatten(0, 1). Moving whole rows is the fast path of torch."""
        first_N = torch.arange(len(self.keep_NK), device=self.keep_NK.device) * self.num_patches
        return (self.keep_NK + first_N.unsqueeze(1)).flatten()

    def image(self, height: int, width: int) -> Tensor:
        """(N, 1, H, W) float32: 1 at the pixels of kept patches, 0 elsewhere. Patches are square, row by row."""
        patch = math.isqrt(height * width // self.num_patches)
        kept = torch.zeros(len(self.keep_NK), self.num_patches, device=self.keep_NK.device)
        kept = kept.scatter(1, self.keep_NK, 1.0).view(-1, 1, height // patch, width // patch)
        return kept.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)


def sample_mask(noise_NT: Tensor, mask_ratio: float) -> Mask | None:
    """Keep the int(T * (1 - mask_ratio)) patches with the smallest of T uniform numbers; None when all are kept."""
    num_patches = noise_NT.shape[1]
    if mask_ratio == 0:
        return None
    keep_NK = noise_NT.argsort(dim=1)[:, : kept_tokens(num_patches, mask_ratio)]
    return Mask(keep_NK, num_patches)


def drop_tokens(x_NTD: Tensor, mask: Mask) -> Tensor:
    """(N, T, D) -> (N, K, D): the kept tokens, in the mask's order."""
    return x_NTD.flatten(0, 1).index_select(0, mask.rows()).unflatten(0, mask.keep_NK.shape)


def restore_tokens(x_NKD: Tensor, mask: Mask) -> Tensor:
    """(N, K, D) -> (N, T, D): tokens back at their patches, zeros where patches were dropped."""
    n, _, width = x_NKD.shape
    everywhere = x_NKD.new_zeros(n * mask.num_patches, width)
    return everywhere.index_copy(0, mask.rows(), x_NKD.flatten(0, 1)).unflatten(0, (n, mask.num_patches))


def mask_ratio(config: TrainConfig, step: int) -> float:
    """Mask ratio of the step to `step + 1`: a function of the step, the same on every rank and device."""
    ratio, num_steps = config.training.mask_ratio, config.training.num_steps
    if isinstance(ratio, LinearMask):
        return ratio.ratios[min(bisect.bisect_right(ratio.ends(num_steps), step), ratio.levels)]
    return ratio


def constant_parts(config: TrainConfig) -> list[tuple[float, TrainConfig]]:
    """(share of the run's steps, the recipe at that mask ratio alone) of each mask ratio. What a run costs is the mean
    over them, and the most that it takes is that of one of them."""
    ratio, num_steps = config.training.mask_ratio, config.training.num_steps
    if isinstance(ratio, LinearMask):
        ends = (0, *ratio.ends(num_steps))
        shares = [(end - start) / num_steps for start, end in zip(ends, ends[1:])]
    else:
        shares = [1.0]
    return [
        (share, config.model_copy(update={"training": config.training.model_copy(update={"mask_ratio": each})}))
        for share, each in zip(shares, config.training.mask_ratios)
        if share > 0
    ]
