"""A run that is disturbed: start after start in one directory, and what each of them must come to."""

import os
import re
import signal
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mdit.bench.torture_start import LIMIT, RunStart, TortureLayout, Workplace
from mdit.checkpoint.training_state import Damaged, complete_checkpoints, latest_step, read_state, step_in
from mdit.config import UserError
from mdit.files import measure
from mdit.train.run_directory import CHECKPOINTS, SNAPSHOTS

ALONE = 15.0  # seconds in which the others end by themselves, once they have met, when one has gone
KILLED = -signal.SIGKILL


class Lost(Exception):
    """Something complete was not used: training went back behind it, or does not go on at all."""


class Wrong(Exception):
    """Something else than was promised: another exit code, no line, other weights, a hang."""


@dataclass
class KindTally:
    """Counts of one kind of fault; `steps_lost` are those between the step reached and the one resumed from."""

    faults: int = 0
    restarts: int = 0
    steps_lost: int = 0
    lost: int = 0
    wrong: int = 0


class TorturedRun:
    """`best` is the step of the newest whole checkpoint, from which the next start must go on; `cause` the kind of
    fault that ended the last start. `layouts` and `conditions`, variables of the environment, are those of one start
    after the other. Every method that says "must" raises Lost or Wrong."""

    def __init__(
        self,
        place: Workplace,
        folder: Path,
        layouts: Iterator[TortureLayout],
        conditions: Iterator[Mapping[str, str]],
        tally: Mapping[str, KindTally],
    ) -> None:
        self.place, self.folder, self.layouts, self.conditions, self.tally = place, folder, layouts, conditions, tally
        self.disk, self.run_dir = folder / "disk", folder / "disk" / "run"
        self.current: RunStart | None = None
        self.starts, self.best, self.reached, self.cause = 0, 0, 0, ""
        self._compared = True

    @property
    def start(self) -> RunStart:
        assert self.current is not None, "between two starts"
        return self.current

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / CHECKPOINTS

    def launch(
        self,
        *,
        layout: TortureLayout | None = None,
        environment: Mapping[str, str] | None = None,
        more: Mapping[int, Sequence[str]] | None = None,
    ) -> RunStart:
        """The same command again, beside what may run; `more` are further arguments of single ranks."""
        self.starts += 1
        logs = self.folder / f"start_{self.starts:02d}"
        return RunStart(
            self.place, layout or next(self.layouts), self.run_dir, logs, environment=environment, more=more
        )

    def go_on(self) -> RunStart:
        """The start that runs; a new one where none does."""
        if self.current is None:
            self.current, self._compared = self.launch(environment=next(self.conditions)), False
        return self.current

    def await_step(self, step: int) -> bool:
        """Whether the start still runs once it has reported a step of its own, and that one. It must come that far."""
        start = self.go_on()
        before, deadline = -1, 0.0
        while start.running and not (start.trains and start.reached >= step):
            if start.reached > before:
                before, deadline = start.reached, time.monotonic() + LIMIT
            elif time.monotonic() > deadline:
                start.abort()
                raise Wrong(f"hang: no step after step {before} in {LIMIT:.0f} s")
            time.sleep(0.01)
        self.compare_begin()
        return start.running

    def compare_begin(self) -> None:
        """The current start must have gone on from the newest whole checkpoint, as far as it says by now."""
        if self._compared or (began := self.start.began_at) is None:
            return
        self._compared = True
        if began < self.best:
            raise Lost(f"went back to step {began}; the checkpoint of step {self.best} was whole")
        if began > self.best:
            raise Wrong(f"went on from step {began}; the newest whole checkpoint was that of step {self.best}")
        if self.cause:
            self.tally[self.cause].restarts += 1
            self.tally[self.cause].steps_lost += max(0, self.reached - began)

    def kill(self, ranks: Collection[int] | None = None, number: int = signal.SIGKILL) -> None:
        """Send SIGKILL, or another signal that may be deadly at this moment, to the ranks, by default to all. These
        must end by it, and the others by themselves, naming them; before they have met, as a launcher ends them."""
        start = self.start
        struck = {*(range(len(start.ranks)) if ranks is None else ranks)}
        met = start.trains
        start.send(number, struck)
        if not start.wait_until(lambda: not start.running, LIMIT if met else ALONE) and not met:
            start.send(signal.SIGTERM)
        by_signal = {-number, 128 + number} | ({-signal.SIGTERM} if not met else set())
        ended = self.must_end(
            {rank: {0, 2, *(by_signal if rank in struck or not met else ())} for rank in range(len(start.ranks))}
        )
        if met and 2 in ended.codes and not any(re.search(rf"\brank {min(struck)}\b", line) for line in ended.errors):
            raise Wrong(f"rank {min(struck)} was killed, but the others say {ended.errors}")

    def must_end(self, codes: Mapping[int, Collection[int]]) -> RunStart:
        """Wait for the end of the current start. Each rank must end with one of its codes, and in lines, not in
        tracebacks; 2 is told in a line."""
        start = self.start
        self.await_end(start)
        for rank, code in enumerate(start.codes):
            if code not in codes[rank]:
                if code == 2 and start.began_at is None and start.errors:
                    raise Lost(f"does not go on: {start.errors[0]}")
                raise Wrong(f"rank {rank} has ended with {code}, not with {' or '.join(map(str, codes[rank]))}")
        self.must_speak(start)
        self.compare_begin()
        self.reached, self.current = start.reached, None
        self.best = max(self.best, next((step_in(path.name) or 0 for path in self.whole()), 0))
        return start

    def await_end(self, start: RunStart) -> None:
        """It must come."""
        if not start.wait_until(lambda: not start.running, LIMIT):
            codes = start.codes
            start.abort()
            raise Wrong(f"hang: not ended after {LIMIT:.0f} s, exit codes {codes}")

    def must_speak(self, start: RunStart) -> None:
        """An end with code 2 is told in a line, and none in a traceback."""
        if "Traceback (most recent call last)" in start.text():
            raise Wrong("a traceback")
        if 2 in start.codes and not start.errors:
            raise Wrong("exit code 2 without a line that says why")

    def must_refuse(
        self,
        says: str,
        *,
        layout: TortureLayout | None = None,
        more: Mapping[int, Sequence[str]] | None = None,
        may_begin: bool = False,
    ) -> None:
        """The same command must end with code 2 on all ranks and one line with `says` in it, without a step and with
        everything left where it is. `may_begin`: when what is wrong shows only in the midst of training."""
        before = self.content()
        start = self.current = self.launch(layout=layout, more=more)
        self._compared, best, reached = True, self.best, self.reached
        self.await_end(start)
        if 0 in start.codes:
            raise Wrong(f"not refused ({says}): exit codes {start.codes}")
        self.must_end({rank: {2} for rank in range(len(start.ranks))})
        if not any(says in line for line in start.errors):
            raise Wrong(f"refused by {start.errors}, which does not say {says!r}")
        if may_begin:
            if (began := start.began_at) is not None and began != best:
                raise (Lost if began < best else Wrong)(f"went on from step {began}, not from step {best}")
            return
        self.reached = reached
        if len(start.errors) != 1:
            raise Wrong(f"refused by more than one line: {start.errors}")
        if start.trains:
            raise Wrong(f"trained to step {start.reached} before it refused ({says})")
        if self.content() != before:
            raise Wrong(f"refused ({says}), but what was there has changed")

    def must_finish(self) -> None:
        """The start that runs, or a new one, must come to the last step, or say that the run is there already."""
        start = self.go_on()
        self.await_step(self.place.steps)
        self.must_end({rank: {0} for rank in range(len(start.ranks))})
        if f"finished at step {self.place.steps}" not in start.text(0):
            raise Wrong(f"has ended with code 0, but does not say that it has finished at step {self.place.steps}")

    def must_go_on(self) -> None:
        """The current start must take further steps, or have finished."""
        start = self.start
        reached = start.reached
        if not self.await_step(reached + 1) and {*start.codes} != {0}:
            raise Wrong(f"has ended with {start.codes}, though it had to go on")

    def whole(self) -> list[Path]:
        """Checkpoints whose every byte is as it was written, newest first."""
        found = []
        for path in complete_checkpoints(self.checkpoints):
            try:
                files = read_state(path).state["files"]
                if all(measure(path / name) == entry for name, entry in files.items()):
                    found.append(path)
            except (Damaged, UserError, OSError):
                continue
        return found

    def damaged_on_purpose(self) -> None:
        """Take what is whole by now as what the next start must go on from."""
        self.best = next((step_in(path.name) or 0 for path in self.whole()), 0)

    def content(self) -> dict[str, object]:
        """Size and checksum of every file of the checkpoints and snapshots, but for what a killed save has left."""
        folders = (self.checkpoints, self.run_dir / SNAPSHOTS)
        files = [file for folder in folders for file in folder.glob("[!.]*/**/*") if file.is_file()]
        return {os.fspath(file): measure(file) for file in files}

    def saved(self) -> int:
        """The step of the newest checkpoint, also while training goes on."""
        return latest_step(self.checkpoints)
