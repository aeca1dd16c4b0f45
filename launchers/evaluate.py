"""Score a snapshot: a grid of pictures, numbers on the screen and in scores.json.

    python launchers/evaluate.py --snapshot runs/quickstart/snapshots/latest --out runs/quickstart/evaluation

A recipe of emoji scenes is asked for object x background pairs that training never saw, whose truth is known. Any
other gets its validation captions' pictures and its validation loss.
"""

import argparse
import json
import sys
from pathlib import Path

from mdit.config import UserError
from mdit.dist import identify
from mdit.eval.report import evaluate_scenes, evaluate_validation
from mdit.eval.samples import sampling_options
from mdit.snapshot import load_model, load_snapshot


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--out", type=Path, required=True, help="directory for grid.png and scores.json")
    parser.add_argument("--num_pictures", type=int, default=64)
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    parser.add_argument("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    args = parser.parse_args(arguments)
    try:
        evaluate(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
