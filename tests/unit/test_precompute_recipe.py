"""Making sets: all or nothing, once, alike, and only what the recipe asks for."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mdit.data.writer
import mdit.precompute.recipe
from launchers import precompute as launcher
from mdit import cli
from mdit.config import UserError
from mdit.data.shards import open_dataset, read_samples
from mdit.encoders import build_image_encoder, build_text_encoder
from mdit.precompute import is_precomputed, precompute
from mdit.sources import open_source
from tests.picture_sets import contents, interrupted
from tests.recipes import tiny_config
from tests.towers import save_autoencoder
from tests.training import write_shards
from tests.unit.test_sources import write_folder

EMOJI = dict(name="emoji", objects=4, styles=("twemoji",), scenes=60, validation_scenes=8, held_out=0.1, seed=0)
MODEL = {"latent_size": 8, "latent_channels": 3, "caption_length": 12, "caption_channels": 384}


def recipe(folder, source=EMOJI, model=MODEL, precompute=None, **data):
    build_settings = {"source": source, "image_size": 8, "image_encoder": "pixels", "text_encoder": "minilm"}
    paths = {"train": (str(folder / "train"),), "validation": str(folder / "validation")}
    return tiny_config(model=model, data={**paths, "precompute": {**build_settings, **(precompute or {})}, **data})


def make(config):
    precompute(config, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both sets of the recipe, made once."""
    path = tmp_path_factory.mktemp("data")
    make(recipe(path))
    return path


def test_sets_hold_every_sample_once_encoded_and_shuffled(folder):
    config = recipe(folder)
    assert is_precomputed(config)
    source = open_source(config.data.precompute.source, 8)
    for name, split in (("train", source.training), ("validation", source.validation)):
        dataset = open_dataset(folder / name)
        latents, captions, texts = read_samples(dataset, range(dataset.samples))
        assert sorted(texts) == sorted(split.captions)
        text_encoder = build_text_encoder(dataset.encoders["text"])
        expected = text_encoder.encode(texts[:5])
        torch.testing.assert_close(captions[:5].float(), expected, atol=1e-2, rtol=1e-2)
        decoded = build_image_encoder(dataset.encoders["image"]).decode(latents)
        pixels = ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        assert {(s.caption, np.asarray(s.image).tobytes()) for s in split} == {
            (text, image.tobytes()) for text, image in zip(texts, pixels)
        }
    assert texts != split.captions
    assert sorted(p.name for p in folder.iterdir()) == ["train", "validation"]


def test_sets_that_are_there_are_left_alone(folder, monkeypatch):
    before = contents(folder)
    monkeypatch.setattr(mdit.precompute.recipe, "open_source", None)  # would fail if anything were made
    make(recipe(folder))
    assert contents(folder) == before


def test_a_set_that_is_missing_is_embedded_like_the_one_that_is_there(folder, tmp_path):
    make(recipe(tmp_path, train=(str(tmp_path / "train"), str(folder / "train")), source={**EMOJI, "objects": 5}))
    assert open_dataset(tmp_path / "train").encoders == open_dataset(folder / "train").encoders


def test_an_interrupted_call_leaves_no_set_and_the_next_one_makes_it(folder, tmp_path, monkeypatch):
    with interrupted(monkeypatch, after=20):  # the validation set and some of the training set
        make(recipe(tmp_path))
    names = {".train.lock", ".train.partial", "validation"}
    assert {p.name for p in tmp_path.iterdir()} == names and not is_precomputed(recipe(tmp_path))
    make(recipe(tmp_path))
    assert contents(tmp_path) == contents(folder)


def test_of_two_calls_at_once_one_makes_the_sets(folder, tmp_path):
    program = "import sys; from pathlib import Path; from tests.unit.test_precompute_recipe import make, recipe; "
    other = subprocess.Popen([sys.executable, "-c", program + "make(recipe(Path(sys.argv[1])))", tmp_path])
    make(recipe(tmp_path))
    assert other.wait(timeout=120) == 0
    assert contents(tmp_path) == contents(folder)


# --- refused, by name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"source": {**EMOJI, "objects": 5}}, "validation/manifest.json: was made with source.objects = 4, .* is 5"),
        ({"source": {**EMOJI, "scenes": 61}}, "made with source.scenes = 60, but the recipe's is 61"),
        ({"precompute": {"image_size": 16}}, "made with image_size = 8, but the recipe's is 16"),
        ({"precompute": {"embeddings": "i8b64"}}, "made with embeddings = 'f16', but the recipe's is 'i8b64'; remove "),
        ({"precompute": {"text_encoder": "other"}}, "made with text_encoder = 'minilm', but the recipe's is 'other'"),
        ({"model": {**MODEL, "latent_size": 16}}, "manifest.json: .* recipe's model.latent_size = 16 and not 8"),
        ({"model": {**MODEL, "latent_channels": 4}}, "manifest.json: .* recipe's model.latent_channels = 4 and not 3"),
        ({"model": {**MODEL, "caption_length": 9}}, "manifest.json: .* recipe's model.caption_length = 9 and not 12"),
        ({"model": {**MODEL, "caption_channels": 12}}, "manifest.json: .* model.caption_channels = 12 and not 384"),
    ],
)
def test_a_changed_recipe_is_noticed(folder, change, message):
    with pytest.raises(UserError, match=message):
        make(recipe(folder, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precompute": {"image_size": 16}}, r"image_encoder gives .*\(3, 16, 16\).* model.latent_size = 8"),
        ({"model": {**MODEL, "caption_channels": 12}}, "text_encoder gives .* model.caption_channels = 12 and not 384"),
        ({"source": {**EMOJI, "objects": ("no such thing",)}}, "'no such thing' is no emoji"),
        ({"source": {"name": "folder", "path": "nowhere", "validation_share": 0.1}}, "nowhere/captions.jsonl: cannot"),
    ],
)
def test_nothing_is_written_for_a_recipe_that_cannot_be_made(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        make(recipe(tmp_path, **change))
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_that_was_replaced_makes_no_second_set(tmp_path, monkeypatch):
    """The validation set is there, the training set is not."""
    model, changes = {**MODEL, "latent_channels": 4}, {"image_size": 16, "image_encoder": str(tmp_path / "vae")}
    save_autoencoder(tmp_path / "vae", scaling_factor=1.0)
    make(recipe(tmp_path, model=model, precompute=changes))
    shutil.rmtree(tmp_path / "train")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    save_file({name: weight + 1 for name, weight in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match="image encoder '.*vae': its weights have xxh3 .*, but those that made the lat"):
        make(recipe(tmp_path, model=model, precompute=changes))
    assert not (tmp_path / "train").exists()


def test_a_broken_picture_is_found_before_anything_is_written(tmp_path):
    pictures = write_folder(tmp_path / "pictures")
    (pictures / "sub" / "picture 39.png").write_bytes(b"\x89PNG")
    source = {"name": "folder", "path": str(pictures), "validation_share": 0.2}
    with pytest.raises(UserError, match="captions.jsonl:40: cannot read the picture .*picture 39.png"):
        make(recipe(tmp_path / "data", source=source))
    assert not (tmp_path / "data").exists()


def test_a_folder_of_pictures_becomes_sets(tmp_path):
    source = {"name": "folder", "path": str(write_folder(tmp_path / "pictures")), "validation_share": 0.2}
    make(recipe(tmp_path / "data", source=source))
    sizes = [open_dataset(tmp_path / "data" / name).samples for name in ("train", "validation")]
    assert sum(sizes) == 40 and min(sizes) > 0

    captions = tmp_path / "pictures" / "captions.jsonl"
    captions.write_text(captions.read_text().replace("picture", "drawing"))  # file names and captions
    with pytest.raises(UserError, match="manifest.json: was made with captions = '.*', but the recipe's is '.*'; rem"):
        make(recipe(tmp_path / "data", source=source))
    captions.unlink()
    make(recipe(tmp_path / "data", source=source))  # as on a machine that only trains


def test_several_captions_a_picture(tmp_path):
    make(recipe(tmp_path, precompute={"captions": {"phrasing": 2}}))
    dataset = open_dataset(tmp_path / "train")
    assert (dataset.samples, dataset.captions(), dataset.weights) == (60, 300, {"phrasing": 2.0})
    make(recipe(tmp_path, precompute={"captions": {"phrasing": 2}}))
    with pytest.raises(UserError, match="made with captions.phrasing = 2.0, but the recipe's is 1.0; data.captions of"):
        make(recipe(tmp_path, precompute={"captions": {"phrasing": 1}}))
    with pytest.raises(UserError, match="captions.alt: emoji has no captions of this kind; there are phrasing"):
        make(recipe(tmp_path / "new", precompute={"captions": {"alt": 1}}))
    assert not (tmp_path / "new").exists()


def test_embeddings_in_8_bits(folder, tmp_path):
    make(recipe(tmp_path, precompute={"embeddings": "i8b64"}))
    small, large = (open_dataset(path / "validation") for path in (tmp_path, folder))
    assert small.layout.embeddings == "i8b64" and small.layout.embedding_bytes < 0.6 * large.layout.embedding_bytes


def test_missing_shards_without_a_way_to_make_them(tmp_path):
    with pytest.raises(UserError, match="train/manifest.json: is missing.*launchers/precompute.py.*docs/data.md"):
        make(tiny_config(data={"train": (str(tmp_path / "train"),), "validation": str(tmp_path / "validation")}))


def test_shards_brought_along_need_no_precompute_section(tmp_path):
    config = tiny_config(data={"train": (str(tmp_path / "train"),), "validation": str(tmp_path / "validation")})
    for name in ("train", "validation"):
        write_shards(tmp_path / name, config, 4, seed=0)
    make(config)


def test_a_further_directory_is_not_made(folder, tmp_path):
    train = (str(tmp_path / "train"), str(tmp_path / "further"))
    with pytest.raises(UserError, match="further/manifest.json: is missing"):
        make(recipe(tmp_path, train=train))
    assert not list(tmp_path.iterdir())


# --- the launcher


def test_precompute_says_what_is_there_and_verifies_it(folder, tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text('{"recipe": ' + recipe(folder).model_dump_json(exclude_none=True) + "}")
    launcher.main(["--recipe", str(path), "--verify"])
    out = capsys.readouterr().out
    assert f"{folder}/train: 60 samples in 1 shards" in out and out.count("checksums right") == 2
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: launcher.main(["--recipe", str(path), "--set", "data.precompute.image_size=16"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
