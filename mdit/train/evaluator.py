"""A run's evaluation on the way, of a plain copy of the model: validation loss, expert coverage, grids of samples, and
the field's metrics of drawn pictures.

The copy is there while something is evaluated, in the device's memory alone and in the format that training computes
in, which is what the kernels were checked in; the numbers around it, of EDM's preconditioning and of the sampler, are
float32 and float64 as ever.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed
from torch import Tensor

from mdit.config import MetricsConfig, UserError
from mdit.data.shards import open_dataset, read_samples
from mdit.dist import gather, on_rank_zero
from mdit.encoders import ImageEncoder, build_image_encoder, build_text_encoder
from mdit.eval.distances import Statistics
from mdit.eval.metrics import Batch, PictureMetrics
from mdit.eval.samples import grid, sample_latents, save_png, to_images
from mdit.eval.scores import Reference
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
        self.reference: dict[str, Tensor | Statistics] = {}  # features of what is compared with
        if (metrics := run.config.metrics) is not None:
            on_rank_zero(run.world, lambda: self._check(metrics))

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
        latents = self._sample_latents(self._copy(), self.captions_NLC, self.prompt_indices)
        parts = gather(dict(zip(self.prompt_indices, latents.cpu())), self.world)
        if not self.world.is_rank_zero:
            return
        by_index = {index: latent for part in parts for index, latent in part.items()}
        latents = torch.stack([by_index[i] for i in range(len(self.texts))])
        image = grid(to_images(self._decoder(), latents), self.texts)
        path = self.run.run_dir / "samples" / f"step_{step:08d}.png"
        with optional(path.parent):
            path.parent.mkdir(exist_ok=True)
            save_png(image, path)
        self.meter.write_image(step, "samples", image)

    def score(self, step: int) -> None:
        """The recipe's metrics of pictures for the validation set's first captions. A collective. Towers and decoder
        are loaded for it: while steps are taken they would fill a GPU's memory."""
        self.meter.pause()
        config, world = self.config, self.world
        assert config.metrics is not None
        metrics = PictureMetrics(config.metrics, world.device)
        if metrics.compared and not self.reference:
            reference = Reference(metrics, config.metrics.reference or config.data.validation, world.device)
            reference.judge(to_images(self._decoder(), read_samples(self.dataset, [0])[0]).shape[1], world)
            self.reference = reference.features
        mine = range(world.rank, config.metrics.num_pictures, world.size)
        parts = gather(metrics.features(self._drawn(mine)), world)
        if world.is_rank_zero:
            drawn = {name: torch.cat([part[name] for part in parts if part]) for name in metrics.judges}
            self.meter.write(step, "metrics", metrics.scores(drawn, self.reference))

    def _check(self, metrics: MetricsConfig) -> None:
        """Raise UserError, before the first step, for what cannot be scored."""
        if metrics.num_pictures > self.dataset.samples:
            has = f"{self.dataset.directory} has {self.dataset.samples} samples"
            raise UserError(f"metrics.num_pictures = {metrics.num_pictures}: {has}, whose captions are drawn")
        loaded = PictureMetrics(metrics, torch.device("cpu"))
        if loaded.compared:
            Reference(loaded, metrics.reference or self.config.data.validation, "cpu")

    def _drawn(self, samples: range) -> Iterator[Batch]:
        """Pictures for these samples' captions, with them."""
        model, decoder = self._copy(), self._decoder()
        for start in range(0, len(samples), BATCH_SIZE):
            some = samples[start : start + BATCH_SIZE]
            _, captions_NLC, texts = read_samples(self.dataset, some)
            yield to_images(decoder, self._sample_latents(model, captions_NLC, some)), texts

    def _decoder(self) -> ImageEncoder:
        return build_image_encoder(self.dataset.encoders["image"], self.world.device)

    def _prompts(self) -> tuple[list[str], Tensor]:
        prompts = self.config.report.prompts
        if prompts != "validation":
            encoder = build_text_encoder(self.dataset.encoders["text"], self.world.device)
            return list(prompts), encoder.encode(list(prompts))
        count = min(self.config.report.num_samples, self.dataset.samples)
        _, captions, texts = read_samples(self.dataset, list(range(count)))
        return texts, captions

    def _sample_latents(self, model: MicroDiT, captions_NLC: Tensor, indices: Sequence[int]) -> Tensor:
        report = self.config.report
        return sample_latents(
            model,
            captions_NLC.to(self.world.device),
            config=self.config,
            seed=self.config.seed,
            indices=indices,
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
