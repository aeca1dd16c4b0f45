"""Build every Triton kernel of a training step for a GPU that need not be there, and say what each costs.

    python tools/build_kernels.py
    python tools/build_kernels.py --preset tiny_2 --dtype fp32 --all --json builds.json
    python tools/build_kernels.py --cache DIR --recipe configs/emoji_64.toml

The ops of `mdit.kernels` are called at the shapes of the paper's four stages, forward and backward; what they would
launch is compiled as a GPU would. Of widths that grow with depth the first, the middle and the last are taken, unless
--all. Exit code 1 where a kernel spills registers, needs more shared memory than a block has or does not compile.

With --cache they are built into a directory that can be $TRITON_CACHE_DIR of a run on such a GPU, which then compiles
none of them: every width, at the micro-batches that a run takes and at --micro_batch, the recipes' too with their
evaluation, and those of the check that "auto" makes. It needs a C compiler, that run's versions of Python and Triton,
and the same DIR there, since Triton keeps absolute paths.
"""

import argparse
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mdit import cli
from mdit.bench.report import table
from mdit.config import ModelConfig, UserError, kept_tokens, load_config
from mdit.costs.calls import STAGES
from mdit.costs.trace import Form, launches
from mdit.documents import brief
from mdit.files import try_to_write, write_json
from mdit.kernels import dispatch
from mdit.kernels.launch import Launch, recorded
from mdit.kernels.self_check import compare_with_reference
from mdit.models import presets
from mdit.parallel.settings import AUTO_TOKENS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GROWING = ("A", "C", "D", "F")  # constants of kernels: widths that grow with depth
FP8_CAPABILITY = 89
STUB = Path(__file__).with_name("libcuda_stub.c")
EVALUATED = (64, 0.0)  # images at once, and none masked: validation and sampling of a run


@dataclass(frozen=True)
class Use:
    """Place where a kernel is launched, with its numbers by name."""

    op: str
    direction: str  # forward or backward
    where: str
    numbers: dict[str, int]


ROTARY = "256 px, rotary"
Workload = tuple[str, ModelConfig, int, float]  # name, model, micro-batch and mask ratio


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    require_triton()
    if args.cache:
        return fill_cache(args)
    if args.json:
        try_to_write(args.json)
    builds, wrong, version = build_all(args)
    if args.json:
        report = {"triton": version, "capability": args.capability, "dtype": args.dtype, "preset": args.preset}
        write_json(args.json, {**report, "builds": builds, "faults": wrong})
    print(f"triton {version}, sm_{args.capability}, {args.dtype}: {len(builds)} kernels built")
    print("\n".join(wrong) or "none spills, all fit")
    return 1 if wrong else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=("xl_2", "tiny_2"), default="xl_2")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--capability", type=int, default=90, help="of the GPU: 80 is an A100, 90 an H100")
    widths = parser.add_mutually_exclusive_group()
    widths.add_argument("--all", action="store_true", help="every width, not only the first, the middle and the last")
    widths.add_argument("--few", action="store_true", help="every kernel and option of every op, few of their sizes")
    add("--json", type=Path, help="also write the numbers to this file")
    add("--cache", type=cli.path, metavar="DIR", help="build into DIR, for a GPU machine to find there")
    add("--recipe", type=cli.path, action="append", default=[], help="with --cache: its kernels as well")
    more = "with --cache: besides what a run takes of each model; kernels differ with it"
    add("--micro_batch", type=cli.whole(1), nargs="+", default=[], help=more)
    args = parser.parse_args(arguments)
    if (args.recipe or args.micro_batch) and not args.cache:
        parser.error(f"--{'recipe' if args.recipe else 'micro_batch'}: says nothing without --cache")
    return args


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise UserError("the package triton is not installed: there is nothing to build kernels with")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET=1 makes Triton interpret its kernels: unset it to build them")


def build_all(args: argparse.Namespace) -> tuple[list[dict], list[str], str]:
    """-> what was built, what is wrong with it, and Triton's version. Prints a table of the builds."""
    from mdit.kernels import ahead_of_time  # here, since it imports triton

    uses: dict[ahead_of_time.KernelSource, list[Use]] = {}
    builds, wrong = [], []
    found = traced_launches([rotary_of(args), *stages_of(args)], DTYPES[args.dtype], args.capability)
    for use, launch in found if args.all else representative(found):
        uses.setdefault(ahead_of_time.source(launch, args.capability), []).append(use)
    if args.few:
        uses = few(uses)
    lines = [["kernel, first used at", "warps", "registers", "shared KiB", "stack", "spills", "built s"]]
    with fresh_processes() as workers:
        for (source, used), built in zip(uses.items(), workers.map(partial(attempt, "build"), uses)):
            sizes = " ".join(f"{name}{value}" for name, value in used[0].numbers.items() if name.isupper())
            where = f"{used[0].op}, {used[0].where}: {sizes}" + f" and {len(used) - 1} more" * (len(used) > 1)
            if isinstance(built, str):
                wrong.append(f"{source.kernel} does not compile: {built} ({where})")
                continue
            numbers = [built.num_warps, built.registers, f"{built.shared_bytes / 1024:.1f}", built.stack_bytes]
            numbers += [built.spill_bytes, f"{built.seconds:.1f}"]
            lines.append([f"{built.name}, {used[0].direction} of {where}", *numbers])
            wrong += [f"{fault} ({where})" for fault in ahead_of_time.faults(built)]
            builds.append({**asdict(built), "uses": [asdict(use) for use in used]})
    print(table(lines, markdown=False))
    return builds, wrong, ahead_of_time.VERSION


def few(uses: dict) -> dict:
    """Sources, with all uses that they have, by which each op launches each of its kernels, with every number of warps
    and each of its options on and off: not every pair of options, and few sizes."""
    seen, chosen = set(), {}
    for source in reversed(uses):  # the widest first
        constants = dict(source.constants)
        options = [(i, constants.get((i,), ...)) for i in range(len(source.signature))]
        options = [(i, value if value is None or isinstance(value, bool) else ...) for i, value in options]
        warps = ("warps", source.num_warps)
        forms = {(use.op, use.direction, source.kernel, o) for use in uses[source] for o in (*options, warps)}
        if not forms <= seen:
            chosen[source] = uses[source]
            seen |= forms
    return chosen


def fresh_processes(*initializer: Any) -> ProcessPoolExecutor:
    """Workers in which no kernel was interpreted or built."""
    first, *rest = initializer or (None,)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(os.cpu_count(), mp_context=spawn, initializer=first, initargs=tuple(rest))


def fill_cache(args: argparse.Namespace) -> int:
    """Build into Triton's cache in --cache whatever it lacks -> exit code."""
    from mdit.kernels import ahead_of_time

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UserError("there is no C compiler (gcc or clang), which the launchers of kernels are built with")
    args.cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve())
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # no run reads the rest, which is as much again
    dtype, workloads = DTYPES[args.dtype], stages_of(args)
    workloads += [(*place, size, mask) for *place, _, mask in workloads for size in args.micro_batch]
    for recipe in map(load_config, args.recipe):
        ratios = recipe.training.mask_ratios
        kept = kept_tokens(recipe.model.num_patches, min(ratios))
        taken = [(size, ratio) for size in (AUTO_TOKENS // kept, *args.micro_batch) for ratio in ratios]
        workloads += [(recipe.name, recipe.model, *size_and_mask) for size_and_mask in (*taken, EVALUATED)]
    found = [launch for _, launch in traced_launches(workloads, dtype, args.capability)]
    for head_dim in sorted({config.head_dim for _, config, *_ in workloads}):
        found += launches_of_check(head_dim, dtype)
    sources = dict.fromkeys(ahead_of_time.source(launch, args.capability) for launch in found)
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1", str(STUB)]
        subprocess.run(command, check=True)
        with fresh_processes(ahead_of_time.pretend_to_have_a_gpu, args.capability, Path(folder)) as workers:
            kept = list(workers.map(partial(attempt, "keep"), sources))
    wrong = [
        f"{source.kernel} does not compile: {what}" for source, what in zip(sources, kept) if isinstance(what, str)
    ]
    print(
        f"triton {ahead_of_time.VERSION}, sm_{args.capability}, {args.dtype}: {len(sources)} kernels, of which "
        f"{kept.count(True)} were built and {kept.count(False)} were there already: {args.cache.resolve()}"
    )
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


def attempt(method: str, source):
    """In a worker process: what this function of ahead_of_time gives for the source, or why it fails."""
    from mdit.kernels import ahead_of_time

    try:
        return getattr(ahead_of_time, method)(source)
    except Exception as error:  # of Triton's many kinds
        return brief(error)


def launches_of_check(head_dim: int, dtype: torch.dtype) -> list[Launch]:
    """Launches that `mdit.kernels.selection` makes before it takes kernels. Nothing is run here."""
    with recorded() as found, dispatch.using(off_gpu=True), without_float8_matmuls():
        for op in dispatch.OPS:
            compare_with_reference(op, torch.device("cpu"), dtype, head_dim)
    return found


def stages_of(args: argparse.Namespace) -> list[Workload]:
    """The paper's four."""
    preset = getattr(presets, args.preset)
    return [(name, preset(size), micro_batch, mask_ratio) for name, (size, mask_ratio, micro_batch) in STAGES.items()]


def rotary_of(args: argparse.Namespace) -> Workload:
    """A block of the mixer and one of the backbone with rotary positions."""
    return ROTARY, getattr(presets, args.preset)(rotary=True, depth=1, mixer_depth=1), 256, 0.75


def traced_launches(workloads: Iterable[Workload], dtype: torch.dtype, capability: int) -> list[tuple[Use, Launch]]:
    """All that a micro-batch launches, forward and backward, and in float8 as well where the GPU knows it."""
    found = []
    for name, config, micro_batch, mask_ratio in workloads:
        for fp8 in (False, True)[: 1 + (capability >= FP8_CAPABILITY)]:
            for backward, launch in launches(config, micro_batch, mask_ratio, Form(fp8=fp8, dtype=dtype)):
                arguments = dict(zip(launch.kernel.arg_names, launch.arguments)) | launch.constants
                numbers = {name: value for name, value in arguments.items() if type(value) is int}
                op = launch.kernel.fn.__module__.split(".")[-2]
                found.append((Use(op, "backward" if backward else "forward", name, numbers), launch))
    return found


def representative(found: list[tuple[Use, Launch]]) -> list[tuple[Use, Launch]]:
    """The first, the middle and the last of launches that differ only in a width that grows with depth."""
    groups: dict[tuple, dict[tuple, tuple[Use, Launch]]] = {}
    for use, launch in found:
        constants = launch.constants.items()
        alike = tuple((name, value) for name, value in constants if name not in GROWING)
        widths = tuple(value for name, value in constants if name in GROWING)
        key = (launch.kernel.fn.__name__, use.where, *(value is None for value in launch.arguments), *alike)
        groups.setdefault(key, {}).setdefault(widths, (use, launch))
    chosen = []
    for group in groups.values():
        ordered = [group[widths] for widths in sorted(group)]
        chosen += [ordered[i] for i in sorted({0, len(ordered) // 2, len(ordered) - 1})]
    return chosen


def without_float8_matmuls() -> AbstractContextManager:
    """Context in which scaled matmuls do nothing: a CPU's know no scales by row in torch 2.11."""
    return mock.patch.object(torch, "_scaled_mm", lambda a, b, *, out, **_: out)


if __name__ == "__main__":
    cli.run(main)
