"""Training to take figures from: built as mdit.train.loop builds it, its optimizer steps timed by phase, then freed.

with BenchmarkRun(config, execution, world) as run:          # after mdit.meeting.init_distributed(world)
    measured = run.measure(warm_up=1, steps=3, seconds=12)
"""

import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mdit.bench.row import MADE_UP, Measured
from mdit.bench.timing import PhaseTimer, largest, length_of_union, summarize
from mdit.config import TrainConfig
from mdit.data.loader import Batch
from mdit.diffusion.edm import generator_for
from mdit.dist import World
from mdit.kernels import dispatch
from mdit.models import MicroDiT
from mdit.parallel.align import add_projection
from mdit.parallel.apply import blocks_of, compiling, parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution, RunSettings
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.loop import open_batches, optimizer_step
from mdit.train.meter import memory_gib

HELD = 2  # synthetic batches: as many as a loader holds
CAPTIONS = 8  # different ones
PROFILED_STEPS = 2
GIB = 2**30
COLLECTIVES = ("ncclDevKernel", "ncclKernel", "gloo:")  # begin the names of what moves bytes between processes


def synthetic_batches(config: TrainConfig, plan: ParallelPlan) -> Iterator[Batch]:
    """Made-up batches of this rank without end, which cost nothing to fetch: CAPTIONS captions, and latents that follow
    from them. The same global batches for any number of processes.

    Latents have the standard deviation of EDM's sigma_data, 0.9 of 1 of it from the caption; all fp16, as from shards.
    """
    device, model, global_batch = plan.world.device, config.model, config.training.global_batch_size
    share = global_batch // plan.data_size
    rows = slice(plan.data_rank * share, (plan.data_rank + 1) * share)
    options: dict[str, Any] = {"generator": generator_for(config.seed, "made up", device=device), "device": device}
    captions = torch.randn(CAPTIONS, *model.caption_shape, **options)
    patterns = torch.randn(CAPTIONS, *model.latent_shape, **options)
    features = config.align and torch.randn(CAPTIONS, model.num_patches, config.align.channels, **options).half()
    held: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for _ in range(HELD):
        kinds = torch.randint(CAPTIONS, (global_batch,), **options)[rows]
        noise = torch.randn(global_batch, *model.latent_shape, **options)[rows]
        latents = config.noise.sigma_data * (0.9 * patterns[kinds] + 0.19**0.5 * noise)
        held.append((latents.half(), captions.half()[kinds], None if features is None else features[kinds]))
    steps = ((step, *held[step % HELD]) for step in itertools.count())
    return (Batch(latents, texts, [], np.empty(0, np.int64), step, found) for step, latents, texts, found in steps)


class TimedEngine(Engine):
    """An Engine that marks its phases, and notes the bytes that its first forward pass leaves behind."""

    timer: PhaseTimer
    forward_bytes: int | None = None

    def __call__(self, *args, **kwargs) -> Tensor:
        if self.forward_bytes is not None:
            return super().__call__(*args, **kwargs)
        before = held_bytes(self.world.device)
        output = super().__call__(*args, **kwargs)
        self.forward_bytes = held_bytes(self.world.device) - before
        return output

    def backward(self, loss: Tensor) -> None:
        self.timer.mark("backward")
        super().backward(loss)
        self.timer.mark("forward")  # of the next micro-batch

    def step(self) -> None:
        self.timer.mark("optimizer")
        super().step()


class BenchmarkRun(AbstractContextManager):
    """Optimizer steps of a recipe, with its EMA, from its first weights on. A collective of all ranks, in everything.

    `data`: "made up", so that no step waits for it, or "recipe": the recipe's shards through its loader. `plain`: the
    paper's model as mdit.models has it, neither fused nor recomputed. `backend`: torch.compile's. Raises what building
    a run raises. Closing it frees all memory.
    """

    def __init__(
        self,
        config: TrainConfig,
        execution: Execution,
        world: World,
        *,
        data: str = MADE_UP,
        plain: bool = False,
        backend: str | Callable = "inductor",
    ) -> None:
        self.config, self.world, self.steps, settings = config, world, 0, execution.settings
        self.timer, before = PhaseTimer(world.device), held_bytes(world.device)
        with ExitStack() as stack:
            stack.callback(free_memory)
            stack.enter_context(dispatch.using(*execution.triton_ops))
            plan = plan_of(settings.expert_parallel, settings.tensor_parallel, world)
            torch.manual_seed(config.seed)
            with world.device:  # 1.165 B numbers take a CPU a while
                self.model = MicroDiT(config.model)
                if config.align is not None:
                    add_projection(self.model, config.align)
            if not plain:
                parallelize(self.model, settings.model_copy(update={"compile": False}), plan)
            if settings.compile:
                stack.enter_context(compiling(blocks_of(self.model), backend))
            self.engine = TimedEngine(self.model, config, execution, plan)
            self.engine.timer = self.timer
            stack.callback(release, self.engine)
            self.ema = EMA(config.ema, self.engine.master_weights, config.averages)
            self.built_bytes = held_bytes(world.device) - before
            if data == MADE_UP:
                self.batches = synthetic_batches(config, plan)
            else:
                self.batches = stack.enter_context(open_batches(config, execution, plan, start_step=0))
            self.stack = stack.pop_all()
        free_memory()  # weights are drawn on the device, which takes more of it than training
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)

    def __exit__(self, *error) -> None:
        for name in ("model", "engine", "ema", "batches"):
            vars(self).pop(name, None)
        self.stack.close()

    def step(self) -> Tensor:
        """One optimizer step, and EMA, on the next batch -> this rank's mean loss: a scalar that nobody waited for."""
        self.timer.mark("data")
        batch = next(self.batches)
        self.timer.mark("forward")
        loss = optimizer_step(self.engine, batch, self.steps, self.config)["loss"].mean()
        self.steps += 1
        self.ema.update(self.steps)
        return loss

    def losses(self, steps: int) -> list[float]:
        """Mean losses, of all ranks, of so many steps."""
        return self._mean([self.step() for _ in range(steps)])

    def measure(self, *, warm_up: int, steps: int, seconds: float) -> Measured:
        """Figures of as many steps as `seconds` have room for, at least `steps`, after `warm_up` steps.

        Several ranks take PROFILED_STEPS steps more, in which the collectives' time is taken.
        """
        losses = [self.step() for _ in range(warm_up)]
        times = self.timer.time_steps(
            lambda: losses.append(self.step()), steps=steps, seconds=seconds, world=self.world
        )
        return summarize(
            times,
            self.config.training.global_batch_size,
            world=self.world,
            communication=self._communication(),
            peak_gib=largest(memory_gib(self.world.device), self.world),
            losses=self._mean(losses),
        )

    def memory(self) -> dict[str, float]:
        """GiB of this rank's device (on a CPU: of the process) by part. `buffers` is what building the run took beside
        the parts before it, `forward` what the first micro-batch's forward pass left for its backward pass."""
        engine, device = self.engine, self.world.device
        state = engine.state_dict()
        parts = {
            "weights": [getattr(p, "ds_tensor", p) for p in engine.deepspeed.module.parameters()],  # ZeRO 3's own part
            "masters": state["master"],
            "moments": [t for t in state["exp_avg"] + state["exp_avg_sq"] if t is not None],
            "ema": self.ema.partitions or [],
        }
        found = {name: sum(t.nbytes for t in part if t.device.type == device.type) for name, part in parts.items()}
        found["buffers"] = max(0, self.built_bytes - sum(found.values()))
        found["forward"] = engine.forward_bytes or 0
        return {name: size / GIB for name, size in found.items()} | {"peak": memory_gib(device)}

    def _communication(self) -> float | None:
        """Milliseconds of a step in which a collective ran on the slowest rank; None with one process."""
        if self.world.size == 1:
            return None
        activity = ProfilerActivity.CUDA if self.world.device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
            self.timer.wait()
        spans = [e.time_range for e in profiler.events() or () if e.name.startswith(COLLECTIVES)]
        busy = length_of_union([(span.start, span.end) for span in spans])  # microseconds
        return largest(busy / 1e3 / PROFILED_STEPS, self.world)

    def _mean(self, losses: list[Tensor]) -> list[float]:
        mean = torch.stack(losses).double().cpu() / self.world.size
        torch.distributed.all_reduce(mean)
        return mean.tolist()


@functools.cache
def plan_of(expert_parallel: int, tensor_parallel: int, world: World) -> ParallelPlan:
    """Its groups are made once in a process: megatron-core makes none a second time."""
    return ParallelPlan.build(RunSettings(expert_parallel=expert_parallel, tensor_parallel=tensor_parallel), world)


def release(engine: Engine) -> None:
    """Empty what DeepSpeed keeps alive: behind `destroy`, hooks on the weights still hold ZeRO 3's optimizer, and that
    of ZeRO 1 in bfloat16. The engine is of no use afterwards."""
    engine.deepspeed.destroy()
    for parameter in engine.deepspeed.module.parameters():
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
        vars(parameter).clear()
    engine.zero.optimizer.state.clear()
    vars(engine.zero).clear()
    engine.deepspeed.optimizer = None  # else it would be destroyed once more when nothing holds the engine


def held_bytes(device: torch.device) -> int:
    """Bytes of torch's tensors on a GPU now; on a CPU, this process's resident memory (Linux)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
