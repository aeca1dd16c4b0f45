"""Checkpoints on disk: complete or absent, checked before use, tied to their layout."""

import json
import shutil

import pytest
import torch
import torch.distributed

from mdit.config import UserError
from mdit.dist import World
from mdit.train import checkpoint
from mdit.train.checkpoint import complete_checkpoints, latest_step, load_latest, save_training_state

WORLD = World(0, 1, 0, torch.device("cpu"))
LAYOUT = {"world_size": 1, "zero_stage": 2, "bf16": False}


@pytest.fixture(autouse=True)
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def save(directory, step, keep=2):
    tensors = {"weights": torch.full((3,), float(step)), "step": torch.tensor(step)}
    save_training_state(directory, step, tensors, layout=LAYOUT, world=WORLD, keep=keep)


def load(directory, layout=LAYOUT):
    return load_latest(directory, layout=layout, world=WORLD)


def test_newest_comes_back(tmp_path):
    assert load(tmp_path) is None and latest_step(tmp_path) == 0
    for step in (5, 10):
        save(tmp_path, step)
    step, tensors = load(tmp_path)
    assert step == latest_step(tmp_path) == 10
    assert tensors["weights"].tolist() == [10.0] * 3 and tensors["step"].item() == 10


def test_newest_k_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


def test_same_step_can_be_written_again(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3)
    assert load(tmp_path)[0] == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_one_is_passed_over(tmp_path, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = tmp_path / "step_00000002" / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-2] ^= 4
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    assert load(tmp_path)[0] == 1


def test_failure_before_the_rename_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full_disk(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert load(tmp_path)[0] == 1
    save(tmp_path, 2)  # over what was left
    assert load(tmp_path)[0] == 2 and not list(tmp_path.glob("*.partial"))


def test_without_state_json_it_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000009")
    (tmp_path / "step_00000009" / "state.json").unlink()
    assert load(tmp_path)[0] == 1


@pytest.mark.parametrize("key, value", [("world_size", 2), ("zero_stage", 3), ("bf16", True)])
def test_another_layout_is_refused_with_both_named(tmp_path, key, value):
    save(tmp_path, 1)
    with pytest.raises(UserError) as caught:
        load(tmp_path, LAYOUT | {key: value})
    assert f"'{key}': {LAYOUT[key]}" in str(caught.value) and f"'{key}': {value}" in str(caught.value)


def test_state_names_every_file(tmp_path):
    save(tmp_path, 1)
    state = json.loads((tmp_path / "step_00000001" / "state.json").read_text())
    size = (tmp_path / "step_00000001" / "rank_00000.safetensors").stat().st_size
    assert state["files"]["rank_00000.safetensors"]["bytes"] == size and state["layout"] == LAYOUT
