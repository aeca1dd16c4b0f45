"""Records of a run: metrics.jsonl, TensorBoard events, a progress bar. Only rank 0 writes."""

import json
import math
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tqdm import tqdm

from mdit.dist import World, logger
from mdit.documents import UserError, parse_json
from mdit.files import append_line, optional, write_text


class Metrics:
    """Rank 0's record of a run from `first_step` on; on the other ranks every call does nothing. A context manager.

    What cannot be written, as when the disk is full, is said once and does not end the run.
    """

    def __init__(self, run_dir: Path, *, first_step: int, num_steps: int, world: World) -> None:
        self.active = world.is_first
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is needed

        self.path, self.folder, self.board = run_dir / "metrics.jsonl", run_dir / "tensorboard", None
        forget_after(self.path, first_step)
        threading.excepthook = self._thread_failed
        with optional(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=first_step + 1)
        self.progress = Progress(first_step, num_steps)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        if self.active:
            self.progress.close()
            self._tell(lambda board: board.close())

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; on TensorBoard one scalar "group/name" for each value. What is not finite is null
        in the one and missing in the other: JSON has no NaN."""
        if not self.active:
            return
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with optional(self.path):
            append_line(self.path, json.dumps({"step": step, **values}, allow_nan=False))
        for name, value in values.items():
            if value is not None:
                self._tell(lambda board: board.add_scalar(f"{group}/{name}", value, step))  # noqa: B023

    def write_image(self, step: int, name: str, image: Image) -> None:
        if self.active:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            pixels = pixels.view(image.height, image.width, 3)
            self._tell(lambda board: board.add_image(name, pixels, step, dataformats="HWC"))

    def _tell(self, tell: Callable[[Any], None]) -> None:
        """Call `tell` with TensorBoard's writer. It does not recover from an error: after one it is told no more."""
        if self.board is not None:
            with optional(self.folder):
                try:
                    tell(self.board)
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

    def advance(self, step: int) -> None:
        if self.active:
            self.progress.advance(step)

    def show(self, step: int, loss: float, images_per_second: float) -> None:
        if self.active:
            self.progress.show(step, f"loss {loss:.4f}, {images_per_second:.0f} images/s")


class Progress:
    """A bar on a terminal, elsewhere a line for every report. A run goes on when the terminal, or what reads its lines,
    goes away: tqdm and logging give up by themselves."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self.num_steps, self.bar = num_steps, None
        if sys.stderr.isatty():
            self.bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def advance(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step: int, text: str) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            logger.info(f"step {step} of {self.num_steps}: {text}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Stopwatch:
    """Time spent in optimizer steps since the last reading; reports, snapshots and checkpoints are not counted."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.waited, self.steps, self.started = device, 0.0, 0.0, 0, None

    def start(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()

    def count_step(self) -> None:
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what the host waits for data in. A GPU may be busy with the step before meanwhile."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def pause(self) -> None:
        """Wait for the device, so that the steps counted are the steps done."""
        if self.started is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - self.started
            self.started = None

    def read(self) -> tuple[int, float, float]:
        """(steps, seconds, of these seconds waited for data) since the last reading."""
        self.pause()
        reading, self.seconds, self.waited, self.steps = (self.steps, self.seconds, self.waited), 0.0, 0.0, 0
        return reading


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
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in odd)
        logger.warning(f'{path}: {len(odd)} lines are not like {{"step": 1, ...}}: they are in {aside.name} now')
    text = b"".join(line + b"\n" for line in kept)
    if text != content:
        write_text(path, text.decode())


def step_of(line: bytes) -> int | None:
    """The step that a line of metrics.jsonl is of; None where it is no such line."""
    try:
        values = parse_json(line, "")
    except UserError:
        return None
    found = values.get("step") if isinstance(values, dict) else None
    return found if type(found) is int else None
