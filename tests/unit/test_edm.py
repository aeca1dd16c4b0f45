"""EDM against table 1 and equation 8 of Karras et al. 2022, and the one source of randomness of training."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdit.diffusion.edm import StepNoise, denoise, denoiser, edm_loss, generator_for, sample_noise
from mdit.masking import Mask
from tests.recipes import tiny_config

EDM = tiny_config().noise
SIGMA_DATA = EDM.sigma_data
SEED_OF_STEP_17 = 9168107782540815465  # half of blake2b-64 of "(0, 'step', 17)", little-endian


def net(x_NCHW, c_noise_N, captions_NLC, mask=None):
    """Depends on each of its inputs, differently for every sample."""
    return torch.sin(3 * x_NCHW) + c_noise_N.view(-1, 1, 1, 1) + captions_NLC.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def inputs(n=3):
    sigma = torch.tensor([0.05, 0.6, 12.0])[:n]
    return torch.randn(n, 4, 8, 8), sigma, torch.randn(n, 5, 12)


def hand_denoised(x, sigma, caption):
    """One sample, float64, scalars from the table."""
    x, total = x.double(), sigma**2 + SIGMA_DATA**2
    f = torch.sin(3 * x / math.sqrt(total)) + 0.25 * math.log(sigma) + caption.double().mean()
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / math.sqrt(total) * f


def test_denoise_is_the_preconditioned_network():
    x, sigma, captions = inputs()
    expected = torch.stack([hand_denoised(x[i], sigma[i].item(), captions[i]) for i in range(3)])
    torch.testing.assert_close(denoise(net, x, sigma, captions, EDM).double(), expected, rtol=1e-5, atol=1e-5)


def test_denoise_hands_the_mask_on_and_leaves_bf16_only_inside_the_network():
    x, sigma, captions = inputs()
    mask, seen = Mask(torch.zeros(3, 1, dtype=torch.int64), 16), []

    def bf16_net(x, c_noise, captions, mask):
        seen.append((x.dtype, c_noise.dtype, mask))
        return x.bfloat16()

    assert denoise(bf16_net, x, sigma, captions, EDM, mask).dtype == torch.float32
    assert seen == [(torch.float32, torch.float32, mask)]


def hand_loss(latents, captions, d):
    """The released code's form: mean over channels, average-pool to patches, mean over kept patches, then samples."""
    per_sample = []
    for i, sigma in enumerate(d.sigma_N.tolist()):
        x = latents[i].double()
        caption = captions[i] if d.keep_caption_N[i] else torch.zeros_like(captions[i])
        denoised = hand_denoised(x + sigma * d.noise_NCHW[i].double(), sigma, caption)
        error = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2 * (denoised - x) ** 2
        patches = torch.nn.functional.avg_pool2d(error.mean(0)[None], 2).flatten()
        per_sample.append(patches.mean() if d.mask is None else patches[d.mask.keep_NK[i]].mean())
    return torch.stack(per_sample).mean()


@pytest.mark.parametrize("masked", [False, True])
def test_loss_is_the_mean_over_kept_patches_of_the_weighted_squared_error(masked):
    latents, sigma, captions = inputs()
    mask = Mask(torch.rand(3, 16).argsort(1)[:, :4], 16) if masked else None
    d = StepNoise(sigma, torch.randn(3, 4, 8, 8), torch.tensor([True, False, True]), mask)
    loss = edm_loss(net, latents, captions, d, EDM)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(hand_loss(latents, captions, d).item(), rel=1e-5)


def test_loss_of_half_precision_latents_is_computed_in_float32():
    latents, sigma, captions = inputs()
    latents, captions = latents.half(), captions.half()
    d = StepNoise(sigma, torch.randn(3, 4, 8, 8), torch.tensor([True, False, True]), None)
    loss = edm_loss(lambda x, t, c, mask: net(x, t, c.float()), latents, captions, d, EDM)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(hand_loss(latents, captions, d).item(), rel=1e-4)


def test_loss_at_the_start_is_one_whatever_sigma():
    """lambda(sigma) makes the target's variance 1: a zero network on data of deviation sigma_data scores 1."""
    for sigma in (0.01, 1.0, 50.0):
        latents = SIGMA_DATA * torch.randn(64, 4, 8, 8)
        d = StepNoise(torch.full((64,), sigma), torch.randn(64, 4, 8, 8), torch.ones(64, dtype=torch.bool), None)
        loss = edm_loss(lambda x, t, c, mask: torch.zeros_like(x), latents, torch.zeros(64, 1, 1), d, EDM)
        assert loss.item() == pytest.approx(1, rel=0.05)


def test_mean_of_the_losses_of_equal_micro_batches_is_the_loss_of_the_batch():
    latents, sigma, captions = torch.randn(6, 4, 8, 8), torch.rand(6) + 0.1, torch.randn(6, 5, 12)
    d = StepNoise(
        sigma, torch.randn(6, 4, 8, 8), torch.arange(6) % 2 == 0, Mask(torch.rand(6, 16).argsort(1)[:, :4], 16)
    )
    parts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    losses = [edm_loss(net, latents[rows], captions[rows], d[rows], EDM) for rows in parts]
    assert sum(losses) / 3 == pytest.approx(edm_loss(net, latents, captions, d, EDM).item(), rel=1e-5)


def same(a: StepNoise, b: StepNoise) -> bool:
    masks = (a.mask is None and b.mask is None) or torch.equal(a.mask.keep_NK, b.mask.keep_NK)
    pairs = [(a.sigma_N, b.sigma_N), (a.noise_NCHW, b.noise_NCHW), (a.keep_caption_N, b.keep_caption_N)]
    return masks and all(torch.equal(x, y) for x, y in pairs)


@given(st.data(), st.sampled_from([0.0, 0.75]), st.integers(0, 2**20))
def test_any_split_of_the_batch_draws_the_same_numbers(data, mask_ratio, step):
    """Ranks and micro-batches of any size: each row is a function of (seed, step, sample) alone."""
    batch = data.draw(st.integers(1, 12))
    cuts = sorted(data.draw(st.sets(st.integers(1, batch - 1)))) if batch > 1 else []
    config = tiny_config(training={"global_batch_size": batch, "mask_ratio": mask_ratio})
    everything = sample_noise(config, step, slice(0, batch))
    for start, stop in zip([0, *cuts], [*cuts, batch]):
        part = sample_noise(config, step, slice(start, stop))
        assert len(part.sigma_N) == stop - start
        assert same(part, everything[start:stop])


def whole(config, step=0):
    return sample_noise(config, step, slice(0, config.training.global_batch_size))


def test_a_draw_is_reproducible_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    assert same(whole(tiny_config()), whole(tiny_config()))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seed, step", [(1, 0), (0, 1)])
def test_another_seed_or_step_draws_other_numbers(seed, step):
    """Seed 0 is a seed like any other."""
    first, other = whole(tiny_config(seed=0), 0), whole(tiny_config(seed=seed), step)
    assert not (first.sigma_N == other.sigma_N).any()
    assert not (first.noise_NCHW == other.noise_NCHW).any()
    assert not torch.equal(first.mask.keep_NK, other.mask.keep_NK)


def test_drawn_numbers_have_the_recipes_distribution():
    n = 8192
    training = {"global_batch_size": n, "mask_ratio": 0.5}
    config = tiny_config(model={"latent_size": 4}, noise={"P_mean": 0.3, "P_std": 0.6}, training=training)
    d = whole(config)
    log_sigma = d.sigma_N.log()
    assert log_sigma.mean().item() == pytest.approx(0.3, abs=4 * 0.6 / n**0.5)
    assert log_sigma.std().item() == pytest.approx(0.6, rel=4 / (2 * n) ** 0.5)
    inside = ((log_sigma - 0.3).abs() < 0.6).float().mean().item()
    assert inside == pytest.approx(0.6827, abs=0.02)  # normal, not merely of that mean and deviation
    assert (~d.keep_caption_N).float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / n) ** 0.5)
    assert d.noise_NCHW.mean().item() == pytest.approx(0, abs=4 / (n * 64) ** 0.5)
    assert d.noise_NCHW.std().item() == pytest.approx(1, abs=0.005)
    assert torch.allclose(d.mask.keep_NK.flatten().bincount() / n, torch.tensor(0.5), atol=0.025)
    together = torch.corrcoef(torch.stack([log_sigma, d.noise_NCHW.flatten(1)[:, 0], d.keep_caption_N.float()]))
    assert (together - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_captions_are_dropped_never_or_always_at_the_ends(rate):
    config = tiny_config(data={"caption_drop": rate})
    assert all(whole(config, step).keep_caption_N.tolist() == [rate == 0] * 8 for step in range(20))


def test_draw_changes_with_the_recipes_mask_ratio_only_in_the_mask():
    masked, plain = whole(tiny_config()), whole(tiny_config(training={"mask_ratio": 0.0}))
    assert plain.mask is None and masked.mask.keep_NK.shape == (8, 4)
    assert torch.equal(masked.noise_NCHW, plain.noise_NCHW) and torch.equal(masked.sigma_N, plain.sigma_N)


def test_generators_of_different_keys_are_different():
    keys = [(0, "step", 0), (0, "step", 1), (1, "step", 0), (0, "order", 0), (10, "step"), (1, 0, "step")]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)


def test_generator_of_a_key_is_the_same_in_every_process_and_version():
    """A change of this number would change every run at its next resume."""
    assert generator_for(0, "step", 17).initial_seed() == SEED_OF_STEP_17
    program = "from mdit.diffusion.edm import generator_for; print(generator_for(0, 'step', 17).initial_seed())"
    env = {**os.environ, "PYTHONHASHSEED": "1234"}
    out = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True).stdout
    assert int(out) == SEED_OF_STEP_17


def test_guidance_one_is_the_plain_denoiser():
    x, sigma, captions = inputs()
    calls = []

    def counting(*args, **kwargs):
        calls.append(len(args[0]))
        return net(*args, **kwargs)

    plain = denoise(net, x, sigma, captions, EDM)
    assert torch.equal(denoiser(counting, captions, EDM, 1.0)(x, sigma), plain)
    assert calls == [3]


@pytest.mark.parametrize("guidance", [0.0, 2.0, 5.0])
def test_guidance_extrapolates_from_no_caption_to_the_caption(guidance):
    x, sigma, captions = inputs()
    expected = []
    for i in range(3):
        with_caption = hand_denoised(x[i], sigma[i].item(), captions[i])
        without = hand_denoised(x[i], sigma[i].item(), torch.zeros_like(captions[i]))
        expected.append(without + guidance * (with_caption - without))
    guided = denoiser(net, captions, EDM, guidance)(x, sigma)
    torch.testing.assert_close(guided.double(), torch.stack(expected), rtol=1e-5, atol=1e-5)
