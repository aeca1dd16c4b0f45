"""Tensor parallelism: each rank of a group holds some heads of every attention and some columns of every dense network.

    column  qkv, q_linear, kv_linear, w1, w2   rows of the weight are cut; every rank reads all of x, writes its columns
    row     proj, w3                           columns are cut; every rank reads its columns, the outputs are added up

megatron-core brings the groups and both linear layers. Norms, modulation, experts, embedders and the final layer are
whole on every rank. A sum over ranks has the same bits on all of them, so they see the same there, and their gradients
and weights stay the same to the bit, if equal inputs give equal bits: `start` asks torch for that.

Shapes: N batch, T image tokens, L caption tokens, D width, A width over all ranks, P = A / ranks this rank's part.
"""

import warnings
from typing import cast

import torch
import torch.distributed
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from mdit.kernels import swiglu
from mdit.models import MicroDiT
from mdit.models.layers import softmax_attention
from mdit.parallel.fuse import FusedCrossAttention, FusedSelfAttention, FusedSwiGLU, side_by_side
from mdit.parallel.shard import COLUMN_BLOCKS, WHOLE, cut_dense, shard_of
from mdit.parallel.swap import swap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one for each part of apex and Transformer Engine that is not there
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        linear_with_grad_accumulation_and_async_allreduce,
        reduce_from_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )


class DeepSpeedMPU:
    """Answers to what DeepSpeed asks about the layout, by names of which megatron-core has dropped some."""

    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)


def start(tp: int) -> tuple[ProcessGroup, DeepSpeedMPU]:
    """Groups of `tp` neighbouring ranks -> this rank's, and DeepSpeed's mpu. A collective, once in a process.

    On a GPU atomics add in another order on every rank (PyTorch's gradients of indexing, for example), and what is
    replicated would drift apart. So torch is asked for its deterministic algorithms; cuBLAS has been (mdit.dist).
    """
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A pass over memory, for programs that read what they have not written. (A property of the module's own class.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[reportAttributeAccessIssue]
    return cast(ProcessGroup, parallel_state.get_tensor_model_parallel_group()), DeepSpeedMPU()


def shard_blocks(model: MicroDiT, group: ProcessGroup) -> None:
    """Cut a fused model's attention and dense feed-forward layers, in place; names and order of parameters stay.

    Every rank of the group has to come with the same weights.
    """
    cut_dense(model, group.rank(), group.size(), group)
    for module in model.modules():
        if type(module) in FORMS:
            swap(module, FORMS[type(module)], group=group)
            for name, layer in module.named_children():
                swap(layer, ColumnParallelLinear if name in COLUMN_BLOCKS else RowParallelLinear, group=group)
                for parameter in layer.parameters():
                    if (shard := shard_of(parameter)) != WHOLE:
                        set_tensor_model_parallel_attributes(parameter, True, shard.dim, shard.blocks)


class ColumnParallelLinear(nn.Linear):
    """(N, T, D) -> (N, T, P), of each block a part."""

    group: ProcessGroup

    def forward(self, x_NTD: Tensor) -> Tensor:
        return linear_with_grad_accumulation_and_async_allreduce(
            x_NTD,
            self.weight,
            self.bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=True,
            sequence_parallel=False,
            tp_group=self.group,
        )


class RowParallelLinear(nn.Linear):
    """(N, T, P) -> (N, T, D)"""

    group: ProcessGroup

    def forward(self, x_NTP: Tensor) -> Tensor:
        return self.sum_over_ranks(F.linear(x_NTP, self.weight))

    def sum_over_ranks(self, part_NTD: Tensor) -> Tensor:
        """The sum, in the memory of `part_NTD`; then the bias."""
        whole_NTD = reduce_from_tensor_model_parallel_region(part_NTD, group=self.group)
        return whole_NTD if self.bias is None else whole_NTD + self.bias


class TensorParallelSelfAttention(FusedSelfAttention):
    """This rank's heads."""

    group: ProcessGroup

    def forward(self, x_NTD: Tensor, rotary_NTC: Tensor | None = None) -> Tensor:
        qkv_NT3P = self.qkv(x_NTD).unflatten(-1, (3, -1))
        q_NTP, k_NTP = FullWidthNorm.apply(qkv_NT3P[:, :, :2], self.eps, self.group).unbind(2)
        return self.proj(softmax_attention(q_NTP, k_NTP, qkv_NT3P[:, :, 2], self.num_heads, rotary_NTC))


class TensorParallelCrossAttention(FusedCrossAttention):
    """This rank's heads."""

    group: ProcessGroup

    def forward(self, x_NTD: Tensor, caption_NLD: Tensor) -> Tensor:
        k_NLP, v_NLP = self.kv_linear(caption_NLD).chunk(2, dim=-1)
        q_NTP = FullWidthNorm.apply(self.q_linear(x_NTD), self.eps, self.group)
        k_NLP = FullWidthNorm.apply(k_NLP, self.eps, self.group)
        return self.proj(softmax_attention(q_NTP, k_NLP, v_NLP, self.num_heads))


class TensorParallelSwiGLU(FusedSwiGLU):
    """This rank's columns."""

    group: ProcessGroup
    w3: RowParallelLinear

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = copy_to_tensor_model_parallel_region(x_NTD, self.group)  # all-reduces the gradient
        ab_NTP = F.linear(x_NTD, *side_by_side(self.w1, self.w2))
        return self.w3.sum_over_ranks(swiglu.swiglu_linear(ab_NTP, self.w3.weight))


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    FusedSelfAttention: TensorParallelSelfAttention,
    FusedCrossAttention: TensorParallelCrossAttention,
    FusedSwiGLU: TensorParallelSwiGLU,
}


class FullWidthNorm(torch.autograd.Function):
    """LayerNorm without weights, over a last dimension A of which each rank holds an equal part P; in float32 inside.

    Ranks exchange means and variances of their parts: the mean of the means is the mean of all, and the mean of the
    variances plus the variance of the means is the variance of all (Chan et al. 1979), as exact as two passes.
    Backward: dx = rstd * (dy - mean(dy) - y * mean(dy * y)), with means over A. Saves x, mean and rstd.
    """

    @staticmethod
    def forward(ctx, x: Tensor, eps: float, group: ProcessGroup) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
        ours = torch.stack([mean, variance])
        everyones = [torch.empty_like(ours) for _ in range(group.size())]
        torch.distributed.all_gather(everyones, ours, group=group)
        means, variances = torch.stack(everyones).unbind(1)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        rstd = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.group = group
        return ((wide - mean) * rstd).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        x, mean, rstd = ctx.saved_tensors
        y, dy = (x - mean) * rstd, dy.to(mean.dtype)
        sums = torch.stack([dy.mean(-1, keepdim=True), (dy * y).mean(-1, keepdim=True)])
        torch.distributed.all_reduce(sums, group=ctx.group)
        mean_dy, mean_dy_y = sums / ctx.group.size()
        return (rstd * (dy - mean_dy - y * mean_dy_y)).to(x.dtype), None, None
