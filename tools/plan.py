"""Cost of a step on machines that are not here: memory, traffic, time and price of every layout, on paper.

    python tools/plan.py --micro_batch 256
    python tools/plan.py --recipe configs/res_256_pretrain.toml --gpus 64 --gpu h100
    python tools/plan.py --recipe configs/res_512_finetune.toml --gpus 16 --gpu a100 --activation_checkpointing block
    python tools/plan.py --gpus 8 --ds_config configs/zero3.json --json plan.json

First every layout of so many GPUs, fastest first: ZeRO 1 and 2 with expert parallelism (ep) or tensor parallelism (tp),
ZeRO 3. Then the fastest one at 8 to 1,024 GPUs, with the same global batch. Last, where a micro-batch's time goes on
one GPU. Everything is predicted, from the kernels that the model's own code would launch, and nothing is measured:
docs/planning.md has the formulas and what they assume.
"""

import argparse
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from mdit import cli
from mdit.config import TrainConfig, UserError, load_config
from mdit.costs import machines
from mdit.costs.layouts import Layout, candidates, layout_of
from mdit.costs.machines import MACHINES, Machine
from mdit.costs.prediction import Prediction, fitted, predict
from mdit.costs.time import PARTS, host_seconds
from mdit.costs.trace import training_flops
from mdit.files import write_json
from mdit.parallel.settings import Execution, load_ds_json

RECIPE = Path(__file__).resolve().parent.parent / "configs" / "res_256_pretrain.toml"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
CHECKPOINTING = ("none", "block", "selective")
NOTE = "predicted, not measured"
GIB, GB = 2**30, 1e9
COLUMNS = [  # of both tables, in groups
    ("", ["   batch"]),
    ("GiB on a GPU", [" weights", " grads", " optim", " activ", " buffer", "  peak"]),
    ("GB a GPU sends", [" NVLink", "   net"]),
    ("ms a step", [" compute", "   wait"]),
    ("", [" images/s", " effic", "    $/M"]),
]
LABEL = 22


def main(arguments: list[str] | None = None) -> None:
    cli.run(lambda: command(arguments))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.path, default=RECIPE, help=f"TOML, or a run's config.json; default: {RECIPE.name}")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipe")
    add("--gpus", type=cli.whole(1), default=8, help="in nodes of 8; default: 8")
    add("--gpu", choices=MACHINES, default="h100", help="default: h100")
    add("--ds_config", type=cli.path, help="plan this JSON's layout alone; default: all")
    add("--micro_batch", type=cli.whole(1), help="images at once; default: what a run takes, or fewer so that they fit")
    add("--activation_checkpointing", choices=CHECKPOINTING, help="default: none, or the JSON's")
    add("--kernels", choices=("auto", "reference", "triton"), help='default: the JSON\'s, or "auto"')
    add("--fp8", action="store_true", help="the blocks' matmuls in float8; default: the JSON's, or not")
    add("--dollars_per_gpu_hour", type=cli.positive, default=3.75, help="default: 3.75, as the paper has it")
    add("--json", type=cli.path, help="write both tables, with all they assume, to this file")
    return parser.parse_args(arguments)


def command(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config, machine = load_config(args.recipe, args.set), MACHINES[args.gpu]
    here = predictions(config, args.gpus, machine, args)
    dollars = args.dollars_per_gpu_hour
    nodes = f" ({-(-args.gpus // machine.gpus_per_node)} nodes)" if args.gpus > machine.gpus_per_node else ""
    batch = f"global batch {config.training.global_batch_size}"
    print(f"{config.name}, {batch}, on {args.gpus} {machine.name}{nodes}: {NOTE}\n\n{titles()}")
    for prediction in here:
        print(line(prediction, prediction.layout.label, dollars))
    print(f"\nthe fastest at 8 to 1,024 {machine.name}: {NOTE}; scaling: images/s of a GPU beside the first line's\n")
    sizes = best_of_sizes(config, machine, args)
    print(f"{titles()} scaling" if sizes else f"none of {', '.join(map(str, SIZES))} GPUs can share a {batch}")
    for prediction in sizes:
        scaling = rate_of_a_gpu(prediction) / rate_of_a_gpu(sizes[0])
        print(f"{line(prediction, f'{prediction.layout.gpus:>4} {prediction.layout.label}', dollars)}{scaling:>8.0%}")
    print("\n" + remarks([*here, *sizes], dollars))
    alone = on_one_gpu(config, machine, args)
    if alone:
        print("\n" + parts_table(config, machine, alone))
    if args.json is not None:
        write_json(args.json, report(config, machine, here, sizes, alone, dollars))


def predictions(config: TrainConfig, gpus: int, machine: Machine, args: argparse.Namespace) -> list[Prediction]:
    """Predictions for every layout that was asked for, those that fit first, fastest first."""
    found = [predict(config, layout, machine) for layout in layouts(config, gpus, machine, args)]
    return sorted(found, key=lambda p: (not p.fits, -p.images_per_second))


def layouts(config: TrainConfig, gpus: int, machine: Machine, args: argparse.Namespace) -> list[Layout]:
    kernels, checkpointing = args.kernels or "auto", args.activation_checkpointing
    if args.ds_config is None:
        triton = kernels == "triton" or (kernels == "auto" and machine.triton)
        options = {"micro_batch": args.micro_batch, "checkpointing": checkpointing or "none", "triton": triton}
        found = candidates(config, gpus, **options)
        if args.fp8:
            found = [replace(layout, fp8=True) for layout in found if layout.ep == layout.tp == 1]
            require_fp8(found[0], machine)
        return found if args.micro_batch else [fitted(config, layout, machine) for layout in found]
    from mdit.train.engine import check_ds_config  # with all of DeepSpeed, which nothing else here needs

    asked = {"activation_checkpointing": checkpointing, "kernels": args.kernels, "fp8": args.fp8 or None}
    asked = {key: value for key, value in asked.items() if value is not None}
    ds_json = load_ds_json(args.ds_config, mdit=asked, micro_batch=args.micro_batch)
    execution = Execution.resolve(ds_json, config, processes=gpus, bf16_works=True, path=args.ds_config)
    check_ds_config(execution.deepspeed, args.ds_config)
    kernels = execution.settings.kernels
    triton = kernels == "triton" or (kernels == "auto" and machine.triton)
    layout = layout_of(execution, config, gpus, triton=triton, path=args.ds_config)
    require_fp8(layout, machine)
    return [layout]


def require_fp8(layout: Layout, machine: Machine) -> None:
    if layout.fp8 and not (machine.fp8 and layout.triton):
        why = "with kernels in PyTorch" if machine.fp8 else f"on {machine.name}"
        raise UserError(f"float8 {why} is not what a run would take")


def best_of_sizes(config: TrainConfig, machine: Machine, args: argparse.Namespace) -> list[Prediction]:
    """The best of each size; sizes that cannot share the batch are left out."""
    best = []
    for gpus in SIZES:
        try:
            best.append(predictions(config, gpus, machine, args)[0])
        except UserError:
            continue
    return best


def on_one_gpu(config: TrainConfig, machine: Machine, args: argparse.Namespace) -> list[Prediction]:
    """The first layout that fits one GPU, in bfloat16 and, where a run could be, in float8; none where none fits."""
    try:
        found = [predict(config, layout, machine) for layout in layouts(config, 1, machine, args)]
    except UserError:
        return []
    layout = next((p for p in found if p.fits), found[0]).layout
    kinds = (False, True) if machine.fp8 and layout.triton else (False,)
    return [predict(config, replace(layout, fp8=fp8), machine) for fp8 in kinds]


def parts_table(config: TrainConfig, machine: Machine, found: list[Prediction]) -> str:
    """Milliseconds of a micro-batch by part, of each prediction a column."""
    layout = found[0].layout
    micro_batches = f"{layout.micro_batch} images, of which {layout.accumulation} make a step"
    head = f"where a micro-batch goes on one {machine.name}, {layout.label}: {micro_batches}; {NOTE}\n\n"
    lines = [head + cells("ms a micro-batch", ("float8" if p.layout.fp8 else "bfloat16" for p in found))]
    for part, title in PARTS.items():
        values = [1e3 * p.parts[part] / layout.accumulation for p in found]
        if any(values):
            lines.append(cells(title, (f"{value:.1f}" for value in values)))
    lines.append(cells("sum", (f"{1e3 * p.compute_seconds / layout.accumulation:.1f}" for p in found)))
    lines.append(cells("images/s", (f"{p.images_per_second:,.0f}" for p in found)))
    rates = [p.images_per_second * training_flops(config.model, config.training.mask_ratio) for p in found]
    mfu = (f"{rate / machine.peak:.1%}" if not p.layout.fp8 else "" for p, rate in zip(found, rates))
    lines.append(cells("MFU", mfu))
    host = (f"{1e3 * host_seconds(config, p.layout):.1f}" for p in found)
    return "\n".join([*lines, cells("the host meanwhile needs", host)])


def cells(title: str, values: Iterable[str]) -> str:
    return f"{title:50}{''.join(f'{value:>10}' for value in values)}".rstrip()


def remarks(shown: list[Prediction], dollars: float) -> str:
    """Meaning of the tables' signs, of those that are there."""
    lines = [
        "batch: images at once x micro-batches; peak: of the sum, as parts are not at their largest together;",
        f"net: between nodes of 8; effic: without waiting; $/M: of a million images at {dollars:g} a GPU-hour",
    ]
    if any(p.host_bytes for p in shown):
        most = max(p.host_bytes for p in shown) / GIB
        lines.append(f"host: masters, moments and gradients in host memory, up to {most:.1f} GiB of it for each GPU")
    if any(p.host_bound for p in shown):
        lines.append("h: bound by the host, which launches kernels more slowly than the GPU is done with them")
    if any(p.layout.reduced for p in shown):
        lines.append(
            "* fewer images at once than a run takes by itself, so that they fit: train_micro_batch_size_per_gpu"
        )
    if not all(p.fits for p in shown):
        lines.append(
            f"! more than the GPU has beside {machines.RESERVED_GIB:g} GiB; --activation_checkpointing block needs less"
        )
    return "\n".join(lines)


def rate_of_a_gpu(prediction: Prediction) -> float:
    return prediction.images_per_second / prediction.layout.gpus


def titles() -> str:
    names = ["".join(titles) for _, titles in COLUMNS]
    groups = [f"{group:^{len(name)}}" for (group, _), name in zip(COLUMNS, names)]
    return f"{'':{LABEL}}{' |'.join(groups).rstrip()}\n{'layout':{LABEL}}{' |'.join(names)}"


def line(p: Prediction, label: str, dollars: float) -> str:
    """Batch: images at once x micro-batches. A `!` behind what does not fit."""
    layout = p.layout
    cells = [f"{layout.micro_batch}{'*' if layout.reduced else ''}x{layout.accumulation}"]
    cells += [f"{value / GIB:.1f}" for value in asdict(p.memory).values()]
    cells += [f"{p.link_bytes / GB:.2f}", f"{p.network_bytes / GB:.2f}"]
    cells += [f"{p.compute_seconds * 1e3:.1f}{'h' if p.host_bound else ''}", f"{p.exposed_seconds * 1e3:.1f}"]
    cells += [f"{p.images_per_second:,.0f}", f"{p.efficiency:.0%}", f"{p.dollars_per_million_images(dollars):.2f}"]
    left = iter(cells)
    parts = ["".join(f"{next(left):>{len(title)}}" for title in titles) for _, titles in COLUMNS]
    parts[1] += "" if p.fits else "!"
    return f"{label:{LABEL}}{' |'.join(parts).replace('! |', '!|')}"


def report(
    config: TrainConfig,
    machine: Machine,
    here: list[Prediction],
    sizes: list[Prediction],
    alone: list[Prediction],
    dollars: float,
) -> dict:
    """Content of --json. Bytes, seconds, images per second; each of a GPU, but for images_per_second."""
    assumed = {name.lower(): value for name, value in vars(machines).items() if name.isupper() and name != "MACHINES"}
    return {
        "note": NOTE,
        "recipe": config.name,
        "machine": asdict(machine),
        "assumed": assumed | {"dollars_per_gpu_hour": dollars},
        "layouts": [described(prediction, dollars) for prediction in here],
        "sizes": [described(prediction, dollars) for prediction in sizes],
        "one_gpu": [described(prediction, dollars) for prediction in alone],
    }


def described(p: Prediction, dollars: float) -> dict:
    derived = {
        "label": p.layout.label,
        "compute_seconds": p.compute_seconds,
        "host_bound": p.host_bound,
        "step_seconds": p.step_seconds,
        "images_per_second": p.images_per_second,
        "efficiency": p.efficiency,
        "dollars_per_million_images": p.dollars_per_million_images(dollars),
    }
    return asdict(p) | derived


if __name__ == "__main__":
    main()
