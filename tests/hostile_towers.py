"""Folders of towers that strangers made to do harm: code beside them, pickles, configs that ask for too much."""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save

from mdit.encoders import build_image_encoder, build_text_encoder
from mdit.encoders.judges import load_clip, load_dinov2
from tests.hostile import Case, Pickled, code, marker
from tests.towers import save_autoencoder, save_clip, save_dinov2

CPU = torch.device("cpu")
LONG_HEADER = (10 * 2**30).to_bytes(8, "little") + b"{}"  # of a safetensors file, in what it says


def with_code(save_tower, load, **config):
    """A tower's folder that brings code and asks for it, with other values in its config."""

    def run(folder: Path) -> list[str]:
        save_tower(folder)
        for name in ("configuration_x", "modeling_x", "tokenization_x", "pipeline"):
            (folder / f"{name}.py").write_text(code(folder) + "class Config: ...\nclass Model: ...\n")
        asked = {"AutoConfig": "configuration_x.Config", "AutoModel": "modeling_x.Model"}
        asked |= {"AutoTokenizer": ["tokenization_x.Model", None], "AutoImageProcessor": "modeling_x.Model"}
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (folder / name).exists():
                values = json.loads((folder / name).read_text()) | {"auto_map": asked, "trust_remote_code": True}
                (folder / name).write_text(json.dumps(values | (config if name == "config.json" else {})))
        load(folder)
        return ["loaded"]

    return run


def text(folder: Path):
    return build_text_encoder(str(folder)).encode(["a"])


def picture(folder: Path):
    return build_image_encoder(str(folder))


def whole_clip(folder: Path) -> None:
    save_clip(folder, with_vision=True)


def clip_score(folder: Path):
    return load_clip(str(folder), "metric", CPU, scores=True)


def dino(folder: Path):
    return load_dinov2(str(folder), "metric", CPU)


def open_clip_model(folder: Path, **text) -> None:
    """A model whose config has more for its `text` tower, beside a tokenizer of transformers that is code."""
    sizes = {"context_length": 77, "vocab_size": 99, "width": 16, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}

    def write_config(text: dict) -> None:
        config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))

    (folder / "tokenization_x.py").write_text(code(folder))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.MonkeyPatch.context() as patch:
        for module in ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc"):
            patch.setitem(sys.modules, f"torchvision{module}", MagicMock())
        import open_clip
    write_config(sizes)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    (folder / "open_clip_model.safetensors").write_bytes(save(model.state_dict()))
    write_config({**sizes, **text})


def open_clip_with_code(folder: Path) -> None:
    open_clip_model(folder, hf_tokenizer_name="x/y", tokenizer_kwargs={"trust_remote_code": True})
    build_text_encoder(f"openclip:local-dir:{folder}")


def open_clip_pickle(folder: Path) -> None:
    open_clip_model(folder)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"a": Pickled(marker(folder))}, folder / "open_clip_pytorch_model.bin")
    build_text_encoder(f"openclip:local-dir:{folder}")


def pickle_of(save_tower, load):
    def run(folder: Path) -> None:
        save_tower(folder)
        for path in folder.glob("*.safetensors"):
            path.unlink()
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            torch.save({"a": Pickled(marker(folder))}, folder / name)
        load(folder)

    return run


def torn(save_tower, load, weights: str = "model.safetensors"):
    def run(folder: Path) -> None:
        save_tower(folder)
        (folder / weights).write_bytes(LONG_HEADER)
        load(folder)

    return run


TOWERS = [
    Case("clip: code beside it", with_code(save_clip, text), "loaded"),
    Case("clip score: code beside it", with_code(whole_clip, clip_score), "loaded"),
    Case("dinov2: code beside it", with_code(save_dinov2, dino), "loaded"),
    Case("autoencoder: code beside it", with_code(save_autoencoder, picture), "loaded"),
    Case("a kind that is code", with_code(save_clip, text, model_type="x"), "text encoder .*expected minilm"),
    Case("a judge that is code", with_code(save_dinov2, dino, model_type="x"), "expected the local path"),
    Case("another class", with_code(save_dinov2, dino, model_type="bert"), "is a bert model"),
    Case("labels", with_code(save_clip, text, num_labels=10**9), "num_labels is 1000000000"),
    Case("layers", with_code(save_clip, text, num_hidden_layers=10**7), "num_hidden_layers is 10000000"),
    Case("width", with_code(save_dinov2, dino, hidden_size=2**40), "hidden_size is"),
    Case("width of nothing there", with_code(save_dinov2, dino, hidden_size=2**14), "dinov2|expected|lack|mismatch"),
    Case("blocks", with_code(save_autoencoder, picture, block_out_channels=[2**19] * 2), "parameters are more than"),
    Case("attention of the hub", with_code(save_clip, text, attn_implementation="a/b"), "code of the hub"),
    Case("clip: a pickle", pickle_of(save_clip, text), "expected minilm"),
    Case("dinov2: a pickle", pickle_of(save_dinov2, dino), "expected the local path"),
    Case("autoencoder: a pickle", pickle_of(save_autoencoder, picture), "expected pixels"),
    Case("clip: a header of 10 GB", torn(save_clip, text), "expected minilm"),
    Case(
        "autoencoder: a header of 10 GB",
        torn(save_autoencoder, picture, "diffusion_pytorch_model.safetensors"),
        "expected pixels",
    ),
    Case("open_clip: code of its tokenizer", open_clip_with_code, "its config gives its tokenizer trust_remote_code"),
    Case("open_clip: a pickle", open_clip_pickle, "open_clip cannot load it"),
]
