"""Tensor parallelism: each rank of a group holds some heads of every attention and some columns of every dense network.

    column  qkv, q_linear, kv_linear, w1, w2   rows of the weight are cut; every rank reads all of x, writes its columns
    row     proj, w3                           columns are cut; every rank reads its columns, the outputs are added up

megatron-core brings the groups and both linear layers. Norms, modulation, experts, embedders and the final layer are
whole on every rank. A sum over ranks has the same bits on all of them, so they see the same there, and their gradients
and weights stay the same to the bit, if equal inputs give equal bits: `start` asks torch for that.

Shapes: N batch, T image tokens, L caption tokens, D width, A width over all ranks, P = A / ranks this rank's part.
"""

import warnings

import torch
import torch.distributed
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from mdit.kernels import swiglu
from mdit.models import MicroDiT
from mdit.models.layers import CrossAttention, SelfAttention, SwiGLU, side_by_side
from mdit.parallel.shard import Shard, mark

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # one for each part of apex and Transformer Engine that is not there
    from megatron.core import parallel_state
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_tensor_model_parallel_region,
        set_tensor_model_parallel_attributes,
    )


class DeepSpeedMPU:
    """What DeepSpeed asks about the layout, by names of which megatron-core has dropped some."""

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
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory, for programs that read it
    return parallel_state.get_tensor_model_parallel_group(), DeepSpeedMPU()


def shard_blocks(model: MicroDiT, group: ProcessGroup) -> None:
    """Cut a whole model's attention and dense feed-forward layers, in place; names and order of parameters stay.

    Every rank of the group has to come with the same weights.
    """
    for block in (model.y_emb_preprocess, *model.patch_mixer, *model.blocks):
        block.attn = SelfAttentionPart(block.attn, group)
        if hasattr(block, "cross_attn"):
            block.cross_attn = CrossAttentionPart(block.cross_attn, group)
        if isinstance(block.mlp, SwiGLU):
            block.mlp = SwiGLUPart(block.mlp, group)


class SelfAttentionPart(nn.Module):
    """A SelfAttention's heads of this rank."""

    def __init__(self, whole: SelfAttention, group: ProcessGroup) -> None:
        super().__init__()
        self.num_heads, self.eps, self.group = whole.num_heads // group.size(), whole.eps, group
        self.qkv = Column(whole.qkv, group, blocks=3)
        self.proj = Row(whole.proj, group)

    def forward(self, x_NTD: Tensor) -> Tensor:
        qkv_NT3P = self.qkv(x_NTD).unflatten(-1, (3, -1))
        q_NTP, k_NTP = FullWidthNorm.apply(qkv_NT3P[:, :, :2], self.eps, self.group).unbind(2)
        return self.proj(attend(q_NTP, k_NTP, qkv_NT3P[:, :, 2], self.num_heads))


class CrossAttentionPart(nn.Module):
    """A CrossAttention's heads of this rank."""

    def __init__(self, whole: CrossAttention, group: ProcessGroup) -> None:
        super().__init__()
        self.num_heads, self.eps, self.group = whole.num_heads // group.size(), whole.eps, group
        self.q_linear = Column(whole.q_linear, group)
        self.kv_linear = Column(whole.kv_linear, group, blocks=2)
        self.proj = Row(whole.proj, group)

    def forward(self, x_NTD: Tensor, caption_NLD: Tensor) -> Tensor:
        k_NLP, v_NLP = self.kv_linear(caption_NLD).chunk(2, dim=-1)
        q_NTP = FullWidthNorm.apply(self.q_linear(x_NTD), self.eps, self.group)
        k_NLP = FullWidthNorm.apply(k_NLP, self.eps, self.group)
        return self.proj(attend(q_NTP, k_NLP, v_NLP, self.num_heads))


class SwiGLUPart(nn.Module):
    """A SwiGLU's columns of this rank."""

    def __init__(self, whole: SwiGLU, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.w1 = Column(whole.w1, group)
        self.w2 = Column(whole.w2, group)
        self.w3 = GatedRow(whole.w3, group)

    def forward(self, x_NTD: Tensor) -> Tensor:
        x_NTD = copy_to_tensor_model_parallel_region(x_NTD, self.group)  # all-reduces the gradient
        return self.w3(F.linear(x_NTD, *side_by_side(self.w1, self.w2)))


class Column(ColumnParallelLinear):
    """This rank's rows of each of `blocks` blocks of a linear layer's weight. (N, T, D) -> (N, T, blocks * P)"""

    def __init__(self, whole: nn.Linear, group: ProcessGroup, blocks: int = 1) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            config=megatron_config(whole, group),
            init_method=None,
            bias=whole.bias is not None,
            gather_output=False,
            stride=blocks,
            tp_group=group,
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=blocks)
        shard = Shard(0, group.rank(), group.size(), blocks)
        fill(self.weight, whole.weight, shard, group)
        if whole.bias is not None:
            fill(self.bias, whole.bias, shard, group)

    def forward(self, x_NTD: Tensor) -> Tensor:
        output, _ = super().forward(x_NTD)
        return output


class Row(RowParallelLinear):
    """This rank's columns of a linear layer's weight. (N, T, P) -> (N, T, D): the sum over ranks, then the bias."""

    def __init__(self, whole: nn.Linear, group: ProcessGroup) -> None:
        super().__init__(
            whole.in_features,
            whole.out_features,
            config=megatron_config(whole, group),
            init_method=None,
            bias=whole.bias is not None,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=group,
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)
        fill(self.weight, whole.weight, Shard(1, group.rank(), group.size()), group)
        if whole.bias is not None:
            fill(self.bias, whole.bias, Shard(), group)

    def forward(self, x_NTP: Tensor) -> Tensor:
        output, _ = super().forward(x_NTP)
        return output


class GatedRow(Row):
    """silu(a) * b through the weight, fused where kernels run (mdit.kernels.swiglu)."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_) -> Tensor:
        """Megatron's matmul before the sum over ranks; of a and b side by side."""
        return swiglu.swiglu_linear(input, weight)


def megatron_config(whole: nn.Linear, group: ProcessGroup) -> ModelParallelConfig:
    """No GPU needed to make a layer, weights in the dtype of `whole` and left for `fill`."""
    return ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        params_dtype=whole.weight.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )


@torch.no_grad()
def fill(part: nn.Parameter, whole: Tensor, shard: Shard, group: ProcessGroup) -> None:
    """Give a parameter its part of `whole`, in memory of its own."""
    part.data = shard.take(whole)
    if shard.count > 1:
        mark(part, shard, group)


def attend(q_NTP: Tensor, k_NLP: Tensor, v_NLP: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of this rank's heads -> (N, T, P)"""
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q_NTP, k_NLP, v_NLP))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


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
