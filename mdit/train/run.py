"""From the command line to a settled run: everything a user can get wrong is found here, before any step."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mdit.checkpoint.snapshot import initial_weights, load_snapshot
from mdit.checkpoint.training_state import Damaged, complete_checkpoints, latest_step, read_state
from mdit.config import TrainConfig, UserError, kept_tokens, load_config, portable
from mdit.data.loader import choose_engine, weigh_captions
from mdit.data.order import build_order
from mdit.data.shards import open_dataset
from mdit.dist import World, logger, on_rank_zero
from mdit.files import follow
from mdit.kernels.selection import choose_kernels
from mdit.meeting import Patience
from mdit.parallel.align import projection_sizes
from mdit.parallel.fp8 import check_fp8
from mdit.parallel.plan import check_plan
from mdit.parallel.settings import Execution, count_parameters, load_ds_json
from mdit.precompute import is_precomputed, precompute
from mdit.provenance import commit, package_versions
from mdit.train.engine import check_ds_config
from mdit.train.optim import check_implementation
from mdit.train.run_directory import (
    CHECKPOINTS,
    CONFIG,
    SEEN_WITHIN,
    RunDirectory,
    check_place,
    check_same_recipe,
    finished_at,
)
from mdit.train.watchdog import Watchdog

# Variables that count how often Slurm and torchrun gave the same command again: a --restart in it was for the first.
STARTED_AGAIN = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


@dataclass(frozen=True)
class Run:
    """Everything that is settled before step 0. `initial_weights` is a state dict that `init_from` asks for, `moments`
    the checkpoint whose optimizer's moments a new run begins with."""

    config: TrainConfig
    execution: Execution
    run_dir: Path
    world: World
    initial_weights: dict[str, Tensor] | None = None
    init_from: Path | None = None
    moments: Path | None = None
    restart: bool = False


def resolve_run(
    recipe: Path,
    ds_path: Path,
    *,
    overrides: Sequence[str],
    run_dir: Path | None,
    init_from: Path | None,
    with_moments: bool = False,
    restart: bool,
    world: World,
) -> Run:
    """Read, check and resolve recipe, JSON, run directory and first weights. Raises UserError; writes nothing."""
    config = load_config(recipe, overrides)
    ds_json = load_ds_json(ds_path)
    execution = resolve_execution(ds_json, ds_path, config, recipe, world)
    logger.info(f"kernels: {', '.join(sorted(execution.triton_ops)) or 'none'} in Triton ({execution.kernels_reason})")
    run_dir = run_dir or Path("runs") / config.name
    check_place(run_dir)
    restart = restart and not any(int(os.environ.get(name) or 0) for name in STARTED_AGAIN)
    if not restart:
        check_what_is_there(run_dir, config)
    weights = moments = None
    if with_moments and init_from is None:
        raise UserError("--with_moments: goes with --init_from, whose run's they are")
    if init_from is not None and (restart or latest_step(run_dir / CHECKPOINTS) == 0):
        weights = initial_weights(load_snapshot(init_from), config.model)  # a run that has begun goes on from itself
        moments = moments_beside(init_from, config) if with_moments else None
    return Run(config, execution, run_dir, world, weights, init_from, moments, restart)


def resolve_asked(args: argparse.Namespace, world: World) -> Run:
    """`resolve_run` of the arguments of launchers/train.py."""
    return resolve_run(
        args.recipe,
        args.ds_config,
        overrides=args.set,
        run_dir=args.run_dir,
        init_from=args.init_from,
        with_moments=args.with_moments,
        restart=args.restart,
        world=world,
    )


def moments_beside(init_from: Path, config: TrainConfig) -> Path:
    """The checkpoint at a snapshot's step, in the run that left both. Raises UserError where it cannot serve."""
    snapshot = follow(init_from).resolve()
    path = snapshot.parent.parent / CHECKPOINTS / snapshot.name
    try:
        there = read_state(path).state["run"]["recipe"]["optim"].get("name", "adamw")
    except Damaged as damage:
        raise UserError(
            f"--with_moments: {path}: {damage}; they come from the checkpoint at the snapshot's step"
        ) from None
    if there != config.optim.name:
        raise UserError(f"--with_moments: {path}: are those of {there}, but optim.name is {config.optim.name!r}")
    return path


def check_what_is_there(run_dir: Path, config: TrainConfig) -> None:
    """Raise UserError, before anything is made, where the run directory is another recipe's or another version's."""
    if (run_dir / CONFIG).exists():
        check_same_recipe(load_config(run_dir / CONFIG), config, run_dir / CONFIG)
    for newest in complete_checkpoints(run_dir / CHECKPOINTS)[:1]:
        with suppress(Damaged):
            read_state(newest)


def resolve_execution(ds_json: dict, ds_path: Path, config: TrainConfig, recipe: Path, world: World) -> Execution:
    """Resolve a DeepSpeed JSON beside a recipe, and choose the kernels, for this machine. Raises UserError."""
    bf16_works = world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    execution = Execution.resolve(ds_json, config, processes=world.size, bf16_works=bf16_works, path=ds_path)
    settings = execution.settings
    check_ds_config(execution.deepspeed, ds_path)
    check_plan(execution, config.model, world.size, ds_path)
    check_implementation(config.optim, world.device, recipe, execution)
    choose_engine(settings.data_engine, world.device)  # refuses one that is not installed
    options = world.device, execution.dtype, config.model.head_dim, ds_path, settings.fp8
    triton_ops, reason = choose_kernels(settings.kernels, *options)
    check_fp8(settings, world.device, execution.dtype == torch.bfloat16, triton_ops, ds_path)
    return replace(execution, triton_ops=triton_ops, kernels_reason=reason)


def finished(run: Run) -> bool:
    """Say so when there is nothing left to do. A collective: on a shared file system one rank sees more than another,
    so rank 0 decides."""
    if run.restart:
        return False
    step = on_rank_zero(run.world, lambda: finished_at(run.run_dir, run.config.training.num_steps))
    if step is None:
        return False
    logger.info(f"{run.run_dir}: finished at step {step}; snapshot {run.run_dir / 'snapshots' / f'step_{step:08d}'}")
    return True


def check_data(run: Run) -> None:
    config, patience = run.config, Patience(SEEN_WITHIN, says=False)
    directories = ", ".join((*config.data.train, config.data.validation))
    while not is_precomputed(config):
        if patience.over(directories):
            raise UserError(f"{directories}: rank 0 sees these sets, this rank does not; the nodes have to share them")
    precompute(config, device=run.world.device)
    datasets = [open_dataset(directory) for directory in config.data.train]
    if config.data.captions is not None:
        weigh_captions(datasets, config.data.captions)  # refuses kinds that no set has
    shard_sizes = [dataset.shard_sizes for dataset in datasets]
    # Refuses a set that is smaller than its share of a batch.
    build_order(shard_sizes, config.data.weights, config.training.global_batch_size, config.seed)


@contextmanager
def opened(run: Run, began: float | None = None) -> Iterator[RunDirectory]:
    """The run's directory in the hands of this run: tried out, locked, its checkpoint found, config.json and a line of
    starts.jsonl written; the watchdog is awake. `began` is when this process did, by time.time(): a STOP file that is
    older goes. A collective; raises on all ranks alike."""
    directory = RunDirectory(run.run_dir, run.world, restart=run.restart, began=began)
    with directory, Watchdog(directory, run.world, run.execution.settings.watchdog_s):
        directory.begin(run.config, description(run), run.init_from, has_weights=run.initial_weights is not None)
        yield directory


def description(run: Run) -> dict:
    """Content of config.json. Its "recipe" part can be given to --recipe again."""
    return {
        **({"moments_from": str(run.moments)} if run.moments else {}),
        "recipe": portable(run.config, run.run_dir / "config.json"),
        "deepspeed": run.execution.deepspeed,
        "mdit": run.execution.settings.model_dump(mode="json"),
        "world_size": run.world.size,
        "versions": package_versions(),
        "commit": commit(),
    }


def describe(run: Run, start: int) -> str:
    """Model, layout and batch of a run that begins at step `start`, in a few lines."""
    config, execution = run.config, run.execution
    settings, training = execution.settings, config.training
    fewest, most = (kept_tokens(config.model.num_patches, f(training.mask_ratios)) for f in (max, min))
    aligned = ""
    if (align := config.align) is not None:
        trained = sum(projection_sizes(config.model.dim, align)) / 1e6
        aligned = f"; block {align.block} aligned with {align.tower} by {trained:,.1f} M parameters more"
    return "\n".join(
        [
            f"model: {count_parameters(config.model) / 1e6:,.1f} M parameters, {config.model.num_patches} patches, "
            f"{fewest if fewest == most else f'{fewest} to {most}'} kept{aligned}",
            f"processes: {run.world.size}, experts over {settings.expert_parallel}, tensors over "
            f"{settings.tensor_parallel}, ZeRO-{execution.zero.stage}, {str(execution.dtype).removeprefix('torch.')}",
            f"batch: {training.global_batch_size} = {run.world.size // settings.tensor_parallel} shares x "
            f"{execution.micro_batch} samples x {execution.accumulation_steps} accumulated",
            f"{'resuming' if start else 'starting'} at step {start} of {training.num_steps}",
        ]
    )


def dry_run(run: Run) -> str:
    """The text of --dry_run: all that is resolved, and what is there already."""
    from mdit.costs.trace import mean_training_flops  # a planner, which no training run needs

    data, training = run.config.data, run.config.training
    gigaflops = mean_training_flops(run.config) / 1e9
    if there := is_precomputed(run.config):
        check_data(run)  # makes nothing then, and refuses sets that do not fit
    lines = [
        json.dumps(description(run), indent=1),
        describe(run, latest_step(run.run_dir / CHECKPOINTS)),
        f"compute: {gigaflops:,.1f} GFLOP an image, "
        f"{gigaflops * training.global_batch_size * training.num_steps / 1e6:,.3f} PFLOP the run",
        f"data: {', '.join((*data.train, data.validation))} ({'there' if there else 'not there yet'})",
        f"run directory: {run.run_dir}",
    ]
    return "\n".join(lines)
