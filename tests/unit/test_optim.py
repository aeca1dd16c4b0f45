"""The learning rate as a function of the step."""

import math

import pytest

from mdit.config import load_config
from mdit.train.optim import learning_rate
from tests.recipes import tiny_config
from tests.training import REPOSITORY


def test_paper_stage_1():
    config = load_config(REPOSITORY / "configs" / "res_256_pretrain.toml")

    def rate(step):
        return learning_rate(step, config.training.num_steps, config.optim)

    assert rate(0) == pytest.approx(2.4e-4 / 2500)
    assert rate(1249) == pytest.approx(1.2e-4)
    assert rate(2500) == pytest.approx(2.4e-4)
    middle = 2500 + (250_000 - 2500) // 2
    assert rate(middle) == pytest.approx(2.4e-4 * (0.33 + 0.67 / 2), rel=1e-4)
    assert rate(249_999) == pytest.approx(0.33 * 2.4e-4, rel=1e-4)


def test_constant_after_warm_up():
    config = tiny_config(optim={"schedule": "constant", "final_lr_ratio": 1.0, "warmup_steps": 4, "lr": 1.0}).optim
    assert [learning_rate(step, 8, config) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


def test_cosine_never_rises_after_warm_up():
    config = tiny_config(optim={"warmup_steps": 3}).optim
    rates = [learning_rate(step, 50, config) for step in range(50)]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] > config.lr * config.final_lr_ratio and math.isclose(max(rates), config.lr)
