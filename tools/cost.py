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
from typing import Any

from mdit import cli
from mdit.bench.recipe_cost import SetTime, Stage, choose_rows, scaled, set_times
from mdit.bench.report import Report, table
from mdit.bench.row import PIXELS_OF_A_LATENT, machine_of
from mdit.config import load_config
from mdit.files import try_to_write, write_json

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
STAGES = ("res_256_pretrain", "res_256_finetune", "res_512_pretrain", "res_512_finetune")
PICTURES = 37e6
PRICES = (3.75, 2.0)
NODES, GPUS_OF_A_NODE = (1, 2, 4, 8, 16, 32, 64), 8
NOT_MEASURED = "not measured"
THE_PAPERS = "The paper's own code, as the paper has it (arXiv 2407.15811): $1,890 at $3.75, 2.6 days on 8 H100."


def main(arguments: list[str] | None = None) -> None:
    run(parse_arguments(arguments))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("reports", type=Path, nargs="+", metavar="REPORT.json", help="throughput.json of tools/bench_train.py")
    add("--recipe", type=Path, action="append", help="a stage; several times; default: the paper's four")
    add("--precompute", type=Path, action="append", default=[], metavar="SET_DIR", help="a finished set; several times")
    add(
        "--pictures",
        type=cli.positive,
        default=PICTURES,
        help="of the recipe's sets; default: the paper's 37e6",
    )
    add("--dollars_per_gpu_hour", type=cli.positive, action="append", help="several times; default: 3.75 and 2")
    add("--gpu", help="a part of the name of the GPU whose rows count, where reports are of several")
    add("--json", type=Path, help="write all of it to this file")
    args = parser.parse_args(arguments)
    args.dollars_per_gpu_hour = args.dollars_per_gpu_hour or list(PRICES)
    return args


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        try_to_write(args.json)
    configs = [load_config(path) for path in args.recipe or [CONFIGS / f"{name}.toml" for name in STAGES]]
    stages, left_out = choose_rows([(str(path), Report.load(path)) for path in args.reports], configs, args.gpu)
    device = next((stage.measured.device for stage in stages if stage.measured), None)
    sizes = {PIXELS_OF_A_LATENT * config.model.latent_size for config in configs}
    sets = set_times(args.precompute, sizes, device)
    sections = [
        stage_table(stages, args.dollars_per_gpu_hour),
        set_table(sets, args.pictures, args.dollars_per_gpu_hour),
        node_table(stages, device, args.dollars_per_gpu_hour),
        "\n".join(["Rows that do not count:", *left_out]) if left_out else "",
        THE_PAPERS,
    ]
    print(f"{device or 'No GPU'}: measured rows only\n")
    print("\n\n".join(section for section in sections if section))
    if args.json is not None:
        write_json(args.json, as_json(stages, sets, device, args, left_out))


# --- tables


def dollars(gpu_hours: float | None, prices: Sequence[float]) -> list[str]:
    return [NOT_MEASURED if gpu_hours is None else f"${gpu_hours * price:,.0f}" for price in prices]


def stage_table(stages: Sequence[Stage], prices: Sequence[float]) -> str:
    """Stages and their sum; the sum of the measured ones by itself where some are missing."""
    cells = [["stage", "images", "images/s a GPU", "GPU-hours", *(f"at ${price:g}" for price in prices)]]
    sources = []
    for stage in stages:
        rate = f"{stage.measured.rate:,.0f}" if stage.measured else NOT_MEASURED
        cells.append([stage.config.name, f"{stage.images / 1e6:,.1f} M", rate, *_hours(stage.gpu_hours, prices)])
        sources.append(f"{stage.config.name}: {stage.measured.source if stage.measured else NOT_MEASURED}")
    images = f"{sum(stage.images for stage in stages) / 1e6:,.1f} M"
    measured = [stage for stage in stages if stage.measured]
    total = sum(stage.gpu_hours for stage in measured)
    cells.append(["the recipe", images, "", *_hours(total if len(measured) == len(stages) else None, prices)])
    if 0 < len(measured) < len(stages):
        cells.append([f"the measured {len(measured)} of {len(stages)}", "", "", *_hours(total, prices)])
    return table(cells, markdown=False) + "\n\nMeasured rows:\n" + "\n".join(sources)


def _hours(gpu_hours: float | None, prices: Sequence[float]) -> list[str]:
    return [NOT_MEASURED if gpu_hours is None else f"{gpu_hours:,.1f}", *dollars(gpu_hours, prices)]


def set_table(sets: Sequence[SetTime], pictures: float, prices: Sequence[float]) -> str:
    cells = [["precompute", "pictures", "pictures/s a GPU", "GPU-hours", *(f"at ${price:g}" for price in prices)]]
    told = ["(images and captions once through their towers; no part of the recipe above)"]
    for found in sets:
        rate = NOT_MEASURED if found.problem else f"{found.written / found.seconds:,.0f}"
        hours = _hours(found.gpu_hours(pictures), prices)
        cells.append([f"{found.image_size} px", f"{pictures / 1e6:,.1f} M", rate, *hours])
        how = found.problem or f"{found.written:,} pictures in {found.seconds:,.0f} GPU-seconds"
        told.append(f"{found.image_size} px: {how}")
    return table(cells, markdown=False) + "\n" + "\n".join(told)


def node_table(stages: Sequence[Stage], device: str | None, prices: Sequence[float]) -> str:
    title = "On nodes of 8 GPUs: measured rate x predicted efficiency"
    if device is None or not all(stage.measured for stage in stages):
        return f"{title}: {NOT_MEASURED}, as the recipe is"
    if (machine := machine_of(device)) is None:
        return f"{title}: no data sheet of {device} to predict with"
    cells = [["nodes", "GPUs", "efficiency", "hours", "days", "GPU-hours", *(f"at ${price:g}" for price in prices)]]
    for nodes in NODES:
        gpus = nodes * GPUS_OF_A_NODE
        if (found := scaled(stages, gpus, machine)) is None:
            cells.append([str(nodes), str(gpus), "cannot share the batch"])
            continue
        hours, share = found
        row = [str(nodes), str(gpus), f"{share:.0%}", f"{hours:,.1f}", f"{hours / 24:,.2f}", f"{hours * gpus:,.0f}"]
        cells.append(row + dollars(hours * gpus, prices))
    note = "efficiency: of a GPU beside one alone; the global batch stays the recipe's, whatever the number of GPUs"
    return f"{title}\n\n{table(cells, markdown=False)}\n{note}"


def as_json(
    stages: Sequence[Stage], sets: Sequence[SetTime], device: str | None, args: argparse.Namespace, left_out: list[str]
) -> dict[str, Any]:
    """Hours, seconds, images per second; None for what was not measured."""
    machine = machine_of(device) if device and all(stage.measured for stage in stages) else None
    nodes = {nodes: scaled(stages, nodes * GPUS_OF_A_NODE, machine) for nodes in NODES} if machine else {}
    return {
        "device": device,
        "dollars_per_gpu_hour": args.dollars_per_gpu_hour,
        "stages": [
            {
                "recipe": stage.config.name,
                "images": stage.images,
                "images_per_second_and_gpu": stage.measured and stage.measured.rate,
                "gpu_hours": stage.gpu_hours,
                "row": stage.measured and stage.measured.source,
            }
            for stage in stages
        ],
        "gpu_hours": sum(stage.gpu_hours for stage in stages) if all(stage.measured for stage in stages) else None,
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


if __name__ == "__main__":
    cli.run(main)
