"""What a checkpoint of a recipe costs: bytes, seconds, and host memory beyond the state itself. Nothing is trained.

    torchrun --nproc_per_node 2 tools/bench_checkpoint.py --recipe configs/res_256_pretrain.toml --dir DIR
    torchrun --nproc_per_node 4 tools/bench_checkpoint.py --recipe configs/res_256_pretrain.toml --dir DIR --load

The first line saves made-up numbers in the recipe's shapes (masters, two moments, an EMA where the recipe has one), cut
over the processes as ZeRO cuts them, and reads them back; the second reads what the first wrote, in its own layout.
`--expert_parallel` cuts the experts first. Every number that is read is checked.
"""

import argparse
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed

from mdit import cli, dist
from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import find_latest, load_into, save_training_state
from mdit.config import TrainConfig, UserError, load_config
from mdit.dist import World, identify
from mdit.meeting import start
from mdit.models import MicroDiT
from mdit.models.moe import ExpertChoice
from mdit.parallel.shard import WHOLE, Shard

GIB = 2**30


def fragments_of(config: TrainConfig, world: World, ep: int) -> list[Fragment]:
    """Every parameter's part, end to end, cut evenly over the ranks that hold the same part."""
    with torch.device("meta"):
        model = MicroDiT(config.model)
    experts = {f"{name}.{w}" for name, m in model.named_modules() if isinstance(m, ExpertChoice) for w in ("w1", "w2")}
    fragments, offset = [], 0
    for name, parameter in model.named_parameters():
        shape, shard, share, shares = tuple(parameter.shape), WHOLE, world.rank, world.size
        if ep > 1 and name in experts:
            shape, shard = (shape[0] // ep, *shape[1:]), Shard(0, world.rank % ep, ep)
            share, shares = world.rank // ep, world.size // ep
        size = math.prod(shape)
        first, last = size * share // shares, size * (share + 1) // shares
        if last > first:
            fragments.append(Fragment(name, shape, shard, first, last - first, 0, offset))
            offset += last - first
    return fragments


def numbers(fragment: Fragment, kind: int) -> torch.Tensor:
    """What stands for the elements of a fragment: told by their place in the whole tensor and by the kind of tensor."""
    first = fragment.shard.index * fragment.size + fragment.start  # cut along the first dimension only
    return (torch.arange(first, first + fragment.numel) % 8191).float() + 10_000 * kind


class PeakMemory:
    """Context manager: the most anonymous memory, in bytes, that this process held beyond what it had at the start."""

    def __enter__(self) -> "PeakMemory":
        self.first, self.bytes, self.running = anonymous_bytes(), 0, True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes() - self.first)
            time.sleep(0.005)

    def __exit__(self, *exception) -> None:
        self.running = False
        self.thread.join()


def anonymous_bytes() -> int:
    """RssAnon: without the pages of mapped files, which the kernel takes back when it needs them. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def timed(what: str, size: int, function, *args, world: World, **keys):
    """Call `function`, of which `world` is a keyword too, and print what it took."""
    torch.distributed.barrier()
    started = time.perf_counter()
    with PeakMemory() as peak:
        result = function(*args, world=world, **keys)
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    most = torch.tensor(peak.bytes)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if world.is_first:
        print(
            f"{what}: {size / GIB:.2f} GiB by {world.size} processes in {seconds:.1f} s ({size / GIB / seconds:.2f} "
            f"GiB/s), at most {int(most) / GIB:.2f} GiB of host memory a process beyond its state",
            flush=True,
        )
    return result


def run(arguments: argparse.Namespace, world: World) -> None:
    config = load_config(arguments.recipe)
    ep = arguments.expert_parallel
    if world.size % ep or config.model.num_experts % ep:
        experts = config.model.num_experts
        raise UserError(f"--expert_parallel {ep} does not divide both {world.size} processes and {experts} experts")
    fragments = fragments_of(config, world, ep)
    kinds = ("master", "exp_avg", "exp_avg_sq", *(("ema",) if config.ema else ()))
    numel = sum(fragment.numel for fragment in fragments)
    tensors = {kind: [torch.zeros(numel)] for kind in kinds}
    for (flat,) in tensors.values():
        flat.fill_(0)  # touches the memory, so that it counts as the state's
    size = torch.tensor(4 * numel * len(kinds))
    torch.distributed.all_reduce(size)
    layout = {"world_size": world.size, "expert_parallel": ep}
    if not arguments.load:
        fill(tensors, fragments)
        state = dict(memory={}, run={}, layout=layout, world=world, keep=1)
        timed("save", int(size), save_training_state, arguments.dir, 1, tensors, fragments, **state)
        for (flat,) in tensors.values():
            flat.zero_()
    found = timed("verify", int(size), find_latest, arguments.dir, world=world)
    if found is None:
        raise UserError(f"{arguments.dir}: no checkpoint to load; run without --load first")
    how = "the same layout" if found.state["layout"] == layout else f"{found.state['layout']} as {layout}"
    timed(f"load, {how}", int(size), load_into, found, tensors, fragments, layout=layout, world=world)
    check(tensors, fragments)


def fill(tensors: dict[str, list[torch.Tensor]], fragments: list[Fragment]) -> None:
    for k, partitions in enumerate(tensors.values()):
        for fragment in fragments:
            fragment.of(partitions).copy_(numbers(fragment, k))


def check(tensors: dict[str, list[torch.Tensor]], fragments: list[Fragment]) -> None:
    for k, (kind, partitions) in enumerate(tensors.items()):
        for fragment in fragments:
            if not torch.equal(fragment.of(partitions), numbers(fragment, k)):
                raise UserError(f"{kind}/{fragment.name}: not what was written")


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="for the model's shapes and whether it has an EMA")
    parser.add_argument(
        "--dir", type=Path, required=True, help="where the checkpoint goes; one of that place is replaced"
    )
    parser.add_argument("--expert_parallel", type=cli.whole(1), default=1)
    parser.add_argument("--load", action="store_true", help="read what an earlier run wrote, whatever its layout was")
    args = parser.parse_args(arguments)
    world = replace(identify(), device=torch.device("cpu"))
    start(world)
    run(args, world)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, tells=dist.tells)
