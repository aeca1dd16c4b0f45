"""Time that the kernels save: every op of a training step, at every shape of the paper's stages, against PyTorch.

    python tools/bench_kernels.py --out bench
    python tools/bench_kernels.py --out bench --resume --budget_s 570

`eager` is the op's reference, `compile` torch.compile of it for that very shape, `triton` the kernels. Beside them:
scaled_dot_product_attention alone on q and k that are normalised already (`flash`, `cudnn`, `efficient`). Of float8's
matmuls (`fp8_linear`; largest and smallest of a stage) `eager` and `compile` are the same matmuls in the computing
dtype, and `triton` is float8 with its quantisation. Times are medians in milliseconds, forward / forward and backward,
with the L2 cache full of what nobody needs before every repetition (read, so that nothing is left to be written back)
and the host ahead of the GPU. The rate is that of the bytes an op must move, or the FLOPs it must do, in the kernels'
forward and backward (kernels/cost.py); its ceiling is what a large copy or matmul reaches in the same run. The
error is the largest relative error (by norm) of outputs and gradients, of the kernels against the op's reference.

The largest row of every op comes first, then those of the largest share of a step. OUT/kernels.json (its rows:
mdit/bench/kernel_report.py) and OUT/kernels.md are written after every row, and --resume goes on with what is missing.
Without a GPU, or with --tiny, tiny shapes show that all this works.
"""

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mdit import cli
from mdit.bench.kernel_report import HEAD, MAIN, KernelReport, KernelRow, Times
from mdit.bench.report import environment
from mdit.bench.row import NOT_MEASURED
from mdit.bench.timing import median_milliseconds, relative_error
from mdit.config import ModelConfig, UserError
from mdit.costs.calls import STAGES, KernelCall, kernel_calls
from mdit.dist import settle_numerics
from mdit.documents import brief
from mdit.kernels import dispatch, expert_choice, patch_mixing, swiglu
from mdit.kernels.self_check import is_lost
from mdit.models import presets

START = time.monotonic()
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WITHOUT_FP8 = {
    "fp8_linear.fp8_add_norm_modulate": lambda *given: patch_mixing.add_norm_modulate(*given[:6], 1e-6, given[6]),
    "fp8_linear.fp8_linear": F.linear,
    "fp8_linear.fp8_swiglu": lambda x, w, bias, w3, bias3: swiglu.swiglu_linear(F.linear(x, w, bias), w3, bias3),
    "fp8_linear.fp8_experts": lambda x, w1, w2, *routing: routed(x, w1, w2, expert_choice.Routing(*routing)),
}
CONTENDERS = (*MAIN, *BACKENDS)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP = 3
TINY = dict(dim=64, depth=3, head_dim=32, mixer_depth=2, mixer_dim=32, multiple_of=32, caption_length=7, num_experts=4)


class Bench(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    repeats: int
    interpret: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def milliseconds(self, function: Callable) -> float:
        return median_milliseconds(function, self.device, self.repeats)


class Contender(NamedTuple):
    function: Callable
    in_triton: bool = False
    prepare: Callable[[list], list] = list  # what it gets of the call's inputs


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    settle_numerics()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        print("no GPU here: tiny shapes on the CPU, without what only a GPU can tell")
        args.tiny = True
    dtype = args.dtype or ("bf16" if gpu else "fp32")
    bench = Bench(torch.device("cuda" if gpu else "cpu"), DTYPES[dtype], args.repeats, args.interpret)
    calls, rows = rows_of(args, bench.dtype)
    report = KernelReport(
        environment=environment(bench.device),
        settings={"dtype": dtype, "preset": "tiny" if args.tiny else args.preset, "repeats": args.repeats},
        ceilings=ceilings(bench),
        rows=rows,
    )
    print(report.environment, report.settings, report.ceilings, sep="\n")
    if args.resume:
        report.take_over(args.out / "kernels.json")
    save = partial(report.save, args.out) if args.out else lambda: None
    save()
    print(" | ".join(HEAD))
    longest = 0.0
    for row in report.to_measure():
        began = time.monotonic()
        if began + longest - START > args.budget_s:
            break
        measured, error = measure_row(calls[row.key], args.contenders, bench)
        measured_row = row.model_copy(update={"measured": measured, "error": error})
        report.rows[report.rows.index(row)] = measured_row
        longest = max(longest, time.monotonic() - began)
        print(" | ".join(measured_row.cells(report.ceilings)), flush=True)
        save()
        if is_lost(bench.device):  # a kernel that wrote where it must not ends every other one too
            raise UserError(f"the GPU is lost to this process since {row.op} {row.label}; go on with --resume")
    print("\n" + report.summary())


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="directory of kernels.json and kernels.md; else only the screen")
    add("--resume", action="store_true", help="keep the rows that OUT holds, measure the others")
    add("--budget_s", type=cli.positive, help="seconds for all; default: 270, on a CPU 50")
    add("--micro_batch", type=cli.whole(1), nargs="+", help="for every stage; default: 256, 64, 64 and 16")
    add("--preset", choices=("xl_2", "tiny_2"), default="xl_2")
    add("--dtype", choices=DTYPES, help="default: bf16, on a CPU fp32")
    add("--ops", nargs="+", choices=dispatch.OPS, default=dispatch.OPS)
    add("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    add("--repeats", type=cli.whole(1), default=20)
    add("--tiny", action="store_true", help="tiny shapes; always so where there is no GPU")
    add("--interpret", action="store_true", help="without a GPU: the kernels' error, under TRITON_INTERPRET=1")
    args = parser.parse_args(arguments)
    if args.resume and args.out is None:
        parser.error("--resume: says nothing without --out")
    args.budget_s = args.budget_s or (270 if torch.cuda.is_available() else 50)
    if args.interpret and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") != "1"):
        parser.error("--interpret: is for a machine without a GPU, with TRITON_INTERPRET=1 set")
    return args


def rows_of(args: argparse.Namespace, dtype: torch.dtype) -> tuple[dict[str, KernelCall], list[KernelRow]]:
    """-> the call behind every row, by the row's key, and the rows: equal shapes once, nothing measured yet. Those of
    float8 belong to no stage, as they are another way of computing."""
    calls: dict[str, KernelCall] = {}
    rows: dict[str, KernelRow] = {}

    def add(call: KernelCall) -> dict[str, int]:
        cost = call.cost(dtype)
        costs = {"bytes": cost.forward_bytes + cost.backward_bytes, "flops": 3 * cost.flops}
        row = KernelRow(op=call.op, shape=call.shape, label=call.label, stages={}, **costs)
        calls.setdefault(row.key, call)
        return rows.setdefault(row.key, row).stages

    for name, (config, mask_ratio, default) in stages(args).items():
        for n in args.micro_batch or [default]:
            for call, count in kernel_calls(config, n, mask_ratio).items():
                if call.op.split(".")[0] in args.ops:
                    counts, stage = add(call), f"{name}, N {n}"
                    counts[stage] = counts.get(stage, 0) + count
            for op in WITHOUT_FP8 if "fp8_linear" in args.ops else ():
                same = [call for call in kernel_calls(config, n, mask_ratio, fp8=True) if call.op == op]
                for choose in (max, min) if same else ():
                    add(choose(same, key=lambda call: call.cost().flops))
    return calls, list(rows.values())


def stages(args: argparse.Namespace) -> dict[str, tuple[ModelConfig, float, int]]:
    if args.tiny:
        config = presets.tiny_2(8, **TINY)
        return {"tiny, mask 0.75": (config, 0.75, 4)}
    preset = getattr(presets, args.preset)
    return {name: (preset(latent_size), mask, n) for name, (latent_size, mask, n) in STAGES.items()}


def measure_row(call: KernelCall, wanted: list[str], bench: Bench) -> tuple[dict[str, Times | str], float | None]:
    """-> {contender: its numbers, or why there are none}, and the error of the kernels."""
    torch.compiler.reset()
    torch.manual_seed(0)
    found: dict[str, Times | str] = {}
    error = None
    inputs = call.inputs(bench.device, bench.dtype)
    for name, contender in contenders(call).items():
        if name not in wanted:
            continue
        context = dispatch.using(call.op.split(".")[0]) if contender.in_triton else dispatch.using()
        try:
            with context, sdpa_kernel(BACKENDS[name]) if name in BACKENDS else nullcontext():
                found[name] = measure(contender, inputs, bench, name)
            if name == "triton" and (bench.on_gpu or bench.interpret):
                error = error_of(call, inputs)
        except Exception as failure:  # whatever a compiler or driver may say: the other rows still count
            found[name] = f"failed: {brief(failure)}"
            if bench.on_gpu:
                torch.cuda.empty_cache()
    return found, error


def contenders(call: KernelCall) -> dict[str, Contender]:
    function = call.function

    def op(*inputs):
        return function(*inputs)

    plain = WITHOUT_FP8.get(call.op, op)
    found = {"eager": Contender(plain), "compile": Contender(torch.compile(plain, fullgraph=True, dynamic=False))}
    found["triton"] = Contender(op, in_triton=True)
    if "num_heads" in call.shape:
        packed = call.op == "masked_attention.self_attention"
        prepare = partial(normalised, packed=packed, heads=call.shape["num_heads"])
        alone = Contender(F.scaled_dot_product_attention, prepare=prepare)
        found |= dict.fromkeys(BACKENDS, alone)
    return found


def routed(x_NTD: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, routing: expert_choice.Routing) -> Tensor:
    hidden_EMF = torch.bmm(expert_choice.gather_tokens(x_NTD, routing), w1_EDF)
    return expert_choice.scatter_tokens(expert_choice.gelu_bmm(hidden_EMF, w2_EFD, routing.weights_NEK), routing)


def normalised(inputs: list[Tensor], packed: bool, heads: int) -> list[Tensor]:
    """q, k and v by heads, with the strides that the op hands to attention; from one tensor of all three where they are
    `packed`, else from q and one of k and v."""
    q, k, v = inputs[0].chunk(3, dim=-1) if packed else (inputs[0], *inputs[1].chunk(2, dim=-1))
    q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])
    return [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]


def measure(contender: Contender, inputs: list[Tensor | None], bench: Bench, name: str) -> Times | str:
    if not bench.on_gpu and (contender.in_triton or name in BACKENDS):
        return NOT_MEASURED
    forward, both = passes(contender, inputs)
    for _ in range(WARM_UP):
        both()
    forward_ms, both_ms, peak_mib = bench.milliseconds(forward), bench.milliseconds(both), None
    if bench.on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    return Times(forward_ms=forward_ms, both_ms=both_ms, peak_mib=peak_mib)


def passes(contender: Contender, inputs: list[Tensor | None]) -> tuple[Callable, Callable]:
    """-> forward, and forward and backward for fixed cotangents; both keep what backward needs, as in training."""
    leaves = [None if t is None else t.detach() for t in contender.prepare(inputs)]
    wanted = [t for t in leaves if t is not None and t.is_floating_point()]
    for leaf in wanted:
        leaf.requires_grad_()

    def forward() -> list[Tensor]:
        outputs = contender.function(*leaves)
        return [o for o in ([outputs] if isinstance(outputs, Tensor) else outputs) if o.is_floating_point()]

    cotangents = [torch.randn_like(o) for o in forward()]

    def both() -> list[Tensor]:
        outputs = forward()
        gradients = torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True)
        return [*outputs, *(g for g in gradients if g is not None)]

    return forward, both


def error_of(call: KernelCall, inputs: list[Tensor | None]) -> float:
    found = []
    for ops in ((call.op.split(".")[0],), ()):
        torch.manual_seed(0)  # the same cotangents
        with dispatch.using(*ops):
            found.append(passes(Contender(call.function), inputs)[1]())
    return max((relative_error(ours, theirs) for ours, theirs in zip(*found)), default=0.0)


def ceilings(bench: Bench) -> dict[str, float]:
    """Rates that a large copy (read and written bytes) and a large matmul reach here, now."""
    numbers, side = (2**30, 8192) if bench.on_gpu else (2**26, 1024)
    source = torch.randint(256, (numbers,), dtype=torch.uint8, device=bench.device)
    target, square = torch.empty_like(source), torch.randn(side, side, device=bench.device).to(bench.dtype)
    return {
        "GB/s": 2 * numbers / bench.milliseconds(lambda: target.copy_(source)) / 1e6,
        "TFLOP/s": 2 * side**3 / bench.milliseconds(lambda: square @ square) / 1e9,
    }


if __name__ == "__main__":
    cli.run(main)
