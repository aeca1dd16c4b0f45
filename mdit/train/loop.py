"""The training loop. Read it aloud: the rest of mdit is what its words mean."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed

from mdit.checkpoint.training_state import Checkpoint, load_into, save_training_state
from mdit.config import ReportConfig, TrainConfig
from mdit.data.loader import Batch, build_loader
from mdit.diffusion.edm import draw, edm_losses
from mdit.dist import StopSignal, World, logger, on_all_ranks
from mdit.models import MicroDiT
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import RunSettings, computing_dtype
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.evaluator import Evaluator
from mdit.train.metrics import Metrics, Stopwatch, memory_gib
from mdit.train.optim import learning_rate
from mdit.train.run_directory import CHECKPOINTS, STOP, RunDirectory
from mdit.train.skipped import SkippedSteps, require_finite


@dataclass(frozen=True)
class Run:
    """Everything that is settled before step 0. `initial_weights` is a state dict that `init_from` asks for."""

    config: TrainConfig
    settings: RunSettings
    ds_config: dict
    run_dir: Path
    world: World
    initial_weights: dict[str, torch.Tensor] | None = None
    init_from: Path | None = None
    restart: bool = False
    in_triton: frozenset[str] = frozenset()  # ops

    @property
    def layout(self) -> dict:
        """What a checkpoint's partitions depend on."""
        zero = dict(self.ds_config["zero_optimization"])
        return {
            "world_size": self.world.size,
            "expert_parallel": self.settings.expert_parallel,
            "tensor_parallel": self.settings.tensor_parallel,
            "zero_stage": zero.pop("stage"),
            "zero_options": zero,  # some of them reorder or cut partitions
            "bf16": self.ds_config["bf16"]["enabled"],
        }


def train(run: Run, directory: RunDirectory) -> int:
    """Train, or go on training, to the recipe's last step; returns the step reached. A collective over all ranks.

    Stops early, with a checkpoint, when any rank receives a signal (`StopSignal`), or for a file run_dir/STOP.
    Raises UserError, without one, when steps do not stop being skipped or weights are not finite (mdit.train.skipped).
    """
    config, world, report = run.config, run.world, run.config.report
    checkpoints = directory.path / CHECKPOINTS

    model = first_weights(run, directory.checkpoint)
    plan = ParallelPlan.build(run.settings, world)
    parallelize(model, run.settings, plan)
    engine = Engine(model, config, run.ds_config, plan)
    ema = EMA(config.ema, engine.masters) if config.ema else None
    losses, skipped = LossAverage(world), SkippedSteps(config.training.max_skipped_in_a_row, world)

    step = 0
    if (checkpoint := directory.checkpoint) is not None:
        step = checkpoint.step
        restore(checkpoint, run, engine, ema, losses, skipped)
        logger.info(f"resuming at step {step} of {config.training.num_steps}")
    first_step = step

    evaluation = Evaluator(run.config, run.run_dir, world, computing_dtype(run.ds_config))
    record = partial(Metrics, run.run_dir, first_step=step, num_steps=config.training.num_steps, world=world)
    metrics = on_all_ranks(world, record)  # rank 0 writes
    stop, stopwatch = on_all_ranks(world, partial(StopSignal, run.run_dir / STOP, world)), Stopwatch(world.device)
    loader = build_loader(
        config.data.train,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
        start_step=step,
        rank=plan.data_rank,
        world_size=plan.data_size,
        device=world.device,
        weights=config.data.weights,
        engine=run.settings.data_engine,
    )

    with loader, metrics:
        while True:
            done = step >= config.training.num_steps
            stopping = stop.agreed()

            if step > first_step and (step % report.log_every == 0 or done):
                report_progress(step, engine, losses, skipped, stopwatch, config, metrics)
            if due := due_at(step, first_step, report, done=done, stopping=stopping):
                stopwatch.pause()
            if due & {"snapshot", "checkpoint"}:
                require_finite(step, state_tensors(engine, ema), engine.fragments(), checkpoints, world)
            if "validate" in due:
                evaluation.validate(step, engine, ema, metrics)
            if "sample" in due:
                evaluation.sample(step, engine, ema, metrics)
            if "snapshot" in due:
                directory.attempt("snapshot", step, partial(evaluation.save_snapshot, step, engine, ema))
            if "checkpoint" in due:
                write = partial(save, run, directory, step, engine, ema, losses, skipped)
                directory.attempt("checkpoint", step, write)
            if done or stopping:
                break

            stopwatch.start()
            with stopwatch.waiting():
                batch = next(loader)
            losses_N = optimizer_step(engine, batch, step, config)
            step += 1
            if engine.step_applied:
                skipped.in_a_row = 0
                losses.add(losses_N.mean())
                if ema is not None:
                    ema.update(step)
            else:
                skipped.add(step, batch, losses_N)
            stopwatch.count_step()
            metrics.advance(step)
            if skipped.too_many:
                report_progress(step, engine, losses, skipped, stopwatch, config, metrics)
                raise skipped.too_many_in(checkpoints, step)

    directory.check_saved(step)
    if done:
        counted = f" ({skipped.total} of them skipped: not finite)" if skipped.total else ""
        logger.info(f"finished at step {step}{counted}: {run.run_dir / 'snapshots' / 'latest'}")
    else:
        logger.info(f"stopped at step {step}; the same command goes on from there")
    return step


def first_weights(run: Run, checkpoint: Checkpoint | None) -> MicroDiT:
    """The model on the CPU, where a seed draws the same numbers whatever trains them. They are drawn for a new run
    alone (1.16 B of them take 15 s): what comes from a snapshot or a checkpoint would only overwrite them."""
    if run.initial_weights is None and checkpoint is None:
        torch.manual_seed(run.config.seed)
        return MicroDiT(run.config.model)
    model = MicroDiT.without_weights(run.config.model, "cpu")
    if run.initial_weights is not None:
        model.load_state_dict(run.initial_weights, strict=False)  # all but pos_embed: initial_weights has checked it
    return model


def due_at(step: int, first_step: int, report: ReportConfig, *, done: bool, stopping: bool) -> set[str]:
    """Names of what is due behind the step that led to `step`. The last step brings everything that is not turned off.

    What was due at the first step was done before the run stopped there, but for a snapshot of the last step.
    """
    if step == first_step:
        return {"snapshot"} if done else set()
    every = {
        "validate": report.validate_every,
        "sample": report.sample_every,
        "snapshot": report.snapshot_every,
        "checkpoint": report.checkpoint_every,
    }
    due = {name for name, steps in every.items() if steps and (done or step % steps == 0)}
    return due | ({"snapshot"} if done else set()) | ({"checkpoint"} if stopping else set())


def optimizer_step(engine: Engine, batch: Batch, step: int, config: TrainConfig) -> torch.Tensor:
    """One step on this rank's share of the global batch, micro-batch by micro-batch -> (N,) the loss of each sample."""
    engine.set_learning_rate(learning_rate(step, config.training.num_steps, config.optim))
    share = len(batch.latents_NCHW)
    start = engine.plan.data_rank * share
    drawn = draw(config, step, slice(start, start + share), engine.world.device)
    losses = []
    for rows in engine.micro_batches(share):
        losses_N = edm_losses(
            engine, batch.latents_NCHW[rows], batch.captions_NLC[rows], drawn[rows], config.noise.sigma_data
        )
        engine.backward_and_step(losses_N.mean())
        losses.append(losses_N.detach())
    return torch.cat(losses)


class LossAverage:
    """Mean loss of the steps since the last report. Kept on the device, so that no step waits for a number."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sum_and_count = torch.zeros(2, dtype=torch.float64, device=world.device)

    def add(self, loss: torch.Tensor) -> None:
        self.sum_and_count[0] += loss
        self.sum_and_count[1] += 1

    def read(self) -> float:
        """Over all ranks, NaN where no step was added; starts anew. A collective."""
        total = self.sum_and_count.clone()
        torch.distributed.all_reduce(total)
        self.sum_and_count.zero_()
        return float(total[0] / total[1])

    def memory(self) -> dict[str, float]:
        """Numbers that a checkpoint keeps of it."""
        return dict(zip(("loss_sum", "loss_count"), self.sum_and_count.tolist()))

    def recall(self, memory: dict[str, float]) -> None:
        self.sum_and_count.copy_(torch.tensor([memory["loss_sum"], memory["loss_count"]], dtype=torch.float64))


def report_progress(
    step: int,
    engine: Engine,
    losses: LossAverage,
    skipped: SkippedSteps,
    stopwatch: Stopwatch,
    config: TrainConfig,
    metrics: Metrics,
) -> None:
    steps, seconds, waited = stopwatch.read()
    loss, images_per_second = losses.read(), steps * config.training.global_batch_size / seconds
    metrics.show(step, loss, images_per_second)
    metrics.write(
        step,
        "train",
        {
            "loss": loss,
            "learning_rate": learning_rate(step - 1, config.training.num_steps, config.optim),
            "gradient_norm": engine.gradient_norm(),
            "skipped_steps": skipped.total,
            "images_per_second": images_per_second,
            "step_seconds": seconds / steps,
            "data_wait_share": waited / seconds,
            "memory_gib": memory_gib(engine.world.device),
        },
    )


def state_tensors(engine: Engine, ema: EMA | None) -> dict[str, list[torch.Tensor]]:
    """All tensors that this rank has to remember: randomness and the order of samples are functions of the step."""
    return engine.optimizer_state() | ({"ema": ema.partitions} if ema else {})


def save(
    run: Run,
    directory: RunDirectory,
    step: int,
    engine: Engine,
    ema: EMA | None,
    losses: LossAverage,
    skipped: SkippedSteps,
) -> None:
    save_training_state(
        directory.path / CHECKPOINTS,
        step,
        state_tensors(engine, ema),
        engine.fragments(),
        memory=losses.memory() | skipped.memory() | {"optimizer_steps": engine.optimizer_steps},
        run=directory.run,
        layout=run.layout,
        world=run.world,
        keep=run.config.report.keep_checkpoints,
    )


def restore(
    checkpoint: Checkpoint, run: Run, engine: Engine, ema: EMA | None, losses: LossAverage, skipped: SkippedSteps
) -> None:
    tensors = state_tensors(engine, ema)
    kept = load_into(checkpoint, tensors, engine.fragments(), layout=run.layout, world=run.world)
    engine.optimizer_steps = int(kept["optimizer_steps"])
    losses.recall(kept)
    skipped.recall(kept)
    engine.refresh_parameters()
