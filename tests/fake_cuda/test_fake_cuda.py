"""Training on a GPU that is not there: every tensor is on this rank's device, and the host waits where it must.

The loop, DeepSpeed's CUDA accelerator and the reader's threads are those of a run (tests/fake_cuda/run.py): three
steps, EMA, a report, validation, samples, a snapshot and a checkpoint. Shapes, dtypes and devices are checked, numbers
are not.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from tests.fake_cuda.library import build, compiler
from tests.training import REPOSITORY

pytestmark = [
    pytest.mark.timeout(600),  # for a busy machine: alone it takes under a minute
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler ($CXX or c++) for the fake CUDA device"),
    pytest.mark.skipif(sys.platform != "linux", reason="the fake CUDA device is built for Linux"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built for CUDA and has the part that is faked"),
]


def scenario(stage: int, **keys) -> dict:
    """`keys` of the "mdit" section and of the run: rank, size, inject, steps, every, depth. Under ZeRO-2 gradients are
    accumulated twice."""
    run = {key: keys.pop(key) for key in ("rank", "size", "inject", "steps", "every", "depth") if key in keys}
    micro_batch = 16 // run.get("size", 1) // stage
    mdit = {"kernels": "triton", "data_engine": "native", **keys}
    return {
        "ds": {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}, "mdit": mdit},
        **run,
    }


SHORT = {"steps": 1, "every": 0, "depth": 1}
RUNS = {
    "ZeRO-1, rank 3 of 8": scenario(1, rank=3, size=8),
    "ZeRO-2, float8, selective recomputation": scenario(2, fp8=True, activation_checkpointing="selective"),
    "ZeRO-2, rank 3 of 8, in PyTorch": scenario(2, rank=3, size=8, kernels="reference", steps=1, every=0),
}
FAULTS = {
    "a wait in a step": scenario(1, inject="a wait in a step", **SHORT),
    "a batch on the CPU": scenario(1, inject="a batch on the CPU", **SHORT),
    "a model on the CPU": scenario(1, inject="a model on the CPU", **SHORT | {"every": 1}),
    "noise on another GPU": scenario(1, inject="noise on another GPU", rank=3, size=8, **SHORT),
    "a thread on another GPU": scenario(1, inject="a thread on another GPU", rank=3, size=8, **SHORT),
}

# Where the host may wait for the device, and why. A wait counts to the first of these that is at work.
ALLOWED = {
    # once a step
    "mdit/train/zero_step.py:global_norm": "ZeRO-1 decides by the gradient's norm whether the step is taken",
    "mdit/train/zero_step.py:scaled_global_norm": "ZeRO-2 too",
    "mdit/data/prefetcher.py:_free_buffer": "the reader's thread, for a copy that is a batch old",
    # once a run
    "mdit/train/engine.py:__init__": "weights go to the device",
    # once a report
    "mdit/train/meter.py:report": "the loss and the clock, every log_every steps",
    # evaluation, snapshots, checkpoints
    "mdit/train/evaluator.py:validate": "data to the device, sums to a file",
    "mdit/train/evaluator.py:sample": "captions to the device, pictures to a file",
    "mdit/train/skipped.py:require_finite": "nothing is saved that is not finite",
    "mdit/train/checkpointer.py:save_snapshot": "weights to a file",
    "mdit/train/checkpointer.py:_state": "the loss so far, and the steps that Adam took",
    "mdit/train/checkpointer.py:save": "state to files",
}
ONCE_A_STEP = ("mdit/train/zero_step.py:global_norm", "mdit/train/zero_step.py:scaled_global_norm")
# torch asks once, when it is imported, whether there is CUDA.
START = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); from tests.fake_cuda.run import main; main(*sys.argv[1:])"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What came of every run, by name."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    (folder / "scenarios.json").write_text(json.dumps(RUNS | FAULTS))
    command = [sys.executable, "-c", START, str(build()), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=580
    )
    assert ran.returncode == 0, ran.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS | FAULTS}


def places(run: dict) -> Counter:
    """How many waits there were in each place of ALLOWED; elsewhere, in the innermost function and what was done."""
    return Counter(
        next((frame for frame in frames if frame in ALLOWED), f"{kind}: {' < '.join(frames[:3])}")
        for kind, frames in run["waits"]
    )


@pytest.mark.parametrize("name", RUNS)
def test_a_run_waits_where_it_must_and_stays_on_its_gpu(found, name):
    run = found[name]
    assert run["error"] is None, run["error"]
    assert run["steps"] == (steps := RUNS[name].get("steps", 3))
    waits = places(run)
    assert not waits.keys() - ALLOWED.keys(), waits
    assert sum(waits[place] for place in ONCE_A_STEP) <= steps, "one wait a step"
    assert run["elsewhere"] == []
    assert {device for _, _, device in run["threads"]} == {RUNS[name].get("rank", 0)}
    assert ("pinned memory", "mdit-read-ahead") in {(what, thread) for what, thread, _ in run["threads"]}


def test_every_allowed_place_is_one_where_the_host_waits(found):
    waited = sum((places(found[name]) for name in RUNS), Counter())
    assert waited.keys() == ALLOWED.keys()


def test_a_wait_in_a_step_is_found(found):
    run = found["a wait in a step"]
    assert run["error"] is None, run["error"]
    assert places(run).keys() - ALLOWED.keys() == {"_local_scalar_dense: mdit/train/loop.py:train"}


@pytest.mark.parametrize("name", ["a batch on the CPU", "a model on the CPU"])
def test_a_tensor_on_the_cpu_that_meets_one_on_the_device_is_found(found, name):
    assert "Expected all tensors to be on the same device, but found at least two" in (found[name]["error"] or "")


def test_a_tensor_on_another_gpu_is_found(found):
    what, frames = found["noise on another GPU"]["elsewhere"][0]
    assert what == "randn on cuda:0" and "mdit/diffusion/edm.py:sample_noise" in frames


def test_a_thread_on_another_gpu_is_found(found):
    assert ["pinned memory", "mdit-read-ahead", 0] in found["a thread on another GPU"]["threads"]
