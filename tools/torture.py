"""Torture a small run with random faults, again and again: python tools/torture.py --minutes 30 [--seed 0]

Rounds of a tiny run on CPUs, in one or two processes: kills, signals, full and read-only disks, damaged checkpoints and
shards, second starts, other recipes, clocks set back, slow storage; each round goes on by the same command until it has
finished, and its weights are compared with those of an undisturbed run. Exit code 1 where anything was lost or wrong;
its directory is kept, and `--seed S --round R` tries it again. Full disks need root.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from mdit import cli


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--minutes", type=cli.positive, default=30.0, help="the last round ends somewhat later; default: 30")
    add("--seed", type=cli.whole(0), default=0, help="of all that is drawn; default: 0")
    add("--kinds", type=lambda text: text.split(","), metavar="A,B", help="these kinds of faults alone")
    add("--round", type=cli.whole(1), help="this round alone")
    add("--work", type=cli.path, metavar="DIR", help="a new folder for all runs; default: a temporary one")
    add("--out", type=cli.path, metavar="FILE", help="the table, as Markdown")
    return parser.parse_args(arguments)


def finish(session, folder: Path) -> None:
    """Print the report; the runs stay where one of them has something to look at."""
    print(session.report(), flush=True)
    if not session.failed:
        shutil.rmtree(folder)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    from mdit.bench.torture import TortureSession, possible_kinds
    from mdit.bench.torture_start import Workplace
    from mdit.files import try_to_write, write_text

    if args.out:
        try_to_write(args.out)
    kinds, left_out = possible_kinds(args.kinds)
    if left_out:
        print(f"left out, as nothing can be mounted here: {', '.join(left_out)}")
    if args.work:
        args.work.mkdir(parents=True)
    folder = Path(args.work or tempfile.mkdtemp(prefix="mdit_torture_")).resolve()
    session = TortureSession(Workplace(folder), args.seed, kinds, lambda line: print(line, flush=True))
    try:
        session.run(args.minutes, args.round)
    except KeyboardInterrupt:
        finish(session, folder)
        raise
    finish(session, folder)
    if args.out:
        words = ["python", "tools/torture.py", *(sys.argv[1:] if arguments is None else arguments)]
        write_text(args.out, session.markdown(shlex.join(words)))
    return 1 if session.failed else 0


if __name__ == "__main__":
    cli.run(main)
