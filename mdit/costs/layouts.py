"""Layouts of a step over GPUs, in numbers alone: those that can be, for a run and for a plan."""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mdit.config import AlignConfig, ModelConfig, TrainConfig, UserError
from mdit.costs.trace import Form
from mdit.models import meta_model
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.align import projection_sizes
from mdit.parallel.muon import misfit, takes_muon
from mdit.parallel.plan import problem
from mdit.parallel.settings import Checkpointing, Execution, ZeroOptions
from mdit.parallel.shard import DENSE

SIZES = (2, 4, 8)  # of expert and tensor groups that are tried: within a node
ITEMSIZE = 2  # bytes of a number that is computed with: a paper plan is for bfloat16


@dataclass(frozen=True)
class Layout:
    """`gpus` in groups of `ep` (experts) or `tp` (matrices) neighbours; `micro_batch` images at once, `accumulation`
    times a step. `offload`: the optimizer is in host memory. `reduced`: fewer images at once than a run takes by
    itself. `fp8`: the blocks' matmuls are in float8."""

    gpus: int
    stage: int
    micro_batch: int
    accumulation: int
    ep: int = 1
    tp: int = 1
    checkpointing: Checkpointing = "none"
    triton: bool = False
    options: ZeroOptions = ZeroOptions()
    reduced: bool = False
    offload: bool = False
    fp8: bool = False

    @property
    def data_size(self) -> int:
        """Shares of a global batch."""
        return self.gpus // self.tp

    @property
    def overlapped(self) -> bool:
        """Is ZeRO's own communication hidden behind the computation? BF16_Optimizer (stage 1) cannot."""
        wanted = self.stage == 3 if self.options.overlap_comm is None else self.options.overlap_comm
        return wanted and self.stage > 1

    @property
    def form(self) -> Form:
        """Form in which each GPU computes the model."""
        return Form(self.triton, self.fp8, self.checkpointing, self.tp)

    @property
    def label(self) -> str:
        """ZeRO-2 dp32 ep2 host"""
        groups = f" ep{self.ep}" if self.ep > 1 else f" tp{self.tp}" if self.tp > 1 else ""
        ways = " fp8" * self.fp8 + " host" * self.offload
        return f"ZeRO-{self.stage} dp{self.data_size}{groups}{ways}"


@dataclass(frozen=True)
class Weights:
    """Numbers of a model's parameters: experts (cut by ep), matrices that tp cuts, and all others; the sizes of its
    tensors, one by one; and whether Muon steps the experts and `muon` numbers of all others."""

    experts: int
    matrices: int
    others: int
    tensors: tuple[int, ...]
    muon: int = 0

    def groups(self, layout: Layout) -> list[tuple[int, int, int]]:
        """(numbers that a rank computes with, ranks that share their optimizer state, how far apart they are), of each
        of DeepSpeed's parameter groups; all but the first are Muon's, where there is Muon."""
        shared, dense = (layout.data_size, layout.tp), self.others + self.matrices // layout.tp - self.muon
        if layout.ep == 1:
            muon = self.muon + self.experts if self.muon else 0
            found = [(dense + self.experts + self.muon - muon, *shared), (muon, *shared)]
        else:
            experts = self.experts // layout.ep, layout.gpus // layout.ep, layout.ep
            found = [(dense, *shared), (self.muon, *shared), experts]
        return [group for group in found if group[0]]

    def muon_on_a_rank(self, layout: Layout) -> int:
        """Numbers of which a rank has a momentum and no second moment."""
        groups = self.groups(layout)[1:] if self.muon else []
        return sum(-(-count // ranks) for count, ranks, _ in groups)

    def on_a_rank(self, layout: Layout) -> tuple[int, int]:
        """Numbers that a rank (computes with, has the optimizer state of)."""
        groups = self.groups(layout)
        return sum(count for count, _, _ in groups), sum(-(-count // ranks) for count, ranks, _ in groups)


def count_weights(config: TrainConfig) -> Weights:
    """Everything that is trained: the model and the projection of [align]."""
    return _count_weights(config.model, config.optim.muon is not None, config.align)


@cache
def _count_weights(config: ModelConfig, muon: bool, align: AlignConfig | None) -> Weights:
    model = meta_model(config)
    experts, matrices = (
        sum(p.numel() for m in model.modules() if isinstance(m, kind) for p in m.parameters(recurse=recurse))
        for kind, recurse in ((ExpertChoiceMoE, False), (DENSE, True))
    )
    tensors = (*(p.numel() for p in model.parameters()), *projection_sizes(config.dim, align))
    taken = sum(p.numel() for name, p in model.named_parameters() if muon and takes_muon(name, p.shape))
    return Weights(experts, matrices, sum(tensors) - experts - matrices, tensors, taken - experts if muon else 0)


def gathered_numbers(config: TrainConfig, layout: Layout) -> tuple[int, int, int]:
    """ZeRO 3: whole weights beside the partitions, (between steps, while backward begins), and those in the buffer of
    the gather that was begun ahead, from which they are copied.

    Parameters of up to the persistence threshold always (parameter_offload.py); of the others those that will be used
    again within the reuse distance, which at the turn from forward to backward is twice the way to the end, and a
    bucket fetched ahead.
    """
    if layout.stage < 3 or layout.data_size == 1:  # gathering is a view of the only partition
        return 0, 0, 0
    options, tensors = layout.options, count_weights(config).tensors
    always = sum(size for size in tensors if size <= options.stage3_param_persistence_threshold)
    rest, bucket = sum(tensors) - always, options.stage3_prefetch_bucket_size
    return always, always + min(rest, options.stage3_max_reuse_distance // 2 + bucket), min(rest, bucket)


def candidates(
    config: TrainConfig, gpus: int, *, micro_batch: int | None, checkpointing: Checkpointing, triton: bool
) -> list[Layout]:
    """ZeRO 1 and 2 with every ep or tp that fits, and ZeRO 3. Raises UserError when none can share the batch."""
    groups = [(1, 1), *((ep, 1) for ep in SIZES), *((1, tp) for tp in SIZES)]
    found, errors, path = [], [], f"--gpus {gpus}"
    for stage, (ep, tp) in itertools.product((1, 2, 3), groups):
        settings = {"expert_parallel": ep, "tensor_parallel": tp, "activation_checkpointing": checkpointing}
        ds_json: dict[str, Any] = {"zero_optimization": {"stage": stage}, "mdit": settings}
        ds_json |= {"train_micro_batch_size_per_gpu": "auto" if micro_batch is None else micro_batch}
        try:
            execution = Execution.resolve(ds_json, config, processes=gpus, bf16_works=True, path=path)
            found.append(layout_of(execution, config, gpus, triton=triton, path=path))
        except UserError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def layout_of(execution: Execution, config: TrainConfig, gpus: int, *, triton: bool, path: str | Path) -> Layout:
    """The layout that a DeepSpeed JSON asks for."""
    settings, zero = execution.settings, execution.zero
    ep, tp = settings.expert_parallel, settings.tensor_parallel
    if execution.offloads_parameters or (execution.offloads_optimizer and zero.stage != 2):
        key = "offload_param" if execution.offloads_parameters else "offload_optimizer"
        why = "a paper plan knows offload_optimizer at stage 2 only"
        raise UserError(f"{path}: zero_optimization.{key}.device = 'cpu': {why}")
    if execution.dtype != torch.bfloat16:
        raise UserError(f"{path}: bf16.enabled = False: a paper plan is for bfloat16")
    if why := problem(execution, config.model, gpus):
        raise UserError(f'{path}: "mdit": {why}')
    if config.optim.muon is not None and (why := misfit(execution)):
        raise UserError(f"{path}: optim.name = 'muon': {why}")
    batches, checkpointing = (execution.micro_batch, execution.accumulation_steps), settings.activation_checkpointing
    options = ZeroOptions(**zero.model_dump(include=set(ZeroOptions.model_fields)))
    ways: dict[str, Any] = {"options": options, "offload": execution.offloads_optimizer, "fp8": settings.fp8}
    return Layout(gpus, zero.stage, *batches, ep, tp, checkpointing, triton, **ways)
