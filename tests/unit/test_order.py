"""The order of samples: a function of (seed, step), a permutation within every epoch, of one set or of several."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.config import UserError
from mdit.data.order import GlobalOrder, WeightedOrder, build_order, quotas

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


def test_the_order_never_changes():
    """A new version of anything that reorders samples would break the resume of every run: notice it."""
    order = GlobalOrder([7, 5, 9], 4, seed=3, group=2)
    assert [order.batch(step).tolist() for step in (0, 4, 5)] == [[7, 18, 14, 10], [4, 5, 3, 1], [17, 14, 20, 7]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 300))
def test_a_batch_is_shared_out_by_weight_to_the_nearest_whole_sample(weights, batch):
    shares = np.array(weights) / sum(weights) * batch
    if (np.floor(shares) == 0).any():  # such a set may get none
        weights, batch = [1.0] * len(weights), batch + len(weights)
        shares = np.full(len(weights), batch / len(weights))
    counts = quotas(weights, batch)
    assert sum(counts) == batch
    assert (np.abs(counts - shares) < 1).all()


mixtures = st.lists(st.tuples(shard_lists, st.integers(1, 5)), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(mixtures, st.integers(0, 2**40), st.integers(0, 20))
def test_a_mixed_batch_holds_the_quota_of_every_set_and_depends_on_the_step_alone(mixture, seed, step):
    sets = [shard_sizes for shard_sizes, _ in mixture]
    weights = [min(weight, sum(shard_sizes)) for shard_sizes, weight in mixture]
    batch_size = sum(weights)
    ends = np.cumsum([sum(shard_sizes) for shard_sizes in sets])
    order = WeightedOrder(sets, weights, batch_size, seed)
    batch = order.batch(step)
    assert batch.shape == (batch_size,) and batch.dtype == np.int64
    assert np.bincount(np.searchsorted(ends, batch, side="right"), minlength=len(sets)).tolist() == weights
    order.batch(step + 7)
    assert np.array_equal(order.batch(step), batch)
    assert np.array_equal(WeightedOrder(sets, weights, batch_size, seed).batch(step), batch)


def test_every_set_of_a_mixture_goes_through_its_own_epochs():
    sets, quota = [[30, 10], [25]], [8, 5]  # 5 batches are an epoch of either
    order = WeightedOrder(sets, quota, 13, seed=1)
    epochs = [np.concatenate([order.batch(step) for step in range(5 * epoch, 5 * epoch + 5)]) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(65))
    assert not np.array_equal(epochs[0], epochs[1])
    half = WeightedOrder(sets, [4, 5], 9, seed=1)  # the first set takes twice as long
    seen = np.concatenate([half.batch(step) for step in range(10)])
    counts = np.bincount(seen, minlength=65)
    assert (counts[:40] == 1).all() and (counts[40:] == 2).all()


def test_sets_are_spread_over_a_mixed_batch_and_drawn_independently():
    order = WeightedOrder([[100], [100]], [1, 1], 64, seed=0)
    batches = [order.batch(step) for step in range(3)]
    for batch in batches:
        first_half = (batch[:32] < 100).sum()  # a rank of two processes sees both sets
        assert 8 <= first_half <= 24
        assert not np.array_equal(np.sort(batch[batch < 100]), np.sort(batch[batch >= 100] - 100))


def test_the_mixed_order_never_changes():
    order = WeightedOrder([[4, 3], [5]], [2, 1], 3, seed=3)
    assert [order.batch(step).tolist() for step in (0, 1, 5)] == [[10, 4, 2], [1, 9, 3], [10, 6, 2]]


def test_without_weights_several_sets_are_read_as_one():
    assert isinstance(build_order([[7, 5], [9]], [1, 1], 4, seed=3), WeightedOrder)
    one = build_order([[7, 5], [9]], None, 4, seed=3)
    assert np.array_equal(one.batch(3), GlobalOrder([7, 5, 9], 4, seed=3).batch(3))


def test_a_share_that_is_no_sample():
    with pytest.raises(UserError, match=r"data.weights\[1\] = 0.01 of 1.01 is not one sample .*global_batch_size = 8"):
        build_order([[50], [50]], [1, 0.01], 8, seed=0)


def test_seeking_in_a_large_set_touches_one_window():
    order = GlobalOrder([6000] * 6167, 2048, seed=0)  # 37 million
    batch = order.batch(order.steps_per_epoch * 5 // 2)
    assert len(np.unique(batch)) == 2048 and len(np.unique(batch // 6000)) <= 2 * order.group
