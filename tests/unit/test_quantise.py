"""`i8b64`: how far off a value may be, and one way to read it back, whoever reads."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mdit.data.quantise import BLOCK, dequantise, quantise, stored_bytes

halves = st.floats(-65504, 65504, width=16)  # all that are finite: zeros of both signs and subnormals included
embeddings = st.tuples(st.integers(1, 3), st.integers(1, 2)).flatmap(
    lambda size: arrays.arrays(np.float16, (size[0], size[1] * BLOCK), elements=halves)
)


def parts(stored, shape):
    """Values (L, C / 64, 64) and scales (L, C / 64, 1) in float64, taken from the bytes."""
    count = shape[0] * shape[1]
    values = np.frombuffer(stored[:count], np.int8).astype(np.float64).reshape(shape[0], -1, BLOCK)
    return values, np.frombuffer(stored[count:], "<f2").astype(np.float64).reshape(shape[0], -1, 1)


def read(stored, shape):
    return dequantise(torch.frombuffer(bytearray(stored), dtype=torch.uint8)[None], *shape)[0].numpy()


@given(embeddings)
def test_a_value_is_at_most_half_a_scale_off_before_it_is_rounded(embedding):
    stored = quantise(embedding)
    assert len(stored) == stored_bytes(*embedding.shape)
    values, scales = parts(stored, embedding.shape)
    blocks = embedding.astype(np.float64).reshape(values.shape)
    assert (np.abs(values) <= 127).all()
    assert (np.abs(values * scales - blocks) <= scales / 2).all()
    # No scale is larger than it must be: the next smaller fp16 number is below largest / 127.
    smaller = np.nextafter(scales.astype(np.float16), np.float16(-1)).astype(np.float64)
    assert (127 * smaller < np.abs(blocks).max(axis=2, keepdims=True) + (scales == 0)).all()


@given(embeddings)
def test_torch_reads_the_bits_that_numpy_computes(embedding):
    stored = quantise(embedding)
    values, scales = parts(stored, embedding.shape)
    expected = (values * scales).astype(np.float16).reshape(embedding.shape)  # exact in float64, one rounding
    found = read(stored, embedding.shape)
    assert np.isfinite(found).all()
    assert np.array_equal(found.view(np.uint16), expected.view(np.uint16))


def test_every_scale_times_every_value_is_rounded_once():
    scales = np.arange(2**15, dtype=np.uint16).view(np.float16)
    scales = scales[scales <= 515.5]  # what quantise writes
    values = np.tile(np.arange(-127, 1, dtype=np.int8), (len(scales), 1))  # (scales, 2 blocks)
    stored = np.concatenate([values.view(np.uint8), np.repeat(scales, 2).reshape(-1, 2).view(np.uint8)], axis=1)
    found = dequantise(torch.from_numpy(stored), 1, 2 * BLOCK)
    expected = (values.astype(np.float64) * scales[:, None].astype(np.float64)).astype(np.float16)
    assert np.array_equal(found.numpy()[:, 0].view(np.uint16), expected.view(np.uint16))


def test_rows_of_a_batch_are_read_each_with_its_own_scales():
    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(5, 3, 2 * BLOCK)) * 10.0 ** np.arange(-3, 2)[:, None, None]).astype(np.float16)
    stored = [quantise(embedding) for embedding in batch]
    rows = torch.from_numpy(np.stack([np.frombuffer(row, np.uint8) for row in stored]))
    wider = torch.nn.functional.pad(rows, (6, 10))[:, 6:-10]  # as a slice of longer rows
    for found in (dequantise(rows, 3, 2 * BLOCK), dequantise(wider, 3, 2 * BLOCK)):
        assert found.shape == (5, 3, 2 * BLOCK) and found.dtype == torch.float16
        for row, one in zip(found, stored):
            assert np.array_equal(row.numpy(), read(one, (3, 2 * BLOCK)))
