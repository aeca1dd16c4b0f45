"""The paper's four recipes in miniature, each from the snapshot of the one before."""

import pytest
import torch
from safetensors.torch import load_file

from mdit.config import load_config
from mdit.models.layers import position_embedding
from mdit.stages import paper_stages
from tests.training import REPOSITORY, read_metrics, train, write_ds_json, write_shards

STAGES = [stage.config.name for stage in paper_stages()]
# What makes it small; everything else is the recipe's own: mask ratio, noise, schedule, clipping, EMA.
SMALL = [
    "model.dim=32", "model.depth=4", "model.head_dim=8", "model.multiple_of=16", "model.caption_length=5",
    "model.caption_channels=12", "model.mixer_depth=2", "model.mixer_dim=24", "training.num_steps=3",
    "training.global_batch_size=4", "report.log_every=1", 'report.prompts="validation"', "report.sampler_steps=2",
    "report.num_samples=2", "report.sample_every=3",
]  # fmt: skip


def overrides(stage: str, folder) -> list[str]:
    size = 8 if "256" in stage else 16
    sets = [
        *SMALL,
        f"model.latent_size={size}",
        f'data.train=["{folder}/{size}"]',
        f'data.validation="{folder}/{size}"',
    ]
    if "512" in stage:
        sets.append("ema.start_step=1")
    return sets


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    previous = None
    for stage in STAGES:
        recipe, sets = REPOSITORY / "configs" / f"{stage}.toml", overrides(stage, folder)
        config = load_config(recipe, sets)
        if not (folder / str(config.model.latent_size)).exists():
            write_shards(folder / str(config.model.latent_size), config, 16, seed=0)
        arguments = [part for item in sets for part in ("--set", item)]
        if previous:
            arguments += ["--init_from", str(previous / "snapshots" / "latest")]
        train(recipe, write_ds_json(folder / "ds.json"), folder / stage, *arguments)
        previous = folder / stage
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_stage_ran(runs, stage):
    assert list(read_metrics(runs / stage)) == [1, 2, 3]
    assert (runs / stage / "samples" / "step_00000003.png").stat().st_size > 0
    assert (runs / stage / "snapshots" / "latest" / "ema.safetensors").exists() == ("512" in stage)


@pytest.mark.parametrize("before, after", list(zip(STAGES, STAGES[1:])))
def test_stage_starts_from_the_one_before(runs, before, after):
    old = load_file(runs / before / "snapshots/latest/raw.safetensors")
    new = load_file(runs / after / "snapshots/latest/raw.safetensors")
    name = "blocks.0.attn.qkv.weight"
    assert (new[name] - old[name]).norm() < 0.1 * old[name].norm()
    size = 8 if "256" in after else 16
    torch.testing.assert_close(new["pos_embed"], position_embedding(size // 2, 32, size / 8))
