"""Expert parallelism on DeepSpeed's MoE groups: each rank of a group of `ep` holds E / ep of the experts.

Expert choice gives every expert the same number of tokens of every image, so the exchange is one all-to-all of fixed
size before the experts and one behind them, with no counts to agree on and no token dropped. All ranks of a group bring
equally many images and tokens: the recipe's batch and mask ratio see to it.

DeepSpeed's own MoE layer lets tokens choose and does not fit. Its engine only has to see that there are experts
(`isinstance(module, MoE)`); their weights carry `allreduce = False` and `group_name`, by which ZeRO reduces and shards
them over the ranks that hold the same experts.
"""

import deepspeed
import torch
import torch.distributed
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import configure_moe_param_groups
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from mdit.kernels.expert_choice import Routing
from mdit.parallel.fuse import FusedExpertChoiceMoE
from mdit.parallel.shard import Shard, cut
from mdit.parallel.swap import swap


def join_deepspeed() -> None:
    """Let DeepSpeed use the process group that mdit.dist has started."""
    # On a CPU it would compile a shared-memory op first: up to two minutes, and a lock that a kill leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


def start(expert_parallel: int) -> torch.distributed.ProcessGroup:
    """Let DeepSpeed make its groups; -> this rank's, of `expert_parallel` neighbouring ranks. A collective."""
    join_deepspeed()
    groups._create_expert_and_data_parallel(expert_parallel)
    return groups._get_expert_parallel_group(group_name(expert_parallel))


def group_name(expert_parallel: int) -> str:
    return f"ep_size_{expert_parallel}"  # what DeepSpeed calls it


def shard_experts(model: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Keep this rank's experts of every expert layer of a fused model, in place. Parameters keep their names."""
    ep = group.size()
    for layer in model.modules():
        if type(layer) is FusedExpertChoiceMoE:
            for part in (layer.w1, layer.w2):
                cut(part, Shard(dim=0, index=group.rank(), count=ep), group)
                vars(part).update(allreduce=False, group_name=group_name(ep))
            swap(layer, ExpertParallelMoE, group=group, ep=ep)


def split_groups(groups: list[dict]) -> list[dict]:
    """Parameter groups of the optimizer with the experts' apart from all others, as ZeRO wants them."""
    return [group for group in configure_moe_param_groups(groups) or [] if group["params"]]


def sharing(parameter: nn.Parameter) -> torch.distributed.ProcessGroup | None:
    """The ranks over which ZeRO shards a parameter: those that hold the same experts; None: all."""
    name = getattr(parameter, "group_name", None)
    return groups._get_expert_data_parallel_group(name) if name is not None else None


class ExpertParallelMoE(FusedExpertChoiceMoE, MoE):
    """Its w1 and w2 hold this rank's experts; E of `num_experts` counts all of them."""

    group: torch.distributed.ProcessGroup
    ep: int

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's engine calls this; the groups are made already."""

    def dispatch(self, x_NTD: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        tokens_EMD, weights_NEK = super().dispatch(x_NTD, routing)
        # The weights travel while the first matmul waits for nothing but the tokens.
        weights_PNeK = self.exchange(by_owner(weights_NEK.transpose(0, 1), self.ep).transpose(1, 2))
        tokens_PeMD = self.exchange(by_owner(tokens_EMD, self.ep))
        return tokens_PeMD.transpose(0, 1).flatten(1, 2), weights_PNeK.flatten(0, 1)

    def combine(self, out_EMD: Tensor, routing: Routing) -> Tensor:
        back_PeMD = self.exchange(out_EMD.unflatten(1, (self.ep, -1)).transpose(0, 1))
        return super().combine(back_PeMD.flatten(0, 1), routing)

    def exchange(self, x_P: Tensor) -> Tensor:
        """Entry p of the first dimension goes to rank p of the group, and what comes from rank p arrives as entry p."""
        return all_to_all_single_autograd(x_P.contiguous(), None, None, self.group)


def by_owner(x_E: Tensor, ep: int) -> Tensor:
    """(E, ...) -> (P, e, ...): the experts of each of the P = ep ranks."""
    return x_E.unflatten(0, (ep, -1))
