"""Captions to token embeddings by a frozen text tower.

    minilm         MiniLM-L6 from a pip package, 384 channels, standardised per dimension
    PATH, HUB_ID   a CLIP text model or a T5 encoder of transformers, or a diffusers pipeline with one in text_encoder/
    openclip:ID    the text tower of an open_clip model: openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378

All but MiniLM give their last hidden states as they are, padding included, as released models were trained on them.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mdit.config import UserError
from mdit.encoders.loading import described, digest, dtype_of, require_weights
from mdit.encoders.text_openclip import PREFIX, load_openclip
from mdit.encoders.text_transformers import load_minilm, load_transformers, tower_of

FIT_CAPTIONS = 512
BATCH_SIZE = 64


class Tower(Protocol):
    """`most_tokens` is None where any number of tokens can be asked for."""

    channels: int
    default_tokens: int

    @property
    def most_tokens(self) -> int | None: ...

    @property
    def model(self) -> torch.nn.Module: ...

    def __call__(self, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor | None]:
        """The last hidden states, (N, max_tokens, C) in the tower's dtype on its device, longer captions cut; and which
        tokens are real, (N, max_tokens) bool, or None where padding counts as tokens too."""
        ...


class TextEncoder:
    """A tower with a fixed number of tokens L, `max_tokens`, and C `channels`.

    Where the tower's states are standardised (MiniLM's), the embedding of a token is (x - mean) / std per dimension,
    with mean and std of the real tokens of the training captions, which `fit` measures; padding is exactly 0.
    """

    def __init__(self, name: str, tower: Tower, max_tokens: int, precision: str, standardised: bool) -> None:
        self.name, self.tower, self.max_tokens = name, tower, max_tokens
        self.precision, self.standardised, self.channels = precision, standardised, tower.channels
        self.mean_C: Tensor | None = None
        self.std_C: Tensor | None = None

    @cached_property
    def weights(self) -> str:
        return digest(self.tower.model.parameters())

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` must be called before `encode`."""
        return self.standardised and self.mean_C is None

    def fit(self, captions: Sequence[str]) -> None:
        """Measure mean and std over an even choice of at most FIT_CAPTIONS different captions, where they are used."""
        if not self.standardised:
            return
        distinct = sorted(set(captions))
        chosen = [distinct[i] for i in np.linspace(0, len(distinct) - 1, min(len(distinct), FIT_CAPTIONS)).astype(int)]
        real_TC = torch.cat([embeddings_NLC[real_NL] for embeddings_NLC, real_NL in self._embed(chosen)]).double()
        std_C, mean_C = torch.std_mean(real_TC, dim=0, correction=0)
        self.mean_C, self.std_C = mean_C.float(), torch.where(std_C > 1e-6, std_C, 1.0).float()

    def encode(self, captions: Sequence[str]) -> Tensor:
        """-> (N, L, C) float32 on the CPU. Raises ValueError where `needs_fit`."""
        if self.needs_fit:
            raise ValueError("fit() the text encoder before encode()")
        parts = [torch.empty(0, self.max_tokens, self.channels)]
        for embeddings_NLC, real_NL in self._embed(captions):
            if self.mean_C is not None and self.std_C is not None:
                embeddings_NLC = (embeddings_NLC - self.mean_C) / self.std_C
            if real_NL is not None:
                embeddings_NLC[~real_NL] = 0
            parts.append(embeddings_NLC)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """Description for the manifest; build_text_encoder takes it."""
        description = {"id": self.name, "max_tokens": self.max_tokens, "channels": self.channels}
        description |= described(self)
        if self.mean_C is not None and self.std_C is not None:
            description |= {"mean": self.mean_C.tolist(), "std": self.std_C.tolist()}
        return description

    @torch.no_grad()
    def _embed(self, captions: Sequence[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The tower's states batch by batch, (N, L, C) float32 and (N, L) bool or None, on the CPU."""
        for start in range(0, len(captions), BATCH_SIZE):
            hidden_NLC, real_NL = self.tower(list(captions[start : start + BATCH_SIZE]), self.max_tokens)
            yield hidden_NLC.float().cpu(), None if real_NL is None else real_NL.cpu()


def build_text_encoder(
    encoder: str | dict[str, Any],
    device: torch.device | str = "cpu",
    *,
    max_tokens: int | None = None,
    precision: str = "float32",
) -> TextEncoder:
    """From one of the names above, or from a description, whose tokens and precision then count, and its statistics if
    it has any. `max_tokens` None is the tower's own: 77 for CLIP and MiniLM, 120 for T5.

    Raises UserError when the tower cannot be loaded, takes fewer tokens, or is another one than the description's.
    """
    asked = encoder if isinstance(encoder, dict) else {"id": encoder, "max_tokens": max_tokens, "precision": precision}
    name, precision = asked["id"], asked.get("precision", "float32")
    key, dtype = f"text encoder {name!r}", dtype_of(precision)
    if name == "minilm":
        tower = load_minilm(key, device, dtype)
    elif name.startswith(PREFIX):
        tower = load_openclip(name.removeprefix(PREFIX), key, device, dtype)
    else:
        tower = load_transformers(name, key, device, dtype)
    tokens = tower.default_tokens if asked["max_tokens"] is None else asked["max_tokens"]
    if tower.most_tokens is not None and tokens > tower.most_tokens:
        raise UserError(f"{key}: takes at most {tower.most_tokens} tokens, not {tokens} (caption_length)")
    built = TextEncoder(name, tower, tokens, precision, standardised=name == "minilm")
    return _as_described(built, asked, key)


def text_encoder_of(model, tokenizer, description: dict[str, Any]) -> TextEncoder:
    """From a tower of transformers that is there and the description of an encoder. Raises UserError where the tower is
    another one than the description's."""
    name, precision = description["id"], description.get("precision", "float32")
    tower = tower_of(model, tokenizer)
    built = TextEncoder(name, tower, description["max_tokens"], precision, standardised=name == "minilm")
    return _as_described(built, description, f"text encoder {name!r}")


def _as_described(built: TextEncoder, asked: dict[str, Any], key: str) -> TextEncoder:
    if (channels := asked.get("channels", built.channels)) != built.channels:
        raise UserError(f"{key}: has {built.channels} channels, but the set was made with {channels}")
    require_weights(key, built, asked)
    if "mean" in asked:
        built.mean_C, built.std_C = torch.tensor(asked["mean"]), torch.tensor(asked["std"])
    return built
