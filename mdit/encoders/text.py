"""Captions to token embeddings by a frozen text tower.

    minilm         MiniLM-L6 from a pip package, 384 channels, standardised per dimension
    PATH, HUB_ID   a CLIP text model or a T5 encoder of transformers, or a diffusers pipeline with one in text_encoder/
    openclip:ID    the text tower of an open_clip model: openclip:hf-hub:apple/DFN5B-CLIP-ViT-H-14-378

All but MiniLM give their last hidden states as they are, padding included, as released models were trained on them.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mdit.config import UserError
from mdit.encoders.precision import described, digest, dtype_of, require_weights
from mdit.encoders.text_openclip import PREFIX, load_openclip
from mdit.encoders.text_transformers import load_minilm, load_transformers

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
        count, total, squares = 0, torch.zeros(self.channels).double(), torch.zeros(self.channels).double()
        for start in range(0, len(chosen), BATCH_SIZE):
            embeddings_NLC, real_NL = self._embed(chosen[start : start + BATCH_SIZE])
            real = embeddings_NLC[real_NL].double()
            count, total, squares = count + len(real), total + real.sum(0), squares + real.square().sum(0)
        mean = total / count
        std = (squares / count - mean**2).clamp(min=0).sqrt()
        self.mean_C, self.std_C = mean.float(), torch.where(std > 1e-6, std, 1.0).float()

    def encode(self, captions: Sequence[str]) -> Tensor:
        """-> (N, L, C) float32 on the CPU. Raises ValueError where `needs_fit`."""
        if self.needs_fit:
            raise ValueError("fit() the text encoder before encode()")
        parts = [torch.empty(0, self.max_tokens, self.channels)]
        for start in range(0, len(captions), BATCH_SIZE):
            embeddings_NLC, real_NL = self._embed(captions[start : start + BATCH_SIZE])
            if self.mean_C is not None and self.std_C is not None:
                embeddings_NLC = (embeddings_NLC - self.mean_C) / self.std_C
            if real_NL is not None:
                embeddings_NLC[~real_NL] = 0
            parts.append(embeddings_NLC)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """Description for the manifest; build_text_encoder_from takes it."""
        description = {"id": self.name, "max_tokens": self.max_tokens, "channels": self.channels}
        description |= {"weights": self.weights} | described(self.precision)
        if self.mean_C is not None and self.std_C is not None:
            description |= {"mean": self.mean_C.tolist(), "std": self.std_C.tolist()}
        return description

    @torch.no_grad()
    def _embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The tower's states, (N, L, C) float32 and (N, L) bool or None, on the CPU."""
        hidden_NLC, real_NL = self.tower(list(captions), self.max_tokens)
        return hidden_NLC.float().cpu(), None if real_NL is None else real_NL.cpu()


def build_text_encoder(
    name: str, *, max_tokens: int | None = None, device: torch.device | str = "cpu", precision: str = "float32"
) -> TextEncoder:
    """From one of the names above. `max_tokens` None is the tower's own: 77 for CLIP and MiniLM, 120 for T5.

    Raises UserError when the tower cannot be loaded or takes fewer tokens.
    """
    key, dtype = f"text encoder {name!r}", dtype_of(precision)
    if name == "minilm":
        tower = load_minilm(key, device, dtype)
    elif name.startswith(PREFIX):
        tower = load_openclip(name.removeprefix(PREFIX), key, device, dtype)
    else:
        tower = load_transformers(name, key, device, dtype)
    tokens = tower.default_tokens if max_tokens is None else max_tokens
    if tower.most_tokens is not None and tokens > tower.most_tokens:
        raise UserError(f"{key}: takes at most {tower.most_tokens} tokens, not {tokens} (caption_length)")
    return TextEncoder(name, tower, tokens, precision, standardised=name == "minilm")


def build_text_encoder_from(description: dict[str, Any], device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of a set, with the statistics of that set if it has any. Raises UserError when it cannot be loaded,
    or is another one than the description's."""
    name, tokens = description["id"], description["max_tokens"]
    precision = description.get("precision", "float32")
    encoder = build_text_encoder(name, max_tokens=tokens, device=device, precision=precision)
    if encoder.channels != description["channels"]:
        raise UserError(
            f"text encoder {name!r}: has {encoder.channels} channels, but the set was made with "
            f"{description['channels']}"
        )
    if "weights" in description:
        require_weights(f"text encoder {name!r}", encoder.weights, description)
    if "mean" in description:
        encoder.mean_C, encoder.std_C = torch.tensor(description["mean"]), torch.tensor(description["std"])
    return encoder
