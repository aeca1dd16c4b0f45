"""The text tower of an open_clip model, as the paper's code uses it: every token after the final norm, none pooled."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mdit.config import UserError
from mdit.encoders.loading import check_config, refusing

PREFIX = "openclip:"
INSTALL = "pip install 'open_clip_torch>=3', with the torchvision that belongs to your torch"
HAVE_WEIGHTS = ("hf-hub:", "local-dir:")
# Of a model's own arguments for its tokenizer: open_clip hands them on to transformers, trust_remote_code among them.
TOKENIZER_ARGUMENTS = {"clean", "strip_sep_token", "language", "reduction_mask"}


class OpenClipTower:
    """See `mdit.encoders.text.Tower`. Captions are padded with token 0, and no padding is masked, as in training."""

    def __init__(self, model: Any, tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        text: Any = getattr(model, "text", model)
        self.channels: int = text.token_embedding.embedding_dim
        self.default_tokens = self.most_tokens = int(text.context_length)

    def __call__(self, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor | None]:
        ids_NL = self.tokenizer(captions, context_length=max_tokens)
        # The tower wants all its positions filled; its causal mask keeps the first ones from seeing what is added.
        ids_NL = F.pad(ids_NL, (0, self.most_tokens - max_tokens)).to(self.model.logit_scale.device)
        output = self.model.forward_intermediates(
            text=ids_NL, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )
        return output["text_intermediates"][-1][:, :max_tokens], None


def load_openclip(identifier: str, key: str, device: torch.device | str, dtype: torch.dtype) -> OpenClipTower:
    """From "hf-hub:OWNER/NAME", "local-dir:PATH", or "MODEL:TAG" of open_clip's own list of pretrained models.

    Weights are safetensors, or files that torch.load reads with weights_only. `key` begins every message of the
    UserError that is raised when there is no such tower.
    """
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another torch
        raise UserError(f"{key}: needs open_clip ({error}): {INSTALL}") from None
    name, tag = (identifier, "") if identifier.startswith(HAVE_WEIGHTS) else identifier.partition(":")[::2]
    if name == identifier and not identifier.startswith(HAVE_WEIGHTS):
        tags = open_clip.list_pretrained_tags_by_model(name)
        known = f"one of {', '.join(tags)}" if tags else "but open_clip knows no weights of that model"
        raise UserError(f"{key}: expected {PREFIX}hf-hub:ID, {PREFIX}local-dir:PATH or {PREFIX}{name}:TAG, {known}")
    with refusing(f"{key}: open_clip cannot load it"):
        _check_model(open_clip.get_model_config(name), key)
        load: Any = open_clip.create_model_from_pretrained
        model = load(name, tag or None, return_transform=False, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    if not hasattr(getattr(model, "text", model), "forward_intermediates"):
        raise UserError(f"{key}: its text tower is a model of transformers; give the id of that one")
    model.visual = None  # gives its memory back
    return OpenClipTower(model.to(device, dtype).eval().requires_grad_(False), tokenizer)


def _check_model(config: Any, key: str) -> None:
    """Raise UserError for a model whose config would have another one loaded, or code run that comes with it."""
    check_config(config, key)
    text, vision = ((config or {}).get(part) or {} for part in ("text_cfg", "vision_cfg"))
    if more := sorted({*(text.get("tokenizer_kwargs") or {})} - TOKENIZER_ARGUMENTS):
        raise UserError(
            f"{key}: its config gives its tokenizer {more[0]}; only {sorted(TOKENIZER_ARGUMENTS)} are taken"
        )
    if ":" in str(vision.get("timm_model_name") or "") or vision.get("timm_model_pretrained"):
        raise UserError(f"{key}: its config has the vision tower of another place loaded, which is not done")
