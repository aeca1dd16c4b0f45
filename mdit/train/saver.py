"""Saving beside training: a step waits until its state is copied into host memory; a thread writes the copy.

At most one save is under way: the next one waits for it. What is written is complete or absent, as ever: it gets its
name when all of it is on disk (mdit.files).
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import torch
import torch.distributed
from torch import Tensor

from mdit.checkpoint.fragments import Partitions
from mdit.checkpoint.training_state import latest_step
from mdit.dist import World, logger, on_rank_zero, shared, work_on
from mdit.documents import explain
from mdit.meeting import COLLECTIVE, processes_here
from mdit.train.run_directory import CHECKPOINTS, RunDirectory

RESERVE = 2 * 2**30  # bytes that stay free for files being written and for everything else, each process
CGROUP = Path("/sys/fs/cgroup")


class HostCopy:
    """Host memory for a copy of a rank's state, pinned where that lies on a GPU. Taken once: to pin it and to touch
    its pages takes longer than a copy."""

    def __init__(self, like: dict[str, Partitions]) -> None:
        self.partitions = {kind: [None if t is None else _host_like(t) for t in flats] for kind, flats in like.items()}

    def fill(self, tensors: dict[str, Partitions]) -> dict[str, Partitions]:
        """The copy of `tensors`, of the shapes it was made for."""
        for kind, flats in tensors.items():
            for copy, flat in zip(self.partitions[kind], flats, strict=True):
                if copy is not None and flat is not None:
                    copy.copy_(flat, non_blocking=True)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return dict(self.partitions)


def _host_like(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    # By numpy: an operation of torch on as many numbers starts OpenMP threads for the thread that calls it, and from
    # then on there are more of them than cores, which makes every operation of training slower.
    copy.numpy().fill(0)
    return copy


class Saver(AbstractContextManager):
    """Writes one thing after another, in a thread where `background` holds and host memory has room for the copies;
    leaving the context waits for the last.

    Its collectives have a process group of their own, so that they never meet training's. A full disk does not end the
    run: what was saved before is there, a line says what is not, and `check_saved` knows it.
    """

    def __init__(self, directory: RunDirectory, world: World, *, background: bool) -> None:
        self.directory, self.training_world, self.background = directory, world, background
        apart = background and world.size > 1
        group = torch.distributed.new_group(backend="gloo", timeout=COLLECTIVE) if apart else world.group
        self.world = replace(world, group=group)
        self._thread = ThreadPoolExecutor(1, "mdit-saving", initializer=work_on, initargs=(world.device,))
        self._under_way: Future[None] | None = None
        self._copy: Future[HostCopy | None] | None = None
        self._failed: list[tuple[int, str, OSError]] = []

    def prepare(self, tensors: dict[str, Partitions]) -> None:
        """Take the memory for copies of a state like this one, in the thread, while the first steps are taken."""
        if self.background:
            self._copy = self._thread.submit(self._take_memory, tensors)

    def start(self, what: str, step: int, write: Callable[[], None]) -> None:
        """Begin to write `what` of a step, once what is under way is done. A collective, as `write` may be one: it has
        to raise on all ranks alike. Raises UserError when another process has taken the run's lock over."""
        self.finish()
        on_rank_zero(self.training_world, self.directory.lock.check)
        self._under_way = self._thread.submit(self._attempt, what, step, write)
        if not self.background:
            self.finish()

    def start_with_copy(
        self, what: str, step: int, tensors: dict[str, Partitions], write: Callable[[dict[str, Partitions]], None]
    ) -> None:
        """The same, `write` being called with a copy of `tensors`; where there is no room for one, with themselves, and
        this waits until it has returned."""
        self.finish()
        copy = self._copy.result() if self._copy is not None else None
        held = tensors if copy is None else copy.fill(tensors)
        self.start(what, step, lambda: write(held))
        if copy is None:
            self.finish()

    def finish(self) -> None:
        """Wait for what is under way. Raises what it raised."""
        if (under_way := self._under_way) is not None:
            self._under_way = None
            under_way.result()

    def check_saved(self, step: int) -> None:
        """Wait, and raise UserError where something of `step`, the last one, is not saved."""
        self.finish()
        for failed, what, error in self._failed:
            if failed == step:
                last = latest_step(self.directory.path / CHECKPOINTS)
                there = f"the same command goes on from step {last}" if last else "there is no checkpoint"
                raise shared(f"stopped at step {step}, but its {what} is not saved: {explain(error)}; {there}")

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.finish()
        except Exception:
            if error is None:  # else it is what ended the run that counts
                raise
        finally:
            self._thread.shutdown()

    def _attempt(self, what: str, step: int, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._failed.append((step, what, error))
            if self.world.is_rank_zero:
                logger.warning(f"{what} of step {step} not saved: {explain(error)}; the next one that is due is tried")

    def _take_memory(self, tensors: dict[str, Partitions]) -> HostCopy | None:
        size = sum(t.nbytes for flats in tensors.values() for t in flats if t is not None)
        room = available_memory() // processes_here(self.world) - RESERVE
        if size <= room:
            return HostCopy(tensors)
        logger.warning(
            f"checkpoints: a copy of {size / 2**30:.3g} GiB has no room in this host's memory "
            f"({max(0, room) / 2**30:.3g} GiB for each process); steps wait until they are written"
        )
        return None


def available_memory() -> int:
    """Bytes that this host's processes can still take, as far as the kernel and the cgroup let them."""
    found = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no cgroup of version 2, or "max"
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        found = min(found, limit - int((CGROUP / "memory.current").read_text(encoding="ascii")))
    return found
