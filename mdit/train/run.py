"""From the command line to a settled run: everything a user can get wrong is found here, before any step."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mdit.config import TrainConfig, UserError, kept_tokens, load_config
from mdit.data.loader import choose_engine
from mdit.data.order import build_order
from mdit.data.shards import open_dataset
from mdit.dist import World, logger
from mdit.kernels.choice import choose_kernels
from mdit.models import MicroDiT
from mdit.models.flops import training_flops
from mdit.parallel.fp8 import check_fp8
from mdit.parallel.plan import check_plan, data_parallel_size
from mdit.parallel.settings import RunSettings, load_ds_json, load_run_settings, resolve_ds_config
from mdit.prepare import is_prepared, prepare
from mdit.provenance import commit, package_versions
from mdit.snapshot import initial_weights, load_snapshot
from mdit.train.checkpoint import complete_checkpoints, latest_step, read_state
from mdit.train.engine import check_zero_section
from mdit.train.loop import Run
from mdit.train.optim import check_implementation

# What may change between two starts of one run: how often it reports, how long it goes on, what steps its weights.
CHANGEABLE = ("report.", "training.num_steps", "optim.implementation")


def plan_run(
    recipe: Path,
    ds_path: Path,
    *,
    overrides: Sequence[str],
    run_dir: Path | None,
    init_from: Path | None,
    world: World,
) -> Run:
    """Read, check and resolve recipe, JSON, run directory and first weights. Raises UserError; writes nothing."""
    config = load_config(recipe, overrides)
    ds_json = load_ds_json(ds_path)
    settings, ds_config, in_triton, reason = settle_json(ds_json, ds_path, config, recipe, world)
    logger.info(f"kernels: {', '.join(sorted(in_triton)) or 'none'} in Triton ({reason})")
    run_dir = run_dir or Path("runs") / config.name
    check_same_recipe(config, run_dir)
    weights = None
    if init_from is not None and latest_step(run_dir / "checkpoints") == 0:  # a run that has begun goes on from itself
        weights = initial_weights(load_snapshot(init_from), config.model)
    run = Run(config, settings, ds_config, run_dir, world, weights)
    for newest in complete_checkpoints(run_dir / "checkpoints")[:1]:
        read_state(newest)  # refuses another format now, before config.json is written again
    return run


def settle_json(
    ds_json: dict, ds_path: Path, config: TrainConfig, recipe: Path, world: World
) -> tuple[RunSettings, dict, frozenset[str], str]:
    """All that a DeepSpeed JSON is checked for beside a recipe, on this machine -> its "mdit" section, what DeepSpeed
    is given, the ops that run in Triton from now on, and why. Raises UserError."""
    settings = load_run_settings(ds_json, ds_path)
    bf16_works = world.device.type == "cuda" and torch.cuda.is_bf16_supported()
    data_size = data_parallel_size(settings, world.size, ds_path)
    ds_config = resolve_ds_config(ds_json, config, data_size=data_size, bf16_works=bf16_works, path=ds_path)
    check_zero_section(ds_config, ds_path)
    check_plan(settings, config.model, ds_config["zero_optimization"], world.size, ds_path)
    check_implementation(config.optim, world.device, recipe, ds_config["zero_optimization"])
    choose_engine(settings.data_engine, world.device)  # refuses one that is not installed
    bf16 = ds_config["bf16"]["enabled"]
    dtype = torch.bfloat16 if bf16 else torch.float32
    options = world.device, dtype, config.model.head_dim, ds_path, settings.fp8
    in_triton, reason = choose_kernels(settings.kernels, *options)
    check_fp8(settings, world.device, bf16, in_triton, ds_path)
    return settings, ds_config, in_triton, reason


def check_same_recipe(config: TrainConfig, run_dir: Path) -> None:
    """A run directory belongs to one recipe."""
    path = run_dir / "config.json"
    if not path.exists():
        return
    before, now = (flatten(c.model_dump(mode="json")) for c in (load_config(path), config))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(CHANGEABLE):
            raise UserError(
                f"{path}: this run was started with {key} = {before.get(key)!r}, now it is {now.get(key)!r}; "
                "choose another --run_dir"
            )


def finished(run: Run) -> bool:
    """Say so when there is nothing left to do."""
    step = latest_step(run.run_dir / "checkpoints")
    if step < run.config.training.num_steps:
        return False
    logger.info(f"{run.run_dir}: finished at step {step}; snapshot {run.run_dir / 'snapshots' / 'latest'}")
    return True


def prepare_on_first(run: Run) -> None:
    """Rank 0 makes the data if it is missing, the others wait for it; all check it; then rank 0 writes config.json."""
    config = run.config
    while not (run.world.is_first or is_prepared(config)):
        time.sleep(0.5)
    prepare(config, device=run.world.device)
    shard_sizes = [open_dataset(directory).shard_sizes for directory in config.data.train]
    # Refuses a set that is smaller than its share of a batch.
    build_order(shard_sizes, config.data.weights, config.training.global_batch_size, config.seed)
    if run.world.is_first:
        write_config(run)


def write_config(run: Run) -> None:
    run.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run.run_dir / "config.json.tmp"
    temporary.write_text(json.dumps(description(run), indent=1) + "\n", encoding="utf-8")
    temporary.rename(run.run_dir / "config.json")


def description(run: Run) -> dict:
    """What config.json records. Its "recipe" part can be given to --recipe again."""
    return {
        "recipe": run.config.model_dump(mode="json", exclude_none=True),
        "deepspeed": run.ds_config,
        "mdit": run.settings.model_dump(mode="json"),
        "world_size": run.world.size,
        "versions": package_versions(),
        "commit": commit(),
    }


def flatten(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def describe(run: Run) -> str:
    """The text of --dry_run."""
    config, ds = run.config, run.ds_config
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
        f"data: {', '.join(config.data.train)} ({'there' if is_prepared(config) else 'not there yet'})",
        f"run directory: {run.run_dir} (at step {latest_step(run.run_dir / 'checkpoints')})",
    ]
    return "\n".join(lines)
