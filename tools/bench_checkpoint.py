"""Cost of a recipe's checkpoint: bytes, seconds, and host memory beyond the state itself. Nothing is trained.

    torchrun --nproc_per_node 2 tools/bench_checkpoint.py --recipe configs/res_256_pretrain.toml --dir DIR
    torchrun --nproc_per_node 4 tools/bench_checkpoint.py --recipe configs/res_256_pretrain.toml --dir DIR --load

The first line saves made-up numbers in the recipe's shapes (masters, two moments, an EMA where the recipe has one), cut
over the processes as ZeRO cuts them, and reads them back; the second reads what the first wrote, in its own layout.
`--expert_parallel` cuts the experts first. Every number that is read is checked. `--copy` measures what steps wait for,
the look for NaN and the copy into host memory from which a thread writes, three times; all kinds of tensors are then
one and the same, so that a machine with memory for four in place of six will do.
"""

import argparse
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed

from mdit import cli, dist
from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import find_latest, load_into, save_training_state
from mdit.config import TrainConfig, UserError, load_config
from mdit.dist import World, world_from_env
from mdit.meeting import init_distributed
from mdit.models import meta_model
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.shard import WHOLE, Shard
from mdit.train.saver import HostCopy
from mdit.train.skipped import non_finite

GIB = 2**30
T = TypeVar("T")


def fragments_of(config: TrainConfig, world: World, ep: int) -> list[Fragment]:
    """Every parameter's part, end to end, cut evenly over the ranks that hold the same part."""
    model = meta_model(config.model)
    experts = {
        f"{name}.{w}" for name, m in model.named_modules() if isinstance(m, ExpertChoiceMoE) for w in ("w1", "w2")
    }
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


def numbers(kinds: Sequence[str], fragments: list[Fragment]) -> Iterator[tuple[str, Fragment, torch.Tensor]]:
    """Made-up elements of each fragment: told by their place in the whole tensor and by the kind of tensor."""
    for (k, kind), fragment in itertools.product(enumerate(kinds), fragments):
        first = fragment.shard.index * fragment.size + fragment.start  # cut along the first dimension only
        yield kind, fragment, (torch.arange(first, first + fragment.numel) % 8191).float() + 10_000 * k


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """The most anonymous memory, in bytes, that this process holds inside beyond what it had at the start."""
    first, found, left = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not left.wait(0.005):
            found[0] = max(found[0], anonymous_bytes() - first)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        left.set()
        thread.join()


def anonymous_bytes() -> int:
    """RssAnon: without the pages of mapped files, which the kernel takes back when it needs them. Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def timed(label: str, size: int, function: Callable[[], T], world: World) -> T:
    """Call `function` on all ranks and print what it took."""
    torch.distributed.barrier()
    started = time.perf_counter()
    with peak_memory() as peak:
        result = function()
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    most = torch.tensor(peak[0])
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    if world.is_rank_zero:
        print(
            f"{label}: {size / GIB:.2f} GiB by {world.size} processes in {seconds:.1f} s ({size / GIB / seconds:.2f} "
            f"GiB/s), at most {int(most) / GIB:.2f} GiB of host memory a process beyond its state",
            flush=True,
        )
    return result


def run(arguments: argparse.Namespace, world: World) -> None:
    config, ep, folder = load_config(arguments.recipe), arguments.expert_parallel, arguments.dir
    if world.size % ep or config.model.num_experts % ep:
        experts = config.model.num_experts
        raise UserError(f"--expert_parallel {ep} does not divide both {world.size} processes and {experts} experts")
    fragments = fragments_of(config, world, ep)
    numel = sum(fragment.numel for fragment in fragments)
    # Zeros that are written, so that their memory counts as the state's.
    kinds = ("master", "exp_avg", "exp_avg_sq", *(("ema",) if config.ema else ()))
    if arguments.copy:
        tensors = dict.fromkeys(kinds, [torch.arange(numel) % 8191.0])
    else:
        tensors = {kind: [torch.empty(numel).zero_()] for kind in kinds}
    total = torch.tensor(4 * numel * len(kinds))
    torch.distributed.all_reduce(total)
    size, layout = int(total), {"world_size": world.size, "expert_parallel": ep}
    if arguments.copy:
        copy = timed("memory for a copy", size, lambda: HostCopy(tensors), world)
        for _ in range(3):
            timed("look for NaN", size, lambda: non_finite(tensors, fragments), world)
            filled = timed("copy", size, lambda: copy.fill(tensors), world)
        if not all(torch.equal(filled[kind][0], flat) for kind, (flat,) in tensors.items()):
            raise UserError("the copy is not what was copied")
        return
    if not arguments.load:
        for kind, fragment, values in numbers(kinds, fragments):
            fragment.of(tensors[kind]).copy_(values)
        state = dict(numbers={}, run={}, layout=layout, world=world, keep=1)
        timed("save", size, lambda: save_training_state(folder, 1, tensors, fragments, **state), world)
        for (flat,) in tensors.values():
            flat.zero_()
    found = timed("verify", size, lambda: find_latest(folder, world=world), world)
    if found is None:
        raise UserError(f"{folder}: no checkpoint to load; run without --load first")
    how = "the same layout" if found.state["layout"] == layout else f"{found.state['layout']} as {layout}"
    timed(f"load, {how}", size, lambda: load_into(found, tensors, fragments, layout=layout, world=world), world)
    for kind, fragment, values in numbers(kinds, fragments):
        if not torch.equal(fragment.of(tensors[kind]), values):
            raise UserError(f"{kind}/{fragment.name}: not what was written")


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--recipe", type=Path, required=True, help="for the model's shapes and whether it has an EMA")
    parser.add_argument("--dir", type=Path, help="where the checkpoint goes, in place of one there")
    parser.add_argument("--expert_parallel", type=cli.whole(1), default=1)
    parser.add_argument("--copy", action="store_true", help="measure the copy into host memory, write nothing")
    parser.add_argument("--load", action="store_true", help="read what an earlier run wrote, whatever its layout was")
    args = parser.parse_args(arguments)
    if not args.dir and not args.copy:
        raise UserError("--dir: has to say where the checkpoint goes")
    world = replace(world_from_env(), device=torch.device("cpu"))
    init_distributed(world)
    run(args, world)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, tells=dist.tells)
