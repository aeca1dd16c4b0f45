"""The deterministic Heun sampler of EDM (Karras et al. 2022, algorithm 1)."""

import torch
from torch import Tensor

from mdit.diffusion.edm import Denoiser


def sigma_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max .. sigma_min, then 0: (num_steps + 1,) float64 (equation 5)."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    steps = (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([steps, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun_sample(denoise: Denoiser, noise_NCHW: Tensor, num_steps: int, **schedule: float) -> Tensor:
    """From unit noise to samples, (N, C, H, W) float32; 2 * num_steps - 1 evaluations, the state kept in float64."""
    sigmas = sigma_steps(num_steps, **schedule).tolist()
    x = noise_NCHW.double() * sigmas[0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        sigma_N = torch.full((len(x),), sigma, device=x.device)
        return (x - denoise(x.float(), sigma_N).double()) / sigma

    for sigma, following in zip(sigmas, sigmas[1:]):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        if following > 0:
            x = x + (following - sigma) * (first + slope(euler, following)) / 2
        else:
            x = euler
    return x.float()
