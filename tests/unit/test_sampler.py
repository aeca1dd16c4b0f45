"""The sampler on data x ~ N(mu, s^2), whose denoiser is D(x; sigma) = (s^2 x + sigma^2 mu) / (s^2 + sigma^2).

The probability-flow ODE then has the solution x(0) = mu + (x(sigma_max) - mu) s / sqrt(s^2 + sigma_max^2).
"""

import pytest
import torch

from mdit.diffusion.sampler import heun_sample, sigma_steps

MU, S = 0.7, 0.5


def gaussian_denoiser(x, sigma_N):
    sigma = sigma_N.double().view(-1, 1, 1, 1)
    return (S**2 * x.double() + sigma**2 * MU) / (S**2 + sigma**2)


def exact(noise, sigma_max=80.0):
    return MU + (sigma_max * noise.double() - MU) * S / (S**2 + sigma_max**2) ** 0.5


def test_samples_follow_the_exact_solution():
    noise = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(heun_sample(gaussian_denoiser, noise, 128).double(), exact(noise), rtol=1e-3, atol=1e-3)


def test_halving_the_step_divides_the_error_by_four():
    noise = torch.randn(8, 4, 4, 4)
    errors = [(heun_sample(gaussian_denoiser, noise, n).double() - exact(noise)).norm() for n in (32, 64, 128)]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(4, rel=0.25)


def test_sigma_steps_are_equation_5_and_end_at_zero():
    steps = sigma_steps(30)
    assert steps.shape == (31,) and steps.dtype == torch.float64
    expected = [(80 ** (1 / 7) + i / 29 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(30)] + [0]
    assert steps.tolist() == pytest.approx(expected, rel=1e-9)


def test_denoiser_is_called_twice_a_step_but_once_at_the_last_and_in_float32():
    seen = []

    def spy(x, sigma_N):
        seen.append((x.dtype, sigma_N.shape, sigma_N[0].item()))
        return gaussian_denoiser(x, sigma_N)

    heun_sample(spy, torch.randn(3, 4, 4, 4), 6)
    sigmas = sigma_steps(6).float().tolist()
    twice = [sigma for pair in zip(sigmas[:5], sigmas[1:6]) for sigma in pair]
    assert seen == [(torch.float32, (3,), sigma) for sigma in [*twice, sigmas[5]]]


def test_no_graph_is_built():
    weight = torch.ones(1, requires_grad=True)
    samples = heun_sample(lambda x, sigma: weight * x, torch.randn(1, 4, 4, 4), 3)
    assert not samples.requires_grad
