"""open_clip's text towers on small random weights in their real layout, beside the formula written out."""

import json
import sys
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mdit.config import UserError
from mdit.encoders import build_text_encoder

START, END, PADDING = 49406, 49407, 0
WIDTH, HEADS, LAYERS, LENGTH = 16, 2, 2, 77
CAPTIONS = ["a red apple on a blue background", "grapes", "Banana,  GREEN background"]


@pytest.fixture(scope="module")
def open_clip():
    """The package. It wants torchvision for pictures, which nothing here needs: where there is none, as beside a torch
    for CPUs, a stand-in is there while the package is imported."""
    pytest.importorskip("transformers").utils.is_torchvision_available()  # remembers the truth
    modules = ("", ".transforms", ".transforms.functional", ".ops", ".ops.misc")
    with pytest.MonkeyPatch.context() as patch:
        try:
            import torchvision  # noqa: F401
        except (ImportError, RuntimeError):
            for module in modules:
                patch.setitem(sys.modules, f"torchvision{module}", MagicMock())
        return pytest.importorskip("open_clip", reason="needs open_clip_torch, see docs/data.md")


def write_config(path, **text):
    text = {"context_length": LENGTH, "vocab_size": 49408, "width": WIDTH, "heads": HEADS, "layers": LAYERS, **text}
    vision = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 8, "head_width": 8}
    config = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def path(open_clip, tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("openclip"))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{path}", load_weights=False)
    for parameter in model.parameters():  # at their start norms and biases do nothing
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    return path


@pytest.fixture(scope="module")
def encoder(path):
    return build_text_encoder(f"openclip:local-dir:{path}")


def by_the_formula(path, ids_NL):
    """Token and position embeddings, pre-norm transformer with a causal mask, final norm."""
    w = load_file(path / "open_clip_model.safetensors")

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["token_embedding.weight"][ids_NL] + w["positional_embedding"]
    for layer in range(LAYERS):
        block = f"transformer.resblocks.{layer}"
        qkv = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        future = torch.ones(LENGTH, LENGTH).triu(1).bool()
        seen = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(seen.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "ln_final")


def ids_of(open_clip, caption):
    """Start, words, end, then zeros up to 77."""
    words = open_clip.tokenizer.SimpleTokenizer().encode(caption)[: LENGTH - 2]
    return [START, *words, END] + [PADDING] * (LENGTH - 2 - len(words))


def test_all_77_tokens_after_the_final_norm_padding_included(open_clip, encoder, path):
    ids_NL = torch.tensor([ids_of(open_clip, caption) for caption in CAPTIONS])
    assert (ids_NL == PADDING).sum() > 150
    embeddings = encoder.encode(CAPTIONS)
    assert embeddings.shape == (3, 77, 16) and embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, by_the_formula(path, ids_NL), atol=1e-5, rtol=1e-4)


def test_long_captions_are_cut_to_77_tokens_that_end_with_the_end(open_clip, encoder, path):
    caption = "apple banana " * 60
    ids_NL = torch.tensor([ids_of(open_clip, caption)])
    assert ids_NL.shape == (1, 77) and (ids_NL[0, 1:76] != END).all()
    torch.testing.assert_close(encoder.encode([caption]), by_the_formula(path, ids_NL), atol=1e-5, rtol=1e-4)


def test_fewer_tokens_are_the_first_ones(encoder, path):
    fewer = build_text_encoder(f"openclip:local-dir:{path}", max_tokens=20)
    torch.testing.assert_close(fewer.encode(CAPTIONS), encoder.encode(CAPTIONS)[:, :20])
    with pytest.raises(UserError, match="takes at most 77 tokens, not 78"):
        build_text_encoder(f"openclip:local-dir:{path}", max_tokens=78)


def test_a_description_builds_the_same_encoder(encoder, path):
    description = encoder.describe()
    weights = encoder.weights
    assert description == {"id": f"openclip:local-dir:{path}", "max_tokens": 77, "channels": 16, "weights": weights}
    assert not encoder.needs_fit
    again = build_text_encoder(json.loads(json.dumps(description)))
    assert torch.equal(again.encode(CAPTIONS), encoder.encode(CAPTIONS))


def test_bfloat16_is_near_float32(encoder, path):
    rough = build_text_encoder(f"openclip:local-dir:{path}", precision="bfloat16")
    assert {p.dtype for p in rough.tower.model.parameters()} == {torch.bfloat16}
    embeddings, exact = rough.encode(CAPTIONS), encoder.encode(CAPTIONS)
    assert embeddings.dtype == torch.float32
    assert 0 < (embeddings - exact).abs().max() < 0.1 * exact.abs().max()


def test_the_text_tower_alone_stays_in_memory(encoder):
    assert not [name for name, _ in encoder.tower.model.named_parameters() if name.startswith("visual")]


def test_a_text_tower_in_a_part_of_its_own(open_clip, path, tmp_path):
    """As CoCa and SigLIP have it: "custom_text" in the config."""
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"]["custom_text"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(path / "open_clip_model.safetensors")
    elsewhere = {f"text.{k}" if not k.startswith(("visual", "logit")) else k: v for k, v in weights.items()}
    save_file(elsewhere, tmp_path / "open_clip_model.safetensors")
    embeddings = build_text_encoder(f"openclip:local-dir:{tmp_path}").encode(CAPTIONS)
    ids_NL = torch.tensor([ids_of(open_clip, caption) for caption in CAPTIONS])
    torch.testing.assert_close(embeddings, by_the_formula(path, ids_NL), atol=1e-5, rtol=1e-4)


# --- what can be wrong


def test_a_model_without_a_tag_has_no_weights(open_clip):
    with pytest.raises(UserError, match=r"'openclip:ViT-H-14': expected .*openclip:ViT-H-14:TAG, one of .*dfn5b"):
        build_text_encoder("openclip:ViT-H-14")
    with pytest.raises(UserError, match="knows no weights of that model"):
        build_text_encoder("openclip:ViT-Z")


def test_nothing_there_or_no_weights(open_clip, tmp_path):
    with pytest.raises(UserError, match="open_clip cannot load it: .*nowhere"):
        build_text_encoder(f"openclip:local-dir:{tmp_path / 'nowhere'}")
    write_config(tmp_path)
    with pytest.raises(UserError, match="open_clip cannot load it: .*weights"):
        build_text_encoder(f"openclip:local-dir:{tmp_path}")


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle was run')",)


def test_a_pickle_that_holds_more_than_weights_is_not_run(open_clip, tmp_path):
    write_config(tmp_path)
    torch.save({"x": Trap()}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match="open_clip cannot load it"):
        build_text_encoder(f"openclip:local-dir:{tmp_path}")


def test_open_clip_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="needs open_clip .*open_clip_torch.*torchvision"):
        build_text_encoder("openclip:hf-hub:some/model")
