"""A parameter of which each rank holds a part: how the part is cut from the whole tensor, and put back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed
from torch import Tensor, nn

from mdit.models.layers import CrossAttention, SelfAttention, SwiGLU

DENSE = SelfAttention, CrossAttention, SwiGLU  # what a tensor group shares
# Their layers that are cut by outputs, and into how many blocks first; all others are cut by inputs.
COLUMN_BLOCKS = {"qkv": 3, "q_linear": 1, "kv_linear": 2, "w1": 1, "w2": 1}


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts along `dim`: of each of `blocks` equal blocks, concatenated.

    Experts of (E, D, F) are cut along 0; a qkv weight (3 * A, D) along 0 in 3 blocks, so that a part has whole heads of
    q, of k and of v.
    """

    dim: int = 0
    index: int = 0
    count: int = 1
    blocks: int = 1

    def take(self, whole: Tensor) -> Tensor:
        """This part, in memory of its own."""
        assert whole.shape[self.dim] % (self.blocks * self.count) == 0, (whole.shape, self)
        parts = [block.chunk(self.count, self.dim)[self.index] for block in whole.chunk(self.blocks, self.dim)]
        return torch.cat(parts, self.dim).contiguous()  # a copy, even of one

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole, from all parts in the order of their index."""
        assert len(parts) == self.count, (len(parts), self)
        cut = [part.chunk(self.blocks, self.dim) for part in parts]
        return torch.cat([part[block] for block in range(self.blocks) for part in cut], self.dim)


WHOLE = Shard()


@torch.no_grad()
def cut(parameter: Tensor, shard: Shard, group: torch.distributed.ProcessGroup | None) -> None:
    """Keep a part of a parameter, in place, and note on it which, and which ranks hold the others (by index)."""
    parameter.data = shard.take(parameter)
    vars(parameter).update(shard=shard, shard_group=group)


def cut_dense(model: nn.Module, index: int, count: int, group: torch.distributed.ProcessGroup | None = None) -> None:
    """Keep part `index` of `count` of every attention, whole heads, and of every dense feed-forward network, in place;
    names and order of parameters stay. On the meta device no group is needed."""
    for module in model.modules():
        if isinstance(module, DENSE):
            for name, layer in module.named_children():
                blocks = COLUMN_BLOCKS.get(name)
                for parameter in layer.parameters() if blocks else [layer.get_parameter("weight")]:
                    cut(parameter, Shard(0 if blocks else 1, index, count, blocks or 1), group)
        if isinstance(module, SelfAttention | CrossAttention):
            module.num_heads //= count


def shard_of(parameter: nn.Parameter) -> Shard:
    return getattr(parameter, "shard", WHOLE)


def gather_whole(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole of a tensor that is cut as `parameter` is (itself, a moment, an average). A collective of its group."""
    shard = shard_of(parameter)
    if shard.count == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(shard.count)]
    torch.distributed.all_gather(parts, part.contiguous(), group=vars(parameter)["shard_group"])
    return shard.join(parts)
