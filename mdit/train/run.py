"""From the command line to a settled run: everything a user can get wrong is found here, before any step."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from mdit.checkpoint.snapshot import initial_weights, load_snapshot
from mdit.checkpoint.training_state import Damaged, complete_checkpoints, latest_step, read_state
from mdit.config import TrainConfig, UserError, kept_tokens, load_config, portable
from mdit.data.loader import choose_engine
from mdit.data.order import build_order
from mdit.data.shards import open_dataset
from mdit.dist import World, gather, logger, on_all_ranks
from mdit.kernels.choice import choose_kernels
from mdit.meeting import while_others_wait
from mdit.models import MicroDiT
from mdit.parallel.fp8 import check_fp8
from mdit.parallel.plan import check_plan, data_parallel_size
from mdit.parallel.settings import RunSettings, computing_dtype, load_ds_json, load_run_settings, resolve_ds_config
from mdit.precompute import is_precomputed, precompute
from mdit.provenance import commit, package_versions
from mdit.train.agreement import require_agreement, what_is_read
from mdit.train.engine import check_ds_config
from mdit.train.loop import Run
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

# Variables that count how often Slurm and torchrun gave the same command again: a --restart in it was for the first.
STARTED_AGAIN = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


def plan_run(
    recipe: Path,
    ds_path: Path,
    *,
    overrides: Sequence[str],
    run_dir: Path | None,
    init_from: Path | None,
    restart: bool,
    world: World,
) -> Run:
    """Read, check and resolve recipe, JSON, run directory and first weights. Raises UserError; writes nothing."""
    config = load_config(recipe, overrides)
    ds_json = load_ds_json(ds_path)
    settings, ds_config, in_triton, reason = settle_json(ds_json, ds_path, config, recipe, world)
    logger.info(f"kernels: {', '.join(sorted(in_triton)) or 'none'} in Triton ({reason})")
    run_dir = run_dir or Path("runs") / config.name
    check_place(run_dir)
    restart = restart and not any(int(os.environ.get(name) or 0) for name in STARTED_AGAIN)
    if not restart:
        check_what_is_there(run_dir, config)
    weights = None
    if init_from is not None and (restart or latest_step(run_dir / CHECKPOINTS) == 0):
        weights = initial_weights(load_snapshot(init_from), config.model)  # a run that has begun goes on from itself
    return Run(config, settings, ds_config, run_dir, world, weights, init_from, restart, in_triton)


def check_what_is_there(run_dir: Path, config: TrainConfig) -> None:
    """Raise UserError, before anything is made, where the run directory is another recipe's or another version's."""
    if (run_dir / CONFIG).exists():
        check_same_recipe(load_config(run_dir / CONFIG), config, run_dir / CONFIG)
    for newest in complete_checkpoints(run_dir / CHECKPOINTS)[:1]:
        with suppress(Damaged):
            read_state(newest)


def settle_json(
    ds_json: dict, ds_path: Path, config: TrainConfig, recipe: Path, world: World
) -> tuple[RunSettings, dict, frozenset[str], str]:
    """All that a DeepSpeed JSON is checked for beside a recipe, on this machine -> its "mdit" section, what DeepSpeed
    is given, the ops that run in Triton from now on, and why. Raises UserError."""
    settings = load_run_settings(ds_json, ds_path)
    bf16_works = world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    data_size = data_parallel_size(settings, world.size, ds_path)
    ds_config = resolve_ds_config(ds_json, config, data_size=data_size, bf16_works=bf16_works, path=ds_path)
    check_ds_config(ds_config, ds_path)
    check_plan(settings, config.model, ds_config["zero_optimization"], world.size, ds_path)
    check_implementation(config.optim, world.device, recipe, ds_config["zero_optimization"])
    choose_engine(settings.data_engine, world.device)  # refuses one that is not installed
    dtype = computing_dtype(ds_config)
    options = world.device, dtype, config.model.head_dim, ds_path, settings.fp8
    in_triton, reason = choose_kernels(settings.kernels, *options)
    check_fp8(settings, world.device, dtype == torch.bfloat16, in_triton, ds_path)
    return settings, ds_config, in_triton, reason


def finished(run: Run) -> bool:
    """Say so when there is nothing left to do. A collective: on a shared file system one rank sees more than another,
    so rank 0 decides."""
    step = None if run.restart else finished_at(run.run_dir, run.config.training.num_steps)
    step = gather(step, run.world)[0]
    if step is None:
        return False
    logger.info(f"{run.run_dir}: finished at step {step}; snapshot {run.run_dir / 'snapshots' / f'step_{step:08d}'}")
    return True


def prepare_on_first(run: Run) -> None:
    """Rank 0 makes the data if it is missing, while the others wait for it; all check it, and that it is the same. A
    collective; raises on all ranks alike."""
    while_others_wait(run.world, "makes the data", lambda: precompute(run.config, device=run.world.device))
    on_all_ranks(run.world, lambda: check_data(run))
    require_agreement(run.world, what_is_read(run))


def check_data(run: Run) -> None:
    config, deadline = run.config, time.monotonic() + SEEN_WITHIN
    while not is_precomputed(config):
        if time.monotonic() > deadline:
            directories = ", ".join((*config.data.train, config.data.validation))
            raise UserError(f"{directories}: rank 0 sees these sets, this rank does not; the nodes have to share them")
        time.sleep(0.1)
    precompute(config, device=run.world.device)
    shard_sizes = [open_dataset(directory).shard_sizes for directory in config.data.train]
    # Refuses a set that is smaller than its share of a batch.
    build_order(shard_sizes, config.data.weights, config.training.global_batch_size, config.seed)


@contextmanager
def opened(run: Run, began: float | None = None) -> Iterator[RunDirectory]:
    """The run's directory in the hands of this run: tried out, locked, its checkpoint found, config.json and a line of
    starts.jsonl written. `began` is when this process did, by time.time(): a STOP file that is older goes. A
    collective; raises on all ranks alike."""
    with RunDirectory(run.run_dir, run.world, restart=run.restart, began=began) as directory:
        directory.begin(run.config, description(run), run.init_from, has_weights=run.initial_weights is not None)
        yield directory


def description(run: Run) -> dict:
    """What config.json records. Its "recipe" part can be given to --recipe again."""
    return {
        "recipe": portable(run.config, run.run_dir / "config.json"),
        "deepspeed": run.ds_config,
        "mdit": run.settings.model_dump(mode="json"),
        "world_size": run.world.size,
        "versions": package_versions(),
        "commit": commit(),
    }


def describe(run: Run) -> str:
    """The text of --dry_run."""
    from mdit.costs.trace import training_flops  # a planner, which no training run needs

    config, ds = run.config, run.ds_config
    places = [*config.data.train, config.data.validation]
    if there := is_precomputed(config):
        check_data(run)  # makes nothing then, and refuses sets that do not fit
    with torch.device("meta"):
        model = MicroDiT(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    kept = kept_tokens(config.model.num_patches, config.training.mask_ratio)
    gigaflops = training_flops(config.model, config.training.mask_ratio) / 1e9
    lines = [
        json.dumps(description(run), indent=1),
        f"model: {parameters / 1e6:,.1f} M parameters, {config.model.num_patches} patches, {kept} kept",
        f"compute: {gigaflops:,.1f} GFLOP an image, "
        f"{gigaflops * config.training.global_batch_size * config.training.num_steps / 1e6:,.3f} PFLOP the run",
        f"processes: {run.world.size}, experts over {run.settings.expert_parallel}, tensors over "
        f"{run.settings.tensor_parallel}, ZeRO-{ds['zero_optimization']['stage']}",
        f"batch: {config.training.global_batch_size} = {run.world.size // run.settings.tensor_parallel} shares x "
        f"{ds['train_micro_batch_size_per_gpu']} samples x {ds['gradient_accumulation_steps']} accumulated",
        f"data: {', '.join(places)} ({'there' if there else 'not there yet'})",
        f"run directory: {run.run_dir} (at step {latest_step(run.run_dir / CHECKPOINTS)})",
    ]
    return "\n".join(lines)
