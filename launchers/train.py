"""Train a recipe: deepspeed launchers/train.py --ds_config configs/zero2.json [--recipe configs/quickstart.toml]

Also under torchrun, srun and plain python. The same command again goes on where the run stopped.
"""

import argparse
import time

from mdit import cli
from mdit.config import DEFAULT_DS_CONFIG, DEFAULT_RECIPE

BEGAN = time.time()  # before anything slow is imported


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.config, default=DEFAULT_RECIPE, help="what is learned: TOML, or a run's config.json")
    add("--ds_config", type=cli.config, default=DEFAULT_DS_CONFIG, help="how it is run: a DeepSpeed JSON")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipe")
    add("--run_dir", type=cli.path, help="default: runs/<recipe name>")
    add("--init_from", type=cli.path, metavar="SNAPSHOT", help="start from these weights")
    add("--with_moments", action="store_true", help="start from the moments of that snapshot's optimizer as well")
    add("--restart", action="store_true", help="start anew; what the run directory has is moved aside")
    add("--dry_run", action="store_true", help="resolve and print everything, run nothing")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.dist import configure_logging, world_from_env
    from mdit.meeting import joined

    world = world_from_env()
    configure_logging(world)
    from mdit.train.agreement import prepare_on_first, require_agreement, what_runs
    from mdit.train.run import dry_run, finished, opened, resolve_asked

    if args.dry_run:
        if world.is_rank_zero:
            print(dry_run(resolve_asked(args, world)))
        return
    with joined(world, lambda: resolve_asked(args, world)) as run:
        require_agreement(world, what_runs(run))
        if finished(run):
            return
        prepare_on_first(run)
        from mdit.train.loop import train

        with opened(run, BEGAN) as directory:
            train(run, directory)


if __name__ == "__main__":
    cli.run(main)
