"""Draw a benchmark's prompts into the files that its scorer reads, and say how that is started.

    python launchers/draw_benchmark.py --benchmark geneval --prompts geneval/prompts/evaluation_metadata.jsonl \\
        --snapshot runs/NAME/snapshots/latest --out pictures/geneval

geneval, geneval2, dpg and parti are known (`mdit.eval.benchmarks`). Any number of processes draw together (deepspeed,
torchrun, srun); the same command again draws what is missing.
"""

import argparse
from pathlib import Path

from mdit import cli
from mdit.config import UserError


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    cli.add_sampling(parser)
    add = parser.add_argument
    add("--benchmark", required=True, choices=("geneval", "geneval2", "dpg", "parti"))
    add("--prompts", type=Path, required=True, help="the benchmark's own file, or directory, of prompts")
    add("--out", type=Path, required=True, help="the directory to write")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    from tqdm import tqdm

    from mdit.checkpoint.snapshot import load_snapshot
    from mdit.dist import configure_logging, gather, on_all_ranks, on_rank_zero, world_from_env
    from mdit.eval.benchmarks import BENCHMARKS, draw
    from mdit.eval.samples import Painter
    from mdit.files import write_text
    from mdit.meeting import joined

    world = world_from_env()
    configure_logging(world)

    def resolve():
        try:
            benchmark = BENCHMARKS[args.benchmark](args.prompts, args.out)
        except UnicodeDecodeError as error:
            raise UserError(f"{args.prompts}: not UTF-8: {error}") from None
        for path, text in benchmark.texts.items():
            if path.exists() and path.read_text(encoding="utf-8") != text:
                raise UserError(f"{path}: is of other prompts than {args.prompts}; choose another --out")
        return load_snapshot(args.snapshot), benchmark

    def write() -> None:
        args.out.mkdir(parents=True, exist_ok=True)
        for path, text in benchmark.texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)

    settings = {"guidance": args.guidance, "steps": args.num_steps, "seed": args.seed}
    with joined(world, resolve) as (snapshot, benchmark):
        on_rank_zero(world, write)
        painter = Painter(snapshot, args.weights)
        drawn = draw(benchmark, painter, world, args.batch_size, **settings)
        drawn = tqdm(drawn, unit="file", dynamic_ncols=True, disable=None if world.is_rank_zero else True)
        count = sum(gather(on_all_ranks(world, lambda: sum(1 for _ in drawn)), world))
    if world.is_rank_zero:
        kept = len(benchmark.sheets) - count
        print(f"{args.out}: {count} files drawn, {kept} there already; to score them:", benchmark.command, sep="\n")


if __name__ == "__main__":
    cli.run(main)
