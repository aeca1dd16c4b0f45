"""What a run tells: metrics.jsonl, TensorBoard events, a progress bar. Only rank 0 writes."""

import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL.Image import Image
from tqdm import tqdm

from mdit.dist import World


class Metrics:
    """Rank 0's record of a run from `first_step` on; on the other ranks every call does nothing."""

    def __init__(self, run_dir: Path, *, first_step: int, num_steps: int, world: World) -> None:
        self.active = world.is_first
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter  # slow to import: only where it is needed

        self.path = run_dir / "metrics.jsonl"
        forget_after(self.path, first_step)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=num_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def write(self, step: int, group: str, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; on TensorBoard one scalar "group/name" for each value."""
        if not self.active:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{group}/{name}", value, step)

    def write_image(self, step: int, name: str, image: Image) -> None:
        if self.active:
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            self.board.add_image(name, pixels.view(image.height, image.width, 3), step, dataformats="HWC")

    def advance(self, step: int) -> None:
        if self.active:
            self.bar.update(step - self.bar.n)

    def show(self, loss: float, images_per_second: float) -> None:
        if self.active:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {images_per_second:.0f} images/s")

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.board.close()


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of later steps (and a torn last line): a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            break
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
