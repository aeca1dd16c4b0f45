"""Targets of the network: what it is to predict at a noise level, and how levels are drawn, for EDM and rectified flow.

Both see x + sigma n and make a denoiser of the network F, in the general form of Karras et al. 2022 (equations 7, 8):

    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)            loss: weight |D(x + sigma n) - x|^2

Rectified flow (Liu et al. 2023, arXiv 2209.03003) is F = v(x_t, t) on x_t = (1 - t) x + t n, with the loss
|v - (n - x)|^2. That is this form at sigma = t / (1 - t), where x_t = (x + sigma n) / (1 + sigma) and D = x_t - t v.
The network's input is scaled to unit variance, as EDM's is, and its time is 1000 t, as diffusion transformers have it.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from mdit.config import EDMNoise, FlowNoise, NoiseConfig

FLOW_TIMES = 1e-3, 0.999  # the first and the last that is drawn, and that the sampler starts from
FLOW_SIGMAS = tuple(t / (1 - t) for t in FLOW_TIMES)
TIME_SCALE = 1000


def preconditioning(noise: NoiseConfig, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise at noise levels of any shape, in that shape."""
    total = sigma**2 + noise.sigma_data**2
    if isinstance(noise, FlowNoise):
        t = sigma / (1 + sigma)
        return 1 / (1 + sigma), -t, 1 / total.sqrt(), TIME_SCALE * t
    return noise.sigma_data**2 / total, sigma * noise.sigma_data / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


def loss_weight(noise: NoiseConfig, sigma):
    """Weight of the denoiser's squared error at noise levels, a tensor or a number: that of the target's own loss."""
    if isinstance(noise, FlowNoise):
        return ((1 + sigma) / sigma) ** 2
    return edm_weight(sigma, noise.sigma_data)


def edm_weight(sigma, sigma_data: float):
    """lambda(sigma) of EDM, by which a denoiser of any target is judged in validation."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def sample_sigmas(noise: NoiseConfig, count: int, generator: torch.Generator, device: torch.device | str) -> Tensor:
    """(count,) float32 noise levels of training. A shift s of flow's times, t' = s t / (1 + (s - 1) t) (Esser et al.
    2024, arXiv 2403.03206, equation 23), is a factor s of sigma."""
    if isinstance(noise, EDMNoise):
        return (torch.randn(count, generator=generator, device=device) * noise.P_std + noise.P_mean).exp()
    if noise.times == "uniform":
        logit = torch.rand(count, generator=generator, device=device).logit()
    else:
        logit = torch.randn(count, generator=generator, device=device) * noise.std + noise.mean
    return (noise.shift * logit.exp()).clamp(*FLOW_SIGMAS)


def sigma_quantile(noise: NoiseConfig, share: float) -> float:
    """The noise level below which so large a share of training's are."""
    if isinstance(noise, EDMNoise):
        return math.exp(NormalDist(noise.P_mean, noise.P_std).inv_cdf(share))
    uniform = noise.times == "uniform"
    before = share / (1 - share) if uniform else math.exp(NormalDist(noise.mean, noise.std).inv_cdf(share))
    return min(max(noise.shift * before, FLOW_SIGMAS[0]), FLOW_SIGMAS[1])
