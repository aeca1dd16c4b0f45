"""DeepSpeed behind a few verbs: build, micro-step, and the float32 master weights as plain tensors.

Beside zero_step.py, optim.py and mdit/parallel/expert.py only this file knows DeepSpeed; all else sees tensors and
names. In ZeRO 1, 2 and 3 each rank's optimizer owns flat float32 partitions of the weights (`master_weights`), and the
model's own parameters are copies of them in the computing dtype. `fragments` says which elements of which parameter lie
where in them.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor

from mdit.checkpoint.fragments import Fragment
from mdit.config import TrainConfig, UserError
from mdit.models import MicroDiT
from mdit.parallel import expert
from mdit.parallel.align import PREFIX, projection_of
from mdit.parallel.muon import Exchange, matrices_of, takes_muon
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution
from mdit.parallel.shard import gather_whole, shard_of
from mdit.train.muon import MuonAdamW
from mdit.train.optim import (
    build_optimizer,
    has_second_moment,
    moments,
    parameter_groups,
    set_moments,
    step_count,
)
from mdit.train.pace import Stopwatch
from mdit.train.zero_step import improve

MOMENTS = ("exp_avg", "exp_avg_sq")  # of a state, by the optimizer's own names


def check_ds_config(ds_config: dict, path) -> None:
    """Let DeepSpeed itself judge what it will be given, before anything is started."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Without the global batch: that is a matter of how many processes there are, and here there may be one.
    judged = {key: value for key, value in ds_config.items() if key != "train_batch_size"}
    try:
        DeepSpeedConfig(judged)
    except Exception as error:  # ValidationError, ValueError, AssertionError, and errors of its own
        raise UserError(f"{path}: DeepSpeed refuses it: {error}") from None


class Engine:
    """A MicroDiT under DeepSpeed, called like the model. `master_weights`: this rank's float32 partitions of them;
    `forward`: the time of its forward passes."""

    def __init__(self, model: MicroDiT, config: TrainConfig, execution: Execution, plan: ParallelPlan) -> None:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
        expert.join_deepspeed()
        self.plan, self.world, self.execution = plan, plan.world, execution
        self.forward = Stopwatch(self.world.device)
        self.projection = projection_of(model)  # for representation alignment, where the recipe asks for it
        bf16 = execution.dtype == torch.bfloat16
        exact = {name: p.detach().clone() for name, p in model.named_parameters()} if bf16 else {}
        model.to(self.world.device)
        groups = parameter_groups(model.named_parameters(), config.optim)
        groups = expert.split_groups(groups) if plan.expert_group else groups
        optimizer = build_optimizer(groups, config.optim, offloaded=execution.offloads_optimizer)
        self.deepspeed: Any = deepspeed.initialize(  # of no types, like all that is in it
            model=model, optimizer=optimizer, config=execution.deepspeed, mpu=plan.mpu
        )[0]
        improve(self.deepspeed)
        self.zero: Any = self.deepspeed.optimizer
        self.master_weights: list[Tensor] = next(  # ZeRO 3; ZeRO 1 in bf16; ZeRO 1 and 2
            getattr(self.zero, name)
            for name in (
                "fp32_partitioned_groups_flat",
                "fp32_groups_flat_partition",
                "single_partition_of_fp32_groups",
            )
            if hasattr(self.zero, name)
        )
        if isinstance(optimizer, MuonAdamW):
            optimizer.exchanges = {self.master_weights[i]: exchange for i, exchange in self._exchanges()}
        for name, parameter in self.deepspeed.module.named_parameters():
            if name in exact:  # DeepSpeed takes its masters from the bf16 copies: give it back what rounding lost
                safe_set_full_fp32_param(parameter, exact.pop(name).to(self.world.device))

    def __call__(self, *args, **kwargs) -> Tensor:
        with self.forward.running():
            return self.deepspeed(*args, **kwargs)

    def micro_batches(self, share: int) -> Iterator[slice]:
        """Rows of each micro-batch in this rank's share of a global batch."""
        size = self.execution.micro_batch
        for start in range(0, share, size):
            yield slice(start, start + size)

    def set_learning_rate(self, value: float) -> None:
        """`value` is AdamW's; Muon's is as much of its own peak."""
        for group in self.zero.param_groups:
            group["lr"] = value * group["peak"]

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a micro-batch's loss, divided by the number of micro-batches of a step. Reduces
        over the ranks as the ZeRO stage has it: after each, or after the last."""
        self.deepspeed.backward(loss)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch, no more

    def step(self) -> None:
        """Clip the gradients, step the master weights and fill the model's with them, zero the gradients."""
        self.deepspeed.step()
        if not self.step_applied:
            self._clean_up_skipped_step()

    @property
    def step_applied(self) -> bool:
        """Whether the last optimizer step changed anything: DeepSpeed skips it, on all ranks alike, where the norm of
        the gradient is not finite. Costs no wait: the step itself has read the norm."""
        return self.deepspeed.was_step_applied()

    def gradient_norm(self) -> float:
        """Global norm before clipping, of the last optimizer step; infinity where that was skipped."""
        return float(self.deepspeed.get_global_grad_norm() or 0.0)

    def full_weights(self, partitions: list[Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, whole float32 tensor on this device) of every parameter of MicroDiT, from the masters or from
        partitions of the same layout such as the EMA's. A collective: every rank has to run through it."""
        held = None
        if partitions is not None:
            held = [master.detach().clone() for master in self.master_weights]
            self._fill_master_weights(partitions)
        try:
            for name, parameter in self.deepspeed.module.named_parameters():
                if name.startswith(PREFIX):
                    continue
                part = cast(Tensor, safe_get_full_fp32_param(parameter)).view(
                    getattr(parameter, "ds_shape", parameter.shape)
                )
                yield name, gather_whole(part, parameter)
        finally:
            if held is not None:
                self._fill_master_weights(held)

    def fragments(self) -> list[Fragment]:
        """Fragments in this rank's master weights. DeepSpeed's padding between and behind belongs to none."""
        found = []
        for name, parameter in self.deepspeed.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if self.execution.zero.stage == 3:
                partition, offset, size = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = size * self.world.rank
                numel = min(size, parameter.ds_numel - start)
            elif (mapping := parameter._hp_mapping) is not None:
                partition, offset = mapping.param_group_index, mapping.hp_fragment_address.start
                start, numel = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
            else:
                continue
            if numel > 0:
                found.append(Fragment(name, shape, shard_of(parameter), start, numel, partition, offset))
        return found

    def _exchanges(self) -> Iterator[tuple[int, Exchange]]:
        """(partition, its matrices) of each of Muon's partitions. A collective."""
        held = {fragment.name: fragment for fragment in self.fragments()}
        by_group: dict[Any, list[tuple[str, tuple[int, ...]]]] = {}
        for name, parameter in self.deepspeed.module.named_parameters():
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            if takes_muon(name, shape):
                by_group.setdefault(expert.sharing(parameter), []).append((name, shape))
        for group, named in by_group.items():
            # Partition, first element, their number and place of every parameter; -1 where this rank has none of it.
            mine = [held[name].address if name in held else (-1, 0, 0, 0) for name, _ in named]
            mine_P4 = torch.tensor(mine, device=self.world.device)
            all_RP4 = [torch.empty_like(mine_P4) for _ in range(torch.distributed.get_world_size(group))]
            torch.distributed.all_gather(all_RP4, mine_P4, group=group)
            table_RP4 = torch.stack(all_RP4).cpu().numpy()
            partition_P, rank = table_RP4[..., 0].max(0), torch.distributed.get_rank(group)
            for partition in sorted({*partition_P.tolist()}):
                begin_RP, numel_RP, offset_RP = table_RP4[:, partition_P == partition, 1:].transpose(2, 0, 1)
                matrices = matrices_of([shape for (_, shape), at in zip(named, partition_P) if at == partition])
                yield partition, Exchange(matrices, begin_RP, begin_RP + numel_RP, offset_RP[rank], rank, group)

    def state_dict(self) -> dict[str, Any]:
        """Master weights and the optimizer's moments, for each kind one flat float32 tensor a partition, views and no
        copies, None where a partition has none; and the steps that Adam has taken: fewer than the run's where some were
        skipped."""
        optimizer = self.zero.optimizer
        if not moments(optimizer, self.master_weights[0]):  # no step has been taken, or all were skipped
            for master in self.master_weights:
                square = torch.zeros_like(master) if has_second_moment(optimizer, master) else None
                set_moments(optimizer, master, torch.zeros_like(master), square, step=0)
        of_masters = [moments(self.zero.optimizer, master) for master in self.master_weights]
        return {
            "master": [master.detach() for master in self.master_weights],
            **{kind: [found.get(kind) for found in of_masters] for kind in MOMENTS},
            "optimizer_steps": step_count(self.zero.optimizer, self.master_weights[0]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state. The optimizer goes on in the moments' tensors, without copies."""
        self._fill_master_weights(state["master"])
        for master, mean, square in zip(self.master_weights, *(state[kind] for kind in MOMENTS), strict=True):
            set_moments(self.zero.optimizer, master, mean, square, step=int(state["optimizer_steps"]))
        self.refresh_parameters()

    @torch.no_grad()
    def _fill_master_weights(self, partitions: list[Tensor]) -> None:
        for master, value in zip(self.master_weights, partitions, strict=True):
            master.copy_(value)

    def refresh_parameters(self) -> None:
        """Fill the model's parameters from the masters, after these have been filled from a checkpoint."""
        if self.execution.zero.stage < 3:
            self.zero.update_lp_params()
            return
        zero = self.zero
        for i, master in enumerate(self.master_weights):
            flat = zero.fp16_partitioned_groups_flat[i]
            flat.data.copy_(master.data)
            for part, value in zip(
                zero.fp16_partitioned_groups[i], zero.unflatten(flat, zero.fp16_partitioned_groups[i])
            ):
                part.data = value.data
        if zero.persistent_parameters:
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            self._gather_persistent()

    def _clean_up_skipped_step(self) -> None:
        """Leave nothing of a skipped step to the next one. DeepSpeed 0.19.8 does so but for two things: the gradients
        that bf16 under ZeRO 1 or 2 sums up for an optimizer in host memory, and ZeRO 3's small parameters."""
        if self.execution.zero.stage == 3:
            self._gather_persistent()
            return
        sums = getattr(self.zero, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))

    def _gather_persistent(self) -> None:
        """Make ZeRO 3's small parameters whole: they stay so between steps, and its forward pass counts on that."""
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)
