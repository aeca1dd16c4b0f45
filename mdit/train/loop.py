"""The training loop. Read it aloud: the rest of mdit is what its words mean."""

import torch

from mdit.checkpoint.training_state import Checkpoint
from mdit.config import TrainConfig
from mdit.data.loader import Batch, build_loader
from mdit.diffusion.edm import edm_losses, sample_noise
from mdit.dist import StopSignal, logger
from mdit.models import MicroDiT
from mdit.parallel.align import add_projection
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution
from mdit.train.align import stores_features, with_features
from mdit.train.checkpointer import Checkpointer
from mdit.train.ema import EMA
from mdit.train.engine import Engine
from mdit.train.evaluator import Evaluator
from mdit.train.meter import Meter
from mdit.train.optim import learning_rate
from mdit.train.run import Run, describe
from mdit.train.run_directory import STOP, RunDirectory
from mdit.train.saver import Saver
from mdit.train.skipped import SkippedSteps


def train(run: Run, directory: RunDirectory) -> int:
    """Train, or go on training, to the recipe's last step; return the step reached. A collective over all ranks.

    Stops early, with a checkpoint, when any rank receives a signal (`StopSignal`), or for a file run_dir/STOP.
    Raises UserError, without one, when steps do not stop being skipped or weights are not finite (mdit.train.skipped).
    """
    config, world, report = run.config, run.world, run.config.report
    plan = ParallelPlan.build(run.execution.settings, world)
    model = first_weights(run, directory.checkpoint)
    parallelize(model, run.execution.settings, plan)
    engine = Engine(model, config, run.execution, plan)
    ema = EMA(config.ema, engine.master_weights, config.averages)
    meter = Meter(config, run.run_dir, world)  # loss, images/s, memory, the pace of each rank
    skipped = SkippedSteps(config.training.max_skipped_in_a_row, run.run_dir, world)  # losses that are not finite
    saver = Saver(directory, world, background=run.execution.settings.async_checkpoints)
    checkpointer = Checkpointer(run, directory, saver, engine=engine, ema=ema, meter=meter, skipped=skipped)
    step = start = checkpointer.load_latest()
    evaluator = Evaluator(run, engine, ema, meter)
    logger.info(describe(run, start))

    loader = open_batches(config, run.execution, plan, start)
    stop = StopSignal(run.run_dir / STOP, world)
    with loader as batches, saver, meter.recording(start):
        while True:
            directory.step = step
            done, stopping = step >= config.training.num_steps, stop.requested()
            if due(report.log_every, step, start, done):
                meter.report(step, engine.gradient_norm(), skipped.total, engine.forward)
            if due(report.validate_every, step, start, done):
                evaluator.validate(step)
            if due(report.sample_every, step, start, done):
                evaluator.sample(step)
            if config.metrics is not None and due(config.metrics.every, step, start, done):
                evaluator.score(step)
            if due(report.snapshot_every, step, start) or done:
                checkpointer.save_snapshot(step)
            if config.averages is not None and due(config.averages.every, step, start, done):
                checkpointer.save_averages(step)
            if due(report.checkpoint_every, step, start, done or stopping):
                checkpointer.save(step)
            if done or stopping:
                break

            batch = meter.timed_fetch(batches)
            losses = optimizer_step(engine, batch, step, config)
            step += 1
            if engine.step_applied:
                ema.update(step)
                meter.add(losses)
                skipped.in_a_row = 0
            else:
                skipped.add(step, batch, losses["loss"])
            meter.count_step()
            if skipped.too_many:
                meter.report(step, engine.gradient_norm(), skipped.total, engine.forward)
                raise skipped.error(step)

    saver.check_saved(step)
    if done:
        counted = f" ({skipped.total} of them skipped: not finite)" if skipped.total else ""
        logger.info(f"finished at step {step}{counted}: {run.run_dir / 'snapshots' / 'latest'}")
    else:
        logger.info(f"stopped at step {step}; the same command goes on from there")
    return step


def due(every: int, step: int, start: int, at_end: bool = False) -> bool:
    """Whether what happens every `every` steps (0: never) happens after `step`, or for its last time `at_end`. What was
    due at `start` was done before the run stopped there."""
    return every > 0 and step > start and (at_end or step % every == 0)


def open_batches(config: TrainConfig, execution: Execution, plan: ParallelPlan, start_step: int):
    """An endless iterator of Batch, and a context manager: this rank's rows of the recipe's global batches."""
    stored = config.align is not None and stores_features(config)
    batches = build_loader(
        config.data.train,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
        start_step=start_step,
        rank=plan.data_rank,
        world_size=plan.data_size,
        device=plan.world.device,
        weights=config.data.weights,
        captions=config.data.captions,
        engine=execution.settings.data_engine,
        features=stored,
    )
    return batches if stored or config.align is None else with_features(batches, config, plan.world.device)


def optimizer_step(engine: Engine, batch: Batch, step: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    """One step on this rank's share of the global batch, micro-batch by micro-batch -> (N,) "loss" of each sample, and
    "align_loss" while representations are aligned."""
    share = len(batch.latents_NCHW)
    first = engine.plan.data_rank * share
    noise = sample_noise(config, step, slice(first, first + share), engine.world.device)
    if (projection := engine.projection) is not None:
        projection.begin(step)
    engine.set_learning_rate(learning_rate(step, config.training.num_steps, config.optim))
    losses, aligned = [], []  # of each sample
    for rows in engine.micro_batches(share):
        losses_N = edm_losses(engine, batch.latents_NCHW[rows], batch.captions_NLC[rows], noise[rows], config.noise)
        loss = losses_N.mean()
        if projection is not None:
            features = None if batch.features_NTC is None else batch.features_NTC[rows]
            align_N = projection.losses(features, noise[rows].mask)
            loss = loss + projection.config.weight * align_N.mean()
            aligned.append(align_N.detach())
        engine.backward(loss)  # accumulates; averages over the ranks
        losses.append(losses_N.detach())
    engine.step()  # clips to optim.max_grad_norm, steps the optimizer, zeroes the gradients
    found = {"loss": torch.cat(losses)}
    if projection is not None and projection.active:
        found["align_loss"] = torch.cat(aligned)
    return found


def first_weights(run: Run, checkpoint: Checkpoint | None) -> MicroDiT:
    """The model on the CPU, where a seed draws the same numbers whatever trains them. They are drawn for a new run
    alone (1.16 B of them take 15 s): what comes from a snapshot or a checkpoint would only overwrite them."""
    if run.initial_weights is None and checkpoint is None:
        torch.manual_seed(run.config.seed)
        model = MicroDiT(run.config.model)
    else:
        model = MicroDiT.without_weights(run.config.model, "cpu")
    if run.initial_weights is not None:
        model.load_state_dict(run.initial_weights, strict=False)  # all but pos_embed: initial_weights has checked it
    if run.config.align is not None:
        torch.manual_seed(run.config.seed)  # the same projection on every rank, whatever the model began from
        add_projection(model, run.config.align)
    return model
