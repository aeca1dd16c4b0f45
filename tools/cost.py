"""Cost of the whole recipe: GPU-hours and dollars, from measured rows only.

    python tools/cost.py bench/throughput.json
    python tools/cost.py A/throughput.json B/throughput.json --precompute data/cc12m/256 --precompute data/cc12m/512 \\
        --dollars_per_gpu_hour 2 --json cost.json

The rows are those that tools/bench_train.py writes. A stage takes as long as its images need at the fastest measured
rate of its model, latent size and mask ratio, in bfloat16; without such a row it is "not measured", as is the total.
On several nodes the measured rate is multiplied with the efficiency that the paper plan predicts (docs/planning.md).
Precompute is a line of its own: the GPU-seconds a written picture that finished sets took (their report.json; one
process a GPU; sets of one image size are added up), for --pictures pictures.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mdit import cli
from mdit.bench.recipe_cost import SetTime, Stage, choose_rows, scaled, set_times
from mdit.bench.report import Report, table
from mdit.bench.row import NOT_MEASURED, PIXELS_OF_A_LATENT, PRICES, machine_of
from mdit.config import load_config
from mdit.files import try_to_write, write_json
from mdit.stages import MICRO_BUDGET, load_stages

PICTURES = 37e6
NODES, GPUS_OF_A_NODE = (1, 2, 4, 8, 16, 32, 64), 8
THE_PAPERS = "The paper's own code, as the paper has it (arXiv 2407.15811): $1,890 at $3.75, 2.6 days on 8 H100."


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("reports", type=Path, nargs="+", metavar="REPORT.json", help="throughput.json of tools/bench_train.py")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--stages", type=Path, default=MICRO_BUDGET, help=f"a recipe's; default: {MICRO_BUDGET.name}")
    what.add_argument("--recipe", type=Path, action="append", help="a stage; several times")
    add("--precompute", type=Path, action="append", default=[], metavar="SET_DIR", help="a finished set; several times")
    add("--pictures", type=cli.positive, default=PICTURES, help="of the recipe's sets; default: the paper's 37e6")
    add("--dollars_per_gpu_hour", type=cli.positive, action="append", help="several times; default: 3.75 and 2")
    add("--gpu", help="a part of the name of the GPU whose rows count, where reports are of several")
    add("--json", type=Path, help="write all of it to this file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.json is not None:
        try_to_write(args.json)
    prices = args.dollars_per_gpu_hour or list(PRICES)
    configs = [load_config(path) for path in args.recipe or []]
    configs = configs or [stage.config for stage in load_stages(args.stages).stages]
    stages, left_out = choose_rows([(str(path), Report.load(path)) for path in args.reports], configs, args.gpu)
    measured = [stage.measured for stage in stages if stage.measured]
    device = measured[0].environment.gpu if measured else None
    sets = set_times(args.precompute, {PIXELS_OF_A_LATENT * config.model.latent_size for config in configs}, device)
    complete = len(measured) == len(stages)
    machine = machine_of(device) if device else None
    nodes = {n: scaled(stages, n * GPUS_OF_A_NODE, machine) for n in NODES} if machine and complete else {}
    sections = [
        stage_table(stages, prices),
        set_table(sets, args.pictures, prices),
        node_table(nodes, prices, f"no data sheet of {device} to predict with" if complete else None),
        "\n".join(["Rows that do not count:", *left_out]) if left_out else "",
        THE_PAPERS,
    ]
    print(f"{device or 'No GPU'}: measured rows only\n")
    print("\n\n".join(filter(None, sections)))
    if args.json is None:
        return
    content = {
        "device": device,
        "dollars_per_gpu_hour": prices,
        "stages": [
            {
                "recipe": stage.name,
                "images": stage.images,
                "images_per_second_and_gpu": stage.measured and stage.measured.rate,
                "gpu_hours": stage.gpu_hours,
                "row": stage.measured and stage.measured.source,
            }
            for stage in stages
        ],
        "gpu_hours": sum(stage.gpu_hours or 0.0 for stage in stages) if complete else None,
        "precompute": [
            {
                "image_size": found.image_size,
                "pictures": args.pictures,
                "gpu_hours": found.gpu_hours(args.pictures),
                "problem": found.problem,
            }
            for found in sets
        ],
        "nodes_predicted_efficiency": {
            count: {"hours": found[0], "efficiency": found[1]} for count, found in nodes.items() if found
        },
        "rows_that_do_not_count": left_out,
    }
    write_json(args.json, content)


# --- tables


def at_prices(prices: Sequence[float]) -> list[str]:
    """Heads of the columns that `costs` fills."""
    return ["GPU-hours", *(f"at ${price:g}" for price in prices)]


def costs(gpu_hours: float | None, prices: Sequence[float]) -> list[str]:
    if gpu_hours is None:
        return [NOT_MEASURED] * (1 + len(prices))
    return [f"{gpu_hours:,.1f}", *(f"${gpu_hours * price:,.0f}" for price in prices)]


def stage_table(stages: Sequence[Stage], prices: Sequence[float]) -> str:
    """Stages and their sum; the sum of the measured ones by itself where some are missing."""
    cells, sources = [["stage", "images", "images/s a GPU", *at_prices(prices)]], []
    for stage in stages:
        rate, source = NOT_MEASURED, NOT_MEASURED
        if stage.measured:
            rate, source = f"{stage.measured.rate:,.0f}", stage.measured.source
        cells.append([stage.name, f"{stage.images / 1e6:,.1f} M", rate, *costs(stage.gpu_hours, prices)])
        sources.append(f"{stage.name}: {source}")
    images = f"{sum(stage.images for stage in stages) / 1e6:,.1f} M"
    hours = [stage.gpu_hours for stage in stages if stage.gpu_hours is not None]
    total, missing = sum(hours), len(stages) - len(hours)
    cells.append(["the recipe", images, "", *costs(None if missing else total, prices)])
    if hours and missing:
        cells.append([f"the measured {len(hours)} of {len(stages)}", "", "", *costs(total, prices)])
    return table(cells, markdown=False) + "\n\nMeasured rows:\n" + "\n".join(sources)


def set_table(sets: Sequence[SetTime], pictures: float, prices: Sequence[float]) -> str:
    cells = [["precompute", "pictures", "pictures/s a GPU", *at_prices(prices)]]
    told = ["(images and captions once through their towers; no part of the recipe above)"]
    for found in sets:
        rate, how = NOT_MEASURED, found.problem
        if not found.problem:
            rate = f"{found.written / found.seconds:,.0f}"
            how = f"{found.written:,} pictures in {found.seconds:,.0f} GPU-seconds"
        cells.append([f"{found.image_size} px", f"{pictures / 1e6:,.1f} M", rate])
        cells[-1] += costs(found.gpu_hours(pictures), prices)
        told.append(f"{found.image_size} px: {how}")
    return table(cells, markdown=False) + "\n" + "\n".join(told)


def node_table(
    nodes: dict[int, tuple[float, float] | None], prices: Sequence[float], without_machine: str | None
) -> str:
    """`without_machine`: why there are no `nodes`, where the recipe was measured."""
    title = "On nodes of 8 GPUs: measured rate x predicted efficiency"
    if not nodes:
        return f"{title}: {without_machine or f'{NOT_MEASURED}, as the recipe is'}"
    cells = [["nodes", "GPUs", "efficiency", "hours", "days", *at_prices(prices)]]
    for count, found in nodes.items():
        gpus = count * GPUS_OF_A_NODE
        cells.append([str(count), str(gpus)])
        if found is None:
            cells[-1].append("cannot share the batch")
            continue
        hours, share = found
        cells[-1] += [f"{share:.0%}", f"{hours:,.1f}", f"{hours / 24:,.2f}", *costs(hours * gpus, prices)]
    note = "efficiency: of a GPU beside one alone; the global batch stays the recipe's, whatever the number of GPUs"
    return f"{title}\n\n{table(cells, markdown=False)}\n{note}"


if __name__ == "__main__":
    cli.run(main)
