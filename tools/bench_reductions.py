"""Cost of sums in float32: matmuls of a micro-batch's weight gradients, with cuBLAS free to reduce in bfloat16 and not.

    python tools/bench_reductions.py --out bench
    python tools/bench_reductions.py --recipe configs/res_512_pretrain.toml --micro_batch 64

torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction lets cuBLAS add the parts of a product that it splits
along its rows (16,384 to 65,536 for a weight) in bfloat16; training does not (mdit/dist.py). Each matmul is timed both
ways, with its error against float32. OUT/reductions.json holds the rows. On a CPU, or with --tiny, tiny shapes show
that this works.
"""

from typing import Any

import torch
from torch import Tensor

from mdit import cli
from mdit.bench.report import environment, table
from mdit.bench.stages import tiny_form
from mdit.bench.timing import median_milliseconds, relative_error
from mdit.config import CONFIGS, load_config
from mdit.costs.trace import Form, Product, trace
from mdit.dist import settle_numerics
from mdit.files import try_to_write, write_json

SCHEMA = "mdit-reductions/1"
SHAPE = ("matrices", "outputs", "inputs", "rows")
WAYS = ("reduced", "exact")  # sums


def main(arguments: list[str] | None = None) -> None:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.path, default=CONFIGS / "res_256_pretrain.toml", help="default: the first stage")
    add("--micro_batch", type=cli.whole(1), default=256)
    add("--repeats", type=cli.whole(1), default=10)
    add("--out", type=cli.path, metavar="DIR", help="for reductions.json")
    add("--tiny", action="store_true", help="tiny shapes; always so where there is no GPU")
    args = parser.parse_args(arguments)
    settle_numerics()  # as training does, all but what is compared
    gpu = torch.cuda.is_available()
    config = load_config(args.recipe)
    if args.tiny or not gpu:
        config, args.micro_batch, args.tiny = tiny_form(config), 2, True
    device = torch.device("cuda" if gpu else "cpu")
    ratio, here = config.training.fixed_mask_ratio, environment(device)
    settings = {"recipe": config.name, "micro_batch": args.micro_batch, "mask_ratio": ratio, "tiny": args.tiny}
    report: dict[str, Any] = {"schema": SCHEMA, "environment": here.model_dump(), "settings": settings, "rows": []}
    path = args.out and args.out / "reductions.json"
    if path:
        args.out.mkdir(parents=True, exist_ok=True)
        try_to_write(path)
    print(f"{here}, {', '.join(f'{name} {value}' for name, value in settings.items())}", flush=True)
    lines: list[list[Any]] = [["calls", *SHAPE, "bf16 ms", "error", "fp32 ms", "error"]]
    calls = trace(config.model, ratio, Form(triton=False)).weight_gradients(args.micro_batch)
    for product, count in sorted(calls.items(), key=lambda item: -item[0].flops * item[1]):
        row = {"calls": count} | measure(product, device, args.repeats)
        report["rows"].append(row)
        lines.append([count, *(row[name] for name in SHAPE)])
        for way in WAYS:
            lines[-1] += [f"{row[way]['ms']:.4f}", f"{row[way]['error']:.1e}"]
        if path:
            write_json(path, report)
    print(table(lines, markdown=False))
    totals = [sum(row["calls"] * row[way]["ms"] for row in report["rows"]) for way in WAYS]
    print(f"a micro-batch: {totals[0]:.2f} ms reduced in bfloat16, {totals[1]:.2f} ms in float32")


def measure(product: Product, device: torch.device, repeats: int) -> dict[str, Any]:
    """The row of a weight's gradient, y^T x over all rows of a micro-batch, of each expert for itself."""
    matrices, outputs, inputs, rows, _ = product
    torch.manual_seed(0)
    x = torch.randn(matrices, rows, inputs, device=device, dtype=torch.bfloat16)
    y = torch.randn(matrices, rows, outputs, device=device, dtype=torch.bfloat16)

    def gradient(x: Tensor = x, y: Tensor = y) -> Tensor:
        return x.mT @ y if matrices > 1 else (x[0].mT @ y[0])[None]

    exact = gradient(x.float(), y.float())
    found: dict[str, Any] = dict(zip(SHAPE, product))
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    for way in WAYS:
        settings.allow_bf16_reduced_precision_reduction = way == "reduced"
        error = relative_error(gradient(), exact)  # and the first call
        found[way] = {"ms": median_milliseconds(gradient, device, repeats), "error": error}
    settings.allow_bf16_reduced_precision_reduction = before
    return found


if __name__ == "__main__":
    cli.run(main)
