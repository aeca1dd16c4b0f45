"""Validation loss at fixed noise levels, and how evenly the routers spread tokens over the experts."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mdit.config import NoiseConfig, TrainConfig
from mdit.data.shards import open_dataset, read_samples
from mdit.diffusion.edm import StepNoise, edm_loss, generator_for
from mdit.diffusion.targets import edm_weight, loss_weight, sigma_quantile
from mdit.dist import World, gather
from mdit.kernels import expert_choice
from mdit.models.moe import ExpertChoiceMoE

NUM_SIGMAS = 5
BATCH_SIZE = 64
MAX_SAMPLES = 1024  # of a set


def validation_sigmas(noise: NoiseConfig) -> list[float]:
    """The 10, 30, 50, 70 and 90 % quantiles of training's noise levels, lowest first.

    They are the middles of five equally probable bins, so the mean of the five losses estimates the loss that training
    of EDM minimises (without mask and caption drop), and each of them alone tells about one range of noise.
    """
    return [sigma_quantile(noise, (s + 0.5) / NUM_SIGMAS) for s in range(NUM_SIGMAS)]


@torch.no_grad()
def validation_loss(
    net: Callable,
    latents_NCHW: Tensor,
    captions_NLC: Tensor,
    *,
    config: TrainConfig,
    indices: Sequence[int],
    batch_size: int,
    measured_as: TrainConfig | None = None,
) -> Tensor:
    """EDM loss (Karras et al. 2022, equation 8) of every patch with its caption, summed over samples; of a denoiser of
    either target.

    `indices` are the samples' places in the validation set: each draws its noise from (seed, place, sigma), so neither
    batch size nor the split over ranks matters. Runs on the latents' device. `config` is the network's recipe;
    `measured_as` is another one whose seed, noise levels and weights are taken, so that networks of several recipes can
    be compared.

    -> (NUM_SIGMAS,) float64 on that device: add over ranks, then divide by the number of samples of all of them.
    """
    measure, target = measured_as or config, config.noise
    sigmas = validation_sigmas(measure.noise)
    weights = [edm_weight(sigma, measure.noise.sigma_data) / loss_weight(target, sigma) for sigma in sigmas]
    sums = torch.zeros(len(sigmas), dtype=torch.float64, device=latents_NCHW.device)
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        latents, captions = latents_NCHW[rows].float(), captions_NLC[rows]
        for s, sigma in enumerate(sigmas):
            noise = _noise(measure.seed, indices[rows], s, sigma, latents)
            sums[s] += edm_loss(net, latents, captions, noise, target).double() * (len(latents) * weights[s])
    return sums


def losses_on_set(
    net: Callable,
    config: TrainConfig,
    device: torch.device,
    measured_as: TrainConfig | None = None,
    world: World | None = None,
) -> list[float]:
    """The validation loss at each noise level over the first samples of the recipe's validation set; a collective where
    there is a `world`, whose ranks share them."""
    dataset = open_dataset(config.data.validation)
    count = min(dataset.samples, MAX_SAMPLES)
    indices = range(world.rank, count, world.size) if world else range(count)
    latents_NCHW, captions_NLC, _ = read_samples(dataset, indices)
    options = {"config": config, "indices": indices, "batch_size": BATCH_SIZE, "measured_as": measured_as}
    sums = validation_loss(net, latents_NCHW.to(device), captions_NLC.to(device), **options).cpu()
    return (torch.stack(gather(sums, world) if world else [sums]).sum(0) / count).tolist()


def _noise(seed: int, indices: Sequence[int], s: int, sigma: float, like_NCHW: Tensor) -> StepNoise:
    noise = [
        torch.randn(like_NCHW.shape[1:], generator=generator_for(seed, "validation", index, s)) for index in indices
    ]
    every = torch.ones(len(indices), dtype=torch.bool, device=like_NCHW.device)
    return StepNoise(
        torch.full_like(like_NCHW[:, 0, 0, 0], sigma), torch.stack(noise).to(like_NCHW.device), every, None
    )


class ExpertCoverage:
    """Context manager that watches the routers of a model during forward passes: how they spread tokens over experts.

        with ExpertCoverage(model) as coverage:
            validation_loss(model, ...)
        coverage.summary()["tokens_without_expert"]

    `totals` (5,) float64 are the sums that every metric is made of: with several ranks, all-reduce them first. Hooks do
    not fire inside a compiled model: watch the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, ExpertChoiceMoE)]
        self.totals = torch.zeros(5, dtype=torch.float64, device=next(model.parameters()).device)
        self._hooks = []

    def __enter__(self) -> "ExpertCoverage":
        hooks = [layer.gate.register_forward_hook(functools.partial(self._add_choices, layer)) for layer in self.layers]
        self._hooks += hooks
        return self

    def __exit__(self, *exception) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _add_choices(self, layer: ExpertChoiceMoE, gate: nn.Module, args: tuple, logits_NTE: Tensor) -> None:
        routing = expert_choice.route(logits_NTE, layer.tokens_per_expert(logits_NTE.shape[1]))
        experts_NT = (routing.slots_NTE >= 0).double().sum(dim=-1)
        sums = [torch.ones_like(experts_NT), experts_NT == 0, experts_NT, experts_NT**2, routing.weights_NEK]
        self.totals += torch.stack([values.double().sum() for values in sums])

    def summary(self) -> dict[str, float]:
        """Numbers for a log; empty for a model without experts.

        tokens_without_expert  share of tokens that no expert chose (random choices at capacity factor 2 of 8: 10 %)
        expert_imbalance       standard deviation over mean of the number of experts a token gets: 0 is perfectly even
                               (random choices: 0.61), sqrt(E / capacity_factor - 1) means that all experts chose alike
        router_weight          mean router probability of a (token, expert) choice; 1 / E: it tells no two apart
        """
        if not self.layers:
            return {}
        tokens, unchosen, choices, squares, weights = self.totals.tolist()
        if tokens == 0:
            raise RuntimeError("no forward pass was watched; a compiled model does not call hooks")
        mean = choices / tokens
        imbalance = max(squares / tokens - mean**2, 0.0) ** 0.5 / mean
        return {
            "tokens_without_expert": unchosen / tokens,
            "expert_imbalance": imbalance,
            "router_weight": weights / choices,
        }
