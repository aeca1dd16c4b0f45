"""Look at machine, launcher, recipe and disks before a run, one line each: ok, slow, or fails.

    python tools/doctor.py
    torchrun --nproc_per_node 8 tools/doctor.py --recipe configs/res_256_pretrain.toml --ds_config configs/zero2.json

Runs under deepspeed, torchrun and srun as launchers/train.py does, with its arguments or, for one stage of several,
with those of launchers/train_recipe.py. Exit code 1 where a run would fail, 0 else. Makes no data and leaves nothing
behind.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import DEFAULT_DS_CONFIG, DEFAULT_RECIPE


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.config, default=DEFAULT_RECIPE, help=f"default: {DEFAULT_RECIPE.name}")
    add("--ds_config", type=cli.config, default=DEFAULT_DS_CONFIG, help="a DeepSpeed JSON")
    add("--run_dir", type=cli.path, help="default: runs/<the recipe's name>")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change a key of the recipe")
    add("--init_from", type=cli.path, metavar="SNAPSHOT", help="the run is to start from these weights")
    add("--with_moments", action="store_true", help="and from the moments of that snapshot's optimizer")
    add("--restart", action="store_true", help="the run is to start anew")
    add("--plan", type=cli.config, help="a recipe of several stages: TOML; --run_dir is that of all of them")
    add("--stage", help="which of them, by its name; those before it have ended")
    add("--dry_run", action="store_true", help=argparse.SUPPRESS)  # of launchers/train.py, where its arguments go here
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    from mdit.bench.doctor import examine
    from mdit.caches import keep_on_local_disk
    from mdit.dist import world_from_env
    from mdit.meeting import joined
    from mdit.stages import load_stages
    from mdit.train.run import Run, resolve_asked
    from mdit.train.staged import StagedRun

    keep_on_local_disk()
    world, failed = world_from_env(), 0

    def resolve() -> Run:
        if args.plan is not None:
            recipe = load_stages(args.plan)
            root = args.run_dir or Path("runs") / recipe.name
            staged = StagedRun(recipe, args.ds_config, root, world, args.restart)
            return staged.resolve(recipe.stage(args.stage, args.plan))
        return resolve_asked(args, world)

    with joined(world):
        for finding in examine(world, resolve):
            failed += finding.state == "fails"
            if world.is_rank_zero:
                print(finding.line, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    cli.run(main)
