"""Rounds of random faults against a small run of mdit: nothing may be lost, and the weights come out as undisturbed.

A round is a run in a directory of its own: faults strike it one after the other, the same command goes on each time,
until it has finished. Its plan is a function of (seed, round), its moments are as good as the clock. Either all starts
have one layout, and the weights must be those of an undisturbed run bit for bit, or each has another, and they must be
so to rounding. In every run a sample is not a number: its steps are skipped.
"""

import math
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import count, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from mdit.bench.faults import CONDITIONS, FAULTS, KINDS, Condition, Fault, PlannedFault, mounted
from mdit.bench.report import cpu_model, table
from mdit.bench.side_by_side import terminate_as_interrupt
from mdit.bench.torture_start import LAYOUTS, TortureLayout, Workplace
from mdit.bench.tortured_run import KindTally, Lost, TorturedRun, Wrong
from mdit.config import UserError
from mdit.dist import cores
from mdit.documents import parse_json
from mdit.provenance import commit
from mdit.train.meter import step_of
from mdit.train.run_directory import METRICS, SNAPSHOTS

FAULTS_OF_A_ROUND = 4
OFTEN = ("kill", "kill")  # beside once each kind
NAN, WEIGHTS = "nan_batch", "final weights"  # rows of the table that no fault draws: skipped steps, and rounds compared
TMPFS = ("-t", "tmpfs", "-o", "size=64m", "tmpfs")  # the disk that is filled: some twenty times a checkpoint
# In another layout sums are in another order. Losses are held to what tests/distributed/test_resume_layouts.py holds
# them to. Weights of values up to 1 come out up to 7e-7 apart after 60 steps of Adam, in undisturbed runs too; a step
# too many or too few moves them by 1e-3, the learning rate.
LOSS_ROUNDING, WEIGHT_ROUNDING = 1e-6, 1e-5


@dataclass(frozen=True)
class RoundPlan:
    """All that is drawn for a round. `layouts` and `conditions` (kind or "", number) are those of one start after the
    other, and begin anew where there are more; `one_layout` says that all are the same."""

    layouts: tuple[TortureLayout, ...]
    conditions: tuple[tuple[str, int], ...]
    faults: tuple[PlannedFault, ...]

    @property
    def one_layout(self) -> bool:
        return len({*self.layouts}) == 1

    @classmethod
    def draw(cls, seed: int, number: int, kinds: Sequence[str], steps: int) -> "RoundPlan":
        rng = random.Random(f"{seed}/{number}")
        strikes, conditions = ([kind for kind in kinds if kind in known] for known in (FAULTS, CONDITIONS))
        layouts = [rng.choice(LAYOUTS)] * 16 if rng.random() < 0.5 else [rng.choice(LAYOUTS) for _ in range(16)]
        share = 0.25 if strikes else 1.0
        under = [
            (rng.choice(conditions) if conditions and rng.random() < share else "", rng.getrandbits(32))
            for _ in layouts
        ]
        faults = []
        if strikes:
            moments = rng.sample(range(2, steps - 8), FAULTS_OF_A_ROUND)
            for moment, kind in zip(moments, dealt(seed, number, strikes), strict=True):
                at_startup = FAULTS[kind].at_startup and rng.random() < 0.25
                faults.append(
                    PlannedFault(
                        kind=kind,
                        step=max(moment, FAULTS[kind].not_before),
                        at_startup=at_startup,
                        rank=rng.randrange(2),
                        everyone=rng.random() < 0.5,
                        delay=rng.uniform(1, 10) if at_startup else rng.uniform(0, 0.3),
                        number=rng.getrandbits(32),
                    )
                )
        return cls(tuple(layouts), tuple(under), tuple(sorted(faults, key=lambda fault: fault.step)))


def dealt(seed: int, number: int, kinds: Sequence[str]) -> list[str]:
    """Kinds of faults of a round: from decks that are shuffled anew when they are used up, so that every kind comes
    about as often as the others, whatever the luck."""
    deck = [*kinds, *(kind for kind in OFTEN if kind in kinds)]
    first, found = FAULTS_OF_A_ROUND * (number - 1), []
    for place in range(first, first + FAULTS_OF_A_ROUND):
        turn, card = divmod(place, len(deck))
        found.append(random.Random(f"{seed}/deck/{turn}").sample(deck, len(deck))[card])
    return found


@dataclass
class TortureSession:
    """Rounds of one seed in `place`, with what they have come to: `tally` by kind, `findings` in words."""

    place: Workplace
    seed: int
    kinds: Sequence[str] = KINDS
    tell: Callable[[str], None] = print
    faults: Mapping[str, Fault] = field(default_factory=lambda: dict(FAULTS))
    conditions: Mapping[str, Condition] = field(default_factory=lambda: dict(CONDITIONS))
    tally: dict[str, KindTally] = field(init=False)
    findings: list[str] = field(default_factory=list)
    layouts: set[TortureLayout] = field(default_factory=set)
    rounds: int = 0

    def __post_init__(self) -> None:
        rows = [*(kind for kind in (*self.faults, *self.conditions) if kind in self.kinds), NAN, WEIGHTS]
        self.tally = {kind: KindTally() for kind in rows}

    def run(self, minutes: float, only: int | None = None) -> None:
        """Rounds 1, 2, ... until the minutes are over, and the one then begun to its end; or one of them alone."""
        deadline = time.monotonic() + 60 * minutes
        with terminate_as_interrupt(), _signals_as_by_default():
            for number in count(1) if only is None else [only]:
                if time.monotonic() >= deadline:
                    return
                self.run_round(number, RoundPlan.draw(self.seed, number, self.kinds, self.place.steps), deadline)

    def run_round(self, number: int, plan: RoundPlan, deadline: float = math.inf) -> None:
        """Strike a new run as planned, as long as there is time, and compare what it has come to."""
        self.rounds += 1
        folder = self.place.folder / f"round_{number:04d}"
        folder.mkdir()
        told = plan.layouts[0] if plan.one_layout else "another layout at every start"
        self.tell(f"round {number}: {told}; {', '.join(fault.kind for fault in plan.faults) or 'conditions alone'}")
        run = TorturedRun(self.place, folder, self._each(plan.layouts), self._under(plan, folder), self.tally)
        kind = WEIGHTS
        with ExitStack() as held:
            run.disk.mkdir()
            if any(planned.kind == "full_disk" for planned in plan.faults):
                held.enter_context(mounted(run.disk, *TMPFS))
            held.callback(lambda: run.current and run.current.kill())
            try:
                for planned in plan.faults:
                    kind = planned.kind
                    if time.monotonic() >= deadline or not await_moment(run, planned):
                        break
                    began, reached = time.monotonic(), run.start.reached
                    layout = run.start.layout
                    self.tally[kind].faults += 1
                    if not self.faults[kind].strike(run, planned, random.Random(planned.number)):
                        self.tally[kind].faults -= 1  # nothing was there to strike
                        continue
                    run.cause = run.cause if run.current else kind
                    told = f"{kind} at step {reached} of {layout}: {time.monotonic() - began:.0f} s"
                    self.tell(f"round {number}: {told}, newest checkpoint {run.saved()}")
                run.must_finish()
                kind = WEIGHTS
                layout = plan.layouts[0] if plan.one_layout else LAYOUTS[0]
                self._compare(run, layout, exactly=plan.one_layout)
            except (Lost, Wrong) as found:
                self._note(found, kind, number, run)
                return
        shutil.rmtree(folder)

    def _note(self, found: Exception, kind: str, number: int, run: TorturedRun) -> None:
        """Count what was found, and keep the round's directory."""
        if run.current is not None:
            run.current.kill()
        if os.path.ismount(run.disk):
            shutil.copytree(run.disk, run.folder / "kept", symlinks=True)
        row, what = self.tally[kind], type(found).__name__.lower()
        setattr(row, what, getattr(row, what) + 1)
        line = f"{what}: {kind} in round {number} of seed {self.seed}: {found}; kept in {run.folder}"
        self.findings.append(line)
        self.tell(line)

    def _each(self, layouts: Sequence[TortureLayout]) -> Iterator[TortureLayout]:
        for i in count():
            self.layouts.add(layout := layouts[i % len(layouts)])
            yield layout

    def _under(self, plan: RoundPlan, folder: Path) -> Iterator[Mapping[str, str]]:
        for i in count():
            kind, number = plan.conditions[i % len(plan.conditions)]
            if kind:
                self.tally[kind].faults += 1
                self.tell(f"{folder.name}: the next start under {kind}")
                yield self.conditions[kind].environment(folder / kind, random.Random(number))
            else:
                yield {}

    def undisturbed(self, layout: TortureLayout) -> Path:
        """Directory of a run of this layout that nothing strikes; made when it is asked for first. Raises UserError
        where even that fails."""
        folder = self.place.folder / f"undisturbed_{LAYOUTS.index(layout)}"
        if not (done := folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run = TorturedRun(self.place, folder, self._each([layout]), repeat({}), {})
            try:
                run.must_finish()
            except (Lost, Wrong) as found:
                raise UserError(f"{folder}: an undisturbed run of {layout} fails: {found}") from None
            finally:
                if run.current:
                    run.current.kill()
            done.touch()
        return folder / "disk" / "run"

    def _compare(self, run: TorturedRun, layout: TortureLayout, *, exactly: bool) -> None:
        """Raise Wrong where the run has not learned what an undisturbed one learns, or skipped other steps."""
        expected = self.undisturbed(layout)
        self.tally[WEIGHTS].faults += 1
        if difference := differs(run.run_dir, expected, exactly=exactly):
            raise Wrong(f"{difference} (undisturbed, {layout})")
        skipped = max(row["skipped_steps"] for row in _metrics(expected).values())
        if not skipped:
            raise Wrong("no step is skipped, though a sample is not a number")
        self.tally[NAN].faults += skipped

    @property
    def failed(self) -> bool:
        return bool(self.findings)

    def report(self) -> str:
        """The table, in Markdown, and a verdict."""
        head = ["kind", "faults", "restarts", "steps lost", "lost", "wrong"]
        rows = [[kind, *asdict(row).values()] for kind, row in self.tally.items()]
        total = [sum(column) for column in zip(*(asdict(row).values() for row in list(self.tally.values())[:-2]))]
        names = "; ".join(str(layout) for layout in LAYOUTS if layout in self.layouts)
        verdict = f"{len(self.findings)} lost or wrong" if self.failed else "nothing lost, nothing wrong"
        lines = [table([head, *rows[:-2], ["all faults", *total], *rows[-2:]]), f"{self.rounds} rounds: {names}."]
        return "\n\n".join([*lines, *self.findings, f"Verdict: {verdict}."])

    def markdown(self, command: str) -> str:
        """The report below what made it."""
        date = datetime.now(UTC).date().isoformat()
        machine = f"{cpu_model()}, {cores()} cores; torch {torch.__version__}; commit {commit() or 'unknown'}; {date}"
        return f"`{command}`; {machine}.\n\n{self.report()}\n"


def await_moment(run: TorturedRun, planned: PlannedFault) -> bool:
    """Wait for the moment of a fault -> whether the run is still there."""
    new = run.current is None
    start = run.go_on()
    if new and planned.at_startup:
        return not start.wait_until(lambda: not start.running, planned.delay)
    if not run.await_step(planned.step):
        return False
    time.sleep(planned.delay)
    return start.running


def differs(run: Path, expected: Path, *, exactly: bool) -> str:
    """The first thing in which two runs have not learned the same: "" where they have, bit for bit or to rounding."""
    ours, theirs = _metrics(run), _metrics(expected)
    for step in sorted(ours.keys() & theirs.keys()):
        for key, rounding in (("skipped_steps", 0.0), ("loss", 0.0 if exactly else LOSS_ROUNDING)):
            found, true = ours[step][key], theirs[step][key]  # the loss of a skipped step is None
            if found != true and (None in (found, true) or not math.isclose(found, true, rel_tol=rounding)):
                return f"{key} of step {step} is {found!r}, not {true!r}"
    for kind in ("raw", "ema"):
        name = f"{SNAPSHOTS}/latest/{kind}.safetensors"
        if exactly and (run / name).read_bytes() == (expected / name).read_bytes():
            continue
        found, true = load_file(run / name), load_file(expected / name)
        if found.keys() != true.keys():
            return f"{name} has other parameters"
        apart = {key: float((found[key] - true[key]).abs().max()) for key in found}
        worst = max(apart, key=apart.__getitem__)
        if exactly or not apart[worst] <= WEIGHT_ROUNDING:
            return f"{name} differs, by {apart[worst]:.3g} in {worst}"
    return ""


def _metrics(run: Path) -> dict[int, dict[str, Any]]:
    """Rows of metrics.jsonl by step. A full disk leaves some out, and torn ones behind."""
    found = {}
    for line in (run / METRICS).read_bytes().splitlines():
        if (step := step_of(line)) is not None:
            found[step] = parse_json(line, METRICS)
    return found


def possible_kinds(asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The kinds of faults that this machine takes, and those left out. Raises UserError for a kind that is none."""
    for kind in asked or ():
        if kind not in KINDS:
            raise UserError(f"--kinds {kind}: expected some of {', '.join(KINDS)}")
    kinds = [kind for kind in KINDS if kind in (asked or KINDS)]  # in this order: plans depend on it
    mounts = [kind for kind in kinds if kind in FAULTS and FAULTS[kind].mounts]
    out = mounts if mounts and not can_mount() else []
    return [kind for kind in kinds if kind not in out], out


def can_mount() -> bool:
    """Whether this process may mount file systems, found out by doing it."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    with TemporaryDirectory() as folder:
        try:
            with mounted(Path(folder), *TMPFS):
                return True
        except UserError:
            return False


@contextmanager
def _signals_as_by_default() -> Iterator[None]:
    """Ctrl-C and hang-ups reach what is started, also where this process ignores them, as in a shell's background or
    under nohup: a process inherits that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, lambda number, frame: None)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
