"""The parallel plan: which ranks share the samples, the experts or the tensors of a run. dp x ep, or dp x tp.

    world 8, ep 4:  data ranks 0..7;  expert groups (0 1 2 3) (4 5 6 7): each holds all experts, spread over its ranks
    world 8, tp 2:  data ranks 0..3;  tensor groups (0 1) (2 3) (4 5) (6 7): each works as one on the same samples

Neighbouring ranks, those of one node, talk most. Nothing here changes what is learned.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from torch.distributed import ProcessGroup

from mdit.config import ModelConfig, UserError
from mdit.dist import World
from mdit.parallel.layout import problem
from mdit.parallel.settings import RunSettings


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
        """Make the groups. A collective of all ranks, after mdit.dist.start."""
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


def data_parallel_size(settings: RunSettings, world_size: int, path: str | Path) -> int:
    """Into how many shares a global batch is cut. Raises UserError, naming the JSON at `path`, for uneven groups."""
    for key in ("expert_parallel", "tensor_parallel"):
        value = getattr(settings, key)
        if world_size % value:
            raise UserError(f'{path}: "mdit": {key} = {value} does not divide the {world_size} processes')
    return world_size // settings.tensor_parallel


def check_plan(settings: RunSettings, model: ModelConfig, zero: dict, world_size: int, path: str | Path) -> None:
    """Raise UserError, naming the JSON at `path`, for a plan that its `zero_optimization` or this model cannot have."""
    ep, tp = settings.expert_parallel, settings.tensor_parallel
    found = problem(model, world_size, zero["stage"], ep, tp)
    if ep > 1 and not zero.get("reduce_scatter", True):
        found = f"expert_parallel = {ep} with zero_optimization.reduce_scatter = false: expected true"
    if tp > 1 and settings.compile:
        found = f"tensor_parallel = {tp} with compile = true: expected false"
    if tp > 1 and (find_spec("megatron") is None or find_spec("megatron.core") is None):
        found = f"tensor_parallel = {tp} needs megatron-core: pip install -e '.[megatron]'"
    for key, value in (("expert_parallel", ep), ("tensor_parallel", tp)):
        if value > 1 and settings.fp8:
            found = f"{key} = {value} with fp8 = true: expected false"
    if found:
        raise UserError(f'{path}: "mdit": {found}')
