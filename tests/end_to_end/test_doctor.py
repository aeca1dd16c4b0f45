"""The look at machine and run before a run: what it finds, on every rank alike, and what it leaves behind."""

import re
import time

import pytest
import torch

from mdit.bench import doctor
from mdit.config import load_config
from mdit.dist import World
from mdit.train.run import resolve_run
from tests.processes import run_forked
from tests.training import REPOSITORY, launch, write_ds_json, write_recipe, write_toml

ALONE = World(0, 1, 0, torch.device("cpu"))
LOOKS = ("processes", "versions", "device", "cores", "clocks", "gloo", "NCCL", "open files", "locked memory")
OF_A_RUN = ("shared memory", "caches", "recipe", "data", "run directory")


def examined(folder, *extra, processes=1, **options):
    given = ["--recipe", str(folder / "recipe.json"), "--ds_config", str(write_ds_json(folder / "ds.json"))]
    script = str(REPOSITORY / "tools" / "doctor.py")
    arguments = [*given, "--run_dir", str(folder / "run"), *extra]
    ended = run_forked(options.pop("launched", launch), script, arguments, processes=processes, **options)
    found = re.findall(r"^(ok|slow|fails) +(\S.*?)  +(.*)$", ended.output, re.MULTILINE)
    return ended.returncode, {what: (state, told) for state, what, told in found}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_machine_that_can_train(tmp_path, processes):
    write_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, found = examined(tmp_path, processes=processes)
    assert code == 0 and [*found] == [*LOOKS, *OF_A_RUN]
    assert {state for state, _ in found.values()} <= {"ok", "slow"}
    assert found["processes"][1].startswith(f"{processes}, ") and "64 samples" in found["data"][1]
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "ds.json") == before


def test_a_recipe_that_cannot_run_is_named_and_all_else_is_told(tmp_path):
    write_recipe(tmp_path)
    code, found = examined(tmp_path, "--set", "model.dim=7")
    assert code == 1 and found["recipe"] == (
        "fails",
        f"{tmp_path / 'recipe.json'}: model: dim 7 is not a multiple of head_dim 8",
    )
    assert "data" not in found and found["caches"][0] == "ok"


def test_a_run_is_looked_at_with_the_arguments_of_its_launcher(tmp_path):
    """Weights to start from, a stage of a plan: what the trainer would refuse is found before."""
    written = write_recipe(tmp_path)
    code, found = examined(tmp_path, "--init_from", str(tmp_path / "nothing"), "--with_moments")
    assert code == 1 and found["recipe"][0] == "fails" and str(tmp_path / "nothing") in found["recipe"][1]
    write_toml(tmp_path / "first.toml", load_config(written, ["name=first"]))
    (tmp_path / "plan.toml").write_text(
        'name = "plan"\nstages = ["first.toml", { name = "second", recipe = "first.toml" }]\n'
    )
    code, found = examined(tmp_path, "--plan", str(tmp_path / "plan.toml"), "--stage", "second")
    assert code == 1 and found["recipe"][1].startswith(f"{tmp_path / 'run' / 'first'}: first has not ended")
    code, found = examined(tmp_path, "--plan", str(tmp_path / "plan.toml"), "--stage", "first")
    assert code == 0 and str(tmp_path / "run" / "first") in found["recipe"][1]


def spoil_rank_1(script, arguments):
    """The second rank's clock goes wrong, and one of its packages is another version."""
    import os

    from mdit.bench import doctor

    if os.environ["RANK"] == "1":
        clock, versions = time.time, doctor.package_versions
        doctor.time.time = lambda: clock() + 90
        doctor.package_versions = lambda *names: versions(*names) | ({} if names else {"torch": "1.0"})
    launch(script, arguments)


def test_what_is_wrong_on_one_rank_is_told_with_it(tmp_path):
    write_recipe(tmp_path)
    code, found = examined(tmp_path, processes=2, launched=spoil_rank_1)
    assert code == 1 and found["clocks"] == ("slow", "90.0 s apart: times in logs and of files mislead")
    state, told = found["versions"]
    assert state == "fails" and re.fullmatch(r"rank 0 has torch \S+, rank 1 has 1\.0", told)


@pytest.mark.parametrize(
    "error, state, told",
    [
        (doctor.Slow("half as fast"), "slow", "half as fast"),
        (OSError(5, "Input/output error", "/data"), "fails", "/data: Input/output error"),
        (RuntimeError("NCCL error"), "fails", "NCCL error"),
    ],
)
def test_what_a_look_raises_is_a_finding(error, state, told):
    def look():
        raise error

    found = doctor._examined(ALONE, "disk", look)
    assert (found.state, found.what) == (state, "disk") and told in found.told
    assert found.line.split()[0] == state


def test_a_directory_without_room_fails(tmp_path, monkeypatch):
    write_recipe(tmp_path)
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("mdit.train.run_directory.shutil.disk_usage", lambda place: usage._replace(free=1000))
    given = dict(overrides=(), run_dir=tmp_path / "run", init_from=None, restart=False, world=ALONE)
    run = resolve_run(tmp_path / "recipe.json", write_ds_json(tmp_path / "ds.json"), **given)
    *_, last = doctor.examine(ALONE, lambda: run)
    assert (last.what, last.state) == ("run directory", "fails") and "are free, but two checkpoints" in last.told


@pytest.mark.parametrize(
    "most, state", [(64, "fails"), (512, "slow"), (4096, "ok"), (doctor.resource.RLIM_INFINITY, "ok")]
)
def test_open_files_are_counted_as_far_as_they_may_be_raised(monkeypatch, most, state):
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda what: (32, most))
    assert doctor._examined(ALONE, "open files", doctor._open_files).state == state


def test_processes_beyond_the_cores_are_slow(monkeypatch):
    monkeypatch.setattr(doctor, "processes_here", lambda world: 2)
    for cores, state in ((1, "slow"), (2, "ok")):
        monkeypatch.setattr(doctor, "cores", lambda cores=cores: cores)
        assert doctor._examined(ALONE, "cores", lambda: doctor._cores(ALONE)).state == state
