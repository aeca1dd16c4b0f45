"""What a measured run is trained on: made-up batches that cost nothing to fetch, or the recipe's own shards."""

import numpy as np
import torch

from mdit.config import TrainConfig
from mdit.data.loader import Batch, build_loader
from mdit.diffusion.edm import generator_for
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import RunSettings

HELD = 2  # batches of made-up data: as many as a loader holds
KINDS = 8  # of captions


class MadeUp:
    """An endless iterator of made-up batches of this rank: KINDS captions, latents that follow from the caption.

    Latents have the standard deviation of EDM's sigma_data, 0.9 of 1 of it from the caption; all fp16, as from shards.
    The same global batches for any number of processes.
    """

    def __init__(self, config: TrainConfig, settings: RunSettings, plan: ParallelPlan) -> None:
        self.step, device, model = 0, plan.world.device, config.model
        share = config.training.global_batch_size // plan.data_size
        rows = slice(plan.data_rank * share, (plan.data_rank + 1) * share)
        options = dict(generator=generator_for(config.seed, "made up", device=device), device=device)
        latent_shape = model.latent_shape
        captions = torch.randn(KINDS, *model.caption_shape, **options)
        patterns = torch.randn(KINDS, *latent_shape, **options)
        self.batches = []
        for _ in range(HELD):
            kinds = torch.randint(KINDS, (config.training.global_batch_size,), **options)
            noise = torch.randn(len(kinds), *latent_shape, **options)[rows]
            latents = config.noise.sigma_data * (0.9 * patterns[kinds[rows]] + 0.19**0.5 * noise)
            self.batches.append((latents.half(), captions.half()[kinds[rows]]))

    def __next__(self) -> Batch:
        latents, captions = self.batches[self.step % len(self.batches)]
        self.step += 1
        return Batch(latents, captions, [], np.empty(0, np.int64), self.step - 1)


class Loaded:
    """An endless iterator of the recipe's own batches, from its first step on."""

    def __init__(self, config: TrainConfig, settings: RunSettings, plan: ParallelPlan) -> None:
        self.loader = build_loader(
            config.data.train,
            global_batch_size=config.training.global_batch_size,
            seed=config.seed,
            start_step=0,
            rank=plan.data_rank,
            world_size=plan.data_size,
            device=plan.world.device,
            weights=config.data.weights,
            engine=settings.data_engine,
        )

    def __next__(self) -> Batch:
        return next(self.loader)

    def close(self) -> None:
        self.loader.close()
