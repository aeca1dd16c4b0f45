"""Every Triton kernel of a training step, built for an H100 at the paper's shapes: compiles, fits, spills nothing.

What each costs stands in the output (pytest -rA).
"""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mdit import cli
from mdit.costs.calls import STAGES
from mdit.costs.trace import Form, launches
from mdit.diffusion.edm import edm_losses, sample_noise
from mdit.kernels import dispatch
from mdit.kernels.launch import Launch, launch, recorded
from mdit.models import MicroDiT, presets
from mdit.parallel.fp8 import use_fp8
from mdit.parallel.fuse import fuse
from tests.recipes import tiny_config

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from mdit.kernels import ahead_of_time  # noqa: E402
from mdit.kernels.ahead_of_time import Build, build, faults, source  # noqa: E402
from tools import build_kernels  # noqa: E402
from tools.bench_kernels import TINY  # noqa: E402
from tools.first_contact_kit import move_cache  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
FITS = Build("kernel", 4, 2, registers=64, stack_bytes=0, spill_bytes=0, shared_bytes=227 * 1024, seconds=1.0)


@JITFunction  # not triton.jit, which interprets where there is no GPU
def _scale(x_ptr, bias_ptr, out_ptr, n, stride, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i * stride, mask=i < n).to(tl.float32) * factor
    if bias_ptr is not None:
        x += tl.load(bias_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x, mask=i < n)


def run_tool(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools" / "build_kernels.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}, timeout=280)


def test_every_kernel_of_a_training_step_fits_an_h100_and_spills_nothing(tmp_path):
    """Every kernel of every op; `tools/build_kernels.py` alone does it at more of the sizes."""
    done = run_tool("--few", "--json", tmp_path / "builds.json")
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "builds.json").read_text())
    assert report["triton"] == ahead_of_time.VERSION and report["faults"] == []
    used = {(use["op"], use["direction"]) for built in report["builds"] for use in built["uses"]}
    assert used == {(op, direction) for op in dispatch.OPS for direction in ("forward", "backward")}
    assert {use["where"] for built in report["builds"] for use in built["uses"]} == {*STAGES, build_kernels.ROTARY}
    for built in report["builds"]:
        assert built["shared_bytes"] <= 232448, built
        assert built["spill_bytes"] == built["stack_bytes"] == 0, built
        assert 8 <= built["registers"] <= 255, built  # read from a log: a number that no kernel has is a misreading
        numbers = built["uses"][0]["numbers"]
        turned = {use["where"] for use in built["uses"]} == {build_kernels.ROTARY}  # its programs have 8 warps
        if built["name"] == "_attend_backward" and numbers["T"] == numbers["L"] and not turned:  # of self-attention
            assert blocks_per_sm(built) >= (1 if 64 < numbers["T"] <= 128 else 2), built


def blocks_per_sm(built: dict) -> int:
    """Of an H100: 64 K registers, 228 KiB of shared memory, 1 KiB of which each block costs besides."""
    registers = -(-built["registers"] // 8) * 8 * 32 * built["num_warps"]
    return min(64 * 1024 // registers, 228 * 1024 // (built["shared_bytes"] + 1024), 64 // built["num_warps"])


def test_the_tool_says_in_one_line_why_it_cannot_build(monkeypatch, capsys):
    done = run_tool(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: TRITON_INTERPRET=1 makes Triton interpret its kernels: unset it to build them\n"
    monkeypatch.setattr(build_kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: build_kernels.main([]))
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"shared_bytes": 300 * 1024}, "needs 307200 bytes of shared memory, a block has 232448"),
        ({"shared_bytes": 232449}, "shared memory"),
        ({"spill_bytes": 8, "stack_bytes": 8}, "spills: 8 bytes"),
        ({"stack_bytes": 16}, "16 bytes of stack"),
    ],
    ids=str,
)
def test_a_kernel_that_does_not_fit_is_found(change, complaint):
    assert faults(FITS) == []
    (found,) = faults(replace(FITS, **change))
    assert complaint in found


@pytest.mark.parametrize("wrong, code", [([], 0), (["a kernel spills"], 1)])
def test_faults_decide_the_exit_code(monkeypatch, capsys, tmp_path, wrong, code):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(build_kernels, "build_all", lambda args: ([], wrong, "3.9.0"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: build_kernels.main(["--json", str(tmp_path / "builds.json")]))
    assert ended.value.code == code
    assert json.loads((tmp_path / "builds.json").read_text())["faults"] == wrong
    assert capsys.readouterr().out.endswith("a kernel spills\n" if wrong else "none spills, all fit\n")


def test_a_launch_is_specialised_as_on_a_gpu():
    x = torch.empty(100, dtype=torch.bfloat16)
    with recorded() as launches:
        for stride, shifted in ((1, x), (16, x[1:]), (16, x[1:])):
            launch(_scale, (1,), shifted, None, x.float(), 100, stride, 0.5, BLOCK=128, num_warps=2, num_stages=1)
    contiguous, strided, again = map(source, launches)
    assert strided == again and hash(strided) == hash(again) and contiguous != strided
    assert pickle.loads(pickle.dumps(strided)) == strided  # worker processes get it so
    types = dict(strided.signature)
    assert types["x_ptr"] == "*bf16" and types["out_ptr"] == "*fp32" and types["factor"] == "fp32"
    assert types["bias_ptr"] == "constexpr" and types["n"] == types["stride"] == "i32"
    assert dict(contiguous.signature)["stride"] == "constexpr"
    assert dict(contiguous.constants) == {(1,): None, (4,): 1, (6,): 128}
    assert {path for path, found in contiguous.attributes if found} == {(0,), (2,)}  # pointers that are multiples of 16
    assert {path for path, found in strided.attributes if found} == {(2,), (4,)}  # not the shifted one; the stride is


def test_what_a_build_tells():
    x = torch.empty(128, dtype=torch.bfloat16)
    with recorded() as launches:
        launch(_scale, (1,), x, None, x, 128, 1, 0.5, BLOCK=128, num_warps=2, num_stages=1)
    # In a process where nothing was interpreted: that leaves triton.language changed.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        found = fresh.submit(build, source(launches[0])).result()
    assert (found.name, found.num_warps, found.num_stages) == ("_scale", 2, 1)
    assert 0 < found.registers <= 64 and found.spill_bytes == found.stack_bytes == 0 and found.seconds > 0
    assert found.shared_bytes <= 1024 and faults(found) == []


def test_widths_that_grow_are_represented():
    workloads = [("256 px", presets.xl_2(), 2, 0.75)]
    found = build_kernels.traced_launches(workloads, torch.bfloat16, capability=80)
    chosen = build_kernels.representative(found)
    of_all, of_chosen = (
        {launch.constants["A"] for _, launch in some if "A" in launch.constants} for some in (found, chosen)
    )
    assert {512, 1024} <= of_chosen <= of_all and len(chosen) < len(found) / 3
    assert {launch.kernel.fn.__name__ for _, launch in found} == {launch.kernel.fn.__name__ for _, launch in chosen}


def kind(found: Launch) -> tuple:
    """What Triton tells kernels apart by: of numbers whether they are 1 or multiples of 16."""
    numbers = [(a == 1, a % 16 == 0) if isinstance(a, int) else a for a in found.arguments]
    arguments = [a.dtype if isinstance(a, torch.Tensor) else a for a in numbers]
    return (found.kernel.fn.__name__, *arguments, *sorted(found.constants.items()), found.num_warps, found.num_stages)


@pytest.mark.parametrize("mask_ratio, fp8", [(0.5, False), (0.0, True)])
def test_a_trace_has_all_that_a_micro_batch_launches(mask_ratio, fp8):
    config = tiny_config(model=presets.tiny_2(8, **TINY).model_dump(), training={"mask_ratio": mask_ratio})
    model = fuse(MicroDiT(config.model)).bfloat16()
    if fp8:
        use_fp8(model)
    captions_NLC = torch.randn(4, config.model.caption_length, config.model.caption_channels)
    noise = sample_noise(config, 0, slice(0, 4))

    def net(*inputs, mask):
        return model(*(t.bfloat16() for t in inputs), mask=mask)

    with recorded() as run, dispatch.using(*dispatch.OPS, off_gpu=True), build_kernels.without_float8_matmuls():
        edm_losses(net, torch.randn(4, 4, 8, 8), captions_NLC, noise, config.noise).mean().backward()
    checked = {found.kernel.fn.__name__ for found in build_kernels.launches_of_check(32, torch.bfloat16)}
    assert checked > {"_attend_backward", "_mix_backward", "_scatter", "_swiglu_backward", "_quantise_gelu"}
    traced = launches(config.model, 4, mask_ratio, Form(fp8=fp8))
    assert len(run) > 50 and {*map(kind, run)} == {kind(found) for _, found in traced}


CALL = """
import sys
from unittest import mock
import torch
from mdit.costs.trace import Form, launches
from mdit.models.presets import tiny_2
from tools import build_kernels
by_name = {launch.kernel.fn.__name__: launch for _, launch in launches(tiny_2(8), 16, 0.5, Form())}
found = [by_name["_swiglu"], by_name["_swiglu_backward"]]
"""
FILL = """
from contextlib import nullcontext
from types import SimpleNamespace

def this_process(initializer, *arguments):  # is as fresh as any
    initializer(*arguments)
    return nullcontext(SimpleNamespace(map=map))

def traced(workloads, *_):
    print(sorted({(size, mask_ratio) for _, config, size, mask_ratio in workloads if config.latent_size == 64}))
    return [(None, launch) for launch in found]

few = dict(traced_launches=traced, launches_of_check=lambda *a: [], fresh_processes=this_process)
with mock.patch.multiple(build_kernels, **few):
    build_kernels.main(["--cache", sys.argv[1], "--micro_batch", "48", "--recipe", sys.argv[2]])
"""
RUN = """
import torch
from pathlib import Path
from triton import knobs
from mdit.kernels import ahead_of_time
from mdit.kernels.launch import OPTIONS
ahead_of_time.pretend_to_have_a_gpu(90, Path(sys.argv[1]))
hits = []
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
for launch in found:
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, **OPTIONS)
    launch.kernel[(1,)](*launch.arguments, **launch.constants, **options)
print(hits)
"""


def test_a_run_finds_all_that_a_cache_was_filled_with_in_another_place(tmp_path):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    built, cache, stub = tmp_path / "built", tmp_path / "cache", tmp_path / "libcuda.so.1"

    def run(program, *arguments):
        file = tmp_path / "program.py"
        file.write_text(CALL + program, encoding="utf-8")
        environment = {**kept, "TRITON_CACHE_DIR": str(cache)}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, str(file), *map(str, arguments)]
        ran = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    told = run(FILL, built, ROOT / "configs" / "paper_64.toml")
    assert "2 kernels, of which 2 were built and 0 were there already" in told
    # Of 512 px and of a recipe of 64 pixels: what a run takes, what was asked for, and the recipe's evaluation.
    assert "[(16, 0.0), (48, 0.0), (48, 0.5), (48, 0.75), (64, 0.0), (64, 0.75), (128, 0.5)]" in told
    built.rename(cache)
    move_cache(cache)
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, build_kernels.STUB], check=True)
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("*.*")}
    assert {file.suffix for file in before} >= {".cubin", ".so"}
    assert run(RUN, tmp_path) == "[True, True]\n"  # Triton's own way to its cache, launchers included
    after = {file: file.stat().st_mtime_ns for file in cache.rglob("*.*")}
    changed = {file.name.split(".")[0] for file, _ in after.items() - before.items()}
    assert changed <= {"cuda_utils"}  # to Triton 3.9 another one where libcuda is in another directory
