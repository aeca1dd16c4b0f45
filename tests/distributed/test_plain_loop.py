"""Training through DeepSpeed against a loop of plain PyTorch that says the same in twenty lines."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mdit.config import FlowNoise, load_config
from mdit.data.order import GlobalOrder
from mdit.data.shards import open_dataset, read_samples
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.models import MicroDiT
from mdit.train.optim import learning_rate
from tests.training import read_metrics, train, write_ds_json, write_recipe


def plain_run(config):
    """-> loss and gradient norm of every step, final weights, their EMA."""
    torch.manual_seed(config.seed)
    model = MicroDiT(config.model)
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    optim, batch = config.optim, config.training.global_batch_size
    adamw = torch.optim.AdamW(model.parameters(), betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    dataset = open_dataset(config.data.train[0])
    order = GlobalOrder(dataset.shard_sizes, batch, config.seed)
    losses, norms = {}, {}
    for step in range(config.training.num_steps):
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config.training.num_steps, optim)
        latents, captions, _ = read_samples(dataset, order.batch(step))
        loss = edm_loss(model, latents, captions, sample_noise(config, step, slice(0, batch)), config.noise)
        adamw.zero_grad()
        loss.backward()
        norms[step + 1] = float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm))
        adamw.step()
        losses[step + 1] = loss.item()
        decay = config.ema.decay if step + 1 > config.ema.start_step else 0.0
        for name, p in model.named_parameters():
            ema[name] = decay * ema[name] + (1 - decay) * p.detach()
    return losses, norms, dict(model.named_parameters()), ema


BEYOND_THE_PAPER = dict(  # docs/training.md
    noise=FlowNoise(target="flow", shift=2.0, sigma_data=0.9),
    training={"mask_ratio": {"schedule": "linear", "start": 0.75, "final": 0.0, "share": 0.8, "levels": 2}},
    report={"checkpoint_every": 3},
    optim={"schedule": "wsd", "decay_share": 0.5, "decay_shape": "1-sqrt"},
)


@pytest.mark.parametrize("options", [{}, BEYOND_THE_PAPER], ids=["paper", "flow, falling masks, wsd"])
def test_deepspeed_run_equals_the_plain_loop(tmp_path, options):
    """With options beyond the paper's on two processes, then its last steps again on one."""
    training = {"num_steps": 8, **options.get("training", {})}
    recipe = write_recipe(tmp_path, **{**options, "training": training, "ema": {"decay": 0.8, "start_step": 3}})
    ds_json = write_ds_json(tmp_path / "ds.json", stage=2, micro_batch=2)
    train(recipe, ds_json, tmp_path / "run", processes=2 if options else 1)
    if options:
        shutil.rmtree(tmp_path / "run/checkpoints/step_00000008")
        assert "resuming at step 6 " in train(recipe, ds_json, tmp_path / "run")
    losses, norms, weights, ema = plain_run(load_config(recipe))
    clip = load_config(recipe).optim.max_grad_norm
    assert min(norms.values()) > clip, "clipping must be at work"
    assert read_metrics(tmp_path / "run") == pytest.approx(losses, rel=1e-5)
    assert read_metrics(tmp_path / "run", "gradient_norm") == pytest.approx(norms, rel=1e-4)
    snapshot = tmp_path / "run" / "snapshots" / "latest"
    for kind, expected in (("raw", weights), ("ema", ema)):
        found = load_file(snapshot / f"{kind}.safetensors")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=2e-5, msg=f"{kind} {name}")
