"""The launchers as one command: mdit train | train_recipe | sample | evaluate | draw_benchmark | demo | precompute,
each with its own --help.

Also as a module, so that launchers of several processes can start it: torchrun -m mdit train, deepspeed --module mdit
train.
"""

import argparse
import importlib
import sys

from mdit import cli

COMMANDS = ("train", "train_recipe", "sample", "evaluate", "draw_benchmark", "demo", "precompute")


def main() -> None:
    parser = cli.Parser(__doc__, prog="mdit")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # deepspeed's launcher passes it, before the command
    args = parser.parse_args()
    sys.argv = [f"mdit {args.command}", *args.arguments]
    cli.run(importlib.import_module(f"mdit.launchers.{args.command}").main)


if __name__ == "__main__":
    main()
