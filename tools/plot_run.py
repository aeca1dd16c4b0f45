"""Draw a run's training and validation losses, or those of a recipe's stages one behind the other.

    python tools/plot_run.py runs/quickstart --out losses.png
    python tools/plot_run.py runs/miniature/{px32_pretrain,px32_finetune,px64_pretrain,px64_finetune} --out losses.png

Needs matplotlib: pip install 'mdit[bench]'.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, in their order")
    parser.add_argument("--out", type=cli.path, required=True, metavar="PNG")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.bench.plots import draw_losses
    from mdit.documents import parse_json
    from mdit.train.run_directory import METRICS

    stages = {}
    for run in args.runs:
        path = run / METRICS
        if not path.is_file():
            raise UserError(f"{path}: there is no such file: {run} is no run directory")
        stages[run.name] = [parse_json(line, path) for line in path.read_text(encoding="utf-8").splitlines()]
    draw_losses(stages, args.out, " and ".join(stages) if len(stages) < 3 else f"{len(stages)} stages")
    print(args.out)


if __name__ == "__main__":
    cli.run(main)
