"""What `build_loader` refuses, which engine it takes, and how its threads go about reading."""

import importlib.util
import threading
import time

import numpy as np
import pytest
import torch

from mdit.config import UserError
from mdit.data import prefetcher
from mdit.data.loader import NativeLoader, choose_engine
from mdit.data.shards import LatentSet, open_dataset
from tests.latent_sets import ENCODERS, is_right, loader, write_set


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    return [write_set(folder / "a", 40), write_set(folder / "b", 27, first=40)]


def test_a_batch_that_the_ranks_cannot_share(directories):
    with pytest.raises(UserError, match="global_batch_size = 16 is not a multiple of the 3 processes"):
        loader(directories, world_size=3)


def test_a_set_smaller_than_a_batch_or_its_share(directories):
    with pytest.raises(UserError, match="67 samples .*global_batch_size = 68"):
        loader(directories, batch=68)
    with pytest.raises(UserError, match=r"data.train\[1\]: 27 samples, but data.weights gives it 30"):
        loader(directories, batch=60, weights=[1, 1])


def test_directories_that_do_not_fit_together(tmp_path, directories):
    other_shape = write_set(tmp_path / "shape", 4, shape=(2, 8, 8))
    with pytest.raises(UserError, match=r"latent_shape is \(2, 4, 4\) and \(2, 8, 8\)"):
        loader([directories[0], other_shape])
    other_scale = {**ENCODERS, "image": {"id": "pixels", "scale": 2.0}}
    with pytest.raises(UserError, match=r"encoders.image.scale is 1.0 and 2.0"):
        loader([directories[0], write_set(tmp_path / "scale", 4, encoders=other_scale)])
    texts = [
        {**ENCODERS["text"], "id": id, "weights": digit * 16} for id, digit in (("a", "1"), ("a", "2"), ("b", "1"))
    ]
    here, replaced, moved = [
        write_set(tmp_path / str(number), 4, encoders={**ENCODERS, "text": text}) for number, text in enumerate(texts)
    ]
    with pytest.raises(UserError, match="encoders.text.weights is '1111111111111111' and '2222222222222222'"):
        loader([here, replaced], batch=4)
    with loader([here, moved], batch=4):
        pass  # the same tower in another place
    with pytest.raises(UserError, match="embeddings is f16 and i8b64"):
        loader([directories[0], write_set(tmp_path / "bits", 4, embeddings="i8b64")])


@pytest.mark.parametrize(
    "wanted, device, installed, engine",
    [
        ("auto", "cpu", True, "native"),
        ("auto", "cuda", False, "native"),
        ("auto", "cuda", True, "dali"),
        ("native", "cuda", True, "native"),
        ("dali", "cpu", True, "dali"),
    ],
)
def test_the_engine_that_is_taken(monkeypatch, wanted, device, installed, engine):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert choose_engine(wanted, torch.device(device))[0] == engine
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="data_engine = 'dali', but DALI is not installed: pip install"):
        choose_engine("dali", torch.device("cpu"))


def test_buffers_are_used_again_once_nobody_holds_the_batch(directories):
    with loader(directories) as batches:
        assert isinstance(batches, NativeLoader)
        held, seen = next(batches), set()
        for _ in range(40):
            batch = next(batches)
            assert batch.latents_NCHW.data_ptr() != held.latents_NCHW.data_ptr()
            seen.add(batch.latents_NCHW.data_ptr())
        assert len(seen) <= prefetcher.AHEAD + 2  # read ahead, the one in hand and the one before it
        assert is_right(held)


@pytest.mark.parametrize("slow", [True, False])
def test_threads_read_side_by_side_where_reading_is_slow(directories, monkeypatch, slow):
    monkeypatch.setattr(prefetcher, "SLOW", 0 if slow else 1e9)
    readers, read_row = [], LatentSet.read_row

    def watched(*args):
        readers.append(threading.current_thread().name)
        time.sleep(0.001)
        return read_row(*args)

    monkeypatch.setattr(LatentSet, "read_row", watched)
    with loader(directories, batch=32) as batches:
        assert all(is_right(next(batches)) for _ in range(4))
    first, later = readers[:32], readers[32:]
    assert len(set(first)) > 1  # nothing is known yet
    assert len(set(later)) > 1 if slow else set(later) == {"mdit-read-ahead"}


def test_whatever_goes_wrong_in_the_threads_reaches_the_consumer(directories):
    def rows(step):
        if step == 3:
            raise ZeroDivisionError("no such step")
        return np.arange(8)

    reading = prefetcher.Prefetcher([open_dataset(directories[0])], rows, start_step=1, device=torch.device("cpu"))
    assert [reading.take().step for _ in range(2)] == [1, 2]
    with pytest.raises(ZeroDivisionError, match="no such step"):
        reading.take()
    with pytest.raises(StopIteration):
        reading.take()


def test_the_thread_that_pins_memory_is_on_the_gpu_of_its_process(directories, monkeypatch):
    current, found, device = threading.local(), [], torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    new_buffer = prefetcher._free_buffer

    def watched(queues, row_bytes, num_rows, pinned):
        found.append((pinned, getattr(current, "device", None)))
        return new_buffer(queues, row_bytes, num_rows, pinned=False)

    monkeypatch.setattr(prefetcher, "_free_buffer", watched)
    reading = prefetcher.Prefetcher([open_dataset(directories[0])], lambda step: np.arange(4), 0, device)
    reading.take()
    reading.close()
    assert {*found} == {(True, device)}
