"""Train a recipe: deepspeed launchers/train.py --ds_config configs/zero2.json [--recipe configs/quickstart.toml]

Also under torchrun, srun and plain python. The same command again goes on where the run stopped.
"""

import argparse
import sys

import torch.distributed

from mdit.cli import explain, path
from mdit.config import DEFAULT_RECIPE, UserError
from mdit.dist import configure_logging, identify, start

DEFAULT_JSON = DEFAULT_RECIPE.parent / "zero2.json"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", type=path, default=DEFAULT_RECIPE, help="what is learned: TOML, or a run's config.json"
    )
    parser.add_argument("--ds_config", type=path, default=DEFAULT_JSON, help="how it is run: a DeepSpeed JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipe"
    )
    parser.add_argument("--run_dir", type=path, help="default: runs/<recipe name>")
    parser.add_argument("--init_from", type=path, metavar="SNAPSHOT", help="start from these weights")
    parser.add_argument("--restart", action="store_true", help="start anew; what the run directory has is moved aside")
    parser.add_argument("--dry_run", action="store_true", help="resolve and print everything, run nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    world = identify()
    configure_logging(world)
    try:
        from mdit.train.run import describe, finished, opened, plan_run, prepare_on_first

        run = plan_run(
            arguments.recipe,
            arguments.ds_config,
            overrides=arguments.set,
            run_dir=arguments.run_dir,
            init_from=arguments.init_from,
            restart=arguments.restart,
            world=world,
        )
        if arguments.dry_run:
            if world.is_first:
                print(describe(run))
            return
        if finished(run):
            return
        prepare_on_first(run)
        start(world)
        from mdit.train.loop import train

        with opened(run) as directory:
            train(run, directory)
        torch.distributed.destroy_process_group()
    except (UserError, OSError) as error:
        # Before the processes have met, all of them see the same error: one line is enough.
        if world.is_first or torch.distributed.is_initialized():
            print(f"error: {error if isinstance(error, UserError) else explain(error)}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
