"""Files that a run leaves on disk: checkpoints, to resume from, and snapshots, to use."""

from contextlib import suppress
from functools import partial
from typing import Any

from torch import Tensor

from mdit.checkpoint.averages import AVERAGES, save_averages
from mdit.checkpoint.fragments import Partitions
from mdit.checkpoint.snapshot import save_snapshot
from mdit.checkpoint.training_state import Checkpoint, load_into, require_whole, save_training_state, step_name
from mdit.config import portable
from mdit.data.shards import open_dataset
from mdit.dist import on_rank_zero
from mdit.files import partial_name
from mdit.models.dit import buffers
from mdit.train.ema import EMA
from mdit.train.engine import MOMENTS, Engine
from mdit.train.meter import Meter
from mdit.train.run import Run
from mdit.train.run_directory import CHECKPOINTS, CONFIG, SNAPSHOTS, RunDirectory
from mdit.train.saver import Saver
from mdit.train.skipped import SkippedSteps, require_finite


class Checkpointer:
    """Saves all that a run has to remember and loads it again; randomness and the order of samples are functions of the
    step. Each part has `state_dict`, of flat tensors laid out as the engine's master weights and of numbers, and
    `load_state_dict`. Saves are collectives; `saver` writes them while training goes on.
    """

    def __init__(
        self,
        run: Run,
        directory: RunDirectory,
        saver: Saver,
        *,
        engine: Engine,
        ema: EMA,
        meter: Meter,
        skipped: SkippedSteps,
    ) -> None:
        self.run, self.directory, self.saver = run, directory, saver
        self.engine, self.ema, self.meter = engine, ema, meter
        self.parts = (engine, ema, meter, skipped)

    def load_latest(self) -> int:
        """Load the checkpoint that the run goes on from -> its step; 0 for a new run, which begins with the moments of
        another where it is asked to. A collective."""
        step = self._load_latest()
        self.saver.prepare(self._state()[0])
        return step

    def _load_latest(self) -> int:
        if (found := self.directory.checkpoint) is not None:
            state = self._read(found, self._state()[0])
            for part in self.parts:
                part.load_state_dict(state)
            return found.step
        if self.run.moments is not None:
            ours = self.engine.state_dict()
            theirs = self._read(require_whole(self.run.moments, self.run.world), {kind: ours[kind] for kind in MOMENTS})
            self.engine.load_state_dict(ours | theirs)
        return 0

    def _read(self, checkpoint: Checkpoint, tensors: dict[str, Partitions]) -> dict[str, Any]:
        """Fill `tensors` from a checkpoint of any layout -> them and its numbers."""
        layout = self.run.execution.layout(self.run.world.size)
        return tensors | load_into(checkpoint, tensors, self.engine.fragments(), layout=layout, world=self.run.world)

    def save(self, step: int) -> None:
        """Save a checkpoint. Raises UserError where the state holds NaN or infinities."""
        tensors, numbers = self._checked_state(step)
        directory = self.directory.path / CHECKPOINTS
        if self.run.world.is_rank_zero:  # now: the next step may be reported before the thread has made it
            with suppress(OSError):
                partial_name(directory / step_name(step)).mkdir(parents=True, exist_ok=True)
        write = partial(
            save_training_state,
            directory,
            step,
            fragments=self.engine.fragments(),
            numbers=numbers,
            run=self.directory.run,
            layout=self.run.execution.layout(self.run.world.size),
            world=self.saver.world,
            keep=self.run.config.report.keep_checkpoints,
        )
        self.saver.start_with_copy("checkpoint", step, tensors, write)

    def save_snapshot(self, step: int) -> None:
        """Save a snapshot. Raises UserError where the state holds NaN or infinities."""
        self._checked_state(step)
        config, raw = self.run.config, self._whole_weights(None)
        averaged = self._whole_weights(self.ema.partitions) if self.ema.partitions is not None else None
        snapshots = self.directory.path / SNAPSHOTS
        write = partial(
            save_snapshot,
            snapshots / step_name(step),
            step=step,
            config_json={"recipe": portable(config, self.directory.path / CONFIG)},
            raw=raw,
            ema=averaged,
            encoders=open_dataset(config.data.validation).encoders,
            latest=snapshots / "latest",
        )
        self.saver.start("snapshot", step, partial(on_rank_zero, self.saver.world, write))

    def save_averages(self, step: int) -> None:
        """Store the averages from which one of any length is made after training."""
        self.meter.pause()
        config, path = self.run.config.averages, self.directory.path / AVERAGES / step_name(step)
        assert config is not None, "called by a recipe that has them"
        averages = [self._whole_weights(average) for average in self.ema.of_lengths]
        write = partial(save_averages, path, config.lengths, averages)
        self.saver.start("averages", step, partial(on_rank_zero, self.saver.world, write))

    def _state(self) -> tuple[dict[str, Partitions], dict[str, float]]:
        """Tensors, views of the parts' own, and numbers."""
        state: dict[str, Any] = {}
        for part in self.parts:
            state |= part.state_dict()
        tensors: dict[str, Partitions] = {key: value for key, value in state.items() if isinstance(value, list)}
        return tensors, {key: value for key, value in state.items() if key not in tensors}

    def _checked_state(self, step: int) -> tuple[dict[str, Partitions], dict[str, float]]:
        self.meter.pause()
        tensors, numbers = self._state()
        require_finite(step, tensors, self.engine.fragments(), self.directory.path / CHECKPOINTS, self.run.world)
        return tensors, numbers

    def _whole_weights(self, partitions: list[Tensor] | None) -> dict[str, Tensor]:
        """Float32 weights and buffers in host memory, on rank 0; nothing elsewhere. A collective."""
        whole = buffers(self.run.config.model)
        for name, value in self.engine.full_weights(partitions):
            if self.run.world.is_rank_zero:
                whole[name] = value.to("cpu", copy=True)
        return whole
