"""Models as diffusers pipelines: the launcher's pictures, the snapshot's weights, and what is wrong in one line."""

import json
import shutil
import sys
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mdit.checkpoint.released import PRESETS, import_released
from mdit.checkpoint.snapshot import load_snapshot, seal_snapshot
from mdit.config import UserError
from mdit.eval.samples import generate
from mdit.models import MicroDiT
from mdit.models.presets import tiny_2
from mdit.publish.export import import_pipeline
from tests.towers import save_autoencoder, save_clip, save_t5
from tools import convert_checkpoint, export_diffusers

diffusers = pytest.importorskip("diffusers")
PROMPTS = ["a red apple", "a frog, green", "a panda"]


def miniature(latent_size=32, **changes):
    sizes = dict(dim=32, depth=2, head_dim=16, multiple_of=16, mixer_depth=2, mixer_dim=16, caption_channels=16)
    return tiny_2(latent_size, **{**sizes, **changes})


def snapshot_of_released(folder, save_tower):
    """Random weights in the released layout, and towers in the formats of the real ones, as somebody has them who
    imported a released file and named his towers in encoders.json."""
    torch.manual_seed(0)
    model = MicroDiT(miniature())
    torch.save({name: t + 0.05 * torch.randn_like(t) for name, t in model.state_dict().items()}, folder / "released.pt")
    with mock.patch.dict(PRESETS, miniature=miniature):
        import_released(folder / "released.pt", folder / "snapshot")
    file = folder / "snapshot" / "encoders.json"
    encoders = json.loads(file.read_text())
    for name, save in (("tower", save_tower), ("vae", lambda path: save_autoencoder(path, latent_channels=4))):
        (folder / name).mkdir()
        save(folder / name)
    encoders["text"]["id"], encoders["image"]["id"] = str(folder / "tower"), str(folder / "vae")
    file.write_text(json.dumps(encoders))
    seal_snapshot(folder / "snapshot")
    return folder / "snapshot"


@pytest.fixture(scope="module", params=[save_clip, save_t5], ids=["clip", "t5"])
def published(request, tmp_path_factory):
    """-> (snapshot's path, pipeline's path)"""
    folder = tmp_path_factory.mktemp("published")
    snapshot = snapshot_of_released(folder, request.param)
    export_diffusers.main(["--snapshot", str(snapshot), "--out", str(folder / "pipeline"), "--license", "apache-2.0"])
    move_towers(folder, "", "_elsewhere")  # the pipeline brings its own
    return snapshot, folder / "pipeline"


def move_towers(folder, now, then):
    for name in ("tower", "vae"):
        (folder / f"{name}{now}").rename(folder / f"{name}{then}")


@contextmanager
def towers_back(folder):
    move_towers(folder, "_elsewhere", "")
    yield
    move_towers(folder, "", "_elsewhere")


@pytest.fixture
def copy(published, tmp_path):
    shutil.copytree(published[1], tmp_path / "pipeline")
    return tmp_path / "pipeline"


def test_pipeline_draws_the_launchers_pictures(published):
    snapshot, folder = published
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    drawn = pipeline(PROMPTS, seed=3, guidance_scale=4.0, num_inference_steps=3).images
    with towers_back(folder.parent):
        expected = generate(load_snapshot(snapshot), PROMPTS, guidance=4.0, steps=3, seed=3)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.asarray(drawn[0]).std() > 1
    (alone,) = pipeline(PROMPTS[0], seed=3, guidance_scale=4.0, num_inference_steps=3).images
    assert np.abs(np.asarray(alone, dtype=int) - np.asarray(drawn[0])).max() <= 1


def test_back_to_a_snapshot_bit_for_bit(published, tmp_path, capsys):
    from mdit import MicroDiTPipeline

    snapshot, folder = published
    with mock.patch.object(sys, "argv", ["convert_checkpoint.py"]):
        convert_checkpoint.main(["import", str(folder), str(tmp_path / "back")])
    ours, theirs = load_snapshot(tmp_path / "back"), load_snapshot(snapshot)
    assert ours.config.model == theirs.config.model and ours.step == theirs.step
    expected = theirs.weights()
    assert ours.weights().keys() == expected.keys()
    assert all(torch.equal(ours.weights()[name], value) for name, value in expected.items())
    pipeline = MicroDiTPipeline.from_pretrained(folder)
    options = dict(guidance=4.0, steps=2, seed=1)
    from_snapshot = generate(ours, PROMPTS[:1], **options)
    from_pipeline = pipeline(PROMPTS[:1], guidance_scale=4.0, num_inference_steps=2, seed=1).images
    assert from_snapshot[0].tobytes() == from_pipeline[0].tobytes()


def test_in_bfloat16_the_pictures_are_nearly_the_same(published):
    from mdit import MicroDiTPipeline

    exact, rounded = (
        MicroDiTPipeline.from_pretrained(published[1], torch_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    parts = (rounded.transformer, rounded.vae, rounded.text_encoder)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    pictures = [np.asarray(p(PROMPTS[0], num_inference_steps=2).images[0], dtype=int) for p in (exact, rounded)]
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 10


def test_from_the_hub_without_its_code(published):
    from mdit import MicroDiTPipeline

    with mock.patch("mdit.publish.pipeline.snapshot_download", return_value=str(published[1])) as download:
        assert MicroDiTPipeline.from_pretrained("somebody/model", revision="v1").recipe.name == "res_256_finetune"
    assert download.call_args.args == ("somebody/model",)
    assert download.call_args.kwargs == {"revision": "v1", "token": None, "ignore_patterns": ["*.py"]}
    with mock.patch("mdit.publish.pipeline.snapshot_download", side_effect=OSError("no such repository")):
        with pytest.raises(UserError, match="somebody/model: no such folder, .* Hub: no such repository"):
            MicroDiTPipeline.from_pretrained("somebody/model")


def test_saved_again_by_diffusers_it_is_the_same(published, tmp_path):
    from mdit import MicroDiTPipeline

    MicroDiTPipeline.from_pretrained(published[1]).save_pretrained(tmp_path / "again")
    name = "transformer/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(tmp_path / "again" / name), load_file(published[1] / name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_model_card(published):
    text = (published[1] / "README.md").read_text()
    front = text.split("---")[1]
    assert "license: apache-2.0" in front and "library_name: diffusers" in front
    assert "| mask ratio | 0 |" in text and "raw of step 0, xxh3" in text


def another_model(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file({"weight": torch.zeros(3)}, file, {"format": "pt"})


def other_shapes(folder):
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["network.final_layer.linear.weight"] = torch.zeros(4, 32)
    save_file(weights, file, {"format": "pt"})


def no_file(folder):
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()


def other_channels(folder):
    shutil.rmtree(folder / "vae")
    (folder / "vae").mkdir()
    save_autoencoder(folder / "vae", latent_channels=8)


@pytest.mark.parametrize(
    "fault, message",
    [
        (another_model, "transformer: lacks network."),
        (other_shapes, "transformer: "),
        (no_file, "transformer: "),
        (other_channels, "vae: has latents of 8 channels, the transformer takes 4"),
    ],
)
def test_a_damaged_pipeline_is_refused_in_one_line(copy, fault, message):
    from mdit import MicroDiTPipeline

    fault(copy)
    with pytest.raises(UserError) as raised:
        MicroDiTPipeline.from_pretrained(copy)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", [another_model, other_shapes, no_file])
def test_import_refuses_what_is_no_model(copy, tmp_path, fault):
    fault(copy)
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors"):
        import_pipeline(copy, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_pipeline_is_not_ours(copy, tmp_path):
    (copy / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    from mdit import MicroDiTPipeline

    for read in (lambda: import_pipeline(copy, tmp_path / "back"), lambda: MicroDiTPipeline.from_pretrained(copy)):
        with pytest.raises(UserError, match="has no recipe: not a pipeline of mdit"):
            read()


def test_push_uploads_the_folder(published, tmp_path):
    snapshot, folder = published
    out = str(tmp_path / "out")
    with towers_back(folder.parent), mock.patch("huggingface_hub.HfApi") as api:
        export_diffusers.main(["--snapshot", str(snapshot), "--out", out, "--push", "somebody/model"])
    api.return_value.create_repo.assert_called_once_with("somebody/model", exist_ok=True)
    assert str(api.return_value.upload_folder.call_args.kwargs["folder_path"]) == out
    with pytest.raises(UserError, match="exists already"):
        export_diffusers.main(["--snapshot", str(snapshot), "--out", out])
