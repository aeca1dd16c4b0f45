"""What a run shows on the way, from a plain copy of the model: validation loss, expert coverage, grids, snapshots."""

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from mdit.config import TrainConfig
from mdit.data.shards import open_dataset, read_samples
from mdit.dist import World
from mdit.encoders import build_image_encoder, build_text_encoder_from
from mdit.eval.samples import grid, sample_latents, to_images
from mdit.eval.validation import ExpertCoverage, validation_loss
from mdit.models import MicroDiT
from mdit.snapshot import save_snapshot
from mdit.train.checkpoint import gather
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.metrics import Metrics

MAX_VALIDATION_SAMPLES = 1024


class Evaluation:
    """Evaluates the EMA where there is one, else the weights. Every rank takes a share; the result is the same for any
    number of ranks, since each sample brings its own random numbers."""

    def __init__(self, config: TrainConfig, run_dir: Path, world: World) -> None:
        self.config, self.run_dir, self.world = config, run_dir, world
        self.dataset = open_dataset(config.data.validation)
        self.model = MicroDiT(config.model).eval().requires_grad_(False)
        self.batch_size = 64
        self.texts, captions_NLC = self._prompts()
        self.prompt_indices = list(range(world.rank, len(self.texts), world.size))
        self.captions_NLC = captions_NLC[self.prompt_indices]

    def run(
        self, step: int, engine: Engine, ema: EMA | None, metrics: Metrics, *, validate: bool, sample: bool, snapshot: bool
    ) -> None:
        """A collective."""
        with self._weights(engine, ema.partitions if ema else None) as model:
            if validate:
                metrics.write(step, self.validate(model))
            if sample and (image := self.draw_grid(model)) is not None:
                (self.run_dir / "samples").mkdir(exist_ok=True)
                image.save(self.run_dir / "samples" / f"step_{step:08d}.png")
                metrics.write_image(step, "samples", image)
            averaged = self._state_dict() if snapshot and ema else None
        if snapshot:
            with self._weights(engine, None) if ema else self._as_it_is():
                self._save_snapshot(step, self._state_dict(), averaged)

    def validate(self, model: MicroDiT) -> dict[str, float]:
        """Fixed-sigma loss and expert coverage over the first samples of the validation set. A collective."""
        count = min(self.dataset.samples, MAX_VALIDATION_SAMPLES)
        mine = list(range(self.world.rank, count, self.world.size))
        latents, captions, _ = read_samples(self.dataset, mine)
        with ExpertCoverage(model) as coverage:
            sums = validation_loss(
                model,
                latents.to(self.world.device),
                captions.to(self.world.device),
                config=self.config,
                indices=mine,
                batch_size=self.batch_size,
            )
        torch.distributed.all_reduce(sums)
        losses = (sums / count).tolist()
        torch.distributed.all_reduce(coverage.totals)
        return {"validation_loss": sum(losses) / len(losses), **coverage.summary()}

    def draw_grid(self, model: MicroDiT):
        """The prompts' pictures on rank 0, None elsewhere. A collective."""
        report = self.config.report
        latents = sample_latents(
            model,
            self.captions_NLC.to(self.world.device),
            config=self.config,
            seed=self.config.seed,
            indices=self.prompt_indices,
            guidance=report.guidance,
            num_steps=report.sampler_steps,
            batch_size=self.batch_size,
        )
        parts = gather(dict(zip(self.prompt_indices, latents.cpu())), self.world)
        if not self.world.is_first:
            return None
        by_index = {index: latent for part in parts for index, latent in part.items()}
        latents = torch.stack([by_index[i] for i in range(len(self.texts))])
        decoder = build_image_encoder(self.dataset.encoders["image"])
        return grid(to_images(decoder, latents), self.texts)

    def _prompts(self) -> tuple[list[str], Tensor]:
        prompts = self.config.report.prompts
        if prompts != "validation":
            encoder = build_text_encoder_from(self.dataset.encoders["text"])
            return list(prompts), encoder.encode(list(prompts))
        count = min(self.config.report.num_samples, self.dataset.samples)
        _, captions, texts = read_samples(self.dataset, list(range(count)))
        return texts, captions

    @contextmanager
    def _weights(self, engine: Engine, partitions: list[Tensor] | None):
        """The evaluation copy, on the device, holding whole weights. Between evaluations it waits in host memory."""
        parameters = dict(self.model.named_parameters())
        for name, value in engine.full_weights(partitions):
            parameters[name].copy_(value)
        self.model.to(self.world.device)
        try:
            yield self.model
        finally:
            self.model.to("cpu")

    @contextmanager
    def _as_it_is(self):
        yield self.model

    def _state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()}

    def _save_snapshot(self, step: int, raw: dict[str, Tensor], averaged: dict[str, Tensor] | None) -> None:
        if self.world.is_first:
            save_snapshot(
                self.run_dir / "snapshots",
                step=step,
                config_json={"recipe": self.config.model_dump(mode="json")},
                raw=raw,
                ema=averaged,
                encoders=self.dataset.encoders,
            )
        torch.distributed.barrier()
