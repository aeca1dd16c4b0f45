"""The order of samples: a function of (seed, step), a permutation within every epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.config import UserError
from mdit.data.order import GlobalOrder

shard_lists = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)


@st.composite
def orders(draw):
    sizes = draw(shard_lists)
    return dict(
        shard_sizes=sizes,
        global_batch_size=draw(st.integers(1, sum(sizes))),
        seed=draw(st.integers(0, 2**40)),
        group=draw(st.integers(1, 5)),
    )


@settings(max_examples=100, deadline=None)
@given(orders(), st.integers(0, 3))
def test_an_epoch_repeats_no_sample_and_drops_less_than_a_batch(arguments, epoch):
    order = GlobalOrder(**arguments)
    steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
    batches = [order.batch(step) for step in steps]
    assert all(batch.shape == (order.global_batch_size,) and batch.dtype == np.int64 for batch in batches)
    seen = np.concatenate(batches)
    assert len(np.unique(seen)) == len(seen)
    assert seen.min() >= 0 and seen.max() < order.samples
    assert 0 <= order.samples - len(seen) < order.global_batch_size


@settings(max_examples=100, deadline=None)
@given(orders(), st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_batch_depends_on_nothing_that_was_asked_before(arguments, steps):
    used = GlobalOrder(**arguments)
    for step in steps:
        assert np.array_equal(used.batch(step), GlobalOrder(**arguments).batch(step))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_a_window_of_shards_is_read_before_the_next(group, seed):
    sizes = [10] * 8
    order = GlobalOrder(sizes, 10 * group, seed, group)
    for step in range(8 // group):
        assert len(np.unique(order.batch(step) // 10)) == group


def test_epochs_and_seeds_differ_and_seed_0_is_a_seed():
    sizes = [50] * 4
    first_batches = [GlobalOrder(sizes, 100, seed).batch(step) for seed in (0, 1, 2) for step in (0, 2, 4)]
    assert len({batch.tobytes() for batch in first_batches}) == len(first_batches)
    assert not np.array_equal(first_batches[0], np.arange(100))


def test_samples_are_mixed_across_the_shards_of_a_window():
    batch = GlobalOrder([100] * 8, 80, seed=0).batch(0)
    assert len(np.unique(batch // 100)) == 8


def test_the_order_never_changes():
    """A new version of anything that reorders samples would break the resume of every run: notice it."""
    order = GlobalOrder([7, 5, 9], 4, seed=3, group=2)
    assert [order.batch(step).tolist() for step in (0, 4, 5)] == [[7, 18, 14, 10], [4, 5, 3, 1], [17, 14, 20, 7]]


def test_a_set_smaller_than_one_batch_names_both_numbers():
    with pytest.raises(UserError, match="63 samples .*global_batch_size = 64"):
        GlobalOrder([40, 23], 64, seed=0)
