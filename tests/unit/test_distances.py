"""The Frechet distance against its formula with a root of a matrix, as scipy takes it; CMMD pair by pair."""

import math

import pytest
import torch

from mdit.eval import distances
from mdit.eval.distances import cmmd, frechet_distance

linalg = pytest.importorskip("scipy.linalg")


def formula(one, other):
    means, covariances = [x.mean(0) for x in (one, other)], [x.T.cov() for x in (one, other)]
    root = linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real
    return float((means[0] - means[1]).square().sum() + (covariances[0] + covariances[1]).trace() - 2 * root.trace())


@pytest.mark.parametrize("sizes", [(200, 150, 12), (40, 300, 24)])
def test_it_is_the_formula(sizes):
    generator = torch.Generator().manual_seed(0)
    n, m, width = sizes
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    one = torch.randn(n, width, generator=generator, dtype=torch.float64)
    other = torch.randn(m, width, generator=generator, dtype=torch.float64) @ mixing + 0.3
    assert frechet_distance(one, other) == pytest.approx(formula(one, other), rel=1e-6)


def test_fewer_pictures_than_features():
    """Covariances without full rank, whose root scipy finds only nearly: a set is no distance from itself, and a moved
    one is as far as it was moved."""
    one = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(one, one.flip(0)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(one, one + 0.5) == pytest.approx(64 * 0.25, rel=1e-5)


def test_cmmd_is_the_papers_formula(monkeypatch):
    """Its equation 3 by pairs, with sigma 10 and the factor of 1000 of its code."""
    generator = torch.Generator().manual_seed(0)
    one, other = (
        torch.nn.functional.normalize(torch.randn(n, 6, generator=generator) + shift, dim=1)
        for n, shift in ((7, 0), (5, 1))
    )

    def kernel(xs, ys):
        pairs = [math.exp(-float((x - y).double().square().sum()) / 200) for x in xs for y in ys]
        return math.fsum(pairs) / len(pairs)

    expected = 1000 * (kernel(one, one) + kernel(other, other) - 2 * kernel(one, other))
    for rows in (1024, 3):
        monkeypatch.setattr(distances, "ROWS", rows)
        assert cmmd(one, other) == pytest.approx(expected, rel=1e-6)
    assert cmmd(one, one.flip(0)) == pytest.approx(0, abs=1e-9)
