"""Trains on CUDA devices that are not there: `main`, in a process that loaded the library before torch.

A folder has scenarios.json, {name: {"ds": a DeepSpeed JSON, "rank": 3, "size": 8, ...}}, and gets NAME.json for each:
the waits that were noted, tensors on other devices, devices of threads, and the error, if one ended it. Each runs in a
process of its own, forked when everything is imported.
"""

import dataclasses
import gc
import importlib
import json
import os
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed

from tests.fake_cuda import device as fake
from tests.processes import PRELOAD

AT_ONCE = 2  # processes


def run(scenario: dict, folder: Path) -> dict:
    """All of mdit.train.loop.train on one rank of `size`."""
    rank, size = scenario.get("rank", 0), scenario.get("size", 1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), FAKE_CUDA_DEVICES=str(size))
    from mdit.dist import World, work_on
    from mdit.train import checkpointer, loop
    from mdit.train.run import resolve_run
    from tests.training import write_recipe

    world = World(rank, size, rank, torch.device("cuda", rank))
    work_on(world.device)
    _join_group(rank, size)
    every = {key: scenario.get("every", 3) for key in ("validate_every", "sample_every", "snapshot_every")}
    recipe = write_recipe(
        folder / f"recipe_{os.getpid()}",
        # Heads that there are kernels for; a dense block, one with experts, and one in the mixer.
        model={"dim": 64, "mixer_dim": 32, "head_dim": 16, "depth": scenario.get("depth", 3), "mixer_depth": 1},
        training={"num_steps": scenario.get("steps", 3), "global_batch_size": 16},
        report={"log_every": 3, "checkpoint_every": 3, "num_samples": 1, "sampler_steps": 2, **every},
    )
    ds_json = folder / f"{os.getpid()}.json"
    ds_json.write_text(json.dumps(scenario["ds"]))
    gpu, error = fake.FakeGPU(world.device), None
    options = dict(overrides=[], run_dir=folder / f"{os.getpid()}", init_from=None, restart=False, world=world)
    plan = resolve_run(recipe, ds_json, **options)
    if not world.is_rank_zero:
        checkpointer.save_training_state = lambda *arguments, **options: (
            None
        )  # rank 0, which would make the directory, is not there
    lock = SimpleNamespace(check=lambda: None)
    directory = SimpleNamespace(path=plan.run_dir, run={}, checkpoint=None, lock=lock)
    plan.run_dir.mkdir()
    try:
        INJECTIONS.get(scenario.get("inject"), lambda: None)()
        with gpu:
            steps = loop.train(plan, directory)
    except Exception:
        error, steps = traceback.format_exc(), None
    return {"waits": gpu.waits, "elsewhere": gpu.elsewhere, "threads": gpu.threads, "error": error, "steps": steps}


class Done:
    """A collective that is under way."""

    def wait(self, *args) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _join_group(rank: int, size: int) -> None:
    """A process group of `size` in which nobody else is: collectives leave everything as it is."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    def nothing(*args, async_op=False, **options):
        return Done() if async_op else None

    for name in (
        "all_reduce",
        "broadcast",
        "all_gather",
        "reduce",
        "barrier",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
    ):
        setattr(torch.distributed, name, nothing)

    def all_gather_object(values, value, group=None):
        values[:] = [value] * len(values)

    torch.distributed.all_gather_object = all_gather_object
    new_group = torch.distributed.new_group
    torch.distributed.new_group = lambda *args, backend=None, **options: new_group(*args, **options)


def _wait_in_a_step() -> None:
    from mdit.train import loop

    optimizer_step = loop.optimizer_step
    loop.optimizer_step = lambda *args: _read(optimizer_step(*args))


def _read(losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    losses["loss"].mean().item()
    return losses


def _evaluate_on_the_cpu() -> None:
    from mdit.models import MicroDiT

    without_weights = MicroDiT.without_weights
    MicroDiT.without_weights = lambda config, device, *dtype: without_weights(config, "cpu", *dtype)


def _draw_on_the_first_gpu() -> None:
    from mdit.train import loop

    sample = loop.sample_noise
    gpu = torch.device("cuda", 0)
    loop.sample_noise = lambda config, step, samples, device: sample(config, step, samples, gpu)


def _read_on_the_first_gpu() -> None:
    from mdit.data import prefetcher

    prefetcher.work_on = lambda device: None


def _leave_batches_on_the_cpu() -> None:
    from mdit.data.loader import NativeLoader

    take = NativeLoader.__next__

    def batch_on_the_cpu(loader):
        batch = take(loader)
        return dataclasses.replace(batch, latents_NCHW=batch.latents_NCHW.cpu())

    NativeLoader.__next__ = batch_on_the_cpu


INJECTIONS = {
    "a batch on the CPU": _leave_batches_on_the_cpu,
    "a thread on another GPU": _read_on_the_first_gpu,
    "a wait in a step": _wait_in_a_step,
    "a model on the CPU": _evaluate_on_the_cpu,
    "noise on another GPU": _draw_on_the_first_gpu,
}


def main(library: str, place: str) -> None:
    folder = Path(place)
    fake.install(Path(library))
    for module in (*PRELOAD, "torch._dynamo", "torch._inductor.compile_fx"):  # whatever DeepSpeed and FakeTensor import
        importlib.import_module(module)
    gc.freeze()  # what was imported is no garbage: collections need not look through all of it
    scenarios = json.loads((folder / "scenarios.json").read_text())
    children = []
    for name, scenario in scenarios.items():
        if len(children) >= AT_ONCE:
            os.waitpid(children.pop(0), 0)
        children.append(os.fork())
        if children[-1] == 0:
            _child(scenario, folder, folder / f"{name}.json")
    for child in children:
        os.waitpid(child, 0)


def _child(scenario: dict, folder: Path, result: Path) -> None:
    try:
        found = run(scenario, folder)
    except BaseException:
        found = {"error": traceback.format_exc()}
    result.write_text(json.dumps(found))
    os._exit(0)
