"""The deterministic Heun sampler of EDM (Karras et al. 2022, algorithm 1)."""

import torch
from torch import Tensor

from mdit.diffusion.edm import Denoiser

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def sigma_steps(num_steps: int) -> Tensor:
    """Noise levels SIGMA_MAX .. SIGMA_MIN, then 0: (num_steps + 1,) float64 (equation 5)."""
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    steps = (SIGMA_MAX ** (1 / RHO) + ramp * (SIGMA_MIN ** (1 / RHO) - SIGMA_MAX ** (1 / RHO))) ** RHO
    return torch.cat([steps, torch.zeros(1, dtype=torch.float64)])


@torch.no_grad()
def heun_sample(denoise: Denoiser, noise_NCHW: Tensor, num_steps: int) -> Tensor:
    """From unit noise to samples, (N, C, H, W) float32; 2 * num_steps - 1 evaluations, the state kept in float64."""
    sigmas = sigma_steps(num_steps).tolist()
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
