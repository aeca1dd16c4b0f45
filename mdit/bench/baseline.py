"""Our model against another one, in one process: both train by the plainest step there is, on the same batches.

    precision   weights                     computing
    fp32        float32                     float32
    bf16        bfloat16, float32 masters   bfloat16, as we train
    amp         float32                     bfloat16 under torch.autocast, as the released code trains

A step is one micro-batch: noise, loss, backward, clip, fused AdamW; no ZeRO. On a GPU contenders take turns of several
steps, and the one that waits leaves the device: its weights wait in host memory, masters and moments start anew with
its next turn, so that each has all memory when it runs. On a CPU they take turns step by step.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdit.bench.report import Report, environment
from mdit.bench.row import OUT_OF_MEMORY, BenchmarkRow, Measured, one_line
from mdit.bench.run import free_memory, synthetic_batches
from mdit.bench.stages import Job, with_batch
from mdit.bench.timing import PhaseTimer, StepPhases, summarize
from mdit.config import TrainConfig, UserError
from mdit.data.loader import Batch
from mdit.diffusion.edm import StepNoise, edm_errors, edm_loss, sample_noise
from mdit.dist import World
from mdit.documents import brief
from mdit.models import MicroDiT
from mdit.parallel.apply import blocks_of, compiling
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution, RunSettings
from mdit.train.meter import memory_gib

Precision = Literal["fp32", "bf16", "amp"]
PRECISIONS = {
    "fp32": "float32",
    "bf16": "bfloat16 weights, float32 masters",
    "amp": "float32 weights, autocast to bfloat16",
}
LOSSES = 10  # of the first steps that a report keeps
OURS, BASELINE = "ours", "baseline"
FASTER = 1.02  # twice the micro-batch has to bring so much for the search to go on
SEARCHED = "search"  # the pairing of rows that stand alone


class Contender:
    """A model that trains. `losses` are those of all its steps so far, not waited for."""

    def __init__(
        self, name: str, model: nn.Module, config: TrainConfig, device: torch.device, precision: Precision
    ) -> None:
        self.name, self.config, self.device, self.precision = name, config, device, precision
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = model.to(self.dtype)
        self.losses: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.masters = self.weights
        self.optimizer: torch.optim.AdamW | None = None
        self._data: dict[int, tuple[TrainConfig, Iterator[Batch]]] = {}

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The modules that are compiled one by one: blocks, as a run with "compile": true does it."""
        return blocks_of(cast(MicroDiT, self.model))

    def loss(self, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise) -> Tensor:
        return edm_loss(self.model, latents_NCHW, captions_NLC, noise, self.config.noise)

    def to_device(self) -> None:
        """Move to the device, with a new optimizer."""
        self.model.to(self.device)
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = self.weights
        if self.precision == "bf16":
            self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        optim = self.config.optim
        options: dict[str, Any] = dict(lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
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
        return timer.time_steps(lambda: self.step(micro_batch, timer), steps=steps), memory_gib(self.device)

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

    def data(self, micro_batch: int) -> tuple[TrainConfig, Iterator[Batch]]:
        """The recipe at a global batch of one micro-batch, and its batches: the same for every contender."""
        if micro_batch not in self._data:
            config = with_batch(self.config, micro_batch)
            here = ParallelPlan(World(rank=0, size=1, local_rank=0, device=self.device))
            self._data = {micro_batch: (config, synthetic_batches(config, here))}
        return self._data[micro_batch]

    @torch.no_grad()
    def update(self) -> None:
        """Clip the gradients, step AdamW, drop the gradients."""
        assert self.optimizer is not None
        if self.masters is not self.weights:
            used = [(master, w.grad) for master, w in zip(self.masters, self.weights) if w.grad is not None]
            gradients = [torch.empty_like(master) for master, _ in used]
            torch._foreach_copy_(gradients, [gradient for _, gradient in used])
            for (master, _), gradient in zip(used, gradients):
                master.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.masters, self.config.optim.max_grad_norm)
        self.optimizer.step()
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)
        self.optimizer.zero_grad()
        self.model.zero_grad()


class Baseline(Contender):
    """model(latents_NCHW, sigma_N, captions_NLC, mask_ratio) -> (N, C, H, W), or that and (N, T), 1 where a patch was
    dropped. It makes its own conditioning of sigma and drops its own patches."""

    def __init__(
        self, name: str, model: nn.Module, config: TrainConfig, device: torch.device, precision: Precision
    ) -> None:
        super().__init__(name, model, config, device, precision)
        self.mask_ratio = config.training.fixed_mask_ratio
        # It draws its own mask: none is sampled for it.
        self.config = config.model_copy(update={"training": config.training.model_copy(update={"mask_ratio": 0.0})})

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.model]

    def loss(self, latents_NCHW: Tensor, captions_NLC: Tensor, noise: StepNoise) -> Tensor:
        """`edm_loss` over the patches that the model has kept."""
        dropped: Tensor | None = None

        def net(x_NCHW: Tensor, c_noise_N: Tensor, captions_NLC: Tensor, mask: None) -> Tensor:
            nonlocal dropped
            output, dropped = self.call(x_NCHW, noise.sigma_N, captions_NLC)
            return output

        error = edm_errors(net, latents_NCHW, captions_NLC, noise, self.config.noise)
        if dropped is None:
            return error.mean()
        patch, grid = self.config.model.patch_size, self.config.model.latent_size // self.config.model.patch_size
        kept = F.interpolate((1 - dropped.float()).view(-1, 1, grid, grid), scale_factor=patch)
        return (error * kept).sum() / (kept.sum() * error.shape[1])

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
            raise UserError(f"{self.name}: raised {brief(error)}") from None
        for what, found, expected in (("output", output, tuple(batch.latents_NCHW.shape)), ("mask", dropped, tokens)):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            if shape != expected and not (what == "mask" and found is None):
                raise UserError(f"{self.name}: its {what} is {shape}, expected {expected}")
        if not output.requires_grad:
            raise UserError(f"{self.name}: its output has no gradient, so there is nothing to train")
        self.to_host()


@dataclass(frozen=True)
class Pace:
    """Turns of each contender, in each so many steps that are not measured, and that are."""

    rounds: int
    warm_up: int
    steps: int


PACES = {"cuda": Pace(rounds=3, warm_up=2, steps=5), "cpu": Pace(rounds=5, warm_up=0, steps=1)}
SEARCH = Pace(rounds=1, warm_up=1, steps=3)


class Turn(NamedTuple):
    """A contender of a pairing, and how it runs there."""

    contender: Contender
    micro_batch: int
    compile: bool


def take_turns(entries: list[Turn], pace: Pace, backend: str | Callable = "inductor") -> list[Measured | str]:
    """Figures of each entry, or the problem why there are none: the others go on without it. What is compiled is
    compiled in the first turn, whose steps may be far from the median, so one more is not measured."""
    steps: list[list[StepPhases]] = [[] for _ in entries]
    peaks, problems = [0.0] * len(entries), [""] * len(entries)
    with ExitStack() as stack:
        for entry in entries:
            if entry.compile:
                stack.enter_context(compiling(entry.contender.compiled_parts, backend))
        for number in range(pace.rounds):
            for i in range(len(entries))[:: -1 if number % 2 else 1]:
                contender, micro_batch, _ = entries[i]
                if problems[i]:
                    continue
                try:
                    found, peak = contender.measure(micro_batch, pace.warm_up + (number == 0), pace.steps)
                    steps[i], peaks[i] = steps[i] + found, max(peaks[i], peak)
                except torch.OutOfMemoryError:
                    problems[i] = f"{OUT_OF_MEMORY} at micro-batch {micro_batch}"
                except Exception as error:  # whatever a compiler or a driver may say: the others still count
                    problems[i] = brief(error)
                if problems[i] or contender.device.type == "cuda":
                    contender.to_host()
    return [problems[i] or summed_up(entries[i], steps[i], peaks[i]) for i in range(len(entries))]


def summed_up(entry: Turn, steps: list[StepPhases], peak_gib: float) -> Measured:
    losses = entry.contender.losses[:LOSSES]
    return summarize(steps, entry.micro_batch, peak_gib=peak_gib, losses=torch.stack(losses).tolist() if losses else ())


@dataclass
class BaselineComparison:
    """Pairings, searches, and a row for everything measured, which goes to `out`/baseline.json and to the screen.

    `kernels`: the ops of our model that run in Triton. In every mode of `modes` ("eager", "compiled") both are measured
    in turn at `micro_batch`, then each at its doubles up to `max_micro_batch` as long as that brings something; at last
    both in turn as each was fastest. Nothing is begun that would not end within `budget_s` seconds, as far as what was
    measured tells.
    """

    contenders: dict[str, Contender]
    world: World
    kernels: list[str]
    micro_batch: int
    max_micro_batch: int
    rounds: int
    modes: list[str]
    budget_s: float
    out: Path | None = None
    backend: str | Callable = "inductor"
    started: float = field(default_factory=time.perf_counter)
    longest: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def __post_init__(self) -> None:
        self.report = Report(environment=environment(self.world.device), command=" ".join(sys.argv))

    def run(self) -> None:
        pace = PACES[self.world.device.type]
        pace = Pace(self.rounds, pace.warm_up, pace.steps)
        for mode in self.modes:
            self.measure(f"same, {mode}", {who: (self.micro_batch, mode) for who in self.contenders}, pace)
            for who in (BASELINE, OURS):
                self.search(who, mode)
        best = {who: found for who in self.contenders if (found := self.best(who))}
        same = [f"same, {mode}" for mode in self.modes if set(best.values()) == {(self.micro_batch, mode)}]
        if len(best) == len(self.contenders) and not same:
            self.measure("best", best, pace)
        print(self.report.tables(()))
        print("\n".join([*ratios(self.report.rows), *(f"best: as {name}" for name in same)]))

    def search(self, who: str, mode: str) -> None:
        """Measure doubles of the micro-batch as long as each is faster than the one before; where the first does not
        fit into memory, its halves until one does."""
        rate, size = 0.0, self.micro_batch
        while 1 <= size <= max(self.micro_batch, self.max_micro_batch):
            earlier = (row for row in self.report.rows if _which(row) == (who, size, mode))
            row = next(earlier, None) or self.measure(SEARCHED, {who: (size, mode)}, SEARCH)[0]
            if row.ran_out_of_memory and not rate:
                size //= 2
            elif row.problem or row.figures.images_per_second < FASTER * rate or size < self.micro_batch:
                return
            else:
                rate, size = row.figures.images_per_second, 2 * size

    def best(self, who: str) -> tuple[int, str] | None:
        """(micro-batch, mode) that was the fastest so far."""
        measured = [row for row in self.report.rows if row.contender == who and not row.problem]
        row = max(measured, key=lambda row: row.figures.images_per_second, default=None)
        return row and _which(row)[1:]

    def measure(self, pairing: str, turns: dict[str, tuple[int, str]], pace: Pace) -> list[BenchmarkRow]:
        """Measure contenders in turn, each at a micro-batch and in a mode."""
        before = time.perf_counter()
        entries = [Turn(self.contenders[who], size, mode == "compiled") for who, (size, mode) in turns.items()]
        compiled = any(entry.compile for entry in entries)
        if before - self.started + self.longest[compiled] > self.budget_s:
            found = [f"no time was left of {self.budget_s:g} s"] * len(entries)
        else:
            found = take_turns(entries, pace, self.backend)
            self.longest[compiled] = max(self.longest[compiled], time.perf_counter() - before)
        rows = [self.row(pairing, who, entry, each) for who, entry, each in zip(turns, entries, found)]
        for row in rows:
            print(f"{pairing}: {one_line(row)}", flush=True)
        self.report.rows.extend(rows)
        if self.out is not None:
            self.report.save(self.out / "baseline.json")
        return rows

    def row(self, pairing: str, who: str, entry: Turn, found: Measured | str) -> BenchmarkRow:
        contender, size = entry.contender, entry.micro_batch
        sizes = {"train_batch_size": size, "train_micro_batch_size_per_gpu": size, "zero_optimization": {"stage": 0}}
        bf16 = {"bf16": {"enabled": contender.precision != "fp32"}}
        kernels = self.kernels if who == OURS else []
        execution = Execution(RunSettings(compile=entry.compile), sizes | bf16, frozenset(kernels))
        job = Job(self.contenders[OURS].config, execution)
        row = job.row(self.world, "baseline", f"{who}, {'compiled' if entry.compile else 'eager'}")
        setting = row.setting.model_copy(update={"weights": PRECISIONS[contender.precision]})
        parameters = sum(p.numel() for p in contender.model.parameters())
        row = row.with_(setting=setting, parameters=parameters, contender=who, pairing=pairing)
        return row.with_(problem=found) if isinstance(found, str) else row.with_(measured=found)


def _which(row: BenchmarkRow) -> tuple[str | None, int, str]:
    """(contender, micro-batch, mode)"""
    return row.contender, row.setting.micro_batch, "compiled" if row.setting.compile else "eager"


def ratios(rows: Iterable[BenchmarkRow]) -> list[str]:
    """Our images/s over the baseline's, by the median and by the fastest steps: of every pairing that has both."""
    pairs: dict[str | None, dict[str | None, BenchmarkRow]] = {}
    for row in rows:
        if row.pairing != SEARCHED:
            pairs.setdefault(row.pairing, {})[row.contender] = row
    lines = []
    for pairing, pair in pairs.items():
        ours, theirs = pair[OURS], pair[BASELINE]
        if ours.problem or theirs.problem:
            lines.append(f"{pairing}: no ratio, as one of them has no figures")
            continue
        ratio = ours.figures.images_per_second / theirs.figures.images_per_second
        sizes = ours.setting.micro_batch, theirs.setting.micro_batch
        fastest = sizes[0] / sizes[1] * theirs.figures.fastest_ms / ours.figures.fastest_ms
        sides = " against ".join(f"{row.name}, {row.setting.micro_batch} images" for row in (ours, theirs))
        lines.append(
            f"{pairing}: {ratio:.2f} times the images/s of the baseline, {fastest:.2f} by fastest steps ({sides})"
        )
    return lines
