"""The parallel plan: which ranks share the samples, the experts or the tensors of a run. dp x ep, or dp x tp.

    world 8, ep 4:  data ranks 0..7;  expert groups (0 1 2 3) (4 5 6 7): each holds all experts, spread over its ranks
    world 8, tp 2:  data ranks 0..3;  tensor groups (0 1) (2 3) (4 5) (6 7): each works as one on the same samples

Neighbouring ranks, those of one node, talk most. Nothing here changes what is learned.
"""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from torch.distributed import ProcessGroup

from mdit.config import ModelConfig, UserError
from mdit.dist import World
from mdit.models import meta_model
from mdit.models.layers import CrossAttention, SelfAttention, SwiGLU
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.settings import Execution, RunSettings


@dataclass(frozen=True)
class ParallelPlan:
    """`expert_group` and `tensor_group` are this rank's, None where each has one rank; `mpu` tells DeepSpeed
    what it asks about tensor parallelism."""

    world: World
    tensor_parallel: int = 1
    expert_group: ProcessGroup | None = None
    tensor_group: ProcessGroup | None = None
    mpu: object | None = None

    @classmethod
    def build(cls, settings: RunSettings, world: World) -> "ParallelPlan":
        """Make the groups. A collective of all ranks, after mdit.meeting.init_distributed."""
        ep, tp = settings.expert_parallel, settings.tensor_parallel
        if ep > 1:
            from mdit.parallel import expert

            return cls(world, expert_group=expert.start(ep))
        if tp > 1:
            from mdit.parallel import tensor

            group, mpu = tensor.start(tp)
            return cls(world, tensor_parallel=tp, tensor_group=group, mpu=mpu)
        return cls(world)

    @property
    def data_rank(self) -> int:
        """Which share of every global batch is this rank's."""
        return self.world.rank // self.tensor_parallel

    @property
    def data_size(self) -> int:
        """Into how many shares a global batch is cut."""
        return self.world.size // self.tensor_parallel


def check_plan(execution: Execution, model: ModelConfig, world_size: int, path: object) -> None:
    """Raise UserError, naming the JSON at `path`, for a plan that cannot be, or not with what is installed."""
    found, tp = problem(execution, model, world_size), execution.settings.tensor_parallel
    if tp > 1 and (find_spec("megatron") is None or find_spec("megatron.core") is None):
        found = found or f"tensor_parallel = {tp} needs megatron-core: pip install -e '.[megatron]'"
    if found:
        raise UserError(f'{path}: "mdit": {found}')


def problem(execution: Execution, model: ModelConfig, gpus: int) -> str | None:
    """Why a run of this model cannot be spread over so many GPUs as its JSON asks, or None."""
    settings, zero = execution.settings, execution.zero
    ep, tp = settings.expert_parallel, settings.tensor_parallel
    for key, value in (("expert_parallel", ep), ("tensor_parallel", tp)):
        if value > 1 and settings.fp8:
            return f"{key} = {value} with fp8 = true: expected false"
        if value > 1 and zero.stage == 3:
            return f"{key} = {value} with zero_optimization.stage = 3: expected stage 1 or 2"
    if ep > 1 and tp > 1:
        return f"expert_parallel = {ep} with tensor_parallel = {tp}: one of them has to be 1"
    if tp > 1 and settings.compile:
        return f"tensor_parallel = {tp} with compile = true: expected false"
    if ep > 1 and not zero.reduce_scatter:
        return f"expert_parallel = {ep} with zero_optimization.reduce_scatter = false: expected true"
    has_experts = any(isinstance(module, ExpertChoiceMoE) for module in meta_model(model).modules())
    experts = model.num_experts if has_experts else 0
    if ep > 1 and (not experts or experts % ep):
        return f"expert_parallel = {ep} does not divide the recipe's {experts} experts"
    return uneven(model, tp)


@cache
def uneven(config: ModelConfig, tp: int) -> str | None:
    """The first layer that tensor groups of this size cannot share, in words."""
    for name, module in meta_model(config).named_modules():
        if isinstance(module, SelfAttention | CrossAttention) and module.num_heads % tp:
            return f"tensor_parallel = {tp} does not divide the {module.num_heads} heads of {name}"
        if isinstance(module, SwiGLU) and module.w3.in_features % tp:
            return f"tensor_parallel = {tp} does not divide the width {module.w3.in_features} of {name}"
    return None
