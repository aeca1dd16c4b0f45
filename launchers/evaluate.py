"""Score a snapshot: numbers on the screen and in OUT/scores.json, pictures in OUT/grid.png.

    python launchers/evaluate.py --snapshot runs/quickstart/snapshots/latest --out runs/quickstart/evaluation

Emoji scenes are asked for pairs of object and background that training never saw, whose truth is known; any other
recipe for its validation captions, with the validation loss.
"""

import argparse
from pathlib import Path

from mdit import cli


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    parser.add_argument("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--num_pictures", type=cli.whole(1, 10_000), default=64, help="or validation samples")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    parser.add_argument("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    parser.add_argument("--seed", type=cli.whole(0), default=0)
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.dist import world_from_env
    from mdit.eval.evaluate import evaluate
    from mdit.eval.samples import grid, sampling_model, sampling_options, save_png
    from mdit.files import try_to_write, write_json

    snapshot, device = load_snapshot(args.snapshot), world_from_env().device
    options = sampling_options(snapshot.config, args.guidance, args.num_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    picture, scores = args.out / "grid.png", args.out / "scores.json"
    for path in (picture, scores):
        try_to_write(path)
    model = sampling_model(snapshot, args.weights, device)
    found = evaluate(snapshot, model, args.num_pictures, args.seed, options)
    save_png(grid(found.pictures_NHWC, found.captions), picture)
    settings = {"step": snapshot.step, "weights": args.weights, "pictures": len(found.captions), "seed": args.seed}
    write_json(scores, {**settings, **options, **found.scores})
    print(*found.lines, picture, sep="\n")


if __name__ == "__main__":
    cli.run(main)
