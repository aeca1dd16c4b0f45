"""Score a snapshot: numbers on the screen and in OUT/scores.json, pictures in OUT/grid.png.

    python launchers/evaluate.py --snapshot runs/quickstart/snapshots/latest --out runs/quickstart/evaluation
    torchrun --nproc_per_node 8 launchers/evaluate.py --snapshot DIR --out OUT --metrics val_loss,fid,clip_score,cmmd \\
        --num_pictures 30000 --prompts coco:data/coco --reference data/coco/val2014 --guidance 1.5

Without --metrics emoji scenes are asked for pairs of object and background that training never saw, whose truth is
known, and any other recipe for its validation captions, with the validation loss. With them the pictures of all prompts
go to OUT/pictures, drawn by any number of processes (deepspeed, torchrun, srun); the same command again goes on.
docs/evaluation.md has the protocols.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import MetricsConfig, UserError, near_key, parse_section

VAL_LOSS = "val_loss"
TOWERS = ("inception", "dinov2", "cmmd_clip", "clip")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_sampling(parser)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the directory to write")
    add("--num_pictures", type=cli.whole(1, 1_000_000), help="or validation samples; default: 64")
    add("--metrics", help="val_loss, fid, fd_dinov2, fd_efflite0, cmmd, clip_score, with commas between them")
    add("--prompts", help="a file of one a line, or SOURCE:DIR as coco:DIR; default: the validation set's captions")
    add("--reference", help="pictures to compare with: DIR, SOURCE:DIR, an earlier OUT/reference.safetensors, or .npz "
        "statistics for fid; default: the recipe's, or its validation set")  # fmt: skip
    for name in TOWERS:
        add(f"--{name}", help="a local path or hub id; default: the recipe's, or the metric's own")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.metrics is not None:
        return score_by_metrics(args)
    for name in ("prompts", "reference", *TOWERS):
        if (value := getattr(args, name)) is not None:
            raise UserError(f"--{name} {value}: changes nothing without --metrics")
    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.dist import world_from_env
    from mdit.eval.evaluate import evaluate
    from mdit.eval.samples import grid, sampling_model, sampling_options, save_png
    from mdit.files import try_to_write, write_json

    snapshot, world = load_snapshot(args.snapshot), world_from_env()
    if world.size > 1:
        raise UserError(f"{world.size} processes: --metrics are scored by several, all else by one")
    options = sampling_options(snapshot.config, args.guidance, args.num_steps)
    args.out.mkdir(parents=True, exist_ok=True)
    picture, scores = args.out / "grid.png", args.out / "scores.json"
    for path in (picture, scores):
        try_to_write(path)
    model = sampling_model(snapshot, args.weights, world.device)
    found = evaluate(snapshot, model, args.num_pictures or 64, args.seed, options)
    save_png(grid(found.pictures_NHWC, found.captions), picture)
    settings = {"step": snapshot.step, "weights": args.weights, "pictures": len(found.captions), "seed": args.seed}
    write_json(scores, {**settings, **options, **found.scores})
    print(*found.lines, picture, sep="\n")


def score_by_metrics(args: argparse.Namespace) -> None:
    from mdit.checkpoint.snapshot import Snapshot, load_snapshot
    from mdit.dist import configure_logging, on_rank_zero, world_from_env
    from mdit.eval.metrics import METRICS
    from mdit.eval.scores import Scoring, read_prompts, score
    from mdit.meeting import joined

    world = world_from_env()
    configure_logging(world)

    names = [name.strip() for name in args.metrics.split(",")]

    def resolve() -> tuple[Snapshot, int, MetricsConfig | None]:
        snapshot = load_snapshot(args.snapshot)
        if unknown := [name for name in names if name not in (VAL_LOSS, *METRICS)]:
            hint = near_key(unknown[0], METRICS) or f"; there are {VAL_LOSS}, {', '.join(METRICS)}"
            raise UserError(f"--metrics {unknown[0]}: is not known{hint}")
        recipes = snapshot.config.metrics
        config = {**(recipes.model_dump() if recipes else {}), "every": 1}
        count = args.num_pictures or config.get("num_pictures", 64)
        given = {name: getattr(args, name) for name in ("reference", *TOWERS) if getattr(args, name) is not None}
        config |= {"names": [name for name in names if name != VAL_LOSS], "num_pictures": count, **given}
        return snapshot, count, parse_section(MetricsConfig, config, "command line") if config["names"] else None

    with joined(world, resolve) as (snapshot, count, metrics):
        prompts = on_rank_zero(world, lambda: read_prompts(args.prompts, snapshot, count))
        sampler = {"guidance": args.guidance, "steps": args.num_steps, "seed": args.seed, "batch_size": args.batch_size}
        val_loss = VAL_LOSS in names
        scoring = Scoring(snapshot, args.weights, metrics, prompts, args.out, **sampler, val_loss=val_loss)
        lines = score(scoring, world)
    if world.is_rank_zero:
        print(*lines, sep="\n")


if __name__ == "__main__":
    cli.run(main)
