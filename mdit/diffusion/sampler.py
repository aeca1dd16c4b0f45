"""Deterministic samplers: Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1), in each target's
own coordinates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mdit.config import FlowNoise, NoiseConfig
from mdit.diffusion.edm import Denoiser
from mdit.diffusion.targets import FLOW_TIMES

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def sigma_steps(num_steps: int) -> Tensor:
    """Noise levels SIGMA_MAX .. SIGMA_MIN, then 0: (num_steps + 1,) float64 (equation 5)."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    steps = (SIGMA_MAX ** (1 / RHO) + ramp * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    return torch.cat([steps, torch.zeros(1, dtype=torch.float64)])


def flow_times(num_steps: int, shift: float) -> Tensor:
    """Times from the last one of training to 0, equally spaced but for the shift: (num_steps + 1,) float64."""
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return (shift * even / (1 + (shift - 1) * even)).clamp(max=FLOW_TIMES[1])


def sample(target: NoiseConfig, denoise: Denoiser, noise_NCHW: Tensor, num_steps: int) -> Tensor:
    """From unit noise to samples, (N, C, H, W) float32; 2 * num_steps - 1 evaluations, the state kept in float64."""
    if isinstance(target, FlowNoise):
        return flow_sample(denoise, noise_NCHW, num_steps, target.shift)
    return heun_sample(denoise, noise_NCHW, num_steps)


@torch.no_grad()
def heun_sample(denoise: Denoiser, noise_NCHW: Tensor, num_steps: int) -> Tensor:
    """EDM's: x + sigma n over falling sigma, with the slope (x - D) / sigma."""

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(x.float(), _each(sigma, x)).double()) / sigma

    return _heun(slope, noise_NCHW, sigma_steps(num_steps).tolist())


@torch.no_grad()
def flow_sample(denoise: Denoiser, noise_NCHW: Tensor, num_steps: int, shift: float) -> Tensor:
    """Rectified flow's: x_t over falling t, with the velocity (x_t - D(x_t / (1 - t); t / (1 - t))) / t."""

    def velocity(x: Tensor, t: float) -> Tensor:
        return (x - denoise((x / (1 - t)).float(), _each(t / (1 - t), x)).double()) / t

    return _heun(velocity, noise_NCHW, flow_times(num_steps, shift).tolist())


def _heun(slope: Callable[[Tensor, float], Tensor], noise_NCHW: Tensor, levels: Sequence[float]) -> Tensor:
    """From levels[0] times the noise to the last level, 0, where the step is Euler's."""
    x = noise_NCHW.double() * levels[0]
    for level, following in zip(levels, levels[1:]):
        first = slope(x, level)
        euler = x + (following - level) * first
        if following > 0:
            x = x + (following - level) * (first + slope(euler, following)) / 2
        else:
            x = euler
    return x.float()


def _each(level: float, x_NCHW: Tensor) -> Tensor:
    return torch.full((len(x_NCHW),), level, device=x_NCHW.device)
