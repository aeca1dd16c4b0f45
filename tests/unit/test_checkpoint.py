"""Checkpoints on disk: complete or absent, checked before use, read back by any layout."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.checkpoint import training_state
from mdit.checkpoint.fragments import Fragment
from mdit.checkpoint.training_state import (
    Reader,
    complete_checkpoints,
    find_latest,
    latest_step,
    load_into,
    save_training_state,
    write_fragments,
)
from mdit.config import UserError
from mdit.dist import World
from mdit.parallel.shard import WHOLE, Shard

WORLD = World(0, 1, 0, torch.device("cpu"))
LAYOUT = {"world_size": 1, "zero_stage": 2, "bf16": False}
FRAGMENTS = [Fragment("weights", (3,), WHOLE, 0, 3, partition=0, offset=1)]


pytestmark = pytest.mark.usefixtures("group_of_one", "impatient")


def save(directory, step, keep=2, layout=LAYOUT):
    tensors = {"master": [torch.full((5,), float(step))]}
    save_training_state(
        directory,
        step,
        tensors,
        FRAGMENTS,
        numbers={"loss_sum": step / 3},
        run={},
        layout=layout,
        world=WORLD,
        keep=keep,
    )


def load(directory, layout=LAYOUT):
    """-> step, flat partition (zero where no fragment is), numbers of the newest that is whole; None without one."""
    if (found := find_latest(directory, WORLD)) is None:
        return None
    flat = torch.zeros(5)
    numbers = load_into(found, {"master": [flat]}, FRAGMENTS, layout=layout, world=WORLD)
    return found.step, flat.tolist(), numbers


def test_newest_comes_back(tmp_path):
    assert load(tmp_path) is None and latest_step(tmp_path) == 0
    for step in (5, 10):
        save(tmp_path, step)
    assert load(tmp_path) == (10, [0, 10, 10, 10, 0], {"loss_sum": 10 / 3}) and latest_step(tmp_path) == 10


def test_another_layout_is_taken_over_and_both_are_named(tmp_path, caplog):
    save(tmp_path, 5)
    with caplog.at_level("INFO", logger="mdit"):
        assert load(tmp_path, LAYOUT | {"zero_stage": 3}) == (5, [0, 5, 5, 5, 0], {"loss_sum": 5 / 3})
    assert "zero_stage 2" in caplog.text and "zero_stage 3" in caplog.text


def test_newest_k_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000004", "step_00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_one_is_passed_over_and_set_aside(tmp_path, damage, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (file,) = (tmp_path / "step_00000002").glob("*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-2] ^= 4
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    assert load(tmp_path)[0] == 1
    assert "step_00000002: damaged (rank_00000_000.safetensors" in caplog.text
    save(tmp_path, 2, keep=1)  # what is set aside is none of the one that is kept
    assert load(tmp_path)[0] == 2 and (tmp_path / "step_00000002.damaged").exists()


def test_a_rank_may_hold_nothing(tmp_path):
    files = [path.name for path in write_fragments(tmp_path, 3, {"master": [torch.empty(0)]}, [])]
    assert files == ["rank_00003_000.safetensors"]
    assert not Reader(training_state.Checkpoint(tmp_path, {"step": 1, "files": dict.fromkeys(files)}), ranks=[3]).stored


def test_files_are_written_one_after_the_other_and_kept_small(tmp_path, monkeypatch):
    monkeypatch.setattr(training_state, "MAX_FILE_BYTES", 4 * 250)
    fragments = [Fragment(f"p{i}", (100,), WHOLE, 0, 100, partition=0, offset=100 * i) for i in range(7)]
    files = write_fragments(tmp_path, 0, {"master": [torch.arange(700.0)]}, fragments)
    for count, file in enumerate(files, 1):
        assert len(list(tmp_path.iterdir())) == count and file.stat().st_size < 4 * 250 + 2000
    assert count == 4  # two fragments each


# Layouts made up: parameters cut over `groups` ranks, then the parts' elements, end to end, over `shares` ranks.


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    dim: int
    blocks: int  # cut along dim in this many blocks, or 0: never cut


def partitioned(parameters, groups: int, shares: int, order: int) -> list[list[Fragment]]:
    """-> fragments of each of groups * shares ranks. `order` 1 lays the parameters out backwards, in two partitions."""
    ranks = []
    for group in range(groups):
        for share in range(shares):
            fragments, offsets = [], [3, 0]  # padding in front
            for i, p in enumerate(parameters[:: -1 if order else 1]):
                shard = Shard(p.dim, group, groups, p.blocks) if p.blocks and groups > 1 else WHOLE
                shape = tuple(n // (shard.count if d == shard.dim else 1) for d, n in enumerate(p.shape))
                size = math.prod(shape)
                start, stop = size * share // shares, size * (share + 1) // shares
                if stop > start:
                    where = i % 2 if order else 0
                    fragments.append(Fragment(p.name, shape, shard, start, stop - start, where, offsets[where]))
                    offsets[where] += stop - start
            ranks.append(fragments)
    return ranks


def flats(fragments: list[Fragment]) -> list[torch.Tensor]:
    ends = [max([p.offset + p.numel for p in fragments if p.partition == i], default=0) for i in range(2)]
    return [torch.full((end,), math.nan) for end in ends]


def fill(fragments: list[Fragment], partitions, whole) -> None:
    for fragment in fragments:
        part = fragment.shard.take(whole[fragment.name]).flatten()
        fragment.of(partitions).copy_(part[fragment.start : fragment.start + fragment.numel])


PARAMETERS = [
    Parameter("experts", (8, 3, 5), 0, 1),
    Parameter("qkv", (24, 5), 0, 3),
    Parameter("proj", (5, 8), 1, 1),
    Parameter("bias", (8,), 0, 1),
    Parameter("norm", (7,), 0, 0),
    Parameter("one", (1,), 0, 0),
]
LAYOUTS = st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 1))


@given(LAYOUTS, LAYOUTS)
@settings(max_examples=30)
def test_any_layout_reads_what_any_other_wrote(tmp_path_factory, written, read):
    directory = tmp_path_factory.mktemp("checkpoint")
    whole = {p.name: torch.randn(p.shape) for p in PARAMETERS}
    files = {}
    for rank, fragments in enumerate(partitioned(PARAMETERS, *written)):
        partitions = flats(fragments)
        fill(fragments, partitions, whole)
        tensors = {"master": partitions, "exp_avg": [2 * flat for flat in partitions]}
        files |= {path.name: {} for path in write_fragments(directory, rank, tensors, fragments)}
    found = training_state.Checkpoint(directory, {"step": 1, "files": files})
    reader = Reader(found, ranks=range(written[0] * written[1]))
    for fragments in partitioned(PARAMETERS, *read):
        expected, got = flats(fragments), {"master": flats(fragments), "exp_avg": flats(fragments)}
        fill(fragments, expected, whole)
        for fragment in fragments:
            for kind, partitions in got.items():
                reader.fill(kind, fragment, fragment.of(partitions))
        for i, flat in enumerate(expected):
            torch.testing.assert_close(got["master"][i], flat, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(got["exp_avg"][i], 2 * flat, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "lost, message",
    [
        ("norm", "has no norm"),
        ("qkv", "holds 30 of 60 elements .* master/qkv"),
        ("experts", "holds 60 of 120 elements .* master/experts"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, lost, message):
    """A rank of the four that wrote knows nothing of a parameter; so does the file of the other one."""
    ranks = partitioned(PARAMETERS, 2, 2, 0)
    files = {}
    for rank, fragments in enumerate(ranks):
        kept = [p for p in fragments if p.name != lost or (lost != "norm" and p.start)]
        written = write_fragments(tmp_path, rank, {"master": [torch.zeros_like(f) for f in flats(fragments)]}, kept)
        files |= {path.name: {} for path in written}
    reader = Reader(training_state.Checkpoint(tmp_path, {"step": 1, "files": files}), ranks=range(4))
    (fragment,) = (fragment for fragment in partitioned(PARAMETERS, 1, 1, 0)[0] if fragment.name == lost)
    with pytest.raises(UserError, match=message):
        reader.fill("master", fragment, torch.empty(fragment.numel))


def test_a_part_of_qkv_has_whole_heads_of_each():
    """(3 * A, D) with A = 4, heads of 2: rank 1 of 2 has the second head of q, of k and of v."""
    rows = torch.arange(12).unsqueeze(1)
    assert Shard(0, 1, 2, blocks=3).take(rows).flatten().tolist() == [2, 3, 6, 7, 10, 11]
