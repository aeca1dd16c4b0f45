"""Cost of Muon in a step: the same steps with AdamW and with Muon, one after the other on this machine.

    python tools/bench_optimizer.py --out bench
    OMP_NUM_THREADS=2 python tools/bench_optimizer.py --preset tiny_2 --batch 8 --images 2048

The optimizer's part of a step does not grow with the batch, forward and backward do: a step of --images images is taken
to be that many more of both, and the same optimizer. Clipping, the EMA and weights to the computing dtype count as the
optimizer's, with either. OUT/optimizer.json holds the figures. With --tiny, tiny shapes show that this works.
"""

import statistics
from typing import Any

from mdit import cli
from mdit.bench.report import environment, table
from mdit.bench.run import BenchmarkRun
from mdit.bench.stages import tiny_form, with_batch
from mdit.config import CONFIGS, TrainConfig, load_config
from mdit.dist import World, world_from_env
from mdit.files import try_to_write, write_json
from mdit.meeting import init_distributed
from mdit.models import presets
from mdit.parallel.settings import load_ds_json
from mdit.train.run import resolve_execution

SCHEMA = "mdit-optimizer/1"
MUON = ["optim.name=muon", "optim.muon.lr=0.02", "optim.muon.weight_decay=0.1"]


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.path, default=CONFIGS / "res_256_pretrain.toml", help="default: the first stage")
    add("--preset", choices=("xl_2", "tiny_2"), default="tiny_2", help="its model; default: tiny_2")
    add("--ds_config", type=cli.path, default=CONFIGS / "zero1.json", help="default: zero1.json")
    add("--batch", type=cli.whole(1), default=8, help="images of a measured step; default: 8")
    add("--images", type=cli.whole(1), default=2048, help="of the step that is extrapolated to; default: 2048")
    add("--steps", type=cli.whole(1), default=3, help="of each in a turn; default: 3")
    add("--turns", type=cli.whole(1), default=2, help="of each; default: 2")
    add("--out", type=cli.path, metavar="DIR", help="for optimizer.json")
    add("--tiny", action="store_true", help="tiny shapes")
    args = parser.parse_args(arguments)
    world = world_from_env()
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        try_to_write(args.out / "optimizer.json")
    init_distributed(world)
    configs = {
        name: resized(load_config(args.recipe, overrides), args) for name, overrides in (("adamw", []), ("muon", MUON))
    }
    batch, here = configs["adamw"].training.global_batch_size, environment(world.device)
    print(
        f"{here}\n{configs['adamw'].name}, {batch} images a step, {args.turns} turns of {args.steps} steps\n",
        flush=True,
    )
    turns = [{name: measure(config, args, world) for name, config in configs.items()} for _ in range(args.turns)]
    found = {
        name: {key: statistics.median(turn[name][key] for turn in turns) for key in turns[0][name]} for name in configs
    }
    lines: list[list[Any]] = [
        ["ms", "forward, backward", "optimizer", f"step of {batch}", f"step of {args.images}, extrapolated"]
    ]
    for name, ms in found.items():
        ms["step"], ms["extrapolated"] = (n / batch * ms["model"] + ms["optimizer"] for n in (batch, args.images))
        lines.append([name, *(f"{ms[key]:.1f}" for key in ("model", "optimizer", "step", "extrapolated"))])
    # Both run the same model: of its two times, which differ by chance, the mean stands for both.
    model = statistics.mean(ms["model"] for ms in found.values())
    ratios = {n: ratio([n / batch * model + ms["optimizer"] for ms in found.values()]) for n in (batch, args.images)}
    print(table(lines, markdown=False))
    print(
        f"\na step with Muon is {', '.join(f'{r:.3f} times that with AdamW at {n} images' for n, r in ratios.items())}"
    )
    if args.out:
        settings = {"recipe": configs["adamw"].name, "preset": args.preset, "batch": batch, "tiny": args.tiny}
        report = {"schema": SCHEMA, "environment": here.model_dump(), "settings": settings}
        write_json(args.out / "optimizer.json", report | {"milliseconds": found, "turns": turns, "ratios": ratios})


def ratio(adamw_muon: list[float]) -> float:
    return adamw_muon[1] / adamw_muon[0]


def resized(config: TrainConfig, args: Any) -> TrainConfig:
    model = getattr(presets, args.preset)(config.model.latent_size)
    config = with_batch(config.model_copy(update={"model": model, "name": f"{config.name}_{args.preset}"}), args.batch)
    return tiny_form(config) if args.tiny else config


def measure(config: TrainConfig, args: Any, world: World) -> dict[str, float]:
    """Milliseconds of a step's model (forward and backward) and optimizer, medians of a turn after one step."""
    execution = resolve_execution(load_ds_json(args.ds_config), args.ds_config, config, args.recipe, world)
    with BenchmarkRun(config, execution, world) as run:
        ms = run.measure(warm_up=1, steps=args.steps, seconds=0.0).milliseconds
    return {"model": ms.forward + ms.backward, "optimizer": ms.optimizer}


if __name__ == "__main__":
    cli.run(main)
