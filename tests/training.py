"""Real training runs for tests: made-up latent shards, recipes as files, the launcher in processes of its own."""

import json
import os
import pickle
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.distributed

from mdit import meeting
from mdit.bench.tiny import write_shards
from mdit.config import TrainConfig
from mdit.differences import toml
from mdit.dist import world_from_env
from tests.processes import run_forked, start_forked
from tests.recipes import tiny_config

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = REPOSITORY / "launchers" / "train.py"


def write_recipe(folder: Path, *, samples: int = 64, **changes) -> Path:
    """A tiny recipe with its shards, in the form of a run's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": [str(folder / "train")], "validation": str(folder / "validation")}
    config = tiny_config(**{**changes, "data": {**data, **changes.get("data", {})}})
    for name, count, seed in (("train", samples, 0), ("validation", 8, 1)):
        if not (folder / name).exists():
            write_shards(folder / name, config, count, seed)
    path = folder / "recipe.json"
    path.write_text(json.dumps({"recipe": config.model_dump(mode="json", exclude_none=True)}))
    return path


def write_toml(path: Path, config: TrainConfig) -> Path:
    """A recipe as people write it."""
    values = config.model_dump(mode="json", exclude_none=True)
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in values.items()))
    return path


def write_ds_json(path: Path, stage: int = 2, micro_batch="auto", **keys) -> Path:
    content = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}, **keys}
    path.write_text(json.dumps(content))
    return path


def command(recipe: Path, ds_json: Path, run_dir: Path, *extra: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        *start,
        str(LAUNCHER),
        "--recipe",
        str(recipe),
        "--ds_config",
        str(ds_json),
        "--run_dir",
        str(run_dir),
        *extra,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def attempt(
    recipe: Path,
    ds_json: Path,
    run_dir: Path,
    *extra: str,
    processes: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float = 280,
    launched: Callable[[str, list[str]], None] | None = None,
) -> tuple[int, str]:
    """Run the launcher as `command` does, in forked processes -> exit status, everything that was printed.

    `env` is added to the environment; `launched` stands in for `launch`. Raises AssertionError when the run has not
    ended after `timeout` seconds.
    """
    _, script, *arguments = command(recipe, ds_json, run_dir, *extra)
    ended = run_forked(launched or launch, script, arguments, processes=processes, env=env, timeout=timeout)
    return ended.returncode, ended.output


def start(recipe: Path, ds_json: Path, run_dir: Path) -> BaseProcess:
    """The launcher in a forked process of its own, which is not waited for."""
    _, script, *arguments = command(recipe, ds_json, run_dir)
    return start_forked(launch, script, arguments, log=run_dir.with_suffix(".log"))


def launch(script: str, arguments: list[str]) -> None:
    """Run a launcher in this process."""
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def train(recipe: Path, ds_json: Path, run_dir: Path, *extra: str, **options) -> str:
    """Run to the end, with the options of `attempt`; -> everything that was printed."""
    returncode, output = attempt(recipe, ds_json, run_dir, *extra, **options)
    assert returncode == 0, output
    return output


def run_in_processes(function: Callable, processes: int, *args, timeout: float = 120) -> list:
    """Call `function(world, *args)` in each of `processes` forked processes that have met in a gloo group, on CPUs ->
    what each returned, by rank.

    `function` must be at the top of a module; it, its arguments and what it returns are pickled. Raises AssertionError
    with everything that was printed, a traceback among it, when a process fails.
    """
    with TemporaryDirectory() as folder:
        no_gpu = {"CUDA_VISIBLE_DEVICES": ""}
        ended = run_forked(_in_group, function, args, folder, processes=processes, env=no_gpu, timeout=timeout)
        assert ended.returncode == 0, ended.output
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(processes)]


def _in_group(function: Callable, args: tuple, folder: str) -> None:
    world = world_from_env()
    meeting.init_distributed(world)
    answer = function(world, *args)
    Path(folder, str(world.rank)).write_bytes(pickle.dumps(answer))
    torch.distributed.destroy_process_group()


def read_metrics(run_dir: Path, key: str = "loss") -> dict[int, float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}
