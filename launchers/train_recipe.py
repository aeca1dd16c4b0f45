"""Train a recipe of several stages: deepspeed launchers/train_recipe.py --plan configs/micro_budget.toml

Each stage goes on from the weights of the one before it, in runs/NAME/STAGE. Also under torchrun, srun and plain
python. The same command again goes on where it stopped; --stage trains one of them, as a job of its own.
"""

import argparse
import time
from pathlib import Path

from mdit import cli
from mdit.config import CONFIGS, DEFAULT_DS_CONFIG

BEGAN = time.time()  # before anything slow is imported
PLAN = CONFIGS / "micro_budget.toml"
PRICE = 3.75  # dollars a GPU-hour, as the paper has it


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__)
    add = parser.add_argument
    add("--plan", type=cli.config, default=PLAN, help=f"the stages: TOML; default: {PLAN.name}")
    add("--ds_config", type=cli.config, default=DEFAULT_DS_CONFIG, help="how they are run: a DeepSpeed JSON")
    add("--stage", help="this one alone, by its recipe's name; the one before it has ended")
    add("--run_dir", type=cli.path, help="of all stages; default: runs/<the plan's name>")
    add("--dollars_per_gpu_hour", type=cli.positive, default=PRICE, help=f"default: {PRICE}")
    add("--restart", action="store_true", help="start anew; what the stages' directories have is moved aside")
    add("--list", action="store_true", help="print the stages' names, a line each, and run nothing")
    add("--dry_run", action="store_true", help="resolve and print everything, run nothing")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.stages import load_stages

    if args.list:
        print(*(stage.name for stage in load_stages(args.plan).stages), sep="\n")
        return
    from mdit.dist import configure_logging, world_from_env
    from mdit.meeting import joined

    world = world_from_env()
    configure_logging(world)
    from mdit.train.staged import StagedRun, dry_run_of_all, train_stages

    def resolve():
        recipe = load_stages(args.plan)
        only = None if args.stage is None else recipe.stage(args.stage, args.plan)
        root = args.run_dir or Path("runs") / recipe.name
        staged = StagedRun(recipe, args.ds_config, root, world, args.restart)
        return staged, staged.check(), only

    if args.dry_run:
        if world.is_rank_zero:
            staged, runs, _ = resolve()
            print(dry_run_of_all(staged, runs, args.dollars_per_gpu_hour))
        return
    with joined(world, resolve) as (staged, runs, only):
        train_stages(staged, runs, only, BEGAN, args.dollars_per_gpu_hour)


if __name__ == "__main__":
    cli.run(main)
