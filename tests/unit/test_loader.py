"""Reading in order: every rank its rows, from any step, with errors that reach the consumer and threads that end."""

import os
import subprocess
import sys
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.config import UserError
from mdit.data.loader import build_loader
from mdit.data.order import GlobalOrder
from mdit.data.shards import ShardError, ShardWriter, open_dataset

ENCODERS = {"image": {"id": "pixels", "scale": 1.0}, "text": {"id": "none"}}


def write_set(directory, samples, *, first=0, shape=(2, 4, 4), encoders=ENCODERS):
    """Sample i holds the number i everywhere."""
    with ShardWriter(directory, shape, (3, 4), encoders, {}, shard_bytes=30_000) as writer:
        for i in range(first, first + samples):
            latent, embedding = np.full(shape, i, np.float16), np.full((3, 4), -i, np.float16)
            writer.write(f"{i:05d}", latent, embedding, f"number {i}")
    return str(directory)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write_set(folder / "a", 40), write_set(folder / "b", 27, first=40)]


def loader(directories, *, start_step=0, rank=0, world_size=1, batch=8, seed=0):
    return build_loader(
        directories,
        global_batch_size=batch,
        seed=seed,
        start_step=start_step,
        rank=rank,
        world_size=world_size,
        device="cpu",
    )


def take(count, *args, **kwargs):
    with loader(*args, **kwargs) as batches:
        return list(islice(batches, count))


def test_batches_hold_what_the_order_says(directories):
    sizes = [size for directory in directories for size in open_dataset(directory).shard_sizes]
    order = GlobalOrder(sizes, 8, seed=5)
    batches = take(20, directories, seed=5)  # more than two epochs of 8 batches
    assert [batch.step for batch in batches] == list(range(20))
    for step, batch in enumerate(batches):
        assert np.array_equal(batch.samples, order.batch(step))
        assert batch.latents_NCHW.shape == (8, 2, 4, 4) and batch.latents_NCHW.dtype == torch.float16
        assert batch.captions_NLC.shape == (8, 3, 4) and batch.captions_NLC.dtype == torch.float16
        ids = torch.from_numpy(batch.samples).half()
        assert (batch.latents_NCHW == ids[:, None, None, None]).all()
        assert (batch.captions_NLC == -ids[:, None, None]).all()
        assert batch.texts == [f"number {i}" for i in batch.samples]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 40), st.integers(0, 3))
def test_ranks_together_read_the_global_batch_from_any_step(directories, world_size, start_step, seed):
    whole = take(3, directories, seed=seed, start_step=start_step)
    parts = [
        take(3, directories, seed=seed, start_step=start_step, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert batch.step == start_step + step
        assert np.array_equal(batch.samples, np.concatenate([part[step].samples for part in parts]))
        assert torch.equal(batch.latents_NCHW, torch.cat([part[step].latents_NCHW for part in parts]))


def test_resuming_gives_the_batches_that_would_have_come(directories):
    straight = take(12, directories)
    for start in (1, 7, 8, 11):
        resumed = take(12 - start, directories, start_step=start)
        for a, b in zip(straight[start:], resumed, strict=True):
            assert a.texts == b.texts and torch.equal(a.captions_NLC, b.captions_NLC)


def test_a_batch_stays_as_it_is_while_later_ones_are_read(directories):
    with loader(directories) as batches:
        first = next(batches)
        before = first.latents_NCHW.clone()
        for _ in range(10):
            next(batches)
    assert torch.equal(first.latents_NCHW, before)


def test_a_damaged_shard_reaches_the_consumer(tmp_path):
    directory = write_set(tmp_path / "set", 40)
    with loader([directory], batch=40) as batches:
        next(batches)
        for shard in sorted((tmp_path / "set").glob("*.tar")):
            os.truncate(shard, 1000)
        with pytest.raises(ShardError, match=r"shard_0000\d.tar: sample \d+ of the set is damaged"):
            for _ in range(10):  # some batches were read before the shards were cut
                next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_closing_ends_the_thread(directories):
    def running():
        return [thread for thread in threading.enumerate() if thread.name == "mdit-read-ahead"]

    batches = loader(directories)
    next(batches)
    assert len(running()) == 1
    batches.close()
    batches.close()
    assert not running()
    with pytest.raises(StopIteration):
        next(batches)
    forgotten = loader(directories)
    del forgotten
    assert not running()


def test_the_interpreter_ends_with_a_loader_open(directories):
    program = (
        "from mdit.data.loader import build_loader\n"
        f"batches = build_loader({directories!r}, global_batch_size=8, seed=0, start_step=0, rank=0, world_size=1,"
        " device='cpu')\nprint(next(batches).step)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_a_batch_that_the_ranks_cannot_share(directories):
    with pytest.raises(UserError, match="global_batch_size = 8 is not a multiple of the 3 processes"):
        loader(directories, world_size=3)


def test_a_set_smaller_than_a_batch(directories):
    with pytest.raises(UserError, match="67 samples .*global_batch_size = 68"):
        loader(directories, batch=68)


def test_directories_that_do_not_fit_together(tmp_path, directories):
    other_shape = write_set(tmp_path / "shape", 4, shape=(2, 8, 8))
    with pytest.raises(UserError, match=r"latent_shape is \(2, 4, 4\) and \(2, 8, 8\)"):
        loader([directories[0], other_shape])
    other_scale = {**ENCODERS, "image": {"id": "pixels", "scale": 2.0}}
    with pytest.raises(UserError, match=r"encoders.image.scale is 1.0 and 2.0"):
        loader([directories[0], write_set(tmp_path / "scale", 4, encoders=other_scale)])


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu(directories):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    arguments = dict(global_batch_size=8, seed=0, start_step=0, rank=0, world_size=1)
    with build_loader(directories, device="cuda", **arguments) as batches:
        for batch, expected in zip(batches, take(30, directories)):
            assert batch.latents_NCHW.is_cuda and torch.equal(batch.latents_NCHW.cpu(), expected.latents_NCHW)
            assert torch.equal(batch.captions_NLC.cpu(), expected.captions_NLC)
