"""From the paper's model to ours, one technique after the other, in one run: what each brings, and what it changes.

    as published                  the plain model, the paper's steps one by one, experts by one-hot products
    as published, compiled        torch.compile of its blocks
    experts by index              our model in PyTorch, nothing fused
    experts by index, compiled
    + OP in Triton                an op after the other, eager
    + torch.compile               all of them, blocks compiled
    + micro-batch x 2
    + float8

From `+ OP` on a rung keeps what the rungs before it added; what fails or cannot run here is left out of the rungs after
it. Every rung trains from the same weights, on the same batches and random numbers, in the same engine. Its parity is
how far its losses are from those of the first rung:

    largest      the largest relative difference of a step's loss
    mean_first   relative difference of the mean loss over the first tenth of the steps
    mean_last    ... over the last quarter
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from mdit.bench.clock import largest
from mdit.bench.contenders import in_one_line
from mdit.bench.row import MADE_UP, NO_TIME, BenchmarkRow, Measured, Parity, describe
from mdit.bench.trial import Trial
from mdit.config import ModelConfig, TrainConfig, UserError
from mdit.dist import World
from mdit.kernels import dispatch
from mdit.kernels.dispatch import FP8
from mdit.kernels.selection import choose_kernels
from mdit.models import MicroDiT
from mdit.parallel.apply import blocks_of, compiling
from mdit.parallel.fp8 import check_fp8, use_fp8
from mdit.parallel.settings import RunSettings, computing_dtype
from mdit.parallel.swap import as_built

ORDER = ("patch_mixing", "swiglu", "expert_choice", "masked_attention")  # in which ops are switched to Triton
WARM_UP = 2  # steps before those measured, beside the steps of the parity
BUILD_S = 5.0  # torch.compile of one block, forward and backward, until a rung has shown how long it takes; assumed
NEEDS_A_GPU = "needs a GPU"


@dataclass(frozen=True)
class Rung:
    """`adds`: what it brings to the rung before it, and what later rungs do without where that fails; "" for the four
    that stand for themselves. `times`: the micro-batch."""

    name: str
    adds: str = ""
    published: bool = False
    kernels: tuple[str, ...] = ()
    compile: bool = False
    times: int = 1
    fp8: bool = False

    def without(self, lost: set[str]) -> "Rung":
        kept = tuple(op for op in self.kernels if op not in lost)
        compile = self.compile and not (self.adds and "compile" in lost)
        return replace(self, kernels=kept, compile=compile, times=1 if "micro-batch" in lost else self.times)


RUNGS = (
    Rung("as published", published=True),
    Rung("as published, compiled", published=True, compile=True),
    Rung("experts by index"),
    Rung("experts by index, compiled", compile=True),
    *(Rung(f"+ {op} in Triton", op, kernels=ORDER[: i + 1]) for i, op in enumerate(ORDER)),
    Rung("+ torch.compile", "compile", kernels=ORDER, compile=True),
    Rung("+ micro-batch x 2", "micro-batch", kernels=ORDER, compile=True, times=2),
    Rung("+ float8", FP8, kernels=(*ORDER, FP8), compile=True, times=2, fp8=True),
)
FIRST = RUNGS[0]


def in_measuring_order() -> list[Rung]:
    """What needs a compiler comes last, as it takes minutes; of that our own model first."""
    return sorted(RUNGS, key=lambda rung: (rung.times, rung.compile, rung.compile and not rung.kernels))


def climb(
    config: TrainConfig,
    settings: RunSettings,
    ds_config: dict,
    world: World,
    *,
    steps: int = 5,
    seconds: float = 5.0,
    parity_steps: int = 10,
    long_parity_steps: int = 0,
    budget_s: float = float("inf"),
    backend: str | Callable = "inductor",
    save: Callable[[list[BenchmarkRow]], None] = lambda rows: None,
) -> list[BenchmarkRow]:
    """-> the rows of kind "ladder" (mdit.bench.row), in RUNGS' order. `settings` give activation checkpointing, which
    the published form is measured without; kernels, compile and fp8 are the ladder's. A collective of all ranks.

    A rung is measured over `steps` steps, more where `seconds` have room for them, after its `parity_steps`; with
    `long_parity_steps` the first rung and the two with all kernels are compared over so many. `save` is called with all
    rows whenever one has changed. No rung is begun that would not end within `budget_s` seconds, as far as those before
    it tell; the first one that is compiled is taken to need BUILD_S a block besides. On one process a rung that is not
    done by then is broken off. Raises UserError for experts or tensors that are spread over processes.
    """
    if settings.expert_parallel > 1 or settings.tensor_parallel > 1:
        raise UserError("the ladder measures whole blocks: expected expert_parallel = 1 and tensor_parallel = 1")
    parity = {rung: parity_steps for rung in RUNGS}
    if long_parity_steps:
        parity |= {rung: long_parity_steps for rung in RUNGS if rung is FIRST or set(ORDER) <= set(rung.kernels)}
    ladder = _Ladder(config, settings, ds_config, world, parity, backend)
    rows = {rung: ladder.row(rung).with_(problem=f"{NO_TIME}: no time was left of {budget_s:g} s") for rung in RUNGS}
    started, longest = time.perf_counter(), {}
    try:
        for rung in in_measuring_order():
            before = time.perf_counter()
            left = budget_s - largest(before - started, world)
            if expected_seconds(rung, longest, config.model) > left:
                continue
            with no_longer_than(left if world.size == 1 else float("inf")):
                rows[rung] = ladder.measure(rung, steps, seconds)
            longest[rung.compile] = max(longest.get(rung.compile, 0.0), largest(time.perf_counter() - before, world))
            save(list(rows.values()))
    except _TimeIsUp:
        pass  # its row says so, and all that are left
    finally:
        ladder.close()
    save(list(rows.values()))
    return list(rows.values())


def expected_seconds(rung: Rung, longest: dict[bool, float], model: ModelConfig) -> float:
    """As the longest rung of its kind, compiled or not. `longest` has no entry for a kind that was not measured."""
    if rung.compile in longest or not rung.compile:
        return longest.get(rung.compile, 0.0)
    blocks = model.depth + (model.mixer_depth if model.use_patch_mixer else 0)
    return longest.get(False, 0.0) + BUILD_S * blocks


class _TimeIsUp(BaseException):
    """No Exception: a compiler would make its own of it, and a rung a problem of its row."""


@contextmanager
def no_longer_than(seconds: float) -> Iterator[None]:
    """Inside, _TimeIsUp is raised when so many seconds are over. Only the main thread can be interrupted."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_) -> None:
        raise _TimeIsUp

    handler = signal.signal(signal.SIGALRM, interrupt)
    timer = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


class _Ladder:
    """The live trial, the losses of the first rung, and what does not work here."""

    def __init__(
        self,
        config: TrainConfig,
        settings: RunSettings,
        ds_config: dict,
        world: World,
        parity: dict[Rung, int],
        backend: str | Callable,
    ) -> None:
        self.config, self.ds_config, self.world = config, ds_config, world
        self.parity_steps, self.backend = parity, backend
        self.settings = settings.model_copy(update={"compile": False, "fp8": False, "kernels": "auto"})
        self.trial: Trial | None = None
        self.times, self.lost, self.first_losses = 1, set(), []

    def close(self) -> None:
        if self.trial is not None:
            self.trial.close()
        self.trial = None

    def measure(self, rung: Rung, steps: int, seconds: float) -> BenchmarkRow:
        """The row of a rung. Whatever goes wrong in it is told there, and the next one gets a new trial."""
        reduced = rung.without(self.lost)
        problem = self.hindrance(rung)
        if problem is None:
            try:
                measured = self.run(reduced, self.parity_steps[rung], steps, seconds)
                return self.row(reduced).with_(measured=measured)
            except torch.OutOfMemoryError:
                micro_batch = self.ds_config["train_micro_batch_size_per_gpu"] * reduced.times
                problem = f"out of memory at micro-batch {micro_batch}"
            except Exception as error:  # whatever a compiler, a driver or a kernel may say: the other rungs still count
                problem = in_one_line(error)
            self.close()
        self.lost |= {rung.adds} - {""}
        return self.row(reduced).with_(problem=problem)

    def hindrance(self, rung: Rung) -> str | None:
        """Why a rung cannot be measured on this machine, if so."""
        if self.trial is None:
            self.open(times=1)
        on_gpu = self.world.device.type == "cuda"
        if not on_gpu and rung.kernels and rung.adds != "micro-batch":
            return NEEDS_A_GPU
        if rung.adds in ORDER and rung.adds not in self.trial.kernels:
            return self.trial.kernels_because
        if rung.fp8:
            settings = self.settings.model_copy(update={"fp8": True})
            dtype, head_dim = computing_dtype(self.ds_config), self.config.model.head_dim
            try:
                in_triton, _ = choose_kernels("auto", self.world.device, dtype, head_dim, "the ladder", fp8=True)
                check_fp8(settings, self.world.device, dtype == torch.bfloat16, in_triton, "the ladder")
            except UserError as error:
                return str(error)
        return None

    def open(self, times: int) -> None:
        """A trial at so many times the micro-batch; the one that is there, if it is at that."""
        if self.trial is not None and self.times == times:
            return
        self.close()
        config, ds_config = larger(self.config, self.ds_config, times)
        self.trial, self.times = Trial(config, self.settings, ds_config, self.world, data=MADE_UP), times

    def run(self, rung: Rung, parity_steps: int, steps: int, seconds: float) -> Measured:
        """Its figures, with the parity. A larger global batch is another training: there float8, which
        changes what is computed, is compared at the first micro-batch, uncompiled, and the micro-batch not at all."""
        config, _ = larger(self.config, self.ds_config, rung.times)
        comparable = config.training.global_batch_size == self.config.training.global_batch_size
        losses = []
        if rung.fp8 and not comparable:
            losses = self.losses(replace(rung, compile=False, times=1), parity_steps)
        self.open(rung.times)
        self.trial.reset()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.world.device)
        with switched(self.trial.model, rung, self.backend):
            losses = self.trial.losses(parity_steps) if comparable else losses
            measured = self.trial.measure(warm_up=WARM_UP, steps=steps, seconds=seconds)
        if rung.published and not rung.compile:
            self.first_losses = losses
        found = parity(losses, self.first_losses) if losses and self.first_losses else None
        return measured.model_copy(update={"losses": tuple(losses), "parity": found})

    def losses(self, rung: Rung, steps: int) -> list[float]:
        self.open(rung.times)
        self.trial.reset()
        with switched(self.trial.model, rung, self.backend):
            return self.trial.losses(steps)

    def row(self, rung: Rung) -> BenchmarkRow:
        config, ds_config = larger(self.config, self.ds_config, rung.times)
        changes = {"fp8": rung.fp8, "compile": rung.compile}
        if rung.published:
            changes["activation_checkpointing"] = "none"
        return describe(
            kind="ladder",
            name=rung.name,
            config=config,
            settings=self.settings.model_copy(update=changes),
            ds_config=ds_config,
            world=self.world,
            kernels=rung.kernels,
        )


@contextmanager
def switched(model: MicroDiT, rung: Rung, backend: str | Callable = "inductor") -> Iterator[None]:
    """Inside, a live model computes as a rung says."""
    with ExitStack() as stack:
        stack.enter_context(dispatch.using(*rung.kernels))
        if rung.published:
            stack.enter_context(as_built(model))
        else:
            use_fp8(model, rung.fp8)
            stack.callback(use_fp8, model, False)
        if rung.compile:
            stack.enter_context(compiling(blocks_of(model), backend))
        yield


def larger(config: TrainConfig, ds_config: dict, times: int) -> tuple[TrainConfig, dict]:
    """At so many times the micro-batch: of the same global batch where enough micro-batches make it up, else of one
    that is larger by as much."""
    micro, accumulated = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    fewer, rest = divmod(accumulated, times)
    batch = ds_config["train_batch_size"] * (times if rest else 1)
    sizes = {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro * times,
        "gradient_accumulation_steps": accumulated if rest else fewer,
    }
    training = config.training.model_copy(update={"global_batch_size": batch})
    return config.model_copy(update={"training": training}), ds_config | sizes


def parity(losses: list[float], reference: list[float]) -> Parity:
    """Over as many steps as both have: the head of this module says what is what."""
    steps = min(len(losses), len(reference))
    pairs = list(zip(losses[:steps], reference[:steps]))

    def of_means(part: list[tuple[float, float]]) -> float:
        ours, theirs = map(sum, zip(*part))
        return abs(ours - theirs) / abs(theirs)

    return Parity(
        steps=steps,
        largest=max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs),
        mean_first=of_means(pairs[: max(1, steps // 10)]),
        mean_last=of_means(pairs[-max(1, steps // 4) :]),
    )
