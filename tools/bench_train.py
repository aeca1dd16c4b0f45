"""Throughput of training, per second and per dollar: real optimizer steps of the paper's four stages, or any recipe.

    python tools/bench_train.py --out bench                       the four stages, xl_2, on one GPU
    deepspeed tools/bench_train.py --recipe configs/paper_32.toml --data recipe
    python tools/bench_train.py --report bench                    stages, ladder, profile and plots, in under 8 minutes
    python tools/bench_train.py --draw bench                      its plots once more, on a machine with matplotlib

Of every step: waiting for data, forward, backward, optimizer; of the median one images/s, model TFLOP/s, MFU, dollars.
--ladder goes from the paper's model to ours, a technique at a time, each with its loss parity; --profile writes a trace
for Perfetto or TensorBoard and tells where a step goes; both of the first recipe, with two micro-batches a step.

DIR/throughput.json (mdit/bench/row.py) and DIR/throughput.md are written after every row; --resume goes on with what
is missing. Where there is no memory for a micro-batch, half of it is tried. Without a GPU, or with --tiny, tiny shapes
show that all this works; a CPU measures a --recipe as it is.
"""

import argparse
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import torch.distributed

from mdit import cli, dist
from mdit.bench.report import Report, earlier_rows, environment
from mdit.bench.row import MADE_UP, PRICES
from mdit.bench.session import JSON, Session, print_plots, print_rank0
from mdit.bench.stages import Job, resolve_job
from mdit.config import CONFIGS, UserError
from mdit.dist import World, configure_logging, gather, on_all_ranks, world_from_env
from mdit.files import try_to_write
from mdit.meeting import init_distributed, while_others_wait
from mdit.precompute import precompute
from mdit.stages import paper_stages

START = time.monotonic()
REPORT_BUDGET_S = {"cuda": 465.0, "cpu": 50.0}
LADDER_SECONDS = 2.0  # a step at most, beside its parity
PARITY_STEPS = {"cuda": 50, "cpu": 40}
SECONDS, SECONDS_OF_TINY = 12.0, 2.0


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    world = world_from_env()
    configure_logging(world)
    if args.draw:
        print_plots(Report.load(args.draw / JSON), args.draw)
        return 0
    try:
        complete = run(args, world)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([f"{args.out} has the rows so far, --resume goes on"] if args.out else [])) from None
    torch.distributed.destroy_process_group()
    return 0 if complete else 1


def tells(error: BaseException) -> bool:
    """Whether this process is the one to print an error: until all have met they have the same."""
    return dist.tells(error) if torch.distributed.is_initialized() else world_from_env().is_rank_zero


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add, count, boolean = parser.add_argument, cli.whole(1), argparse.BooleanOptionalAction
    add("--recipe", type=Path, action="append", help="TOML, or a run's config.json; several times; default: the stages")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipes")
    add("--ds_config", type=Path, help="how it is run; default: zero1.json, of several processes zero2.json")
    add("--compile", action=boolean, help="instead of what the JSON says")
    add("--kernels", choices=("auto", "reference", "triton"), help="instead of what the JSON says")
    add("--fp8", action=boolean, help="instead of what the JSON says")
    add("--micro_batch", type=count, nargs="+", help="images at once on a GPU, each a row; default: what a run takes")
    add("--global_batch", type=count, help="default: the recipe's")
    add("--data", choices=("made_up", "recipe"), default="made_up", help="default: made up on the device")
    add("--steps", type=count, default=3, help="measured at least; default: 3")
    add("--seconds", type=cli.positive, help="for as many steps as fit; default: 12 a row, of tiny shapes 2")
    add("--warm_up", type=cli.whole(0), help="steps before; default: 1, or 2 where a step is one micro-batch")
    add("--dollars_per_gpu_hour", type=cli.positive, action="append", help="several times; default: 3.75 and 2")
    add("--ladder", action="store_true", help="measure the ladder instead of stages")
    add("--parity_steps", type=count, help="of the ladder's longest comparisons of losses; default: 50, on a CPU 40")
    add("--profile", action="store_true", help="profile instead of measuring stages")
    add("--out", type=Path, metavar="DIR", help="write what is measured to DIR")
    add("--report", type=Path, metavar="DIR", help="all of it, and plots, to DIR")
    add("--draw", type=Path, metavar="DIR", help="measure nothing: the plots of the report that DIR holds")
    add("--resume", action="store_true", help="keep the rows that DIR holds, measure the others")
    add("--budget_s", type=cli.positive, help="begin nothing that ends later; default for --report: 465, on a CPU 50")
    add("--tiny", action="store_true", help="tiny shapes; without a GPU always so, unless there is a --recipe")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    args = parser.parse_args(arguments)
    if args.report and (args.out or args.ladder or args.profile):
        parser.error("--report: has a directory, the ladder and the profile of its own")
    args.out = args.report or args.out
    if args.resume and args.out is None:
        parser.error("--resume requires --out or --report")
    args.command = shlex.join(["tools/bench_train.py", *(sys.argv[1:] if arguments is None else arguments)])
    return args


def run(args: argparse.Namespace, world: World) -> bool:
    """Measure -> whether all stages that there was time for were measured, be it with a smaller micro-batch."""
    kind, prices = world.device.type, args.dollars_per_gpu_hour or list(PRICES)
    if kind == "cpu" and not (args.recipe or args.tiny):
        args.tiny = True
        print_rank0(world, "no GPU here: tiny shapes on the CPU, which say nothing of the stages")
    seconds = args.seconds or (SECONDS_OF_TINY if args.tiny else SECONDS)
    jobs = wanted_jobs(args, world)
    init_distributed(world)
    for job in jobs:
        if job.data != MADE_UP:
            make = partial(precompute, job.config, device=world.device)
            while_others_wait(world, f"makes the data of {job.config.name}", make)
    here = environment(world.device, world.size)
    reads = args.resume and world.is_rank_zero  # others may not see its disk
    rows = gather(on_all_ranks(world, lambda: earlier_rows(args.out / JSON, here) if reads else []), world)[0]
    report = Report(environment=here, command=args.command, rows=rows)
    if args.out and world.is_rank_zero:
        args.out.mkdir(parents=True, exist_ok=True)
        try_to_write(args.out / JSON)
    budget_s = args.budget_s or (REPORT_BUDGET_S[kind] if args.report else float("inf"))
    session = Session(report, world, START + budget_s, directory=args.out, prices=prices)
    session.write()
    print_rank0(world, f"{here}\n")
    if args.report or not (args.ladder or args.profile):
        session.stages(jobs, warm_up=args.warm_up, steps=args.steps, seconds=seconds)
    if args.report or args.profile:
        session.profile(jobs[0].shortened())  # some seconds; the ladder takes what is left
    if args.report or args.ladder:
        parity_steps = args.parity_steps or PARITY_STEPS[kind]
        ladder_seconds = min(seconds, LADDER_SECONDS)
        session.ladder(jobs[0].shortened(), parity_steps=parity_steps, steps=args.steps, seconds=ladder_seconds)
    print_rank0(world, "\n" + report.tables(prices))
    if args.report and world.is_rank_zero:
        try:
            print_plots(report, args.report)
        except UserError as error:
            print(f"not drawn: {error}", flush=True)
    if session.missing:
        print_rank0(world, f"\nnot measured, for want of time: {'; '.join(session.missing)}. --resume goes on with it")
    return not any(row.problem and not row.ran_out_of_memory for row in report.of_kind("stage"))


def wanted_jobs(args: argparse.Namespace, world: World) -> list[Job]:
    asked = {"compile": args.compile, "kernels": args.kernels, "fp8": args.fp8}
    options = dict(
        overrides=args.set,
        global_batch=args.global_batch,
        mdit={key: value for key, value in asked.items() if value is not None},
        data=MADE_UP if args.data == "made_up" else "recipe",
        tiny=args.tiny,
    )
    ds_config = args.ds_config or CONFIGS / ("zero1.json" if world.size == 1 else "zero2.json")
    recipes = args.recipe or [stage.recipe for stage in paper_stages()]
    sizes = args.micro_batch or [None]
    return [resolve_job(recipe, ds_config, world, micro_batch=size, **options) for recipe in recipes for size in sizes]


if __name__ == "__main__":
    cli.run(main, tells=tells)
