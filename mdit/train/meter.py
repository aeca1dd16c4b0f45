"""Records of a run: loss, speed and memory, in metrics.jsonl, on TensorBoard and in a progress bar."""

import json
import math
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from PIL.Image import Image
from torch import Tensor
from tqdm import tqdm

from mdit.config import TrainConfig
from mdit.data.loader import Batch
from mdit.dist import World, gather, logger, on_rank_zero
from mdit.documents import UserError, parse_json
from mdit.files import append_line, optional, write_text
from mdit.masking import mask_ratio
from mdit.train.optim import learning_rate
from mdit.train.pace import RankPace, Stopwatch, slow_ranks, spread


class Meter:
    """Measures a run and reports it. The loss is summed up on the device, so that no step waits for a number; the clock
    runs from `timed_fetch` to `pause`, so that evaluations and checkpoints are not counted.

    Rank 0 writes, inside `recording`. What cannot be written, as when the disk is full, is said once and does not end
    the run.
    """

    def __init__(self, config: TrainConfig, run_dir: Path, world: World) -> None:
        self.config, self.world = config, world
        self.path, self.folder = run_dir / "metrics.jsonl", run_dir / "tensorboard"
        names = ("loss", "align_loss") if config.align else ("loss",)  # sum and count of each
        self.losses = {name: torch.zeros(2, dtype=torch.float64, device=world.device) for name in names}
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0  # since the last report
        self.started: float | None = None
        self.board: Any = None
        self.progress: tqdm | None = None  # a bar on a terminal, elsewhere a line for every report

    @contextmanager
    def recording(self, start: int) -> Iterator[None]:
        """Open what is written to, for a run that goes on from step `start`. A collective."""
        on_rank_zero(self.world, lambda: self._open(start))
        try:
            yield
        finally:
            if self.progress is not None:
                self.progress.close()
                self._on_board(lambda board: board.close())

    def timed_fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; what the host waits for it is counted. A GPU may be busy with the step before meanwhile."""
        before = time.perf_counter()
        if self.started is None:
            self.started = before
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def add(self, losses: dict[str, Tensor]) -> None:
        """Count this rank's losses of a step, (N,) by name, towards their means."""
        for name, losses_N in losses.items():
            self.losses[name][0] += losses_N.mean()
            self.losses[name][1] += 1

    def count_step(self) -> None:
        self.steps += 1
        if self.progress is not None:
            self.progress.update()

    def pause(self) -> None:
        """Stop the clock once the device is done, so that the steps counted are the steps done."""
        if self.started is not None:
            if self.world.device.type == "cuda":
                torch.cuda.synchronize(self.world.device)
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def report(self, step: int, gradient_norm: float, skipped_steps: int, forward: Stopwatch) -> None:
        """Write the means since the last report, NaN where every step was skipped, and name ranks that hold others up;
        `forward` has the time of this rank's forward passes. A collective."""
        self.pause()
        paces = gather(RankPace(socket.gethostname(), forward.take(), self.waited), self.world)
        if self.world.is_rank_zero:
            for line in slow_ranks(paces, self.seconds):
                logger.warning(f"step {step}: {line}")
        totals = torch.stack([*self.losses.values()])
        torch.distributed.all_reduce(totals)
        summed = zip(self.losses, totals.tolist(), strict=True)
        means = {"loss": math.nan} | {name: total / count for name, (total, count) in summed if count}
        images_per_second = self.steps * self.config.training.global_batch_size / self.seconds
        if self.progress is not None:
            self.progress.set_postfix_str(told := f"loss {means['loss']:.4f}, {images_per_second:.0f} images/s")
            if self.progress.disable:
                logger.info(f"step {step} of {self.config.training.num_steps}: {told}")
        values = means | {
            "learning_rate": learning_rate(step - 1, self.config.training.num_steps, self.config.optim),
            "mask_ratio": mask_ratio(self.config, step - 1),
            "gradient_norm": gradient_norm,
            "skipped_steps": skipped_steps,
            "images_per_second": images_per_second,
            "step_seconds": self.seconds / self.steps,
            "data_wait_share": max(pace.data for pace in paces) / self.seconds,
            "slowest_rank": spread(paces),
            "memory_gib": memory_gib(self.world.device),
        }
        self.write(step, "train", values)
        for sum_and_count in self.losses.values():
            sum_and_count.zero_()
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def state_dict(self) -> dict[str, float]:
        found = {name: sum_and_count.tolist() for name, sum_and_count in self.losses.items()}
        return {f"{name}_{what}": value for name, pair in found.items() for what, value in zip(("sum", "count"), pair)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, sum_and_count in self.losses.items():
            values = [state[f"{name}_sum"], state[f"{name}_count"]]
            sum_and_count.copy_(torch.tensor(values, dtype=torch.float64))

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """Write a line of metrics.jsonl; on TensorBoard a scalar "group/name" for each value. What is not finite is
        null in the one and missing in the other: JSON has no NaN."""
        if not self.world.is_rank_zero:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with optional(self.path):
            append_line(self.path, json.dumps({"step": step, **finite}, allow_nan=False).encode())
        for name, value in finite.items():
            if value is not None:
                self._on_board(lambda board: board.add_scalar(f"{group}/{name}", value, step))  # noqa: B023

    def write_image(self, step: int, name: str, image: Image) -> None:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3)
        self._on_board(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def _open(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is needed

        forget_after(self.path, start)
        threading.excepthook = self._thread_failed
        with optional(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=start + 1)
        total = self.config.training.num_steps
        self.progress = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True, disable=None)  # off if no tty

    def _on_board(self, write: Callable[[Any], None]) -> None:
        """Call `write` with TensorBoard's writer, if there is one. It does not recover from an error: after one it gets
        no more."""
        if self.board is not None:
            with optional(self.folder):
                try:
                    write(self.board)
                except OSError:
                    self.board = None
                    raise

    def _thread_failed(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own, whose errors show late or never: say them as they come."""
        if type(failed.thread).__module__.startswith("tensorboard.") and isinstance(failed.exc_value, OSError):
            with optional(self.folder):
                raise failed.exc_value
        else:
            threading.__excepthook__(failed)


def memory_gib(device: torch.device) -> float:
    """Peak so far: what torch took of a GPU, else of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes on macOS, else KiB


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps: a resumed run writes them again. Lines that say nothing of a step, as a kill may
    leave one, go to a file beside it, with a warning: nothing that was written is lost, and what stays can be read."""
    if not path.exists():
        return
    content = path.read_bytes()
    kept, odd = [], []
    for line in filter(bytes.strip, content.splitlines()):
        reached = step_of(line)
        if reached is None:
            odd.append(line)
        elif reached <= step:
            kept.append(line)
    if odd:
        aside = path.with_name(path.name + ".damaged")
        append_line(aside, b"\n".join(odd))
        logger.warning(f'{path}: {len(odd)} lines are not like {{"step": 1, ...}}: they are in {aside.name} now')
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        write_text(path, text.decode())


def training_seconds(path: Path, until: int) -> float:
    """Seconds of a run's steps up to `until`, as its metrics.jsonl tells; evaluations and saving left out."""
    seconds, before = 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        values = parse_json(line, path)
        if "step_seconds" in values and before < until:
            steps = min(values["step"], until) - before
            seconds, before = seconds + values["step_seconds"] * steps, before + steps
    return seconds


def step_of(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl is of; None where it is no such line."""
    try:
        values = parse_json(line, "")
    except UserError:
        return None
    found = values.get("step") if isinstance(values, dict) else None
    return found if type(found) is int else None
