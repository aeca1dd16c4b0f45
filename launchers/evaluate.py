"""Score a snapshot: numbers on the screen and in OUT/scores.json, pictures in OUT/grid.png.

    python launchers/evaluate.py --snapshot runs/quickstart/snapshots/latest --out runs/quickstart/evaluation

Emoji scenes are asked for pairs of object and background that training never saw, whose truth is known; any other
recipe for its validation captions, with the validation loss.
"""

import argparse
import sys
from pathlib import Path

from mdit.config import UserError
from mdit.dist import identify
from mdit.eval.evaluate import evaluate
from mdit.eval.samples import grid, sampling_options
from mdit.files import write_json
from mdit.snapshot import load_model, load_snapshot


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--num_pictures", type=int, default=64, help="or validation samples")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    parser.add_argument("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    args = parser.parse_args(arguments)
    try:
        report(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def report(args: argparse.Namespace) -> None:
    snapshot = load_snapshot(args.snapshot)
    options = sampling_options(snapshot.config, args.guidance, args.num_steps)
    if args.num_pictures < 1:
        raise UserError(f"--num_pictures {args.num_pictures}: must be at least 1")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot make this directory: {error.strerror}") from None
    model = load_model(snapshot, args.weights, identify().device)
    found = evaluate(snapshot, model, num_pictures=args.num_pictures, seed=args.seed, options=options)
    grid(found.pictures_NHWC, found.captions).save(args.out / "grid.png")
    settings = {"step": snapshot.step, "weights": args.weights, "pictures": len(found.captions), "seed": args.seed}
    write_json(args.out / "scores.json", {**settings, **options, **found.scores})
    print(*found.lines, args.out / "grid.png", sep="\n")


if __name__ == "__main__":
    main()
