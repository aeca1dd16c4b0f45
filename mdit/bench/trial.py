"""A training run to take figures from: real optimizer steps, built as mdit.train.loop builds them, and their clock.

    with Trial(config, settings, ds_config, world) as trial:          # after mdit.dist.start(world)
        figures = trial.measure(warm_up=1, steps=3, seconds=12)

What is measured is the loop's own `optimizer_step`, and its EMA. The clock only notes when a phase of a step begins
(`Marks`): on a GPU with events that nobody waits for until all steps are done.
"""

import functools
import gc
import time
from typing import Literal

import torch
import torch.distributed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mdit.bench.batches import Loaded, MadeUp
from mdit.bench.clock import MarkedEngine, Marks, held_bytes, largest, length_of_union, median_step, slowest
from mdit.bench.row import MADE_UP, Measured, StepTime
from mdit.config import TrainConfig
from mdit.dist import World
from mdit.kernels.selection import choose_kernels
from mdit.models import MicroDiT
from mdit.parallel.apply import parallelize
from mdit.parallel.fp8 import check_fp8
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution, RunSettings, computing_dtype
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.loop import optimizer_step
from mdit.train.meter import memory_gib

PROFILED_STEPS = 2
GIB = 2**30
COLLECTIVES = ("ncclDevKernel", "ncclKernel", "gloo:")  # begin the names of what moves bytes between processes


class Trial:
    """A context manager. `model`, `engine`, `ema`, `config`, `settings`, `ds_config`, `world`; `kernels` are
    the ops that run in Triton. A collective of all ranks, in everything that it does.

    `ds_config` is what `resolve_ds_config` gives. `data` is "made up": two batches that stay on the device, so that no
    step waits for data; or "recipe": the recipe's shards through its loader. Raises what building a run raises.
    """

    def __init__(
        self,
        config: TrainConfig,
        settings: RunSettings,
        ds_config: dict,
        world: World,
        *,
        data: Literal["made up", "recipe"] = MADE_UP,
    ) -> None:
        self.config, self.settings, self.ds_config, self.world, self.data = config, settings, ds_config, world, data
        dtype = computing_dtype(ds_config)
        options = dict(device=world.device, dtype=dtype, head_dim=config.model.head_dim, fp8=settings.fp8)
        in_triton, self.kernels_because = choose_kernels(settings.kernels, **options)
        self.kernels = sorted(in_triton)
        check_fp8(settings, world.device, dtype == torch.bfloat16, in_triton, "the DeepSpeed JSON")
        self._held_before, self._steps, self._marks = held_bytes(world.device), 0, Marks(world.device)
        self._batches, self.model, self.engine = None, draw_model(config, world.device), None
        plan = plan_of(settings.expert_parallel, settings.tensor_parallel, world)
        parallelize(self.model, settings, plan)
        self.engine = MarkedEngine(self.model, config, Execution(settings, ds_config), plan, self._marks)
        self.ema = EMA(config.ema, self.engine.master_weights)
        self._held_after = held_bytes(world.device)
        self._open_data()
        give_back_memory()  # a draw on the device takes more of it than a run's on the CPU: only training counts
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back."""
        if self.engine is not None:
            release(self.engine)
        self._close_data()
        self.model = self.engine = self.ema = None
        if self.settings.compile:
            torch.compiler.reset()
        give_back_memory()

    def step(self) -> Tensor:
        """One optimizer step, and EMA, on the next batch -> this rank's mean loss: a scalar that nobody waited for."""
        self._marks.put("data")
        batch = next(self._batches)
        self._marks.put("forward")
        loss = optimizer_step(self.engine, batch, self._steps, self.config).mean()
        self._marks.put("optimizer")
        self._steps += 1
        self.ema.update(self._steps)
        return loss

    def losses(self, steps: int) -> list[float]:
        """Train so many steps -> their mean losses, of all ranks."""
        return self._read_losses([self.step() for _ in range(steps)])

    def measure(self, *, warm_up: int, steps: int, seconds: float) -> Measured:
        """Train `warm_up` steps, then as many as `seconds` have room for, but at least `steps`; figures of the latter.

        Several ranks take PROFILED_STEPS steps more, in which the collectives' time is taken.
        """
        assert steps >= 1, steps
        losses = [self.step() for _ in range(warm_up)]
        self.wait()
        self._marks.begin()
        started, done = time.perf_counter(), 0
        while self._another(done, steps, seconds, started):
            losses.append(self.step())
            done += 1
        durations = self._marks.end(self.wait)
        milliseconds = slowest(median_step(durations), self.world)
        return Measured(
            steps=done,
            images_per_second=1e3 * self.config.training.global_batch_size / milliseconds["step"],
            milliseconds=StepTime(**milliseconds, communication=self._communication()),
            fastest_ms=largest(min(sum(step.values()) for step in durations), self.world),
            peak_gib=largest(memory_gib(self.world.device), self.world),
            losses=tuple(self._read_losses(losses)),
        )

    def memory(self) -> dict[str, float]:
        """GiB of this rank's device (on a CPU: of the process) by part. `buffers` is what building the run took beside
        the parts before it, `forward` what the first micro-batch's forward pass left for its backward pass."""
        engine, device = self.engine, self.world.device
        parameters = [getattr(p, "ds_tensor", p) for p in engine.deepspeed.module.parameters()]  # ZeRO 3's own part
        state = engine.state_dict()
        parts = {"weights": parameters, "masters": state["master"], "moments": state["exp_avg"] + state["exp_avg_sq"]}
        parts["ema"] = self.ema.partitions or []
        found = {name: bytes_on(device, tensors) for name, tensors in parts.items()}
        found["buffers"] = max(0, self._held_after - self._held_before - sum(found.values()))
        found["forward"] = engine.forward_bytes or 0
        return {name: size / GIB for name, size in found.items()} | {"peak": memory_gib(device)}

    def reset(self) -> None:
        """As at the start: the same weights, moments of zero, step 0, the same batches and random numbers again."""
        self.engine.clear_moments()
        whole = dict(draw_model(self.config, self.world.device).named_parameters())
        with torch.no_grad():
            for fragment in self.engine.fragments():
                weight = whole[fragment.name]
                part = weight if fragment.shard.count == 1 else fragment.shard.take(weight)
                fragment.of(self.engine.master_weights).copy_(
                    part.reshape(-1).narrow(0, fragment.start, fragment.numel)
                )
        self.engine.refresh_parameters()
        self.ema = EMA(self.config.ema, self.engine.master_weights)
        self._steps = 0
        self._open_data()

    def wait(self) -> None:
        """For the device."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)

    def _open_data(self) -> None:
        self._close_data()
        kind = MadeUp if self.data == MADE_UP else Loaded
        self._batches = kind(self.config, self.settings, self.engine.plan)

    def _close_data(self) -> None:
        if isinstance(self._batches, Loaded):
            self._batches.close()
        self._batches = None

    def _another(self, done: int, steps: int, seconds: float, started: float) -> bool:
        """On all ranks the same: one more step, if it ends in time."""
        wanted = done < steps or (time.perf_counter() - started) * (done + 1) / done <= seconds
        return bool(largest(float(wanted), self.world))

    def _communication(self) -> float | None:
        """Milliseconds of a step in which a collective ran on the slowest rank; None with one process."""
        if self.world.size == 1:
            return None
        activity = ProfilerActivity.CUDA if self.world.device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[activity]) as profiler:
            for _ in range(PROFILED_STEPS):
                self.step()
            self.wait()
        spans = [e.time_range for e in profiler.events() if e.name.startswith(COLLECTIVES)]
        busy = length_of_union([(span.start, span.end) for span in spans])  # microseconds
        return largest(busy / 1e3 / PROFILED_STEPS, self.world)

    def _read_losses(self, losses: list[Tensor]) -> list[float]:
        mean = torch.stack(losses).double().cpu() / self.world.size
        torch.distributed.all_reduce(mean)
        return mean.tolist()


@functools.cache
def plan_of(expert_parallel: int, tensor_parallel: int, world: World) -> ParallelPlan:
    """Its groups are made once in a process: megatron-core makes none a second time."""
    return ParallelPlan.build(RunSettings(expert_parallel=expert_parallel, tensor_parallel=tensor_parallel), world)


def draw_model(config: TrainConfig, device: torch.device) -> MicroDiT:
    """The recipe's model as its seed draws it on a device: 1.165 B numbers take a CPU a while."""
    torch.manual_seed(config.seed)
    with torch.device(device):
        return MicroDiT(config.model)


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


def bytes_on(device: torch.device, tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == device.type)


def give_back_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
