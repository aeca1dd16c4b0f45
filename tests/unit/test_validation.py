import math

import numpy as np
import pytest
import torch

from mdit.checkpoint.snapshot import Snapshot
from mdit.config import CONFIGS, FlowNoise, TrainConfig, load_config
from mdit.data.shards import open_dataset, read_samples
from mdit.data.writer import ShardWriter
from mdit.diffusion.edm import denoise, generator_for
from mdit.eval.evaluate import evaluate
from mdit.eval.validation import NUM_SIGMAS, ExpertCoverage, validation_loss, validation_sigmas
from mdit.models import MicroDiT
from mdit.models.moe import ExpertChoiceMoE

PAPER_32 = CONFIGS / "paper_32.toml"
CONFIG = load_config(PAPER_32, ["model.latent_size=8", "model.latent_channels=2"])
COUNT = 7


def net(x, c_noise, captions, mask=None):
    """Depends on all its inputs; refuses a mask, since validation sees every patch."""
    assert mask is None
    return torch.tanh(x * captions.mean(dim=(1, 2)).view(-1, 1, 1, 1) + c_noise.view(-1, 1, 1, 1))


def data():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(COUNT, 2, 8, 8, generator=generator), torch.randn(COUNT, 4, 6, generator=generator)


def loss(latents, captions, indices, batch_size=3, measured_as=None):
    options = dict(config=CONFIG, indices=indices, batch_size=batch_size, measured_as=measured_as)
    return validation_loss(net, latents, captions, **options)


OTHER = load_config(PAPER_32, ["seed=7", "noise.P_mean=-0.9", "noise.P_std=0.7", "noise.sigma_data=0.4"])


@pytest.mark.parametrize("measured_as", [None, OTHER], ids=["its own noise", "another recipe's"])
def test_it_is_the_textbook_formula(measured_as):
    """The network keeps its own preconditioning; levels, weights and noise may be another recipe's."""
    latents, captions = data()
    inside, (noise, seed) = CONFIG.noise.sigma_data, ((c := measured_as or CONFIG).noise, c.seed)
    expected = torch.zeros(NUM_SIGMAS, dtype=torch.float64)
    for i in range(COUNT):
        x, caption = latents[i : i + 1].double(), captions[i : i + 1].double()
        for s, sigma in enumerate(validation_sigmas(noise)):
            generator = generator_for(seed, "validation", 100 + i, s)
            noisy = x + sigma * torch.randn(1, 2, 8, 8, generator=generator).double()
            total = sigma**2 + inside**2
            inner = net(noisy / math.sqrt(total), torch.tensor([math.log(sigma) / 4]).double(), caption)
            denoised = inside**2 / total * noisy + sigma * inside / math.sqrt(total) * inner
            weight = (sigma**2 + noise.sigma_data**2) / (sigma * noise.sigma_data) ** 2
            expected[s] += weight * ((denoised - x) ** 2).mean()
    found = loss(latents, captions, range(100, 100 + COUNT), measured_as=measured_as)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_one_denoiser_has_one_loss_whatever_it_was_trained_to_predict():
    """A flow network that leads to the denoiser of an EDM network, at the same sigmas."""
    flow = CONFIG.model_copy(update={"noise": FlowNoise(target="flow", sigma_data=0.4)})

    def velocity(c_in_x, time_N, captions, mask=None):
        t = time_N.view(-1, 1, 1, 1) / 1000
        sigma = t / (1 - t)
        x = c_in_x * (sigma**2 + 0.4**2).sqrt()
        return ((1 - t) * x - denoise(net, x, sigma.flatten(), captions, CONFIG.noise)) / t

    latents, captions = data()
    found = validation_loss(
        velocity, latents, captions, config=flow, indices=range(COUNT), batch_size=4, measured_as=CONFIG
    )
    torch.testing.assert_close(found, loss(latents, captions, range(COUNT)), rtol=1e-3, atol=0)


def test_sigmas_are_the_middles_of_equally_probable_bins():
    noise = CONFIG.noise
    sample = (torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * noise.P_std + noise.P_mean).exp()
    for s, sigma in enumerate(validation_sigmas(noise)):
        assert (sample < sigma).float().mean().item() == pytest.approx((s + 0.5) / NUM_SIGMAS, abs=0.005)


def test_independent_of_batch_size_and_split():
    latents, captions = data()
    whole = loss(latents, captions, range(COUNT), batch_size=64)
    torch.testing.assert_close(loss(latents, captions, range(COUNT), batch_size=2), whole, rtol=1e-6, atol=0)
    ranks = [list(range(rank, COUNT, 3)) for rank in range(3)]
    parts = sum(loss(latents[mine], captions[mine], mine) for mine in ranks)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=0)


def test_a_rank_without_samples_adds_nothing():
    latents, captions = data()
    assert torch.equal(loss(latents[:0], captions[:0], []), torch.zeros(NUM_SIGMAS, dtype=torch.float64))


class Router(torch.nn.Module):
    """Logits as given, whatever the tokens."""

    def __init__(self, logits_NTE):
        super().__init__()
        self.logits_NTE = torch.nn.Parameter(logits_NTE)

    def forward(self, x_NTD):
        return self.logits_NTE


def watched(logits_NTE, capacity_factor):
    num_tokens, num_experts = logits_NTE.shape[1:]
    layer = ExpertChoiceMoE(4, 8, 8, num_experts, capacity_factor)
    layer.init_weights(0.02)
    layer.gate = Router(logits_NTE)
    with ExpertCoverage(torch.nn.Sequential(layer)) as coverage:
        layer(torch.randn(1, num_tokens, 4))
    return list(coverage.summary().values())


def test_a_perfect_router_is_even():
    logits = 20 * torch.eye(4).repeat(2, 1).unsqueeze(0)  # token t goes to expert t % 4, with certainty
    assert watched(logits, capacity_factor=1.0) == [0, 0, pytest.approx(1)]


def test_a_hand_made_choice():
    """Experts 0 and 1 both take tokens 0 and 1, expert 2 takes tokens 2 and 3, nobody takes 4 and 5."""
    logits = torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]]).unsqueeze(0)
    weight = (4 * math.e / (2 * math.e + 1) + 2 * math.e / (math.e + 2)) / 6
    # Experts a token: 2 2 1 1 0 0.
    assert watched(logits, capacity_factor=1.0) == pytest.approx([2 / 6, math.sqrt(4 / 6), weight])


def test_collapse_is_the_stated_maximum():
    """Each token's logits are equal over experts, so all experts break the tie alike: on the same tokens."""
    assert watched(torch.zeros(1, 8, 4), capacity_factor=2.0) == pytest.approx([0.5, math.sqrt(4 / 2 - 1), 1 / 4])


def test_every_expert_block_is_watched_and_ranks_add_up():
    model = MicroDiT(load_config(PAPER_32, ["model.depth=6", "model.mixer_depth=2"]).model)

    def watch(*inputs):
        with ExpertCoverage(model) as coverage:
            for x in inputs:
                model(x, torch.zeros(1), torch.zeros(1, 16, 384))
        return coverage

    inputs = torch.randn(2, 1, 3, 32, 32)
    whole, first, second = watch(*inputs), watch(inputs[0]), watch(inputs[1])
    first.totals += second.totals
    torch.testing.assert_close(first.totals, whole.totals)
    assert len(whole.layers) == 3 and whole.totals[0] == 3 * 2 * 64 and whole.totals[2] == 3 * 2 * 64 * 2.0
    model(inputs[0], torch.zeros(1), torch.zeros(1, 16, 384))  # no hook is left behind
    torch.testing.assert_close(first.totals, whole.totals)


def test_nothing_watched_is_said():
    model = MicroDiT(load_config(PAPER_32).model)
    with ExpertCoverage(model) as coverage:
        pass
    with pytest.raises(RuntimeError, match="no forward pass was watched"):
        coverage.summary()
    dense = MicroDiT(load_config(PAPER_32, ["model.experts_every_n=0"]).model)
    with ExpertCoverage(dense) as coverage:
        pass
    assert coverage.summary() == {}


def test_a_snapshot_without_scenes_gets_its_validation_loss(tmp_path):
    overrides = [f"data.validation={tmp_path / 'set'}", "model.depth=2", "model.caption_length=16"]
    values = load_config(PAPER_32, overrides).model_dump()
    values["data"]["precompute"] = None
    config = TrainConfig.model_validate(values)
    description = {"image": {"id": "pixels", "scale": 1.5}, "text": {"id": "none", "max_tokens": 16, "channels": 384}}
    with ShardWriter(tmp_path / "set", (3, 32, 32), (16, 384), description, {}) as writer:
        for i in range(3):
            latent, embedding = np.full((3, 32, 32), 0.5 * i), np.full((16, 384), 0.1)
            writer.write(f"sample-{i}", latent, embedding, f"caption {i}")
    model = MicroDiT(config.model).eval().requires_grad_(False)
    snapshot = Snapshot(tmp_path, 0, config, description, {})
    found = evaluate(snapshot, model, count=8, seed=0, options={"guidance": 2.0, "num_steps": 2})
    assert found.pictures_NHWC.shape == (3, 32, 32, 3) and found.captions == ["caption 0", "caption 1", "caption 2"]
    latents, captions, _ = read_samples(open_dataset(tmp_path / "set"), range(3))
    sums = validation_loss(model, latents, captions, config=config, indices=range(3), batch_size=3)
    assert found.scores["validation_loss"] == pytest.approx(sums.mean().item() / 3)
    assert found.lines[0] == f"validation loss {found.scores['validation_loss']:.4f} over 3 samples"
