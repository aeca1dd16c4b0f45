"""Bring your own baseline: it and our model train in one process, on the same device and data, and ratios are printed.

    python tools/compare_baseline.py --baseline FILE.py:FACTORY --out DIR
    python tools/compare_baseline.py --baseline FILE.py:FACTORY --preset tiny_2 --micro_batch 8 --modes eager
    python tools/compare_baseline.py --expert_layer 1024 --preset tiny_2

FILE.py is run with its folder on Python's path. FACTORY() gives a torch.nn.Module with float32 weights; where it has an
argument without a default, it is handed our ModelConfig (mdit.config). The module is called as

    model(latents_NCHW, sigma_N, captions_NLC, mask_ratio) -> output_NCHW, or (output_NCHW, dropped_NT)

    latents_NCHW   c_in * (x + sigma * noise): noisy and scaled already, float32 (in pure bfloat16 that)
    sigma_N        float32, the noise level itself: the model makes its own conditioning (EDM's is ln(sigma) / 4)
    captions_NLC   embeddings of L tokens, all zeros where a caption was dropped; dtype as the latents
    mask_ratio     the share of the T patches that the model drops, by its own random choice
    output_NCHW    F of EDM's D = c_skip * x + c_out * F, which the tool computes
    dropped_NT     1 where a patch was dropped, row by row: the loss is taken on the others. Without it, on all

Both take the same plain step: loss, backward, gradient clipping, torch's fused AdamW, no ZeRO. Theirs is compiled
whole, ours block by block, as a run does it. First both at --micro_batch, in every mode, then each at its own best,
found by doubling. Precision: fp32 on a CPU; on a GPU ours has bfloat16 weights with float32 masters, theirs float32
weights under torch.autocast (amp, as the released code trains) or the same as ours (--baseline_precision pure). TFLOP/s
and MFU count our model's FLOPs for both. OUT/baseline.json has a row for everything measured (mdit.bench.row), written
as it comes. With --expert_layer: our layers of experts against the one-hot form, alone.
"""

import argparse
import copy
import inspect
import runpy
import statistics
import sys
from functools import partial
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from mdit import cli
from mdit.bench.baseline import BASELINE, OURS, PACES, PRECISIONS, Baseline, BaselineComparison, Contender
from mdit.bench.report import table
from mdit.bench.timing import median_milliseconds
from mdit.config import CONFIGS, ModelConfig, TrainConfig, UserError, kept_tokens, load_config
from mdit.dist import world_from_env
from mdit.documents import brief
from mdit.files import try_to_write
from mdit.kernels.selection import choose_kernels
from mdit.models import MicroDiT, meta_model, presets
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.fuse import fuse
from mdit.parallel.settings import AUTO_TOKENS

MODES = ("eager", "compiled")
CPU_MICRO_BATCH = 8
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config, world = resolve(args), world_from_env()
    precision = args.precision or ("bf16" if world.device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rounds = args.rounds or PACES[world.device.type].rounds
    kernels, why = choose_kernels(args.kernels, world.device, dtype, config.model.head_dim, "--kernels")
    if args.expert_layer is not None:
        model = with_tokens(config.model, args.expert_layer)
        return compare_expert_layers(model, args.micro_batch or 1, world.device, dtype, rounds)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        try_to_write(args.out / "baseline.json")
    theirs = precision if precision == "fp32" else {"amp": "amp", "pure": "bf16"}[args.baseline_precision]
    model = load_baseline(args.baseline, config.model)
    baseline = Baseline(f"--baseline {args.baseline}", model, config, world.device, theirs)
    baseline.check()
    torch.manual_seed(config.seed)
    ours = Contender(OURS, fuse(MicroDiT(config.model)), config, world.device, precision)
    print(f"ours: {PRECISIONS[ours.precision]}; in Triton: {', '.join(sorted(kernels)) or 'nothing'} ({why})")
    print(f"baseline: {args.baseline}, {PRECISIONS[baseline.precision]}")
    options = {name: getattr(args, name) for name in ("micro_batch", "max_micro_batch", "modes", "budget_s", "out")}
    BaselineComparison({OURS: ours, BASELINE: baseline}, world, sorted(kernels), rounds=rounds, **options).run()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--baseline", metavar="FILE.py:FACTORY", help="what gives the other model")
    add("--recipe", type=Path, default=CONFIGS / "res_256_pretrain.toml", help="default: configs/res_256_pretrain.toml")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one key of the recipe")
    add("--preset", choices=("xl_2", "tiny_2"), help="this model instead of the recipe's")
    add("--mask_ratio", type=float, help="instead of the recipe's")
    add(
        "--micro_batch",
        type=cli.whole(1),
        help=f"of the first pairings; default: {AUTO_TOKENS} kept tokens, on a CPU 8 images",
    )
    add("--max_micro_batch", type=cli.whole(1), help="where the search ends; default: 2048, on a CPU --micro_batch")
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--precision", choices=("bf16", "fp32"), help="default: bf16, on a CPU fp32")
    add("--baseline_precision", choices=("amp", "pure"), default="amp", help="of the baseline in bf16; default: amp")
    add("--kernels", choices=("auto", "reference", "triton"), default="auto", help="of our model; default: auto")
    add("--rounds", type=cli.whole(1), help="turns of each; default: 3, on a CPU 5")
    add("--out", type=Path, metavar="DIR", help="for baseline.json")
    add("--budget_s", type=cli.positive, default=480.0, help="nothing begins that would not end in time; default: 480")
    add(
        "--expert_layer",
        type=cli.whole(1),
        metavar="TOKENS",
        help="expert layers against their one-hot form, no baseline",
    )
    args = parser.parse_args(arguments)
    if (args.baseline is None) == (args.expert_layer is None):
        parser.error("expected --baseline FILE.py:FACTORY, or --expert_layer TOKENS")
    return args


def resolve(args: argparse.Namespace) -> TrainConfig:
    """The recipe as the options change it; `--micro_batch` and `--max_micro_batch` too."""
    overrides = [*args.set] + ([] if args.mask_ratio is None else [f"training.mask_ratio={args.mask_ratio}"])
    config = load_config(args.recipe, overrides)
    if args.preset:
        config = config.model_copy(update={"model": getattr(presets, args.preset)(config.model.latent_size)})
    on_gpu = torch.cuda.is_available()
    if args.expert_layer is None:
        kept = kept_tokens(config.model.num_patches, config.training.fixed_mask_ratio)
        args.micro_batch = args.micro_batch or (max(1, AUTO_TOKENS // kept) if on_gpu else CPU_MICRO_BATCH)
        args.max_micro_batch = args.max_micro_batch or (2048 if on_gpu else args.micro_batch)
    return config


def with_tokens(model: ModelConfig, tokens: int) -> ModelConfig:
    """The same layers on an image of so many patches."""
    if isqrt(tokens) ** 2 != tokens:
        raise UserError(f"--expert_layer {tokens}: expected the tokens of a square image, as 256 or 1024")
    return model.model_copy(update={"latent_size": isqrt(tokens) * model.patch_size})


def compare_expert_layers(
    config: ModelConfig, images: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> None:
    """Print, for every width of the model's expert layers, what moving tokens by index spares: medians of `repeats`.

    Both forms multiply the chosen tokens by the experts' matrices. One-hot adds 8 T / 12 F of their FLOPs to move the
    tokens (T tokens of an image, F the experts' width), so narrow layers and large images gain the most.
    """
    experts = [(name, part) for name, part in meta_model(config).named_modules() if isinstance(part, ExpertChoiceMoE)]
    lines = [["layer of experts", "forward, by index ms", "one-hot ms", "ratio"]]
    lines[0] += ["forward and backward, by index ms", "one-hot ms", "ratio"]
    for (place, shape), part in {(name.split(".")[0], part.w1.shape): part for name, part in experts}.items():
        layer = copy.deepcopy(part).to_empty(device=device).to(dtype)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        x_NTD = torch.randn(images, config.num_patches, shape[1], device=device, dtype=dtype, requires_grad=True)
        forms = (fuse(copy.deepcopy(layer)), layer)
        lines.append([f"{place}, T = {config.num_patches}, F = {shape[2]}"])
        for work in (nn.Module.__call__, forward_and_backward):
            calls = [partial(work, form, x_NTD) for form in forms]
            turns = [[median_milliseconds(call, device, repeats=1) for call in calls] for _ in range(1 + repeats)]
            ours, theirs = map(statistics.median, zip(*turns[1:]))  # the first turn warms up
            lines[-1] += [f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.2f}"]
    print(table(lines))


def forward_and_backward(layer: nn.Module, x_NTD: Tensor) -> None:
    output = layer(x_NTD)
    torch.autograd.grad(output, (x_NTD, *layer.parameters()), torch.ones_like(output))


def load_baseline(spec: str, model: ModelConfig) -> nn.Module:
    """The model that FACTORY of FILE.py makes. Raises UserError, naming both, for whatever is wrong with them."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not path.is_file():
        raise UserError(f"--baseline {spec}: no such file: {file or spec}; expected FILE.py:FACTORY")
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        factory = runpy.run_path(file).get(name)
    except Exception as error:  # of code that is not ours
        raise UserError(f"--baseline {spec}: running {path} raised {brief(error)}") from None
    if not callable(factory):
        raise UserError(f"--baseline {spec}: {path} has no function {name}")
    parameters = inspect.signature(factory).parameters.values()
    required = any(p.default is p.empty and p.kind in POSITIONAL for p in parameters)
    try:
        made = factory(model) if required else factory()
    except Exception as error:
        raise UserError(f"--baseline {spec}: {name} raised {brief(error)}") from None
    if not isinstance(made, nn.Module):
        raise UserError(f"--baseline {spec}: {name} gave {type(made).__name__}, expected a torch.nn.Module")
    return made


if __name__ == "__main__":
    cli.run(main)
