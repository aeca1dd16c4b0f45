"""Make the weights' average of any length after training, from those that a run with a table [averages] has stored.

    python tools/reconstruct_ema.py --run_dir runs/quickstart --length 0.07 --out runs/quickstart/averaged
    python tools/reconstruct_ema.py --run_dir runs/quickstart --sweep 0.01 0.02 0.05 0.1 0.2 --plot lengths.png

A length is sigma_rel of arXiv 2312.02696: the standard deviation of the average's profile over steps, as a share of the
run. --out is a snapshot with that average as its EMA; --sweep prints the validation loss of each length, beside that of
the run's own weights and EMA.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--run_dir", type=cli.path, required=True)
    add("--step", type=cli.whole(1), help="after which; the run has a snapshot of it. Default: of the latest snapshot")
    add("--length", type=length, metavar="SIGMA_REL")
    add("--out", type=cli.path, metavar="SNAPSHOT", help="the snapshot to write for --length")
    add("--sweep", type=length, nargs="+", metavar="SIGMA_REL", help="lengths to compare")
    add("--plot", type=cli.path, metavar="PNG", help="of --sweep")
    args = parser.parse_args(arguments)
    if (args.length is None) != (args.out is None) or (args.length is None) == (args.sweep is None):
        parser.error("expected --length with --out, or --sweep")
    return args


def length(text: str) -> float:
    if not 0.001 <= (value := float(text)) <= 0.28:
        raise argparse.ArgumentTypeError(f"{text}: is no length between 0.001 and 0.28")
    return value


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from mdit.checkpoint.averages import reconstruct, stored_averages
    from mdit.checkpoint.snapshot import load_snapshot, save_snapshot
    from mdit.checkpoint.training_state import step_name
    from mdit.config import portable

    snapshot = load_snapshot(args.run_dir / "snapshots" / ("latest" if args.step is None else step_name(args.step)))
    stored = stored_averages(args.run_dir, snapshot.step)
    raw = snapshot.weights("raw")
    print(f"step {snapshot.step}, from {len(stored)} stored averages")
    if args.sweep:
        sweep(snapshot, raw, stored, args.sweep, args.plot)
        return
    if args.out.exists():
        raise UserError(f"{args.out}: is there already")
    averaged = raw | dict(reconstruct(stored, args.length, snapshot.step))
    average = {"length": args.length, "step": snapshot.step, "run_dir": str(args.run_dir)}
    content = {"recipe": portable(snapshot.config, args.out / "config.json"), "average": average}
    options = {"step": snapshot.step, "config_json": content, "encoders": snapshot.encoders}
    save_snapshot(args.out, raw=raw, ema=averaged, **options)
    print(f"{args.out}: average of length {args.length:g}")


def sweep(snapshot, raw, stored, lengths: list[float], plot: Path | None) -> None:
    from mdit.bench.plots import draw_loss_over_length, require_matplotlib
    from mdit.bench.report import table
    from mdit.checkpoint.averages import reconstruct
    from mdit.dist import world_from_env
    from mdit.eval.samples import sampling_model
    from mdit.eval.validation import losses_on_set

    if plot is not None:
        require_matplotlib()
    device = world_from_env().device

    def loss(weights) -> float:
        losses = losses_on_set(sampling_model(snapshot, "raw", device, weights), snapshot.config, device)
        return sum(losses) / len(losses)

    others = {"weights": loss(raw)}
    if snapshot.config.ema is not None:
        others[f"EMA, decay {snapshot.config.ema.decay:g}"] = loss(snapshot.weights("ema"))
    points = [(each, loss(raw | dict(reconstruct(stored, each, snapshot.step)))) for each in sorted(lengths)]
    rows = [["length", "validation loss"], *([f"{each:g}", f"{value:.4f}"] for each, value in points)]
    print(table(rows + [[name, f"{value:.4f}"] for name, value in others.items()]))
    if plot is not None:
        draw_loss_over_length(points, others, plot)
        print(plot)


if __name__ == "__main__":
    cli.run(main)
