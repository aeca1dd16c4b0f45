"""The tiny recipe (mdit.bench.tiny), for tests."""

from mdit.bench.tiny import TINY, tiny_config
from mdit.config import ModelConfig

__all__ = ["LEVERS", "TINY", "tiny_config", "tiny_model"]
LEVERS = {"rotary": True}  # of a model, beyond the paper


def tiny_model(**changes) -> ModelConfig:
    return ModelConfig(**{**TINY["model"], **changes})
