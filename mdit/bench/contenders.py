"""Models that train by the plainest step there is, ours and any other: one draw, loss, backward, clip, fused AdamW.

    precision   weights                     computing
    fp32        float32                     float32
    bf16        bfloat16, float32 masters   bfloat16, as we train
    amp         float32                     bfloat16 under torch.autocast, as the released code trains

No ZeRO and one micro-batch: an optimizer step is the same work for all. What waits for its turn leaves the device.
"""

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from mdit.bench.run import SyntheticBatches, free_memory
from mdit.bench.stages import in_one_line, with_batch
from mdit.bench.timing import PhaseTimer, StepPhases, time_steps
from mdit.config import TrainConfig, UserError
from mdit.diffusion.edm import StepNoise, denoise, edm_loss, sample_noise
from mdit.dist import World
from mdit.parallel.apply import blocks_of
from mdit.parallel.plan import ParallelPlan
from mdit.train.meter import memory_gib

Precision = Literal["fp32", "bf16", "amp"]
PRECISIONS = {
    "fp32": "float32",
    "bf16": "bfloat16 weights, float32 masters",
    "amp": "float32 weights, autocast to bfloat16",
}


class Contender:
    """A model that trains. `losses` are those of all its steps so far, not waited for."""

    def __init__(
        self, name: str, model: nn.Module, config: TrainConfig, device: torch.device, precision: Precision
    ) -> None:
        self.name, self.config, self.device, self.precision = name, config, device, precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = model.to(self.dtype)
        self.losses: list[Tensor] = []
        self.optimizer: torch.optim.AdamW | None = None
        self._data: dict[int, tuple[TrainConfig, SyntheticBatches]] = {}

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The modules that are compiled one by one: blocks, as a run with "compile": true does it."""
        return blocks_of(self.model)

    def loss(self, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise) -> Tensor:
        return edm_loss(self.model, latents_NCHW, captions_NLC, noise, self.config.noise.sigma_data)

    def to_device(self) -> None:
        """Move to the device, with a new optimizer."""
        self.model.to(self.device)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = self.weights
        if self.precision == "bf16":
            self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        optim = self.config.optim
        options = dict(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
        self.optimizer = torch.optim.AdamW(self.masters, **options, fused=True)

    def to_host(self) -> None:
        """Move to host memory, so that the device is the other's."""
        self.optimizer, self.weights, self.masters = None, [], []
        self.model.zero_grad(set_to_none=True)
        self.model.to("cpu")
        free_memory()

    def measure(self, micro_batch: int, warm_up: int, steps: int) -> tuple[list[StepPhases], float]:
        """Train -> the milliseconds of every step behind the first `warm_up`, and the peak in GiB."""
        timer = PhaseTimer(self.device)
        if self.optimizer is None:
            self.to_device()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(warm_up):
            self.step(micro_batch, timer)
        return time_steps(lambda: self.step(micro_batch, timer), timer, steps=steps), memory_gib(self.device)

    def step(self, micro_batch: int, timer: PhaseTimer) -> None:
        config, batches = self.data(micro_batch)
        timer.mark("data")
        batch = next(batches)
        timer.mark("forward")
        noise = sample_noise(config, len(self.losses), slice(0, micro_batch), self.device)
        loss = self.loss(batch.latents_NCHW, batch.captions_NLC, noise)
        timer.mark("backward")
        loss.backward()
        timer.mark("optimizer")
        self.update()
        self.losses.append(loss.detach())

    def data(self, micro_batch: int) -> tuple[TrainConfig, SyntheticBatches]:
        """The recipe at a global batch of one micro-batch, and its batches: the same for every contender."""
        if micro_batch not in self._data:
            config = with_batch(self.config, micro_batch)
            here = ParallelPlan(World(rank=0, size=1, local_rank=0, device=self.device))
            self._data = {micro_batch: (config, SyntheticBatches(config, here))}
        return self._data[micro_batch]

    @torch.no_grad()
    def update(self) -> None:
        if self.masters is not self.weights:
            used = [(m, w) for m, w in zip(self.masters, self.weights) if w.grad is not None]
            for master, _ in used:
                master.grad = torch.empty_like(master) if master.grad is None else master.grad
            torch._foreach_copy_([m.grad for m, _ in used], [w.grad for _, w in used])
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)
        for weight in self.weights:
            weight.grad = None


class Baseline(Contender):
    """model(latents_NCHW, sigma_N, captions_NLC, mask_ratio) -> (N, C, H, W), or that and (N, T), 1 where a patch was
    dropped. It makes its own conditioning of sigma and drops its own patches."""

    def __init__(
        self, name: str, model: nn.Module, config: TrainConfig, device: torch.device, precision: Precision
    ) -> None:
        super().__init__(name, model, config, device, precision)
        self.mask_ratio = config.training.mask_ratio
        # It draws its own mask: none is sampled for it.
        self.config = config.model_copy(update={"training": config.training.model_copy(update={"mask_ratio": 0.0})})

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.model]

    def loss(self, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise) -> Tensor:
        """`edm_loss` over the patches that the model has kept."""
        sigma_data, latents = self.config.noise.sigma_data, latents_NCHW.float()
        captions = captions_NLC * noise.keep_caption_N.view(-1, 1, 1).to(captions_NLC.dtype)
        sigma, dropped = noise.sigma_N.view(-1, 1, 1, 1), None

        def net(x_NCHW: Tensor, c_noise_N: Tensor, captions_NLC: Tensor, mask: None) -> Tensor:
            nonlocal dropped
            output, dropped = self.call(x_NCHW, noise.sigma_N, captions_NLC)
            return output

        denoised = denoise(net, latents + sigma * noise.noise_NCHW, noise.sigma_N, captions, sigma_data)
        error = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2 * (denoised - latents) ** 2
        if dropped is None:
            return error.mean()
        grid, patch = self.config.model.latent_size // self.config.model.patch_size, self.config.model.patch_size
        kept = (1 - dropped.float()).view(-1, 1, grid, grid)
        kept = kept.repeat_interleave(patch, dim=2).repeat_interleave(patch, dim=3)
        return (error * kept).sum() / (kept.sum() * latents.shape[1])

    def call(self, x_NCHW: Tensor, sigma_N: Tensor, captions_NLC: Tensor) -> tuple[Tensor, Tensor | None]:
        """-> its output, and what it dropped, if it says."""
        mixed = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "amp" else nullcontext()
        with mixed:
            answer = self.model(x_NCHW.to(self.dtype), sigma_N, captions_NLC.to(self.dtype), self.mask_ratio)
        return answer if isinstance(answer, tuple) else (answer, None)

    def check(self) -> None:
        """Raise UserError, naming the model, unless it trains on two images and answers in the documented shapes."""
        self.to_device()
        batch = next(self.data(2)[1])
        sigma_N, tokens = torch.ones(2, device=self.device), (2, self.config.model.num_patches)
        try:
            output, dropped = self.call(batch.latents_NCHW.float(), sigma_N, batch.captions_NLC)
        except Exception as error:  # of code that is not ours
            raise UserError(f"{self.name}: raised {in_one_line(error)}") from None
        for what, found, expected in (("output", output, tuple(batch.latents_NCHW.shape)), ("mask", dropped, tokens)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != expected and not (what == "mask" and found is None):
                raise UserError(f"{self.name}: its {what} is {shape}, expected {expected}")
        if not output.requires_grad:
            raise UserError(f"{self.name}: its output has no gradient, so there is nothing to train")
        self.to_host()
