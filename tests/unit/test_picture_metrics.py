"""Features and statistics of a reference in files: what they must be for the metrics that are asked for."""

import numpy as np
import pytest
import torch

from mdit.config import MetricsConfig, UserError
from mdit.encoders.judges import LOADERS, Judge
from mdit.eval.metrics import PictureMetrics

CPU = torch.device("cpu")


@pytest.fixture
def metrics(monkeypatch):
    """Metrics of these names, by towers that are not there, whose weights have `weights` as their checksum."""

    def metrics(*names, weights="1" * 16):
        for judge in LOADERS:
            monkeypatch.setitem(LOADERS, judge, lambda place, key, device: Judge(weights, None))
        return PictureMetrics(MetricsConfig(names=names, every=1, num_pictures=2), CPU)

    return metrics


def test_features_come_back_for_the_metrics_that_compare(metrics, tmp_path):
    features = {name: torch.randn(3, 4) for name in ("clip", "efficientnet", "clip_score")}
    metrics("cmmd", "fd_efflite0", "clip_score").save(features, tmp_path / "reference.safetensors")
    found = metrics("cmmd", "clip_score").load(tmp_path / "reference.safetensors")
    assert [*found] == ["clip"] and torch.equal(found["clip"], features["clip"])
    with pytest.raises(UserError, match="has features of clip, clip_score, efficientnet, not of dinov2"):
        metrics("fd_dinov2").load(tmp_path / "reference.safetensors")
    with pytest.raises(UserError, match=f"clip had weights of xxh3 {'1' * 16}, now it has {'2' * 16}"):
        metrics("cmmd", weights="2" * 16).load(tmp_path / "reference.safetensors")


@pytest.mark.parametrize(
    "content, message",
    [
        (dict(mu=np.zeros(2048)), "no statistics of FID"),
        (dict(mu=np.zeros(64), sigma=np.eye(64)), "mu and sigma have shapes"),
        (dict(mu=np.zeros((2, 2048)), sigma=np.eye(2048)), "mu and sigma have shapes"),
        (b"PK no archive", "no statistics of FID"),
        (b"", "no statistics of FID"),
        (np.zeros(3), "no statistics of FID"),
    ],
    ids=["no sigma", "another tower's", "no vector", "damaged", "empty", "an array alone"],
)
def test_statistics_that_are_none_are_one_line(metrics, tmp_path, content, message):
    path = tmp_path / "stats.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        with path.open("wb") as file:
            np.save(file, content)
    with pytest.raises(UserError) as error:
        metrics("fid").load(path)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="has statistics for FID alone, not features of clip"):
        metrics("fid", "cmmd").load(path)
