"""Results of a run on the way, from a plain copy of the model: validation loss, expert coverage, grids, snapshots.

The copy is there while something is evaluated, in the device's memory alone and in the format that training computes
in, which is what the kernels were checked in; the numbers around it, of EDM's preconditioning and of the sampler, are
float32 and float64 as ever.
"""

from functools import partial
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from mdit.checkpoint.snapshot import save_snapshot
from mdit.checkpoint.training_state import on_first
from mdit.config import TrainConfig, portable
from mdit.data.shards import open_dataset, read_samples
from mdit.dist import World, gather
from mdit.encoders import build_image_encoder, build_text_encoder_from
from mdit.eval.samples import grid, sample_latents, save_png, to_images
from mdit.eval.validation import ExpertCoverage, validation_loss
from mdit.files import optional
from mdit.models import MicroDiT
from mdit.models.dit import buffers
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.metrics import Metrics

BATCH_SIZE = 64
MAX_VALIDATION_SAMPLES = 1024


class Evaluator:
    """Evaluates the EMA where there is one, else the weights. Every rank takes a share; the result is the same for any
    number of ranks, since each sample brings its own random numbers."""

    def __init__(self, config: TrainConfig, run_dir: Path, world: World, dtype: torch.dtype) -> None:
        self.config, self.run_dir, self.world, self.dtype = config, run_dir, world, dtype
        self.dataset = open_dataset(config.data.validation)
        self.texts, captions_NLC = self._prompts()
        self.prompt_indices = list(range(world.rank, len(self.texts), world.size))
        self.captions_NLC = captions_NLC[self.prompt_indices]

    def validate(self, step: int, engine: Engine, ema: EMA | None, metrics: Metrics) -> None:
        """Fixed-sigma loss and expert coverage over the first samples of the validation set. A collective."""
        count = min(self.dataset.samples, MAX_VALIDATION_SAMPLES)
        mine = list(range(self.world.rank, count, self.world.size))
        latents, captions, _ = read_samples(self.dataset, mine)
        model = self._copy(engine, ema)
        with ExpertCoverage(model) as coverage:
            sums = validation_loss(
                model,
                latents.to(self.world.device),
                captions.to(self.world.device),
                config=self.config,
                indices=mine,
                batch_size=BATCH_SIZE,
            )
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(coverage.totals)
        metrics.write(step, "validation", {"validation_loss": float(sums.mean() / count), **coverage.summary()})

    def sample(self, step: int, engine: Engine, ema: EMA | None, metrics: Metrics) -> None:
        """The prompts' pictures as a grid, in samples/ and on TensorBoard. A collective."""
        latents = self._sample_latents(engine, ema)
        parts = gather(dict(zip(self.prompt_indices, latents.cpu())), self.world)
        if not self.world.is_first:
            return
        by_index = {index: latent for part in parts for index, latent in part.items()}
        latents = torch.stack([by_index[i] for i in range(len(self.texts))])
        decoder = build_image_encoder(self.dataset.encoders["image"], self.world.device)
        image = grid(to_images(decoder, latents), self.texts)
        path = self.run_dir / "samples" / f"step_{step:08d}.png"
        with optional(path.parent):
            path.parent.mkdir(exist_ok=True)
            save_png(image, path)
        metrics.write_image(step, "samples", image)

    def save_snapshot(self, step: int, engine: Engine, ema: EMA | None) -> None:
        """A collective. Raises OSError on all ranks alike where it cannot be written."""
        raw = self._state_dict(engine, None)
        averaged = self._state_dict(engine, ema.partitions) if ema else None
        write = partial(
            save_snapshot,
            self.run_dir / "snapshots",
            step=step,
            config_json={"recipe": portable(self.config, self.run_dir / "config.json")},
            raw=raw,
            ema=averaged,
            encoders=self.dataset.encoders,
        )
        on_first(self.world, write)

    def _prompts(self) -> tuple[list[str], Tensor]:
        prompts = self.config.report.prompts
        if prompts != "validation":
            encoder = build_text_encoder_from(self.dataset.encoders["text"], self.world.device)
            return list(prompts), encoder.encode(list(prompts))
        count = min(self.config.report.num_samples, self.dataset.samples)
        _, captions, texts = read_samples(self.dataset, list(range(count)))
        return texts, captions

    def _sample_latents(self, engine: Engine, ema: EMA | None) -> Tensor:
        """This rank's. The copy is gone behind it, before an autoencoder wants the memory."""
        report = self.config.report
        return sample_latents(
            self._copy(engine, ema),
            self.captions_NLC.to(self.world.device),
            config=self.config,
            seed=self.config.seed,
            indices=self.prompt_indices,
            guidance=report.guidance,
            num_steps=report.sampler_steps,
            batch_size=BATCH_SIZE,
        )

    @torch.no_grad()
    def _copy(self, engine: Engine, ema: EMA | None) -> MicroDiT:
        """The model with whole weights, of nobody but the caller. A collective."""
        model = MicroDiT.without_weights(self.config.model, self.world.device, self.dtype)
        parameters = dict(model.named_parameters())
        for name, value in engine.full_weights(ema.partitions if ema else None):
            parameters[name].copy_(value)
        return model.eval().requires_grad_(False)

    def _state_dict(self, engine: Engine, partitions: list[Tensor] | None) -> dict[str, Tensor]:
        """Whole float32 weights and buffers in host memory, on rank 0; nothing elsewhere. A collective."""
        whole = buffers(self.config.model)
        for name, value in engine.full_weights(partitions):
            if self.world.is_first:
                whole[name] = value.to("cpu", copy=True)
        return whole
