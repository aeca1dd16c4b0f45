"""The moving average against its formula."""

import torch

from mdit.config import EMAConfig
from mdit.train.ema import EMA


def test_follows_the_weights_until_start_and_averages_from_then_on():
    weights = torch.zeros(3, dtype=torch.float64)
    ema = EMA(EMAConfig(decay=0.75, start_step=2), [weights])
    for step, value, expected in [(1, 1.0, 1.0), (2, 4.0, 4.0), (3, 8.0, 0.75 * 4 + 0.25 * 8), (4, 0.0, 0.75 * 5)]:
        weights.fill_(value)
        ema.update(step)
        torch.testing.assert_close(ema.partitions[0], torch.full_like(weights, expected))


def test_does_not_share_memory_with_the_weights():
    weights = torch.ones(2)
    ema = EMA(EMAConfig(decay=0.9, start_step=0), [weights])
    weights.add_(1)
    assert ema.partitions[0].tolist() == [1.0, 1.0]
