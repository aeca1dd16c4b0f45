"""tools/bench_checkpoint.py: writes in one layout, reads in another, and sees when a number is not what was written."""

import json
import runpy
import sys

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mdit.checkpoint.training_state import seal
from mdit.files import checksum
from tests.processes import run_forked
from tests.training import REPOSITORY, write_recipe

TOOL = str(REPOSITORY / "tools" / "bench_checkpoint.py")


def run_tool(arguments: list[str]) -> None:
    sys.argv = [TOOL, *arguments]
    runpy.run_path(TOOL, run_name="__main__")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What two processes that share experts have written; -> arguments, folder, what was printed."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = ["--recipe", str(write_recipe(folder)), "--dir", str(folder / "out")]
    ended = run_forked(run_tool, [*arguments, "--expert_parallel", "2"], processes=2)
    assert ended.returncode == 0, ended.output
    return arguments, folder / "out" / "step_00000001", ended.output


def test_two_processes_write_and_read(written):
    lines = written[2].splitlines()
    assert [line.split(":")[0] for line in lines] == ["save", "verify", "load, the same layout"]
    assert all("by 2 processes in" in line and "of host memory a process beyond its state" in line for line in lines)


@pytest.mark.parametrize("processes", [1, 4])
def test_another_layout_reads_it(written, processes):
    ended = run_forked(run_tool, [*written[0], "--load"], processes=processes)
    assert ended.returncode == 0, ended.output
    assert f"'expert_parallel': 2}} as {{'world_size': {processes}, 'expert_parallel': 1}}" in ended.output


def test_a_wrong_number_is_named(written):
    arguments, folder, _ = written
    file, state = folder / "rank_00001_000.safetensors", folder / "state.json"
    before = checksum(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["exp_avg/blocks.1.mlp.w1"][7] += 1
    save_file(tensors, file, metadata)
    values = json.loads(state.read_text(encoding="utf-8").replace(before, checksum(file)))
    state.write_text(json.dumps(seal(values)), encoding="utf-8")
    ended = run_forked(run_tool, [*arguments, "--load"])
    assert ended.returncode == 2 and "error: exp_avg/blocks.1.mlp.w1: not what was written" in ended.output


def test_the_copy_alone_writes_nothing(written):
    ended = run_forked(run_tool, [*written[0][:2], "--copy"])
    assert ended.returncode == 0, ended.output
    labels = [line.split(":")[0] for line in ended.output.splitlines() if " of host memory a process " in line]
    assert labels == ["memory for a copy", *["look for NaN", "copy"] * 3]
    ended = run_forked(run_tool, written[0][:2])
    assert ended.returncode == 2 and "error: --dir: has to say where" in ended.output


def test_experts_that_do_not_come_out_even(written):
    ended = run_forked(run_tool, [*written[0], "--expert_parallel", "3"], processes=2)
    assert ended.returncode == 2 and "--expert_parallel 3" in ended.output
