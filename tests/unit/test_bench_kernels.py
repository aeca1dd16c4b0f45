"""tools/bench_kernels.py and what it makes of its measurements, mdit/bench/kernel_report.py."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mdit import cli
from mdit.bench import timing
from mdit.bench.kernel_report import HEAD, SCHEMA, KernelReport, KernelRow, Times
from mdit.bench.report import Environment
from mdit.bench.row import NOT_MEASURED
from mdit.config import UserError
from mdit.costs.calls import kernel_calls
from mdit.kernels import dispatch
from mdit.models.presets import tiny_2
from tests.recipes import tiny_model
from tools import bench_kernels

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = {"GB/s": 2000.0, "TFLOP/s": 500.0}
CPU = bench_kernels.Bench(torch.device("cpu"), torch.float32, 3)


def row(op, megabytes, gigaflops=0, stages=None, error=None, failed=None, both_ms=None, **shape):
    """`both_ms`: of contenders that were measured; `failed`: one that was not."""
    measured = {name: Times(forward_ms=ms / 4, both_ms=ms, peak_mib=100 * ms) for name, ms in (both_ms or {}).items()}
    return KernelRow(
        op=op,
        shape=shape,
        label=" ".join(f"{name}{value}" for name, value in shape.items()),
        stages={"one": 1} if stages is None else stages,
        bytes=megabytes * 10**6,
        flops=gigaflops * 10**9,
        measured=measured | ({failed: "failed: no | here"} if failed else {}),
        error=error,
    )


def report_of(*rows, dtype="bf16", commit="abc1234"):
    versions = dict(torch="2.13", cuda="none", triton="none", deepspeed="none")
    here = Environment(cpu="some, 2 cores", commit=commit, date="2026-01-01", **versions)
    return KernelReport(environment=here, settings={"dtype": dtype}, ceilings=CEILINGS, rows=list(rows))


def test_bounds_and_shares():
    moves, computes = row("a.moves", 400, 10, {"one": 2, "two": 1}), row("b.computes", 100, 400, {"one": 1})
    assert moves.bound_ms(CEILINGS) == pytest.approx(0.2)  # 400 MB at 2 TB/s
    assert computes.bound_ms(CEILINGS) == pytest.approx(0.8)  # 400 GFLOP at 500 TFLOP/s
    shares = list(report_of(moves, computes, row("layer", 200, stages={})).shares().values())
    assert shares == pytest.approx([1.0, 0.8 / 1.2, 0.1 / 1.2])  # all of stage two; as one call of the largest stage


def test_a_line_of_the_table():
    found = row("a.b", 400, error=1e-3, both_ms={"eager": 2.0, "compile": 1.0, "triton": 0.5}, failed="cudnn", N=256)
    cells = dict(zip(HEAD, found.cells(CEILINGS), strict=True))
    assert cells["triton ms"] == "0.125 / 0.500" and cells["others ms"] == "cudnn failed: no / here"
    assert (cells["rate, of ceiling"], cells["x compile"], cells[HEAD[-1]]) == ("800 GB/s, 40 %", "2.00", "yes")
    assert row("b.computes", 100, 400, both_ms={"triton": 1.0}).rate(CEILINGS) == "400 TFLOP/s, 80 %"
    nothing = row("a.b", 400, both_ms={"eager": 1.0, "compile": 0.9}, failed="triton")
    assert nothing.rate(CEILINGS) is None and nothing.speedup is None


def test_the_summary_adds_up_calls_of_rows_that_were_measured_whole():
    first = row("a.a", 400, stages={"one": 3, "two": 1}, both_ms={"eager": 4.0, "compile": 2.0, "triton": 1.0})
    second = row("b.b", 200, stages={"one": 2}, both_ms={"eager": 1.0, "compile": 0.5}, failed="triton")
    told = report_of(first, second, row("b.b", 200, K=1)).summary()
    one, two = ([cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[2:4])
    assert one == ["one", "67 %", "12.00", "6.00", "3.00", "3.00"]  # 3 x 0.2 of 3 x 0.2 + 2 x 0.1 + 0.1 ms
    assert two == ["two", "100 %", "4.00", "2.00", "1.00", "1.00"]
    assert told.endswith("Left out, for want of time: 1 of b.b.")
    assert " 0 % " in report_of(row("a.a", 400)).summary()


def test_every_op_first_then_by_share_and_failures_last():
    sizes = [("a", 9, {"eager": 1.0}, None), ("a", 8, None, None), ("b", 5, None, None), ("b", 7, None, "eager")]
    rows = [row(op, size, K=size, both_ms=both_ms, failed=failed) for op, size, both_ms, failed in sizes]
    fresh = [row(one.op, one.shape["K"], **one.shape) for one in rows]
    assert [r.shape["K"] for r in report_of(*fresh, row("c", 1, K=1)).to_measure()] == [9, 7, 1, 8, 5]
    assert [r.shape["K"] for r in report_of(*rows, row("c", 1, K=1)).to_measure()] == [1, 8, 5, 7]


def test_an_interrupted_run_keeps_its_rows(tmp_path):
    done = row("a.a", 400, error=0.5, both_ms={"eager": 4.0, "compile": 2.0, "triton": 1.0}, N=1)
    other = row("b.b", 400, both_ms={"eager": 2.0})
    report_of(done, row("a.a", 400, N=2), other).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}
    assert KernelReport.load(tmp_path / "kernels.json").rows[0] == done
    again = report_of(*(row("a.a", 400, N=n) for n in (2, 1, 3)))
    again.take_over(tmp_path / "kernels.json")
    assert again.rows[1] == done and again.rows[3:] == [other]  # which this run would not have measured
    assert [r.shape["N"] for r in again.to_measure()] == [2, 3]
    again.take_over(tmp_path / "elsewhere.json")


def test_rows_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "kernels.json"
    report_of(row("a.a", 400)).save(tmp_path)
    for other, name in ((report_of(commit="0000000"), "commit"), (report_of(dtype="fp32"), "dtype")):
        with pytest.raises(UserError, match=f"has {name} .*, here it is"):
            other.take_over(path)
    for content, reason in (("{", "not valid JSON"), ("[]", "schema = None"), ('{"rows": 1}', "schema = None")):
        path.write_text(content)
        with pytest.raises(UserError, match=reason):
            report_of().take_over(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--micro_batch", "4", "-1"], "--micro_batch: -1 is not between 1"),
        (["--resume"], "--resume: says nothing without --out"),
        (["--interpret"], "--interpret: is for a machine without a GPU"),
    ],
)
def test_bad_options_are_named_in_one_line(monkeypatch, capsys, arguments, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: bench_kernels.main(arguments))
    assert ended.value.code == 2
    assert message in (printed := capsys.readouterr().err) and printed.count("\n") == 1


def test_rows_are_the_calls_of_the_papers_stages():
    args = bench_kernels.parse_arguments(["--preset", "tiny_2", "--micro_batch", "32"])
    calls, rows = bench_kernels.rows_of(args, torch.bfloat16)
    assert list(calls) == [r.key for r in rows] and len(calls) == len(rows)
    stages = {stage for r in rows for stage in r.stages}
    assert stages == {f"{px} px, mask {mask}, N 32" for px in (256, 512) for mask in ("0.75", "0")}
    totals = [sum(r.stages.get("256 px, mask 0.75, N 32", 0) for r in rows if r.op == op) for op in OPS]
    blocks = tiny_2().depth + tiny_2().mixer_depth
    assert totals == [2 + 3 * blocks + 1, 1 + blocks, blocks]
    assert {r.op.split(".")[0] for r in rows} == set(dispatch.OPS)


OPS = ["patch_mixing.add_norm_modulate", "masked_attention.self_attention", "masked_attention.cross_attention"]


def tiny_calls(op):
    return [call for call in kernel_calls(tiny_model(), 2, 0.75) if call.op == op]


def test_whatever_a_contender_raises_is_reported_and_the_others_go_on(monkeypatch):
    call = tiny_calls("swiglu.swiglu_linear")[0]

    def contenders(call):
        broken = bench_kernels.Contender(lambda *inputs: 1 / 0)
        return {"compile": broken, "eager": bench_kernels.Contender(call.function)}

    monkeypatch.setattr(bench_kernels, "contenders", contenders)
    found, error = bench_kernels.measure_row(call, ["eager", "compile"], CPU)
    assert found["compile"] == "failed: ZeroDivisionError: division by zero" and error is None
    assert found["eager"].both_ms > 0 and found["eager"].peak_mib is None
    assert bench_kernels.measure_row(call, ["eager"], CPU)[0].keys() == {"eager"}


class Calls(TorchFunctionMode):
    """Names of what is called; tensors that are asked for on a GPU come from the CPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **((kwargs or {}) | ({"device": "cpu"} if "device" in (kwargs or {}) else {})))


def test_the_cache_is_full_of_what_was_read_when_the_clock_starts(monkeypatch):
    """What is written last stays in the L2 cache, to be written back while the kernel is timed."""
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: mock.Mock(elapsed_time=lambda end: 0.5))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 2**10)
    calls, device = Calls(), torch.device("cuda")
    with calls:
        assert timing.median_milliseconds(lambda: calls.seen.append("timed"), device, repeats=2) == 0.5
    assert calls.seen == ["zeros", "sum", "timed", "sum", "timed"]


def test_contenders_do_the_same_work():
    """Attention on q and k that are normalised gives what the reference gives."""
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


def test_a_machine_without_a_gpu_measures_tiny_shapes(tmp_path):
    """Twice: the second run goes on with what the first did not measure, and keeps what it did."""
    command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), "--out", str(tmp_path), "--repeats", "2"]
    command += ["--tiny", "--contenders", "eager", "triton", "flash"]
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
    assert report["schema"] == SCHEMA and report["environment"]["gpu"] == "none"
    assert all(r["measured"]["eager"]["both_ms"] > 0 for r in report["rows"])
    assert {str(r["measured"]["triton"]) for r in report["rows"]} == {NOT_MEASURED}
    assert {r["error"] for r in report["rows"]} == {None}  # though TRITON_INTERPRET may be set: it was not asked for
    assert "tiny, mask 0.75, N 4" in done.stdout
    assert "tiny" in (tmp_path / "kernels.md").read_text()
