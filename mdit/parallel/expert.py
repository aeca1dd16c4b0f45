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

from mdit.kernels import expert_choice
from mdit.models import MicroDiT
from mdit.models.moe import ExpertChoice
from mdit.parallel.shard import Shard, mark


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


def shard_experts(model: MicroDiT, group: torch.distributed.ProcessGroup) -> None:
    """Keep this rank's experts of every expert layer, in place. Parameters keep their names."""
    for block in (*model.patch_mixer, *model.blocks):
        if isinstance(block.mlp, ExpertChoice):
            block.mlp = ExpertParallel(block.mlp, group)


def parameter_groups(model: nn.Module) -> list[dict]:
    """For the optimizer: the experts' parameters apart from all others, as ZeRO wants them."""
    split = configure_moe_param_groups(list(model.parameters()))
    return [group for group in split if group["params"]]


class ExpertParallel(ExpertChoice, MoE):
    """An ExpertChoice whose w1 and w2 hold this rank's experts; E of `num_experts` counts all of them."""

    def __init__(self, whole: ExpertChoice, group: torch.distributed.ProcessGroup) -> None:
        nn.Module.__init__(self)  # neither parent's: the weights are there, and DeepSpeed's gate is not wanted
        self.num_experts, self.capacity_factor = whole.num_experts, whole.capacity_factor
        self.group, self.ep = group, torch.distributed.get_world_size(group)
        self.gate = whole.gate
        shard = Shard(dim=0, index=torch.distributed.get_rank(group), count=self.ep)
        for name in ("w1", "w2"):
            part = nn.Parameter(shard.take(getattr(whole, name).detach()))
            part.allreduce, part.group_name = False, group_name(self.ep)
            mark(part, shard, group)
            setattr(self, name, part)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's engine calls this; the groups are made already."""

    def forward(self, x_NTD: Tensor) -> Tensor:
        routing = expert_choice.route(self.gate(x_NTD), self.tokens_per_expert(x_NTD.shape[1]))
        # The weights travel while the first matmul waits for nothing but the tokens.
        weights_PNeK = self.exchange(by_owner(routing.weights_NEK.transpose(0, 1), self.ep).transpose(1, 2))
        tokens_PeMD = self.exchange(by_owner(expert_choice.gather_tokens(x_NTD, routing), self.ep))
        hidden_eMF = torch.bmm(tokens_PeMD.transpose(0, 1).flatten(1, 2), self.w1)
        out_eMD = expert_choice.gelu_bmm(hidden_eMF, self.w2, weights_PNeK.flatten(0, 1))
        back_PeMD = self.exchange(out_eMD.unflatten(1, (self.ep, -1)).transpose(0, 1))
        return expert_choice.scatter_tokens(back_PeMD.flatten(0, 1), routing)

    def exchange(self, x_P: Tensor) -> Tensor:
        """Entry p of the first dimension goes to rank p of the group, and what comes from rank p arrives as entry p."""
        return all_to_all_single_autograd(x_P.contiguous(), None, None, self.group)


def by_owner(x_E: Tensor, ep: int) -> Tensor:
    """(E, ...) -> (P, e, ...): the experts of each of the P = ep ranks."""
    return x_E.unflatten(0, (ep, -1))
