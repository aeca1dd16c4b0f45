"""Rectified flow against its own formulas, which know no sigma: x_t = (1 - t) x + t n, loss |v - (n - x)|^2.

On data x ~ N(MU, S^2) the flow has the solution x_t = (1 - t) MU + sqrt((1 - t)^2 S^2 + t^2) z with z constant.
"""

import pytest
import torch

from mdit.config import FlowNoise
from mdit.diffusion.edm import StepNoise, denoise, denoiser, edm_loss
from mdit.diffusion.sampler import flow_sample, flow_times, heun_sample, sample
from mdit.diffusion.targets import FLOW_TIMES, sample_sigmas, sigma_quantile
from mdit.masking import Mask
from tests.recipes import tiny_config

SIGMA_DATA, MU, S = 0.9, 0.7, 0.5


def flow(**changes) -> FlowNoise:
    return FlowNoise(target="flow", sigma_data=SIGMA_DATA, **changes)


class Net(torch.nn.Module):
    """Depends on each of its inputs, differently for every sample, and has a weight."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.3))

    def forward(self, x, time_N, captions, mask=None):
        constant_N = torch.sin(time_N / 300) + captions.mean(dim=(1, 2))
        return torch.sin(self.weight * x) + constant_N.view(-1, 1, 1, 1)


def velocity(net, x_t, t, caption):
    """One sample at time t, as it is documented: the network sees x_t at unit variance, and 1000 t."""
    deviation = ((1 - t) ** 2 * SIGMA_DATA**2 + t**2) ** 0.5
    return net(x_t[None] / deviation, torch.tensor([1000.0 * t]), caption[None])[0]


@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradient_are_those_of_the_velocity(masked):
    times, net = [0.03, 0.4, 0.97], Net()
    latents, noise, captions = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 5, 12)
    keep_NK = torch.rand(3, 16).argsort(1)[:, :4]
    expected = []
    for i, t in enumerate(times):
        caption = captions[i] if i != 1 else torch.zeros(5, 12)
        found = velocity(net, (1 - t) * latents[i] + t * noise[i], t, caption)
        error = ((found - (noise[i] - latents[i])) ** 2).mean(0)
        patches = error.view(4, 2, 4, 2).mean(dim=(1, 3)).flatten()
        expected.append(patches[keep_NK[i]].mean() if masked else patches.mean())
    expected = torch.stack(expected).mean()
    sigma_N = torch.tensor([t / (1 - t) for t in times])
    mask = Mask(keep_NK, 16) if masked else None
    loss = edm_loss(net, latents, captions, StepNoise(sigma_N, noise, torch.tensor([True, False, True]), mask), flow())
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(value, net.weight)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_denoiser_is_what_the_velocity_leads_to():
    net, t = Net(), 0.3
    x_t, captions = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    expected = torch.stack([x_t[i] - t * velocity(net, x_t[i], t, captions[i]) for i in range(2)])
    sigma_N = torch.full((2,), t / (1 - t))
    torch.testing.assert_close(denoise(net, x_t / (1 - t), sigma_N, captions, flow()), expected)


def test_guidance_of_denoisers_is_guidance_of_velocities():
    net, t = Net(), 0.6
    x_t, caption = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12)
    with_caption, without = (velocity(net, x_t[0], t, c) for c in (caption[0], torch.zeros(5, 12)))
    guided = denoiser(net, caption, flow(), 3.0)(x_t / (1 - t), torch.tensor([t / (1 - t)]))
    torch.testing.assert_close(guided[0], x_t[0] - t * (without + 3 * (with_caption - without)))


def gaussian_denoiser(x, sigma_N):
    sigma = sigma_N.double().view(-1, 1, 1, 1)
    return (S**2 * x.double() + sigma**2 * MU) / (S**2 + sigma**2)


def exact(noise):
    t = FLOW_TIMES[1]  # where the sampler starts, with x_t = t n
    return MU + (t * noise.double() - (1 - t) * MU) * S / ((1 - t) ** 2 * S**2 + t**2) ** 0.5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_samples_of_a_gaussian_follow_the_exact_flow_to_second_order(shift):
    noise = torch.randn(8, 4, 4, 4)
    errors = [(flow_sample(gaussian_denoiser, noise, n, shift).double() - exact(noise)).norm() for n in (32, 64, 128)]
    assert errors[-1] < 2e-3 * exact(noise).norm()
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(4, rel=0.3)


def test_the_recipes_target_chooses_the_sampler():
    noise = torch.randn(2, 4, 4, 4)
    of_flow = sample(flow(shift=2.0), gaussian_denoiser, noise, 6)
    assert torch.equal(of_flow, flow_sample(gaussian_denoiser, noise, 6, 2.0))
    assert torch.equal(
        sample(tiny_config().noise, gaussian_denoiser, noise, 6), heun_sample(gaussian_denoiser, noise, 6)
    )


def test_times_are_shifted_and_end_at_zero():
    times = flow_times(10, 3.0)
    expected = [min(0.999, 3 * t / (1 + 2 * t)) for t in (1 - i / 10 for i in range(11))]
    assert times.tolist() == pytest.approx(expected, abs=1e-12) and times[-1] == 0


@pytest.mark.parametrize("noise", [flow(), flow(mean=0.5, std=0.7, shift=3.0), flow(times="uniform", shift=2.0)])
def test_drawn_times_have_the_recipes_distribution(noise):
    n = 100_000
    generator = torch.Generator().manual_seed(0)
    sigma = sample_sigmas(noise, n, generator, "cpu").double()
    t = sigma / (1 + sigma)
    before = t / (noise.shift - (noise.shift - 1) * t)  # t' = s t / (1 + (s - 1) t), solved for t
    if noise.times == "uniform":
        sorted_N = before.sort().values
        assert (sorted_N - torch.linspace(0, 1, n)).abs().max() < 0.01
    else:
        logit = before.logit()
        assert logit.mean().item() == pytest.approx(noise.mean, abs=0.02)
        assert logit.std().item() == pytest.approx(noise.std, rel=0.02)
    for share in (0.1, 0.5, 0.9):
        assert (sigma < sigma_quantile(noise, share)).double().mean().item() == pytest.approx(share, abs=0.01)
