"""A run's directory: whose it is, what is in it, whether it can be written, and how a run goes on in it.

runs/NAME/config.json     the recipe (itself a valid --recipe), data and first weights, how the latest start runs it
          starts.jsonl    a line for each start: time, host, processes, step, versions, JSON
          run.lock        while a run is in it (mdit.train.lock)
          STOP            somebody's wish that it should stop
          metrics.jsonl  tensorboard/  samples/  snapshots/  checkpoints/  averages/
          before_1/       what was there before --restart
"""

import json
import os
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from mdit.checkpoint.averages import AVERAGES
from mdit.checkpoint.snapshot import load_snapshot
from mdit.checkpoint.training_state import (
    Checkpoint,
    Damaged,
    complete_checkpoints,
    find_latest,
    read_state,
    step_in,
)
from mdit.config import TrainConfig, UserError, parse_recipe
from mdit.data.manifest import MANIFEST
from mdit.dist import World, forget_stop, gather, logger, on_all_ranks, on_rank_zero, shared
from mdit.documents import differences, read_json
from mdit.files import append_line, checksum, clean_leftovers, follow, sync, write_json, write_text
from mdit.masking import mask_ratio
from mdit.meeting import Patience
from mdit.models import MicroDiT
from mdit.parallel.align import projection_sizes
from mdit.parallel.muon import takes_muon
from mdit.train.lock import Lock, now
from mdit.train.meter import step_of
from mdit.train.optim import learning_rate

CONFIG, STARTS, METRICS, LOCK, STOP = "config.json", "starts.jsonl", "metrics.jsonl", "run.lock", "STOP"
FILES = (CONFIG, STARTS, METRICS, LOCK, STOP)
CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
FOLDERS = (CHECKPOINTS, SNAPSHOTS, AVERAGES, "samples", "tensorboard")
# What may change between two starts of one run: what it reports, how long it goes on, what steps its weights.
CHANGEABLE = ("report.", "metrics", "training.num_steps", "training.max_skipped_in_a_row", "optim.implementation")
TRIAL = "preflight"
SEEN_WITHIN = 20.0  # seconds in which a shared file system shows to one node what another wrote


class RunDirectory:
    """The directory in the hands of this run: a context manager that all ranks enter together. Raises UserError or
    OSError, on all ranks alike, where the directory cannot serve.

    After `begin`, `checkpoint` is what training goes on from, and `run` says, on rank 0, what is trained.
    """

    def __init__(self, path: Path, world: World, *, restart: bool = False, began: float | None = None) -> None:
        self.path, self.world, self.restart = path, world, restart
        self.began = time.time() if began is None else began
        self.lock = Lock(path / LOCK)
        self.step: int | None = None  # that training has reached, for the watchdog
        self.checkpoint: Checkpoint | None = None
        self.run: dict[str, Any] = {}

    def __enter__(self) -> "RunDirectory":
        with ExitStack() as held:
            token = on_rank_zero(self.world, lambda: self._take(held))
            on_all_ranks(self.world, lambda: try_out(self.path, token, self.world))
            self._held = held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._held.close()

    def begin(
        self, config: TrainConfig, description: dict[str, Any], init_from: Path | None, *, has_weights: bool
    ) -> None:
        """Find the checkpoint to go on from, check that it and the directory are those of this very run, and write down
        that it begins. `has_weights` says whether `init_from` has been read. A collective."""
        self.checkpoint = find_latest(self.path / CHECKPOINTS, self.world)
        on_rank_zero(self.world, lambda: self._check_and_write(config, description, init_from))
        needed = self.checkpoint is None and init_from is not None
        if needed and not all(gather(has_weights, self.world)):  # a rank saw a checkpoint that rank 0 does not see
            raise shared(f"{self.path / CHECKPOINTS}: changed while the run was starting; start again")

    def _take(self, held: ExitStack) -> str:
        """Take the directory and tidy it up -> the lock's token."""
        check_place(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        held.enter_context(self.lock)
        forget_stop(self.path / STOP, self.began)  # only now: before, it may have been meant for the lock's holder
        if self.restart:
            move_aside(self.path)
        clean_leftovers(self.path, lambda name: name.startswith((*FILES, TRIAL)))
        for directory in (self.path / name for name in (CHECKPOINTS, SNAPSHOTS, AVERAGES)):
            ours = lambda name: step_in(name) is not None or name == "latest"  # noqa: E731
            clean_leftovers(directory, ours, ("replaced", "removed"))
            if directory.name != CHECKPOINTS or complete_checkpoints(directory):  # else it tells check_unbegun why
                clean_leftovers(directory, ours, ("partial",))
        return self.lock.token

    def _check_and_write(self, config: TrainConfig, description: dict[str, Any], init_from: Path | None) -> None:
        path, found = self.path / CONFIG, self.checkpoint
        named = description["recipe"]["data"]  # as config.json names them, wherever the project lies by now
        names, sets = (*named["train"], named["validation"]), (*config.data.train, config.data.validation)
        data = {name: checksum(Path(directory) / MANIFEST) for name, directory in zip(names, sets, strict=True)}
        before = None
        if found is not None:
            check_same_run(before := found.state["run"], config, data, found.path / "state.json")
            tell_moved_schedule(found, config)
        if path.exists():
            check_same_run(before := read_json(path), config, data, path)
        if found is None:
            check_unbegun(self.path, before)
        weights = self._initial_weights(before, init_from)
        check_space(self.path, config)
        self.run = {"recipe": description["recipe"], "data": data, "initial_weights": weights}
        write_json(path, description | self.run)
        start = {"time": now(), "host": socket.gethostname(), "pid": os.getpid(), "step": found.step if found else 0}
        start |= {key: value for key, value in description.items() if key != "recipe"}
        append_line(self.path / STARTS, json.dumps(start).encode())
        sync(self.path / STARTS)

    def _initial_weights(self, before: dict[str, Any] | None, init_from: Path | None) -> dict[str, Any] | None:
        """Which weights the run began from. Raises UserError where it is asked to begin from others."""
        recorded = (before or {}).get("initial_weights")
        if self.checkpoint is not None:  # it goes on from itself, so they need not be there any more
            if init_from is None:
                return recorded
            if recorded is None:
                raise UserError(f"--init_from {init_from}: {self.path} was begun without it; {CHOICES}")
            if recorded["snapshot"] != str(follow(init_from).resolve()):
                logger.warning(f"--init_from {init_from}: not read; {self.path} was begun with {recorded['snapshot']}")
            return recorded
        now = None
        if init_from is not None:
            snapshot = load_snapshot(init_from)
            xxh3 = snapshot.checksums[snapshot.weights_file().name]["xxh3"]
            now = {"snapshot": str(snapshot.path), "step": snapshot.step, "xxh3": xxh3}
        if before is not None and (recorded or {}).get("xxh3") != (now or {}).get("xxh3"):
            was, asked = map(describe_weights, (recorded, now))
            raise UserError(f"{self.path / CONFIG}: this run was begun with {was}, now it is {asked}; {CHOICES}")
        return now


CHOICES = "choose another --run_dir, or start anew in this one: --restart"


def describe_weights(weights: dict[str, Any] | None) -> str:
    return f"--init_from {weights['snapshot']} (xxh3 {weights['xxh3']})" if weights else "no --init_from"


def check_place(path: Path) -> None:
    """Raise UserError where something in the way shows by looking: the wrong kind of file, a link to nowhere, a
    directory that cannot be written."""
    for place in (path, *(path / name for name in FOLDERS)):
        if os.path.lexists(place) and not place.is_dir():
            what = f"a link to {os.readlink(place)}, which is no directory" if place.is_symlink() else "not a directory"
            raise UserError(f"{place}: is {what}; a run keeps files in it: move it away or choose another --run_dir")
    samples = path / "samples"
    for place in (*(path / name for name in (*FILES, f"{METRICS}.damaged")), *samples.glob("*")):
        if os.path.lexists(place) and (place.is_symlink() or not place.is_file()):
            what = "a link" if place.is_symlink() else "a directory" if place.is_dir() else "no regular file"
            raise UserError(f"{place}: is {what}, where a run keeps a file; choose another --run_dir")
    nearest = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest}: cannot be written; choose another --run_dir")


def try_out(path: Path, token: str, world: World) -> None:
    """Do on this rank's node what a run does in its directory. Raises UserError where rank 0's files are not seen,
    OSError where a file cannot be written, synced, renamed, read or removed."""
    patience, seen = Patience(SEEN_WITHIN, says=False), ""
    while token not in seen:
        with suppress(OSError):
            seen = (path / LOCK).read_text(encoding="utf-8")
        if token not in seen and patience.over(f"what rank 0 wrote in {path}"):
            raise UserError(
                f"{path.absolute()}: what rank 0 wrote there is not to be seen; the nodes of a run have to share its "
                "directory"
            )
    trial = path / f".{TRIAL}_{world.rank:05d}.partial"  # a name of those that are cleaned up
    write_text(trial, token)
    if trial.read_text(encoding="utf-8") != token:
        raise UserError(f"{trial}: reads back as something else than was written")
    trial.unlink()


def move_aside(path: Path) -> None:
    """Move what earlier runs left in a directory to before_N in it. Nothing is deleted."""
    ours = [path / name for name in (*FILES, f"{METRICS}.damaged", *FOLDERS) if name not in (LOCK, STOP)]
    if there := [place for place in ours if os.path.lexists(place)]:
        number = next(n for n in range(1, 10**6) if not os.path.lexists(path / f"before_{n}"))
        (aside := path / f"before_{number}").mkdir()
        for place in there:
            place.rename(aside / place.name)
        logger.info(f"{path}: what was there is in {aside} now")


def check_same_run(before: dict[str, Any], config: TrainConfig, data: dict[str, str], source: Path) -> None:
    """Raise UserError naming the first thing of recipe and data that differs from what a run began with."""
    check_same_recipe(parse_recipe(before["recipe"], source), config, source)
    then = before.get("data", data)
    for directory, found in data.items():
        if then.get(directory) != found:
            raise UserError(
                f"{source}: this run was started with other samples in {directory} (xxh3 {then.get(directory)} of its "
                f"{MANIFEST}, now {found}); {CHOICES}"
            )


def check_same_recipe(before: TrainConfig, config: TrainConfig, source: Path) -> None:
    """A run directory belongs to one recipe. Raises UserError naming the first key that differs."""
    for key, was, is_ in differences(before.model_dump(mode="json"), config.model_dump(mode="json")):
        if not key.startswith(CHANGEABLE):
            raise UserError(f"{source}: this run was started with {key} = {was!r}, now it is {is_!r}; {CHOICES}")


def unfinished_steps(directory: Path) -> set[int]:
    """Steps whose checkpoints were being written when a run ended."""
    hidden = directory.glob(".*.partial") if directory.is_dir() else ()
    steps = {step_in(path.name[1:].removesuffix(".partial")) for path in hidden}
    return {step for step in steps if step is not None}


def check_unbegun(path: Path, before: dict[str, Any] | None) -> None:
    """Raise UserError where there is no checkpoint, though one was due: starting at step 0 would write over a run.

    At the step of the first checkpoint itself there may be none: a run reports that step before it saves it. Where that
    one has been left unfinished there may be none until the second is due, which waits for it.
    """
    damaged = [file.name for file in sorted((path / CHECKPOINTS).glob("*.damaged"))]
    metrics, snapshots = path / METRICS, path / SNAPSHOTS
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    names = os.listdir(snapshots) if snapshots.exists() else []
    steps = (*map(step_of, lines), *map(step_in, names))  # None for lines that are torn, and other names
    reached = max((step for step in steps if step is not None), default=0)
    first = before["recipe"]["report"]["checkpoint_every"] if before else 0
    if damaged or reached > (2 * first if first in unfinished_steps(path / CHECKPOINTS) else first):
        told = f" ({', '.join(damaged)})" if damaged else ""
        raise UserError(
            f"{path / CHECKPOINTS}: has no checkpoint to go on from{told}, though the run has been at step {reached}; "
            "put a copy back, or start anew: --restart"
        )


def tell_moved_schedule(found: Checkpoint, config: TrainConfig) -> None:
    """Say so where another num_steps moves the learning rate or the mask ratio of the steps that follow."""
    then = found.state["run"]["recipe"]["training"]["num_steps"]
    now = config.training.num_steps
    training = config.training.model_copy(update={"num_steps": then})
    masks = [mask_ratio(c, found.step) for c in (config.model_copy(update={"training": training}), config)]
    if masks[0] != masks[1] and found.step < now:
        logger.warning(
            f"training.num_steps was {then}, now it is {now}: another schedule of masks, so that the mask ratio at "
            f"step {found.step} goes from {masks[0]:g} to {masks[1]:g}"
        )
    before, after = (learning_rate(found.step, steps, config.optim) for steps in (then, now))
    if before != after and found.step < now:
        logger.warning(
            f"training.num_steps was {then}, now it is {now}: the {config.optim.schedule} schedule is another, and the "
            f"learning rate at step {found.step} goes from {before:.3g} to {after:.3g}"
        )


def check_space(path: Path, config: TrainConfig) -> None:
    """Raise UserError where two checkpoints, a snapshot and all averages will not fit. What is there already has its
    space."""
    with torch.device("meta"):
        named = {name: p.shape for name, p in MicroDiT(config.model).named_parameters()}
    parameters = sum(shape.numel() for shape in named.values())
    of_muon = sum(shape.numel() for name, shape in named.items() if config.optim.muon and takes_muon(name, shape))
    missing = max(1, 2 - len(complete_checkpoints(path / CHECKPOINTS)))
    trained = parameters + sum(projection_sizes(config.model.dim, config.align))
    state = (3 + config.num_averages) * trained - of_muon  # which have no second moment
    needs = {CHECKPOINTS: missing * 4 * state, SNAPSHOTS: (1 + bool(config.ema)) * 4 * parameters}
    if config.averages is not None:
        missing = -(-config.training.num_steps // config.averages.every) - len(complete_checkpoints(path / AVERAGES))
        needs[AVERAGES] = max(0, missing) * len(config.averages.lengths) * 4 * parameters
    volumes: dict[int, tuple[Path, int]] = {}  # a folder may be a link to another volume
    for name, size in needs.items():
        place = path / name if (path / name).exists() else path
        device = place.stat().st_dev
        volumes[device] = place, volumes.get(device, (place, 0))[1] + size
    kept = ["two checkpoints", "a snapshot"] + ["averages"] * bool(config.averages)
    for place, size in volumes.values():
        with suppress(OSError):  # some file systems do not tell, or say that they have no size
            usage = shutil.disk_usage(place)
            if usage.total and usage.free < size:
                raise UserError(
                    f"{place}: {usage.free / 2**30:.3g} GiB are free, but {' and '.join(kept)} need "
                    f"{size / 2**30:.3g} GiB more"
                )


def finished_at(path: Path, num_steps: int) -> int | None:
    """The step at which a run of `num_steps` has left a checkpoint and a snapshot; None when there is more to do."""
    for newest in complete_checkpoints(path / CHECKPOINTS)[:1]:
        with suppress(Damaged, UserError):  # UserError: no snapshot
            if (step := read_state(newest).step) >= num_steps:
                load_snapshot(path / SNAPSHOTS / newest.name)
                return step
    return None
