"""Cost of a step on machines that are not here: memory, traffic, time and price of every layout, on paper.

    python tools/plan.py --micro_batch 256
    python tools/plan.py --recipe configs/res_256_pretrain.toml --gpus 64 --gpu h100
    python tools/plan.py --recipe configs/res_512_finetune.toml --gpus 16 --gpu a100 --activation_checkpointing block
    python tools/plan.py --gpus 8 --ds_config configs/zero3.json --json plan.json
    python tools/plan.py --stages configs/micro_budget.toml

First every layout of so many GPUs, fastest first: ZeRO 1 and 2 with expert parallelism (ep) or tensor parallelism (tp),
ZeRO 3. Then the fastest one at 8 to 1,024 GPUs, with the same global batch. Last, where a micro-batch's time goes on
one GPU. With --stages instead hours and dollars of each stage, in its fastest layout. Everything is predicted, from the
kernels that the model's own code would launch, and nothing is measured: docs/planning.md has the formulas and what they
assume.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, get_args

from mdit import cli
from mdit.bench.report import table
from mdit.config import CONFIGS, TrainConfig, UserError, load_config
from mdit.costs import machines
from mdit.costs.layouts import Layout, candidates, layout_of
from mdit.costs.machines import MACHINES, Machine
from mdit.costs.prediction import Prediction, fitted, predict
from mdit.costs.time import PARTS, host_seconds
from mdit.costs.trace import mean_training_flops
from mdit.files import try_to_write, write_json
from mdit.masking import constant_parts
from mdit.parallel.settings import Checkpointing, Execution, load_ds_json
from mdit.stages import load_stages

RECIPE = CONFIGS / "res_256_pretrain.toml"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
NOTE = "predicted, not measured"
GIB, GB, HOUR = 2**30, 1e9, 3600
HEAD = ["layout", "batch", "weights", "grads", "optim", "activ", "buffer", "peak", "NVLink", "net", "compute", "wait"]
HEAD += ["images/s", "effic", "$/M"]
UNITS = ["", "", *["GiB"] * 6, "GB", "GB", "ms", "ms", "", "", ""]
HOST_BOUND = "h: bound by the host, which launches kernels more slowly than the GPU is done with them"
FEWER = "* fewer images at once than a run takes by itself, so that they fit: train_micro_batch_size_per_gpu"
TOO_LARGE = f"! more than the GPU has beside {machines.RESERVED_GIB:g} GiB; --activation_checkpointing block needs less"
DERIVED = ("compute_seconds", "host_bound", "step_seconds", "images_per_second", "efficiency")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.json:
        try_to_write(args.json)
    machine, dollars = MACHINES[args.gpu], args.dollars_per_gpu_hour
    name, tables = (stage_tables if args.stages else layout_tables)(machine, args)
    if args.json:
        write_json(args.json, report(name, machine, tables, dollars))


def layout_tables(machine: Machine, args: argparse.Namespace) -> tuple[str, dict[str, list[Prediction]]]:
    """Print a recipe's layouts. -> its name, and what was printed."""
    config, dollars = load_config(args.recipe or RECIPE, args.set), args.dollars_per_gpu_hour
    here = predictions(config, machine, args, args.gpus)
    nodes = f" ({-(-args.gpus // machine.gpus_per_node)} nodes)" if args.gpus > machine.gpus_per_node else ""
    batch = f"global batch {config.training.global_batch_size}"
    print(f"{config.name}, {batch}, on {args.gpus} {machine.name}{nodes}: {NOTE}\n")
    print(table([HEAD, UNITS, *([p.layout.label, *cells(p, dollars)] for p in here)], markdown=False))
    print(f"\nthe fastest at 8 to 1,024 {machine.name}: {NOTE}; scaling: images/s of a GPU beside the first line's\n")
    sizes = best_of_sizes(partial(predictions, config, machine, args))
    rates = [p.images_per_second / p.layout.gpus for p in sizes]
    lines = [
        [f"{p.layout.gpus:>4} {p.layout.label}", *cells(p, dollars), f"{rate / rates[0]:.0%}"]
        for p, rate in zip(sizes, rates)
    ]
    none = f"none of {', '.join(map(str, SIZES))} GPUs can share a {batch}"
    print(table([[*HEAD, "scaling"], UNITS, *lines], markdown=False) if lines else none)
    print("\n" + remarks([*here, *sizes], dollars))
    alone = on_one_gpu(config, machine, partial(layouts, config, machine, args))
    if alone:
        print("\n" + parts_table(config, machine, alone))
    return config.name, {"layouts": here, "sizes": sizes, "one_gpu": alone}


def stage_tables(machine: Machine, args: argparse.Namespace) -> tuple[str, dict[str, list[Prediction]]]:
    """Print what each of several stages takes in its fastest layout, and their sum. -> as `layout_tables`."""
    file, price = load_stages(args.stages), args.dollars_per_gpu_hour
    found = [(stage.config, predictions(stage.config, machine, args, args.gpus)[0]) for stage in file.stages]
    rows, sums = [["stage", *HEAD, "images", "GPU-hours", "$"], ["", *UNITS, "M", "", ""]], [0.0, 0.0]
    for config, p in found:
        images = config.training.num_steps * config.training.global_batch_size
        hours = images / p.images_per_second / HOUR * args.gpus
        sums = [sums[0] + images, sums[1] + hours]
        rows.append([config.name, p.layout.label, *cells(p, price), *amounts(images, hours, price)])
    rows.append(["sum", *[""] * len(HEAD), *amounts(*sums, price)])
    print(f"{file.name} on {args.gpus} {machine.name}: {NOTE}\n\n{table(rows, markdown=False)}")
    print("\n" + remarks([p for _, p in found], price))
    return file.name, {"stages": [p for _, p in found]}


def amounts(images: float, gpu_hours: float, price: float) -> list[str]:
    return [f"{images / 1e6:,.1f}", f"{gpu_hours:,.1f}", f"{gpu_hours * price:,.0f}"]


def predictions(config: TrainConfig, machine: Machine, args: argparse.Namespace, gpus: int) -> list[Prediction]:
    """Predictions of the layouts that were asked for, those that fit first, fastest first."""
    found = [predict(config, layout, machine) for layout in layouts(config, machine, args, gpus)]
    return sorted(found, key=lambda p: (not p.fits, -p.images_per_second))


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--recipe", type=cli.path, help=f"TOML, or a run's config.json; default: {RECIPE.name}")
    what.add_argument("--stages", type=cli.path, help="TOML of several recipes, as configs/micro_budget.toml")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipe")
    add("--gpus", type=cli.whole(1), default=8, help="in nodes of 8; default: 8")
    add("--gpu", choices=MACHINES, default="h100", help="default: h100")
    add("--ds_config", type=cli.path, help="plan this JSON's layout alone; default: all")
    add("--micro_batch", type=cli.whole(1), help="images at once; default: what a run takes, or fewer so that they fit")
    add("--activation_checkpointing", choices=get_args(Checkpointing), help="default: none, or the JSON's")
    add("--kernels", choices=("auto", "reference", "triton"), help='default: the JSON\'s, or "auto"')
    add("--fp8", action="store_true", help="the blocks' matmuls in float8; default: the JSON's, or not")
    add("--dollars_per_gpu_hour", type=cli.positive, default=3.75, help="default: 3.75, as the paper has it")
    add("--json", type=cli.path, help="write the tables, with all they assume, to this file")
    args = parser.parse_args(arguments)
    if args.stages and args.set:
        parser.error("--set changes one recipe; the stages' changes are in their file")
    return args


def layouts(config: TrainConfig, machine: Machine, args: argparse.Namespace, gpus: int) -> list[Layout]:
    """The layouts of `gpus` that the command line asks for."""

    def triton(kernels: str) -> bool:
        return kernels == "triton" or (kernels == "auto" and machine.triton)

    if args.ds_config is None:
        options = {"checkpointing": args.activation_checkpointing or "none", "triton": triton(args.kernels or "auto")}
        found = candidates(config, gpus, micro_batch=args.micro_batch, **options)
        if args.fp8:
            found = [replace(layout, fp8=True) for layout in found if layout.ep == layout.tp == 1]
            require_fp8(found[0], machine)
        return found if args.micro_batch else [fitted(config, layout, machine) for layout in found]
    from mdit.train.engine import check_ds_config  # with all of DeepSpeed, which nothing else here needs

    path, asked = args.ds_config, {name: getattr(args, name) for name in ("activation_checkpointing", "kernels")}
    mdit = {key: value for key, value in (asked | {"fp8": args.fp8}).items() if value}
    ds_json = load_ds_json(path, mdit=mdit, micro_batch=args.micro_batch)
    execution = Execution.resolve(ds_json, config, processes=gpus, bf16_works=True, path=path)
    check_ds_config(execution.deepspeed, path)
    layout = layout_of(execution, config, gpus, triton=triton(execution.settings.kernels), path=path)
    require_fp8(layout, machine)
    return [layout]


def require_fp8(layout: Layout, machine: Machine) -> None:
    if layout.fp8 and not (machine.fp8 and layout.triton):
        why = "with kernels in PyTorch" if machine.fp8 else f"on {machine.name}"
        raise UserError(f"float8 {why} is not what a run would take")


def best_of_sizes(predictions: Callable[[int], list[Prediction]]) -> list[Prediction]:
    """The best of each size; sizes that cannot share the batch are left out."""
    best = []
    for gpus in SIZES:
        try:
            best.append(predictions(gpus)[0])
        except UserError:
            continue
    return best


def on_one_gpu(config: TrainConfig, machine: Machine, layouts_on: Callable[[int], list[Layout]]) -> list[Prediction]:
    """The first layout that fits one GPU, in bfloat16 and, where a run could be, in float8; none where none fits."""
    try:
        found = [predict(config, layout, machine) for layout in layouts_on(1)]
    except UserError:
        return []
    layout = next((p for p in found if p.fits), found[0]).layout
    kinds = (False, True) if machine.fp8 and layout.triton else (False,)
    return [predict(config, replace(layout, fp8=fp8), machine) for fp8 in kinds]


def parts_table(config: TrainConfig, machine: Machine, found: list[Prediction]) -> str:
    """Milliseconds of a micro-batch by part, of each prediction a column."""
    layout, flops = found[0].layout, mean_training_flops(config)
    micro_batches = f"{layout.micro_batch} images, of which {layout.accumulation} make a step"
    head = f"where a micro-batch goes on one {machine.name}, {layout.label}: {micro_batches}; {NOTE}\n\n"

    def launching(layout: Layout) -> float:
        return sum(share * host_seconds(each, layout) for share, each in constant_parts(config))

    def ms(title: str, seconds: Iterable[float]) -> list[str]:
        return [title, *(f"{1e3 * each / layout.accumulation:.1f}" for each in seconds)]

    rates = [p.images_per_second * flops / machine.peak for p in found]
    lines = [
        ["ms a micro-batch", *("float8" if p.layout.fp8 else "bfloat16" for p in found)],
        *(
            ms(title, (p.parts[part] for p in found))
            for part, title in PARTS.items()
            if any(p.parts[part] for p in found)
        ),
        ms("sum", (p.compute_seconds for p in found)),
        ["images/s", *(f"{p.images_per_second:,.0f}" for p in found)],
        ["MFU", *("" if p.layout.fp8 else f"{rate:.1%}" for p, rate in zip(found, rates))],
        ["the host meanwhile needs", *(f"{1e3 * launching(p.layout):.1f}" for p in found)],
    ]
    return head + table(lines, markdown=False)


def remarks(shown: Sequence[Prediction], dollars: float) -> str:
    """Meaning of the tables' columns and of those signs that are there."""
    most = max(p.host_bytes for p in shown) / GIB
    lines = [
        "batch: images at once x micro-batches; peak: of the sum, as parts are not at their largest together;",
        "GiB on a GPU; GB that a GPU sends, net: between nodes of 8; ms of a step; effic: without waiting;",
        f"$/M: of a million images at {dollars:g} a GPU-hour",
    ]
    signs = {
        f"Newton-Schulz for Muon: {shown[0].muon_seconds / shown[0].step_seconds:.1%} of the first line's step, and at "
        f"most {max(p.muon_seconds / p.step_seconds for p in shown):.1%}": any(p.muon_seconds for p in shown),
        f"host: masters, moments and gradients in host memory, up to {most:.1f} GiB of it for each GPU": most > 0,
        HOST_BOUND: any(p.host_bound for p in shown),
        FEWER: any(p.layout.reduced for p in shown),
        TOO_LARGE: not all(p.fits for p in shown),
    }
    return "\n".join([*lines, *(line for line, is_there in signs.items() if is_there)])


def cells(p: Prediction, dollars: float) -> list[str]:
    """A line under HEAD, but for its label. A `!` behind what does not fit."""
    layout, memory = p.layout, [f"{value / GIB:.1f}" for value in asdict(p.memory).values()]
    found = [f"{layout.micro_batch}{'*' if layout.reduced else ''}x{layout.accumulation}", *memory]
    found[-1] += "" if p.fits else "!"
    found += [f"{p.link_bytes / GB:.2f}", f"{p.network_bytes / GB:.2f}"]
    found += [f"{p.compute_seconds * 1e3:.1f}{'h' if p.host_bound else ''}", f"{p.exposed_seconds * 1e3:.1f}"]
    found += [f"{p.images_per_second:,.0f}", f"{p.efficiency:.0%}", f"{p.dollars_per_million_images(dollars):.2f}"]
    return found


def report(name: str, machine: Machine, tables: dict[str, list[Prediction]], dollars: float) -> dict:
    """Content of --json. Bytes, seconds, images per second; each of a GPU, but for images_per_second."""

    def described(p: Prediction) -> dict[str, Any]:
        derived = {name: getattr(p, name) for name in DERIVED}
        derived |= {"label": p.layout.label, "dollars_per_million_images": p.dollars_per_million_images(dollars)}
        layout = asdict(p.layout) | {"bf16": True, "options": p.layout.options.model_dump()}
        return asdict(p) | {"layout": layout} | derived

    assumed = {name.lower(): value for name, value in vars(machines).items() if name.isupper() and name != "MACHINES"}
    return {
        "note": NOTE,
        "recipe": name,
        "machine": asdict(machine),
        "assumed": assumed | {"dollars_per_gpu_hour": dollars},
        **{key: list(map(described, found)) for key, found in tables.items()},
    }


if __name__ == "__main__":
    cli.run(main)
