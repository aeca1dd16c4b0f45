"""The four stages of configs/ are the paper's, and the one on open data is its first with other data."""

from pathlib import Path

import pytest

from mdit.config import CONFIGS, TrainConfig, load_config
from mdit.models import presets

# steps, mask, lr, warm-up, schedule, final ratio, clip, P_mean, P_std, EMA (decay, start), latent size
STAGES = {
    "res_256_pretrain": (250_000, 0.75, 2.4e-4, 2_500, "cosine", 0.33, 0.25, -0.6, 1.2, None, 32),
    "res_256_finetune": (30_000, 0.0, 8e-5, 0, "constant", 1.0, 0.25, -0.6, 1.2, None, 32),
    "res_512_pretrain": (50_000, 0.75, 8e-5, 500, "constant", 1.0, 0.5, 0.0, 0.6, (0.99975, 25_000), 64),
    "res_512_finetune": (5_000, 0.0, 8e-5, 0, "constant", 1.0, 0.5, 0.0, 0.6, (0.9975, 1_000), 64),
}


def stage(name: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.toml")


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_the_papers(name):
    config = stage(name)
    steps, mask, lr, warmup, schedule, final, clip, P_mean, P_std, ema, latent_size = STAGES[name]
    assert (config.training.num_steps, config.training.mask_ratio) == (steps, mask)
    assert config.training.global_batch_size == 2048
    assert (config.optim.lr, config.optim.warmup_steps) == (lr, warmup)
    assert (config.optim.schedule, config.optim.final_lr_ratio) == (schedule, final)
    assert config.optim.max_grad_norm == clip
    assert (config.optim.betas, config.optim.eps, config.optim.weight_decay) == ((0.9, 0.999), 1e-8, 0.1)
    assert (config.noise.P_mean, config.noise.P_std, config.noise.sigma_data) == (P_mean, P_std, 0.9)
    assert (None if config.ema is None else (config.ema.decay, config.ema.start_step)) == ema
    assert config.model == presets.xl_2(latent_size)
    assert config.data.caption_drop == 0.1
    assert (config.report.guidance, config.report.sampler_steps) == (5.0, 30)


def test_the_four_stages_see_686_million_samples():
    trainings = [stage(name).training for name in STAGES]
    assert sum(t.num_steps * t.global_batch_size for t in trainings) == 686_080_000


def test_open_data_changes_nothing_but_the_data():
    opened, paper = stage("open_256_pretrain"), stage("res_256_pretrain")
    assert opened.data.train == (str(CONFIGS.parent / "data" / "monet" / "256"),)
    data = opened.data.model_copy(update={"train": paper.data.train})
    assert opened.model_copy(update={"name": paper.name, "data": data}) == paper


def test_diffusiondb_is_left_out_at_512_px_and_nothing_else_is():
    def sets(name):
        return {Path(directory).parent.name for directory in stage(name).data.train}

    assert "diffusiondb" in sets("res_256_pretrain")
    for name in ("res_512_pretrain", "res_512_finetune"):
        assert sets(name) == sets("res_256_pretrain") - {"diffusiondb"}
    assert sets("res_256_finetune") == sets("res_256_pretrain")
