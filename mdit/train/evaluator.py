"""A run's evaluation on the way, of a plain copy of the model: validation loss, expert coverage, grids of samples.

The copy is there while something is evaluated, in the device's memory alone and in the format that training computes
in, which is what the kernels were checked in; the numbers around it, of EDM's preconditioning and of the sampler, are
float32 and float64 as ever.
"""

import torch
import torch.distributed
from torch import Tensor

from mdit.data.shards import open_dataset, read_samples
from mdit.dist import gather
from mdit.encoders import build_image_encoder, build_text_encoder
from mdit.eval.samples import grid, sample_latents, save_png, to_images
from mdit.eval.validation import BATCH_SIZE, MAX_SAMPLES, ExpertCoverage, validation_loss
from mdit.files import optional
from mdit.models import MicroDiT
from mdit.parallel.fuse import fuse
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.meter import Meter
from mdit.train.run import Run


class Evaluator:
    """Evaluates the EMA where there is one, else the weights. Every rank takes a share; the result is the same for any
    number of ranks, since each sample brings its own random numbers."""

    def __init__(self, run: Run, engine: Engine, ema: EMA, meter: Meter) -> None:
        self.run, self.engine, self.ema, self.meter = run, engine, ema, meter
        self.config, self.world = run.config, run.world
        self.dataset = open_dataset(run.config.data.validation)
        self.texts, captions_NLC = self._prompts()
        self.prompt_indices = list(range(self.world.rank, len(self.texts), self.world.size))
        self.captions_NLC = captions_NLC[self.prompt_indices]

    def validate(self, step: int) -> None:
        """Fixed-sigma loss and expert coverage over the first samples of the validation set. A collective."""
        self.meter.pause()
        count = min(self.dataset.samples, MAX_SAMPLES)
        mine = list(range(self.world.rank, count, self.world.size))
        latents, captions, _ = read_samples(self.dataset, mine)
        model = self._copy()
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
        self.meter.write(step, "validation", {"validation_loss": float(sums.mean() / count), **coverage.summary()})

    def sample(self, step: int) -> None:
        """The prompts' pictures as a grid, in samples/ and on TensorBoard. A collective."""
        self.meter.pause()
        latents = self._sample_latents()
        parts = gather(dict(zip(self.prompt_indices, latents.cpu())), self.world)
        if not self.world.is_rank_zero:
            return
        by_index = {index: latent for part in parts for index, latent in part.items()}
        latents = torch.stack([by_index[i] for i in range(len(self.texts))])
        decoder = build_image_encoder(self.dataset.encoders["image"], self.world.device)
        image = grid(to_images(decoder, latents), self.texts)
        path = self.run.run_dir / "samples" / f"step_{step:08d}.png"
        with optional(path.parent):
            path.parent.mkdir(exist_ok=True)
            save_png(image, path)
        self.meter.write_image(step, "samples", image)

    def _prompts(self) -> tuple[list[str], Tensor]:
        prompts = self.config.report.prompts
        if prompts != "validation":
            encoder = build_text_encoder(self.dataset.encoders["text"], self.world.device)
            return list(prompts), encoder.encode(list(prompts))
        count = min(self.config.report.num_samples, self.dataset.samples)
        _, captions, texts = read_samples(self.dataset, list(range(count)))
        return texts, captions

    def _sample_latents(self) -> Tensor:
        """This rank's. The copy is gone behind it, before an autoencoder wants the memory."""
        report = self.config.report
        return sample_latents(
            self._copy(),
            self.captions_NLC.to(self.world.device),
            config=self.config,
            seed=self.config.seed,
            indices=self.prompt_indices,
            guidance=report.guidance,
            num_steps=report.sampler_steps,
            batch_size=BATCH_SIZE,
        )

    @torch.no_grad()
    def _copy(self) -> MicroDiT:
        """The model with whole weights, of nobody but the caller. A collective."""
        model = MicroDiT.without_weights(self.config.model, self.world.device, self.run.execution.dtype)
        parameters = dict(model.named_parameters())
        for name, value in self.engine.full_weights(self.ema.partitions):
            parameters[name].copy_(value)
        return fuse(model).eval().requires_grad_(False)
