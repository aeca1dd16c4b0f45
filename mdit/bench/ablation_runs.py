"""All runs of an ablation, side by side on what the machine has; what is done already is not done again."""

import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import mdit
from mdit.bench.ablation import Ablation, TrainingStage, VariantRun
from mdit.bench.ablation_result import LOG, RESULT, VariantResult, change, recipe_change
from mdit.bench.plots import require_matplotlib
from mdit.bench.side_by_side import CommandTask, Start, last_line, side_by_side, start_process, start_single_threaded
from mdit.config import TrainConfig, UserError, portable
from mdit.dist import cores
from mdit.documents import parse_json, read_json
from mdit.encoders.efficientnet import load_efficientnet
from mdit.files import write_json
from mdit.precompute import precompute
from mdit.train.lock import Lock
from mdit.train.run_directory import METRICS, SNAPSHOTS

LAUNCHER = Path(mdit.__file__).resolve().parent / "launchers" / "train.py"
PROBED_STEPS, WARM_UP = 40, 10
IDLE = 0.5  # processes that want to run, in the mean of a minute


@dataclass
class Progress:
    """Outcome of a call: runs whose result was there, that were measured now, and that failed, with the reason."""

    reused: list[str] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        runs = len(self.reused) + len(self.measured) + len(self.failed)
        return f"{runs} runs: {len(self.reused)} reused, {len(self.measured)} run, {len(self.failed)} failed"


@dataclass(frozen=True)
class AblationRunner:
    """`command` measures finished runs, with --measure VARIANT SEED behind it. `rerun`: what has changed since it was
    run is run anew, instead of refused."""

    ablation: Ablation
    out: Path
    command: Sequence[str]
    workers: int
    start: Start
    rerun: bool = False

    def run(self) -> Progress:
        """Raises UserError, before anything is run, for what cannot be."""
        load_efficientnet()  # what the end needs
        require_matplotlib()
        self.out.mkdir(parents=True, exist_ok=True)
        with Lock(self.out / "ablation.lock"):
            try:
                return self._run()
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on where it stopped") from None

    def _run(self) -> Progress:
        if self.ablation.file.budget == "seconds":
            self._probe()
        runs = self.ablation.runs(self.step_seconds)
        changed = self._changed(runs)
        progress = Progress([run.name for run in runs if run not in changed and self._result(run).exists()])
        due = [run for run in runs if run.name not in progress.reused]
        self._make_data(stage.config for run in due for stage in run.stages)
        for run in changed:
            set_aside(run.folder(self.out))
        tasks = [CommandTask(run.name, self._commands(run), run.folder(self.out) / LOG) for run in due]
        names = {run.name: run for run in due}

        def ended(task: CommandTask, status: int) -> None:
            if status == 0:
                progress.measured.append(task.name)
                loss = VariantResult.load(self._result(names[task.name])).curve[-1].loss
                print(f"{task.name}: validation loss {loss:.4f}", flush=True)
            else:
                progress.failed[task.name] = f"{last_line(task.log)} (exit code {status}, {task.log})"
                print(f"{task.name}: failed: {progress.failed[task.name]}", flush=True)

        at_once = min(self.workers, max(1, len(tasks)))
        print(f"{len(runs)} runs, {len(tasks)} to do, {at_once} at a time", flush=True)
        side_by_side(tasks, self.workers, self.start, ended)
        return progress

    def _result(self, run: VariantRun) -> Path:
        return run.folder(self.out) / RESULT

    def _commands(self, run: VariantRun) -> list[list[str]]:
        commands, before = [], None
        for stage in run.stages:
            commands.append(self._train(stage, run.run_dir(self.out, stage), before))
            before = run.run_dir(self.out, stage)
        return [*commands, [*self.command, "--measure", run.variant, str(run.seed)]]

    def _train(self, stage: TrainingStage, run_dir: Path, init_from: Path | None = None) -> list[str]:
        ablation = self.ablation
        files = {"--recipe": ablation.recipe, "--ds_config": ablation.ds_config, "--run_dir": run_dir}
        files |= {"--init_from": init_from / SNAPSHOTS / "latest"} if init_from else {}
        command = [sys.executable, str(LAUNCHER), *(str(word) for pair in files.items() for word in pair)]
        return command + [word for text in stage.overrides for word in ("--set", text)]

    def _changed(self, runs: Sequence[VariantRun]) -> list[VariantRun]:
        """Runs that DIR has otherwise. Raises UserError for the first of them, unless they are to be run anew."""
        changes = {run.name: why for run in runs if (why := change(self.ablation, run, self.out))}
        if changes and not self.rerun:
            raise UserError(f"{next(iter(changes.values()))}; --rerun runs it anew, or choose another --out")
        for why in changes.values():
            print(f"run anew: {why}", flush=True)
        return [run for run in runs if run.name in changes]

    def _make_data(self, configs: Iterable[TrainConfig]) -> None:
        """Every set that is missing, once, before the runs that would all make it."""
        made: list[object] = []
        for config in configs:
            if config.data not in made:
                precompute(config)
                made.append(config.data)

    def step_seconds(self, variant: str, stage: str) -> float:
        return read_json(self._probe_file(variant, stage))["step_seconds"]

    def _probe_file(self, variant: str, stage: str) -> Path:
        return self.out / variant / f"probe_{stage}.json"

    def _probe(self) -> None:
        """Take the time of a step of every stage, one after the other and nothing beside them."""
        ablation, due = self.ablation, list[tuple[str, TrainingStage]]()
        for variant, stages in ablation.stages.items():
            for each in stages:
                seed = ablation.seeds[variant][0]
                stage = ablation.resolve(variant, each, PROBED_STEPS, seed, PROBED_STEPS, log_every=1)
                path = self._probe_file(variant, stage.name)
                why = recipe_change(path, read_json(path)["recipe"], stage.config) if path.exists() else None
                if why and not self.rerun:
                    raise UserError(f"{why}; --rerun takes the time anew, or choose another --out")
                due += [] if path.exists() and not why else [(variant, stage)]
        self._make_data(stage.config for _, stage in due)
        if due and (load := os.getloadavg()[0]) > IDLE:
            print(f"{load:.1f} other processes are at work: seconds will not be those of an idle machine", flush=True)
        for variant, stage in due:
            self._probe_stage(variant, stage)

    def _probe_stage(self, variant: str, stage: TrainingStage) -> None:
        run_dir, failed = self.out / variant / "probe", list[str]()
        shutil.rmtree(run_dir, ignore_errors=True)
        task = CommandTask("probe", [self._train(stage, run_dir)], self.out / variant / "probe.log")
        side_by_side([task], 1, self.start, lambda task, status: failed.extend(["failed"] * (status != 0)))
        if failed:
            raise UserError(f"{task.log}: no time of a step of {variant}: {last_line(task.log)}")
        path = self._probe_file(variant, stage.name)
        lines = (run_dir / METRICS).read_text(encoding="utf-8").splitlines()
        times = [line["step_seconds"] for line in map(partial(parse_json, source=run_dir), lines)]
        write_json(path, {"recipe": portable(stage.config, path), "step_seconds": statistics.median(times[WARM_UP:])})
        shutil.rmtree(run_dir)


def workers_here(asked: int | None, device: torch.device) -> tuple[int, Start]:
    """Runs at a time on this machine, and how each is started. Raises UserError for several on a GPU."""
    if device.type != "cuda":
        return asked or cores(), start_single_threaded
    if asked not in (None, 1):
        raise UserError(f"--workers {asked}: on a GPU runs come one after the other")
    return 1, start_process


def set_aside(folder: Path) -> None:
    """Keep what was run before under another name."""
    names = (folder.with_name(f"{folder.name}.before_{n}") for n in itertools.count(1))
    folder.rename(next(name for name in names if not name.exists()))
