"""tools/bench_kernels.py and what it makes of its measurements, kernels/comparison.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mdit import cli
from mdit.config import UserError
from mdit.costs.kernel_calls import EXPERT_LAYER, expert_layers, kernel_calls
from mdit.kernels import comparison, dispatch
from tests.recipes import tiny_model
from tools import bench_kernels

ROOT = Path(__file__).resolve().parents[2]
CEILING = {"GB/s": 2000.0, "TFLOP/s": 500.0}
CPU = bench_kernels.Bench("cpu", torch.float32, 3, interpret=False)


def cost(megabytes, gigaflops=0):
    return {"bytes": megabytes * 10**6, "flops": gigaflops * 10**9}


def row(op, megabytes, gigaflops=0, stages=None, **shape):
    both = cost(megabytes, gigaflops)
    label = " ".join(f"{name}{value}" for name, value in shape.items())
    return {"op": op, "shape": shape, "label": label, "stages": stages or {"one": 1}, "forward": both, "both": both}


def planned(*rows):
    comparison.plan(list(rows), CEILING)
    return list(rows)


def timed(row, **both_ms):
    for name, ms in both_ms.items():
        row["measured"][name] = {"forward_ms": ms / 4, "both_ms": ms, "peak_mib": 100.0 * ms}
    row.update(comparison.judge(row, CEILING))
    return row


def report_of(rows):
    environment = {"gpu": "none", "torch": "2.13", "date": "2026-01-01"}
    return {"environment": environment, "settings": {"dtype": "bf16"}, "ceilings": CEILING, "rows": rows}


def test_bounds_and_shares():
    moves, computes, layer = planned(
        row("a.moves", 400, 10, {"one": 2, "two": 1}), row("b.computes", 100, 400, {"one": 1}), row("layer", 200)
    )
    assert moves["bound_ms"] == pytest.approx(0.2)  # 400 MB at 2 TB/s
    assert computes["bound_ms"] == pytest.approx(0.8)  # 400 GFLOP at 500 TFLOP/s
    layer["stages"].clear()
    comparison.plan([moves, computes, layer], CEILING)
    assert moves["share"] == pytest.approx(1.0)  # all of stage two
    assert computes["share"] == pytest.approx(0.8 / 1.2)
    assert layer["share"] == pytest.approx(0.1 / 1.2)  # as one call of the largest stage


@pytest.mark.parametrize("compiled, speedup, verdict", [(1.0, 2.0, "yes"), (0.575, 1.15, "yes"), (0.57, 1.14, "no")])
def test_rate_speedup_and_verdict(compiled, speedup, verdict):
    (moves,) = planned(row("a.moves", 400, 10))
    timed(moves, compile=compiled, triton=0.5)
    assert (moves["rate"], moves["verdict"]) == ("800 GB/s", verdict)
    assert moves["of_ceiling"] == pytest.approx(0.4) and moves["speedup"] == pytest.approx(speedup)
    (computes,) = planned(row("b.computes", 100, 400))
    timed(computes, triton=1.0)
    assert computes["rate"] == "400 TFLOP/s" and computes["of_ceiling"] == pytest.approx(0.8)
    assert computes["speedup"] is None and computes["verdict"] == comparison.NOT_MEASURED


def test_nothing_is_said_of_kernels_that_were_not_measured():
    (only,) = planned(row("a.b", 400))
    timed(only, eager=1.0, compile=0.9)
    only["measured"]["triton"] = comparison.NOT_MEASURED
    assert comparison.line(only) == (
        "| a.b |  | 1 | 0.250 / 1.000 | 0.225 / 0.900 | not measured | - | not measured | 100 / 90 | not measured "
        "| not measured | not measured |"
    )


def test_a_line_of_the_table():
    (found,) = planned(row("a.b", 400, N=256, T=64))
    timed(found, eager=2.0, compile=1.0, triton=0.5, flash=0.25)
    found["measured"]["cudnn"] = "failed: RuntimeError: no | here"
    found["measured"]["candidate"] = {"forward_ms": 0.1, "both_ms": None, "peak_mib": None}
    found["error"] = 0.00123
    assert comparison.line(found) == (
        "| a.b | N256 T64 | 1 | 0.500 / 2.000 | 0.250 / 1.000 | 0.125 / 0.500 "
        "| flash 0.062 / 0.250; cudnn failed: RuntimeError: no / here; candidate 0.100 "
        "| 800 GB/s, 40 % | 200 / 100 / 50 | 1.2e-03 | 2.00 | yes |"
    )
    assert comparison.line(found).count("|") == comparison.HEADER.splitlines()[0].count("|")


def test_the_summary_adds_up_calls_of_rows_that_were_measured_whole():
    first, second, third = planned(
        row("a.a", 400, stages={"one": 3, "two": 1}), row("b.b", 200, stages={"one": 2}), row("b.b", 200, K=1)
    )
    timed(first, eager=4.0, compile=2.0, triton=1.0)
    timed(second, eager=1.0, compile=0.5)
    second["measured"]["triton"] = "failed: OutOfResources: shared memory"
    lines = comparison.summary([first, second, third]).splitlines()
    assert lines[2] == "| one | 67 % | 12.00 | 6.00 | 3.00 | 3.00 |"  # 3 x 0.2 of 3 x 0.2 + 2 x 0.1 + 0.1 ms
    assert lines[3] == "| two | 100 % | 4.00 | 2.00 | 1.00 | 1.00 |"
    assert lines[-1] == "Left out, for want of time: 1 of b.b."
    without = timed(*planned(row("a.a", 400, stages={"one": 3})), eager=4.0, compile=2.0)
    assert (
        comparison.summary([without]).splitlines()[2] == "| one | 100 % | 12.00 | 6.00 | not measured | not measured |"
    )
    assert " 0 % " in comparison.summary(planned(row("a.a", 400)))


def test_every_op_first_then_by_share_and_failures_last():
    rows = planned(*(row(op, size, K=size) for op, size in (("a", 9), ("a", 8), ("b", 5), ("b", 7), ("c", 1))))
    assert [r["shape"]["K"] for r in comparison.in_order(rows)] == [9, 7, 1, 8, 5]
    timed(rows[0], eager=1.0)
    rows[3]["measured"] = {"eager": "failed: CUDA error", "triton": comparison.NOT_MEASURED}
    assert [r["shape"]["K"] for r in comparison.in_order(rows)] == [1, 8, 5, 7]


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    done, missing, other = planned(row("a.a", 400, N=1), row("a.a", 400, N=2), row("b.b", 400))
    timed(done, eager=4.0, compile=2.0, triton=1.0)
    timed(other, eager=2.0)
    done["error"] = 0.5
    comparison.write(tmp_path, report_of([done, missing, other]))
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    fresh = planned(row("a.a", 400, N=2), row("a.a", 400, N=1), row("a.a", 400, N=3))
    again = report_of([]) | {"environment": {**report_of([])["environment"], "date": "2026-01-02"}}
    assert comparison.take_over(tmp_path, again, fresh) == [other]  # which this run would not have measured
    assert fresh[1] == {**done, "share": fresh[1]["share"]}
    assert [r["shape"]["N"] for r in comparison.in_order(fresh)] == [2, 3]
    assert comparison.take_over(tmp_path / "elsewhere", again, fresh) == []


def test_markdown_holds_facts_summary_and_measured_rows(tmp_path):
    done, missing = planned(row("a.a", 400, N=1), row("a.a", 400, N=2))
    timed(done, eager=4.0, compile=2.0, triton=1.0)
    text = comparison.markdown(report_of([done, missing]))
    assert "- torch: 2.13" in text and "- GB/s: 2,000.0" in text and "| one | 50 % | 4.00" in text
    assert comparison.line(done) in text and comparison.line(missing) not in text


@pytest.mark.parametrize("part, name", [("environment", "torch"), ("settings", "dtype")])
def test_rows_of_another_machine_are_not_mixed_in(tmp_path, part, name):
    comparison.write(tmp_path, report_of(planned(row("a.a", 400))))
    other = report_of([])
    other[part] = {**other[part], name: "other"}
    with pytest.raises(UserError, match=f"has {name} .*, here it is 'other'"):
        comparison.take_over(tmp_path, other, [])
    (tmp_path / "kernels.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        comparison.take_over(tmp_path, other, [])
    for content in ("[]", "{}", '{"rows": 1}'):
        (tmp_path / "kernels.json").write_text(content)
        with pytest.raises(UserError, match="kernels.json: no report of tools/bench_kernels.py"):
            comparison.take_over(tmp_path, other, [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget_s", "0"], "--budget_s: 0: expected more than 0"),
        (["--budget_s", "nan"], "--budget_s: nan: expected more than 0"),
        (["--repeats", "0"], "--repeats: 0 is not between 1"),
        (["--micro_batch", "4", "-1"], "--micro_batch: -1 is not between 1"),
        (["--resume"], "--resume: says nothing without --out"),
        (["--ops", "attention"], "argument --ops: invalid choice: 'attention'"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_options_are_named_in_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: bench_kernels.main(arguments))
    assert ended.value.code == 2
    assert message in (printed := capsys.readouterr().err) and printed.count("\n") == 1


def test_interpreting_is_asked_for_and_only_off_the_gpu(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: bench_kernels.main(["--interpret"]))
    assert ended.value.code == 2 and "--interpret: is for a machine without a GPU" in capsys.readouterr().err


def test_rows_are_the_calls_of_the_papers_stages():
    args = bench_kernels.parse_arguments(["--micro_batch", "32", "64"])
    calls, rows = bench_kernels.rows_of(args, itemsize=2)
    assert len(calls) == len(rows) == len({comparison.key(r["op"], r["shape"]) for r in rows})
    stages = {stage for r in rows for stage in r["stages"]}
    assert stages == {f"{px} px, mask {mask}, N {n}" for px in (256, 512) for mask in ("0.75", "0") for n in (32, 64)}
    totals = [sum(r["stages"].get("256 px, mask 0.75, N 64", 0) for r in rows if r["op"] == op) for op in OPS]
    assert totals == [2 + 6 * 3 + 1 + 28 * 3 + 1, 1 + 6 + 28, 6 + 28]
    assert all(calls[id(r)].label == r["label"] for r in rows)
    layers = [r for r in rows if r["op"] == EXPERT_LAYER]
    assert layers and not any(r["stages"] for r in layers)
    assert {r["op"].split(".")[0] for r in rows} == set(dispatch.OPS)


OPS = ["patch_mixing.add_norm_modulate", "masked_attention.self_attention", "masked_attention.cross_attention"]


def tiny_calls(op):
    config = tiny_model()
    return [c for c in [*kernel_calls(config, 2, 0.75), *expert_layers(config, 2, 0.75)] if c.op == op]


def test_whatever_a_contender_raises_is_reported_and_the_others_go_on(monkeypatch):
    call = tiny_calls("swiglu.swiglu_linear")[0]

    def contenders(call):
        broken = bench_kernels.Contender(lambda *inputs: 1 / 0)
        return {"compile": broken, "eager": bench_kernels.Contender(call.function)}

    monkeypatch.setattr(bench_kernels, "contenders", contenders)
    found, error = bench_kernels.measure_row(call, ["eager", "compile"], CPU)
    assert found["compile"] == "failed: ZeroDivisionError: division by zero" and error is None
    assert found["eager"]["both_ms"] > 0 and found["eager"]["peak_mib"] is None
    assert bench_kernels.measure_row(call, ["eager"], CPU)[0].keys() == {"eager"}


class OnTheCpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU come from the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))


class Accesses(TorchDispatchMode):
    """Bytes of the storages that ops read, and of those they write, in their order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = zip(func._schema.arguments, args)
        changed = [t for a, t in given if a.alias_info is not None and a.alias_info.is_write]
        found = func(*args, **(kwargs or {}))
        self.seen.append((self._bytes_of(args), self._bytes_of([found, *changed])))
        return found

    def _bytes_of(self, tensors):
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


def test_the_cache_is_full_of_what_was_read_when_the_clock_starts(monkeypatch):
    """What is written last stays in the L2 cache, to be written back while the kernel is timed."""
    events = mock.Mock(elapsed_time=lambda end: 0.5)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: events)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(bench_kernels, "FLUSH_BYTES", 2**20)
    starts = []
    with OnTheCpu(), Accesses() as accesses:
        bench = bench_kernels.Bench("cuda", torch.float32, 3, interpret=False)
        assert bench_kernels.milliseconds(lambda: starts.append(len(accesses.seen)), bench) == 0.5
    assert len(starts) == 3
    for start in starts:
        read, written = [access for access in accesses.seen[:start] if max(access) >= 2**20][-1]
        assert read == 2**20 and written < 100


def test_contenders_do_the_same_work():
    """One-hot experts, and attention on q and k that are normalised, give what the reference gives."""
    (layer, *_) = tiny_calls(EXPERT_LAYER)
    inputs = layer.inputs("cpu", torch.float64)
    contenders = bench_kernels.contenders(layer)
    torch.testing.assert_close(contenders["one_hot"].function(*inputs), contenders["eager"].function(*inputs))
    for op in OPS[1:]:
        (call, *_) = tiny_calls(op)
        inputs = call.inputs("cpu", torch.float64)
        contenders = bench_kernels.contenders(call)
        alone = contenders["flash"].function(*contenders["flash"].prepare(inputs))
        expected = contenders["eager"].function(*inputs)
        torch.testing.assert_close(alone.transpose(1, 2).flatten(-2), expected, rtol=1e-4, atol=1e-4)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("op", ["swiglu.swiglu_linear", "expert_choice.route"])
def test_the_error_sees_gradients_too(monkeypatch, op):
    pytest.importorskip("triton")
    (call, *_) = tiny_calls(op)
    inputs = call.inputs(DEVICE, torch.float32)
    assert 0 <= bench_kernels.error_of(call, inputs) < 1e-5
    real, passes = bench_kernels.passes, []

    def halved_gradient(contender, inputs):
        forward, both = real(contender, inputs)
        passes.append(contender)
        return forward, (lambda: [*both()[:-1], both()[-1] / 2]) if len(passes) == 1 else both

    monkeypatch.setattr(bench_kernels, "passes", halved_gradient)
    assert bench_kernels.error_of(call, inputs) == pytest.approx(0.5, rel=1e-3)


def test_relative_error():
    ones = torch.ones(4, dtype=torch.bfloat16)
    assert bench_kernels.relative_error(ones, ones) == 0
    assert bench_kernels.relative_error(1.5 * ones, ones) == pytest.approx(0.5)
    assert bench_kernels.relative_error(0 * ones, 0 * ones) == 0


def test_times_are_medians(monkeypatch):
    clock = iter([0.0, 0.001, 1.0, 1.005, 2.0, 2.002])
    monkeypatch.setattr(bench_kernels.time, "perf_counter", lambda: next(clock))
    assert bench_kernels.milliseconds(lambda: None, CPU) == pytest.approx(2.0)


def test_a_machine_without_a_gpu_measures_tiny_shapes(tmp_path):
    """Twice: the second run goes on with what the first did not measure, and keeps what it did."""
    command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), "--out", str(tmp_path), "--repeats", "2"]
    command += ["--tiny", "--contenders", "eager", "one_hot", "triton", "flash"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    runs = []
    for more in (["--ops", "swiglu", "--budget_s", "100"], ["--ops", "expert_choice", "--resume"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=200, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "kernels.json").read_text())
        runs.append(report["rows"])
    assert {r["op"] for r in runs[0]} == {"swiglu.swiglu_linear"}
    assert [r for r in runs[1] if r["op"] == "swiglu.swiglu_linear"] == runs[0]
    assert len(runs[1]) > len(runs[0]) > 2 and all(r["measured"] for r in runs[1])
    assert report["schema"] == comparison.SCHEMA and report["environment"]["gpu"] == "none"
    assert all(r["measured"]["eager"]["both_ms"] > 0 for r in report["rows"])
    assert {str(r["measured"]["triton"]) for r in report["rows"]} == {comparison.NOT_MEASURED}
    assert {r["error"] for r in report["rows"]} == {None}  # though TRITON_INTERPRET may be set: it was not asked for
    assert "| tiny, mask 0.75, N 4 | 100 % |" in done.stdout
    assert "tiny" in (tmp_path / "kernels.md").read_text()
