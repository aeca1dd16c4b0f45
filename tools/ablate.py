"""Compare variants of a recipe: each trained from several seeds within one budget, side by side, in one table.

    python tools/ablate.py configs/ablations/paper.toml --out runs/ablations/paper [--workers 2]

The TOML file has the base recipe, seeds, a budget (steps, counted FLOPs or seconds) and variants as differences;
mdit/bench/ablation.py says all of its keys. On CPUs a run has one thread and there are as many at a time as cores; on a
GPU they come one after the other. Every run is launchers/train.py's own: the same command again goes on where it
stopped, and does nothing twice. Leaves DIR/table.md, ablation.json, curves.png and grids/.
"""

import argparse
import shlex
import sys
from pathlib import Path

from mdit import cli


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("ablation", type=cli.path, metavar="ABLATION.toml")
    add("--out", type=cli.path, required=True, metavar="DIR", help="runs, results and the report")
    add("--workers", type=cli.whole(1, 1024), help="runs at a time; default: as many as cores, one on a GPU")
    add("--rerun", action="store_true", help="run anew what the file has otherwise by now; the old runs are kept")
    add("--dry_run", action="store_true", help="print what would be run, and run nothing; a budget of seconds has none")
    add("--table", action="store_true", help="the report of what is measured, without running anything")
    add("--fill", type=cli.path, metavar="DOCUMENT.md", help="put the table into the document's region of that name")
    add("--measure", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)  # a process of its own
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    from mdit.bench.ablation import Ablation
    from mdit.bench.ablation_report import AblationReport, plan
    from mdit.bench.ablation_runs import AblationRunner, workers_here
    from mdit.dist import world_from_env

    ablation = Ablation(args.ablation)
    if args.measure:
        from mdit.bench.ablation_result import measure

        variant, seed = args.measure
        measure(ablation, variant, int(seed), args.out, world_from_env().device)
        return 0
    if args.dry_run:
        print(plan(ablation))
        return 0
    progress = None
    if not args.table:
        workers, start = workers_here(args.workers, world_from_env().device)
        again = [sys.executable, str(Path(__file__).resolve()), str(args.ablation), "--out", str(args.out)]
        progress = AblationRunner(ablation, args.out, again, workers, start, args.rerun).run()
    report = AblationReport.load(ablation, args.out)
    command = shlex.join(["python", "tools/ablate.py", str(args.ablation), "--out", str(args.out)])
    paths = report.write(args.out, command)
    if args.fill:
        report.fill(args.fill, args.out, command)
    print(report.markdown(command), *paths, progress or "nothing was run", sep="\n")
    return 1 if progress and progress.failed else 0


if __name__ == "__main__":
    cli.run(main)
