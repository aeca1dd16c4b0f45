"""A T5 tower beyond 77 tokens and several captions a picture, from a folder of pictures to drawn ones."""

import json

import pytest
import torch

from launchers import evaluate, sample
from mdit.checkpoint.snapshot import load_snapshot
from mdit.config import UserError
from mdit.data.shards import open_dataset
from mdit.encoders import build_text_encoder
from mdit.precompute import precompute
from tests.picture_sets import png
from tests.recipes import tiny_config
from tests.towers import save_t5
from tests.training import read_metrics, train, write_ds_json

TOKENS = 130
WEIGHTS = {"alt": 1.0, "recaption": 3.0}


def write_pictures(folder):
    """Twenty pictures with a short caption, and a long one that differs behind 77 tokens (letters are tokens)."""
    folder.mkdir()
    lines = []
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png(i))
        about = {"alt": f"{chr(97 + i)} cat", "recaption": "a long story, " * 8 + chr(97 + i)}
        lines.append(json.dumps({"file": f"{i}.png", **about}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "t5").mkdir()
    made = {
        "source": {"name": "folder", "path": write_pictures(folder / "pictures"), "validation_share": 0.3},
        "image_size": 8,
        "image_encoder": "pixels",
        "text_encoder": str(save_t5(folder / "t5")),
        "captions": WEIGHTS,
    }
    config = tiny_config(
        model={"latent_channels": 3, "caption_length": TOKENS, "caption_channels": 16},
        data={"train": (str(folder / "train"),), "validation": str(folder / "validation"), "precompute": made},
        training={"num_steps": 3, "global_batch_size": 4},
        report={"validate_every": 3, "sample_every": 3, "snapshot_every": 3},
    )
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps({"recipe": config.model_dump(mode="json", exclude_none=True)}))
    precompute(config, progress=False)
    train(recipe, write_ds_json(folder / "ds.json"), folder / "run")
    return folder


def test_every_caption_is_embedded_whole(run):
    dataset, encoder = open_dataset(run / "train"), build_text_encoder(str(run / "t5"), max_tokens=TOKENS)
    assert dataset.embedding_shape == (TOKENS, 16) and dataset.captions() == 2 * dataset.samples
    long = set()
    for location in dataset.locate(range(dataset.samples)):
        (alt, _), (recaption, embedding) = dataset.read_captions(location)
        assert (alt.kind, recaption.kind) == ("alt", "recaption")
        torch.testing.assert_close(embedding.float(), encoder.encode([recaption.text])[0], atol=1e-2, rtol=1e-2)
        long.add(embedding[78:].numpy().tobytes())
    assert len(long) == dataset.samples


def test_a_run_trains_and_its_snapshot_draws_and_is_scored(run, capsys):
    assert list(read_metrics(run / "run")) == [1, 2, 3] and 3 in read_metrics(run / "run", "validation_loss")
    assert (run / "run" / "samples" / "step_00000003.png").exists()
    snapshot = str(run / "run" / "snapshots" / "latest")
    prompt = "a very long story about a cat, " * 6
    sample.main(["--snapshot", snapshot, "--prompt", prompt, "--out", str(run / "grid.png"), "--num_steps", "2"])
    evaluate.main(["--snapshot", snapshot, "--out", str(run / "scores"), "--num_pictures", "2", "--num_steps", "2"])
    assert "validation loss" in capsys.readouterr().out and (run / "grid.png").stat().st_size > 0
    assert load_snapshot(snapshot).encoders["text"]["max_tokens"] == TOKENS


def test_a_recipe_of_another_length_is_refused(run):
    config = tiny_config(
        model={"latent_channels": 3, "caption_length": 77, "caption_channels": 16},
        data={"train": (str(run / "train"),), "validation": str(run / "validation")},
    )
    with pytest.raises(UserError, match=r"shape \(130, 16\), but the recipe's model.caption_length = 77 and not 130"):
        precompute(config)
