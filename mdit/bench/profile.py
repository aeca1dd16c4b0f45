"""Profile of an optimizer step: a trace to look at, device time by category, and one screen that says it.

Events are torch.profiler's: https://docs.pytorch.org/docs/stable/profiler.html. On a GPU they are its kernels, copies
and clearings; on a CPU the operators' own time, without what they call. Profiling itself slows the host down, so a GPU
that waits for it waits longer here than in an unprofiled run.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from mdit.bench.row import BenchmarkRow, HostTime, KernelTime, Profile
from mdit.bench.timing import length_of_union

TRACE = "step.pt.trace.json.gz"  # TensorBoard's plugin asks for the end, Perfetto opens it as it is
KERNELS, NAME_LENGTH, BAR = 15, 120, 28

OTHER = "other"
# The first that a name matches. Names of CUDA's kernels, of our Triton kernels (kernels/*/triton_impl.py, at the start
# of the name), of what torch.compile generates (triton_*), and of operators on a CPU.
CATEGORIES = {
    OTHER: r"^autograd::|^torch::autograd|Backward\d+$"  # of a CPU: around the operators
    r"|^aten::(empty|resize|view|reshape|alias|as_strided|t$|transpose|permute|detach|lift|(un)?squeeze|expand"
    r"|slice|select|narrow|split|chunk|unbind|_unsafe_view|_reshape_alias|item|_local_scalar)",
    "communication": r"nccl|^gloo:|c10d",
    "compiled elementwise": r"^triton_(poi|red|per)_",
    "float8": r"^_quantise|^_(gelu|gated)_gradient|mdit::fp8",
    "attention": r"^_attend|^_statistics|^_norm_backward|flash|fmha|sdpa|scaled_dot_product|mdit::masked_",
    "norm and modulation": r"^_mix|layer_?norm|GammaBeta|mdit::(add_)?norm_modulate",
    "SwiGLU": r"^_swiglu|silu|mdit::swiglu",
    "experts": r"^_(route|gather|scatter|gelu)|gelu|topk|sort|gather|scatter|(?<!with_)index|mdit::expert",
    "optimizer": r"^triton_for_|adam|multi_tensor|foreach",
    "matmuls": r"gemm|cutlass|nvjet|xmma|cublas|gemv|splitK|^triton_tem_|convolution|_scaled_mm"
    r"|^aten::(mm|addmm|bmm|baddbmm|linear|matmul|mv|dot)$|^mkldnn::",
    "copies": r"^Mem(cpy|set)|copy|CatArray|FillFunctor|^aten::(cat|clone|to|contiguous|fill_|zero_|zeros\w*)$",
    "elementwise": r"elementwise|reduce|softmax|scan|distribution|random|Functor|^aten::",
}
PATTERNS = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in CATEGORIES.items()}
LAUNCHES = re.compile(r"^cu(da)?(LaunchKernel|GraphLaunch)")
WAITS = re.compile(r"^cu(da|Ctx|Stream|Event)\w*Synchronize")


def profile_step(step: Callable[[], Any], *, device: torch.device, directory: Path | None) -> Profile:
    """The profile of one call of `step`, after one that starts the profiler; the trace lies in `directory`."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    # acc_events only keeps torch from warning that events of earlier cycles are lost: there is one cycle.
    with profile(activities=activities, schedule=once, acc_events=True) as profiler:
        step()
        wait()
        profiler.step()
        began = time.perf_counter()
        step()
        wait()
        step_ms = 1e3 * (time.perf_counter() - began)
        profiler.step()
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(directory / TRACE))
    averages = profiler.key_averages()
    operators = _times(averages, DeviceType.CPU)
    found = _times(averages, DeviceType.CUDA) if on_gpu else operators
    busy_ms = sum(kernel.ms for kernel in found)  # operators contain each other, but these are their own times
    if on_gpu:  # streams run side by side
        events = [e for e in profiler.events() or () if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        busy_ms = length_of_union((e.time_range.start, e.time_range.end) for e in events) / 1e3
    categories: dict[str, float] = defaultdict(float)
    for kernel in found:
        categories[kernel.category] += kernel.ms
    return Profile(
        categories=dict(sorted(categories.items(), key=lambda item: -item[1])),
        step_ms=step_ms,
        idle_ms=max(0.0, step_ms - busy_ms),
        kernels=tuple(found[:KERNELS]),
        host=_host(operators) if on_gpu else None,
        trace=None if directory is None else TRACE,
    )


def _times(averages: Iterable[Any], device: DeviceType) -> list[KernelTime]:
    """Calls and own time of what a device did, the dearest first; without ranges that somebody marked. C++ names end
    where they get long."""
    own = "self_cpu_time_total" if device == DeviceType.CPU else "self_device_time_total"  # microseconds
    found = [
        KernelTime(name=one.key[:NAME_LENGTH], category=category(one.key), calls=one.count, ms=getattr(one, own) / 1e3)
        for one in averages
        if one.device_type == device and not one.is_user_annotation
    ]
    return sorted(found, key=lambda kernel: -kernel.ms)


def category(name: str) -> str:
    """Category of a kernel or an operator, by its name."""
    return next((found for found, pattern in PATTERNS.items() if pattern.search(name)), OTHER)


def _host(operators: Sequence[KernelTime]) -> HostTime:
    """Autograd's thread and the one that waits for it are added up."""
    waiting = sum(one.ms for one in operators if WAITS.search(one.name))
    return HostTime(
        busy_ms=sum(one.ms for one in operators) - waiting,
        launches=sum(one.calls for one in operators if LAUNCHES.search(one.name)),
        waiting_ms=waiting,
    )


def summary(row: BenchmarkRow) -> str:
    """One screen, at most 40 lines of 120 characters: categories, idle time, the dearest kernels, the host."""
    found = row.profile
    if found is None:
        return f"{row.name}: {row.problem}"
    step_ms, idle_share = found.step_ms, found.idle_ms / found.step_ms if found.step_ms else 0.0
    lines = [f"Where a step of {step_ms:,.1f} ms goes (profiled): {row.name}"]
    for name, ms in [*found.categories.items(), ("idle", found.idle_ms)]:
        share = ms / step_ms if step_ms else 0.0
        lines.append(f"{name:<22}{ms:9.2f} ms {share:7.1%}  {'#' * min(BAR, round(BAR * share))}".rstrip())
    lines.append("")
    side_by_side = sum(found.categories.values()) + found.idle_ms - step_ms
    if side_by_side > 0.005 * step_ms:
        lines.append(f"{side_by_side:,.1f} ms of it ran beside something else.")
    lines.append(f"{'ms':>9} {'calls':>8}  dearest, of a step")
    for kernel in found.kernels:
        lines.append(f"{kernel.ms:9.2f} {kernel.calls:8,.0f}  {_short(kernel.name)} ({kernel.category})")
    told = f"Python and all between operators, {found.idle_ms:,.1f} ms, {idle_share:.0%} of the step."
    if host := found.host:
        told = (
            f"{host.launches:,.0f} launches; {host.busy_ms:,.1f} ms in operators and launches, "
            f"{host.waiting_ms:,.1f} ms waiting for the GPU, which waited {idle_share:.0%} of the step."
        )
    lines += ["", f"Host: {told}"]
    if found.trace:
        lines.append(f"{found.trace}: open it in ui.perfetto.dev, or in TensorBoard with torch-tb-profiler")
    return "\n".join(lines)


def _short(name: str) -> str:
    """Without what C++ puts around: "void at::native::vectorized_elementwise_kernel<4, ...": template arguments tell
    kernels of one name apart, so they stay, cut."""
    name = name.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name if len(name) <= 72 else name[:69] + "..."
