"""Loss and denoiser of a network in the form of EDM (Karras et al. 2022, arXiv 2206.00364), of either target
(`mdit.diffusion.targets`), with the loss on kept patches only.

A network here is any callable net(x_NCHW, c_noise_N, captions_NLC, mask=...) -> (N, C, H, W).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mdit.config import NoiseConfig, TrainConfig
from mdit.diffusion.targets import loss_weight, preconditioning, sample_sigmas
from mdit.masking import Mask, mask_ratio, sample_mask

Denoiser = Callable[[Tensor, Tensor], Tensor]  # (x_NCHW, sigma_N) -> (N, C, H, W)


@dataclass(frozen=True)
class StepNoise:
    """Every random number of a step, for some samples of its global batch (float32; `keep_caption_N` bool)."""

    sigma_N: Tensor
    noise_NCHW: Tensor
    keep_caption_N: Tensor
    mask: Mask | None

    def __getitem__(self, rows: slice) -> "StepNoise":
        mask = None if self.mask is None else self.mask[rows]
        return StepNoise(self.sigma_N[rows], self.noise_NCHW[rows], self.keep_caption_N[rows], mask)


def sample_noise(config: TrainConfig, step: int, samples: slice, device: torch.device | str = "cpu") -> StepNoise:
    """Rows `samples` of the random numbers of a step: a function of (seed, step, sample) and of nothing else.

    The whole global batch is drawn and sliced, so any number of processes and any micro-batch sees the same numbers; a
    CPU and a GPU draw different ones. Call it once a step: 512 px at a batch of 2,048 are 134 MB before the slice.
    """
    generator = generator_for(config.seed, "step", step, device=device)
    n, model = config.training.global_batch_size, config.model
    shape = (n, *model.latent_shape)
    sigma = sample_sigmas(config.noise, n, generator, device)
    keep_caption = torch.rand(n, generator=generator, device=device) >= config.data.caption_drop
    patch_noise = torch.rand(n, model.num_patches, generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device)
    mask = sample_mask(patch_noise[samples], mask_ratio(config, step))
    return StepNoise(sigma[samples], noise[samples].clone(), keep_caption[samples], mask)


def generator_for(*key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that belongs to a key such as (seed, "step", 17)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def denoise(
    net: Callable, x_NCHW: Tensor, sigma_N: Tensor, captions_NLC: Tensor, target: NoiseConfig, mask: Mask | None = None
) -> Tensor:
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), in float32 outside the network (equation 7, table 1)."""
    c_skip, c_out, c_in, c_noise = preconditioning(target, sigma_N.float().view(-1, 1, 1, 1))
    return c_skip * x_NCHW + c_out * net(c_in * x_NCHW, c_noise.flatten(), captions_NLC, mask=mask).float()


def edm_loss(
    net: Callable, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise, target: NoiseConfig
) -> Tensor:
    """Mean over samples and kept patches of the weighted |D(x + sigma n) - x|^2 (equation 8). A scalar, float32."""
    return edm_losses(net, latents_NCHW, captions_NLC, noise, target).mean()


def edm_losses(
    net: Callable, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise, target: NoiseConfig
) -> Tensor:
    """(N,) float32: the loss of every sample, a mean over its kept patches, of which all samples have equally many."""
    error = edm_errors(net, latents_NCHW, captions_NLC, noise, target)
    if noise.mask is None:
        return error.flatten(1).mean(1)
    kept = noise.mask.image(*error.shape[-2:])
    return (error * kept).flatten(1).sum(1) / (kept.flatten(1).sum(1) * error.shape[1])


def edm_errors(
    net: Callable, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise, target: NoiseConfig
) -> Tensor:
    """(N, C, H, W) float32: weight (D(x + sigma n) - x)^2, of dropped patches too; of flow, (v - (n - x))^2.

    Deterministic given its arguments. Dropped captions are all zeros, as classifier-free guidance expects them.
    """
    latents = latents_NCHW.float()
    captions = captions_NLC * noise.keep_caption_N.view(-1, 1, 1).to(captions_NLC.dtype)
    sigma = noise.sigma_N.view(-1, 1, 1, 1)
    noisy = latents + sigma * noise.noise_NCHW
    denoised = denoise(net, noisy, noise.sigma_N, captions, target, noise.mask)
    return loss_weight(target, sigma) * (denoised - latents) ** 2


def denoiser(net: Callable, captions_NLC: Tensor, target: NoiseConfig, guidance: float = 1.0) -> Denoiser:
    """A denoiser for the sampler, with classifier-free guidance: D = D(zeros) + guidance * (D(caption) - D(zeros))."""
    if guidance == 1:
        return lambda x, sigma: denoise(net, x, sigma, captions_NLC, target)
    both = torch.cat([captions_NLC, torch.zeros_like(captions_NLC)])

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        with_caption, without = denoise(net, x.repeat(2, 1, 1, 1), sigma.repeat(2), both, target).chunk(2)
        return without + guidance * (with_caption - without)

    return guided
