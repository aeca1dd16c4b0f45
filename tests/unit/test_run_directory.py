"""A run directory: whose it is, what a run goes on from, and what it refuses before anything is written over."""

import errno
import json
import os
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch

from mdit.bench.tiny import ENCODERS
from mdit.checkpoint import training_state
from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.snapshot import save_snapshot
from mdit.checkpoint.training_state import complete_checkpoints, find_latest, load_into, save_training_state
from mdit.config import UserError
from mdit.dist import World
from mdit.files import clean_leftovers, replacing_directory
from mdit.parallel.shard import WHOLE
from mdit.train import run_directory
from mdit.train.run_directory import RunDirectory, check_place
from mdit.train.saver import Saver
from tests.recipes import tiny_config
from tests.training import run_in_processes

WORLD = World(0, 1, 0, torch.device("cpu"))


pytestmark = pytest.mark.usefixtures("group_of_one", "impatient")


@pytest.fixture
def config(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(f'{{"made up": "{name}"}}', encoding="utf-8")
    data = {"train": [str(tmp_path / "train")], "validation": str(tmp_path / "validation")}
    return tiny_config(data=data, training={"num_steps": 20})


def opened(path, config, *, restart=False, init_from=None) -> RunDirectory:
    directory = RunDirectory(path, WORLD, restart=restart)
    description = {"recipe": config.model_dump(mode="json", exclude_none=True), "world_size": 1}
    with directory:
        directory.begin(config, description, init_from, has_weights=init_from is not None)
    return directory


def save(directory: RunDirectory, step: int, world: World = WORLD) -> None:
    save_training_state(
        directory.path / "checkpoints",
        step,
        {"master": [torch.full((4,), float(step))]},
        [Fragment("weights", (4 * world.size,), WHOLE, 4 * world.rank, 4, 0, 0)],
        numbers={"loss_sum": float("nan")},
        run=directory.run,
        layout={},
        world=world,
        keep=2,
    )


def begun(path, config, *steps: int) -> Path:
    """A run that was killed after the checkpoints of `steps`; -> its directory."""
    directory = opened(path, config)
    for step in steps:
        save(directory, step)
        with (path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(f'{{"step": {step}}}\n')
    return path


def damage(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def content(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_every_start_is_written_down(tmp_path, config):
    path = begun(tmp_path / "run", config, 2)
    (path / "starts.jsonl").open("a", encoding="utf-8").write('{"torn')
    assert opened(path, config).checkpoint.step == 2
    first, torn, second = (path / "starts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["step"] == 0 and json.loads(second)["step"] == 2 and "host" in json.loads(second)
    assert not (path / "run.lock").exists()


def test_damaged_checkpoints_are_never_a_fresh_start(tmp_path, config):
    path = begun(tmp_path / "run", config, 2, 4)
    for each in complete_checkpoints(path / "checkpoints"):
        damage(each)
    before = content(path)
    with pytest.raises(UserError, match=r"step_00000004: rank_00000_000.*step_00000002: rank_00000_000.*--restart"):
        opened(path, config)
    assert content(path) == before
    assert opened(path, config, restart=True).checkpoint is None
    assert {f"before_1/{name}" for name in before} <= content(path).keys()


@pytest.mark.parametrize("lost", ["all", "set aside"])
def test_lost_checkpoints_are_never_a_fresh_start(tmp_path, config, lost):
    path = begun(tmp_path / "run", config, 2, 4)
    if lost == "all":
        shutil.rmtree(path / "checkpoints")
    else:
        shutil.rmtree(path / "checkpoints" / "step_00000002")
        (path / "checkpoints" / "step_00000004").rename(path / "checkpoints" / "step_00000004.damaged")
    before = content(path)
    with pytest.raises(UserError, match="has been at step 4.*--restart"):
        opened(path, config)
    assert content(path) == before


@pytest.mark.parametrize("reported", [1, 2])
def test_killed_before_its_first_checkpoint_it_begins_again(tmp_path, config, reported):
    path = begun(tmp_path / "run", config)  # whose first checkpoint is due at step 2, after that step's report
    (path / "metrics.jsonl").write_text(f'{{"step": {reported}}}\n', encoding="utf-8")
    assert opened(path, config).checkpoint is None


@pytest.mark.parametrize("unfinished, reported, begins", [(2, 4, True), (2, 5, False), (4, 4, False)])
def test_killed_while_its_first_checkpoint_is_written_it_begins_again(tmp_path, config, unfinished, reported, begins):
    """Steps are reported meanwhile, up to the second checkpoint, which waits. A refused start changes nothing."""
    path = begun(tmp_path / "run", config)
    (path / f"checkpoints/.step_{unfinished:08d}.partial").mkdir(parents=True)
    (path / "metrics.jsonl").write_text(f'{{"step": {reported}}}\n', encoding="utf-8")
    before = content(path)
    with pytest.raises(UserError, match="seed"):
        opened(path, config.model_copy(update={"seed": 7}))
    assert content(path) == before
    if begins:
        assert opened(path, config).checkpoint is None
        save(opened(path, config), 2)
        assert opened(path, config).checkpoint.step == 2
    else:
        with pytest.raises(UserError, match=f"has been at step {reported}.*--restart"):
            opened(path, config)


def test_a_passing_error_of_the_disk_loses_no_checkpoint(tmp_path, config, monkeypatch):
    path = begun(tmp_path / "run", config, 2, 4)
    read, failures = training_state.read_bytes, [errno.EIO, errno.EACCES]

    def failing(file):
        if file.name == "state.json" and "step_00000004" in str(file) and failures:
            raise OSError(failures.pop(), "fails", str(file))
        return read(file)

    monkeypatch.setattr(training_state, "read_bytes", failing)
    assert opened(path, config).checkpoint.step == 4
    failures += [errno.EIO] * 9
    with pytest.raises(UserError, match="step_00000004/state.json: cannot be read"):
        opened(path, config)
    assert [each.name for each in complete_checkpoints(path / "checkpoints")] == ["step_00000004", "step_00000002"]


def test_checkpoints_that_cannot_be_listed_are_never_a_fresh_start(tmp_path, config, monkeypatch):
    path = begun(tmp_path / "run", config, 2)
    before, iterate = content(path), Path.iterdir

    def closed(folder):
        if folder.name == "checkpoints":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return iterate(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(OSError, match="Permission denied: .*checkpoints"):
        opened(path, config)
    monkeypatch.undo()
    assert content(path) == before


def test_a_file_that_shows_late_is_not_missing(tmp_path, config, monkeypatch):
    path = begun(tmp_path / "run", config, 2)
    measure, failures = training_state.measure, [FileNotFoundError(errno.ENOENT, "not yet")]

    def late(file):
        if failures:
            raise failures.pop()
        return measure(file)

    monkeypatch.setattr(training_state, "measure", late)
    assert opened(path, config).checkpoint.step == 2


def test_only_exact_names_are_checkpoints(tmp_path, config):
    path = begun(tmp_path / "run", config, 2)
    for name in ("step_00000002_2", "step_00000003-copy1", "step_00000004.bak2", "step_3", "step_000000005"):
        shutil.copytree(path / "checkpoints" / "step_00000002", path / "checkpoints" / name)
    assert opened(path, config).checkpoint.path.name == "step_00000002"
    shutil.copytree(path / "checkpoints" / "step_00000002", path / "checkpoints" / "step_00000009")
    assert opened(path, config).checkpoint.step == 2  # the other says that it is of step 2
    assert (path / "checkpoints" / "step_00000009.damaged").exists()


def test_state_json_has_a_checksum_of_its_own(tmp_path, config):
    path = begun(tmp_path / "run", config, 2, 4)
    state = path / "checkpoints" / "step_00000004" / "state.json"
    state.write_text(state.read_text(encoding="utf-8").replace('"nan"', '"0.5"'), encoding="utf-8")
    assert opened(path, config).checkpoint.step == 2


@pytest.mark.parametrize("key, change", [("model.dim", {"model": {"dim": 64}}), ("seed", {"seed": 5})])
def test_another_recipes_checkpoint_is_refused_without_config_json(tmp_path, config, key, change):
    path = begun(tmp_path / "run", config, 2)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=f"state.json: this run was started with {key} = "):
        opened(path, tiny_config(data=config.data.model_dump(mode="json"), **change))


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path, config):
    path = begun(tmp_path / "run", config, 2)
    found = find_latest(path / "checkpoints", WORLD)
    with pytest.raises(UserError, match=r"weights has shape \(4,\), the recipe's model needs \(2,\)"):
        smaller = [Fragment("weights", (2,), WHOLE, 0, 2, 0, 0)]
        load_into(found, {"master": [torch.zeros(2)]}, smaller, layout={}, world=WORLD)


def test_leftovers_of_killed_saves_are_removed(tmp_path, config):
    path = begun(tmp_path / "run", config, 2)
    for name in (".step_00000004.partial", ".step_00000002.removed"):
        shutil.copytree(path / "checkpoints" / "step_00000002", path / "checkpoints" / name)
    for name in (".config.json.partial", ".train.partial"):  # the other is a set in the making
        (path / name).touch()
    opened(path, config)
    assert [file.name for file in (path / "checkpoints").iterdir()] == ["step_00000002"]
    assert not (path / ".config.json.partial").exists() and (path / ".train.partial").exists()


def test_a_kill_between_two_renames_loses_neither(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    (tmp_path / "a").rename(tmp_path / ".a.replaced")
    clean_leftovers(tmp_path, lambda name: name == "a")
    assert (tmp_path / "a" / "old").exists() and len(list(tmp_path.iterdir())) == 1
    with replacing_directory(tmp_path / "a") as partial:
        (partial / "new").touch()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["new"]


def test_other_samples_are_refused(tmp_path, config):
    path = begun(tmp_path / "run", config, 2)
    (tmp_path / "train" / "manifest.json").write_text('{"made up": "other"}', encoding="utf-8")
    for lost in (None, "config.json"):
        if lost:
            (path / lost).unlink()
        with pytest.raises(UserError, match=f"other samples in {config.data.train[0]}"):
            opened(path, config)


def snapshot(path: Path, config, step: int) -> Path:
    raw = {"weights": torch.full((4,), float(step))}
    recipe = {"recipe": config.model_dump(mode="json", exclude_none=True)}
    save_snapshot(path / f"step_{step:08d}", step=step, config_json=recipe, raw=raw, ema=raw, encoders=ENCODERS)
    return path / f"step_{step:08d}"


def test_first_weights_are_remembered(tmp_path, config):
    """Killed before its first checkpoint, a run does not go on from other weights, or from none."""
    first, other = (snapshot(tmp_path / "snapshots", config, step) for step in (1, 2))
    directory = opened(tmp_path / "run", config, init_from=first)
    for init_from in (None, other):
        with pytest.raises(UserError, match=r"begun with --init_from .*step_00000001 \(xxh3 .*now it is"):
            opened(tmp_path / "run", config, init_from=init_from)
    assert opened(tmp_path / "run", config, init_from=first).checkpoint is None
    save(directory, 2)
    shutil.rmtree(first)  # no longer needed
    for init_from in (None, first):
        again = opened(tmp_path / "run", config, init_from=init_from)
        assert again.checkpoint.step == 2 and again.run["initial_weights"]["snapshot"] == str(first)
    begun(tmp_path / "another", config, 2)
    with pytest.raises(UserError, match="begun without it"):
        opened(tmp_path / "another", config, init_from=other)


def test_a_moved_schedule_is_told(tmp_path, config, caplog):
    path = begun(tmp_path / "run", config, 20)
    opened(path, config)
    assert not caplog.text
    longer = config.model_copy(update={"training": config.training.model_copy(update={"num_steps": 200})})
    opened(path, longer)
    assert "num_steps was 20, now it is 200" in caplog.text and "from 0.00033 to 0.000986" in caplog.text


def put(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("", encoding="utf-8")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize(
    "name, kind",
    [
        ("", "file"),
        ("", "link"),
        ("checkpoints", "file"),
        ("snapshots", "link"),
        ("metrics.jsonl", "directory"),
        ("config.json", "directory"),
        ("STOP", "directory"),
        ("run.lock", "directory"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, config, name, kind):
    path = tmp_path / "run"
    if name:
        path.mkdir()
    put(path / name if name else path, kind)
    with pytest.raises(UserError, match=f"{path / name if name else path}: is "):
        opened(path, config)
    with pytest.raises(UserError):
        check_place(path)


def test_a_read_only_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be written"):
        check_place(tmp_path / "runs" / "a")


def test_a_disk_that_will_be_full_is_refused(tmp_path, config, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 0, 6_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="0.00559 GiB are free, but two checkpoints and a snapshot need"):
        opened(tmp_path / "run", config)
    assert not (tmp_path / "run" / "config.json").exists()

    def unknown(path):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    opened(tmp_path / "run", config)


def open_apart(world: World, folder: Path) -> str:
    """On every rank a directory of its own, as on nodes that share none."""
    run_directory.SEEN_WITHIN = 0.2
    try:
        with RunDirectory(folder / str(world.rank), world):
            return "opened"
    except UserError as error:
        return str(error)


def save_with_a_full_disk(world: World, folder: Path) -> tuple[str, list[str]]:
    """Rank 1 cannot write its part of the checkpoint of step 4, and can again at step 6."""
    directory, write, told = RunDirectory(folder, world), training_state.save_tensors, []

    def full(tensors, path, metadata):
        if world.rank == 1 and "step_00000004" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path, metadata)

    training_state.save_tensors = full
    with directory, Saver(directory, world, background=True) as saver:
        for step in (2, 4, 6):
            saver.start("checkpoint", step, partial(save, directory, step, saver.world))
            try:
                saver.check_saved(step)
            except UserError as error:
                told.append(str(error))
            found = find_latest(folder / "checkpoints", world)
            told.append(str(found.step))
        saver.check_saved(6)
    return told


def test_nodes_that_do_not_share_it_are_found(tmp_path):
    first, second = run_in_processes(open_apart, 2, tmp_path)
    assert first == second and f"{tmp_path / '1'}: what rank 0 wrote there is not to be seen" in first
    assert "(rank 1 on " in first


def test_a_full_disk_of_one_rank_is_known_to_all(tmp_path):
    for before, error, kept, after in run_in_processes(save_with_a_full_disk, 2, tmp_path):
        assert (before, kept, after) == ("2", "2", "6") and "No space left on device (rank 1 on" in error
    assert not list((tmp_path / "checkpoints").glob(".*"))
