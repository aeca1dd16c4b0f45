"""Starts of real runs for mdit.bench.torture: a tiny recipe and its sets, layouts, and the processes of one start."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash

import mdit
from mdit.bench.side_by_side import start_process
from mdit.bench.tiny import tiny_config, write_shards
from mdit.data.manifest import MANIFEST
from mdit.data.shards import INDEX, open_dataset
from mdit.documents import read_json
from mdit.files import measure, write_json

LAUNCHER = Path(mdit.__file__).resolve().parent / "launchers" / "train.py"
POLL = 0.02  # seconds
LIMIT = 240.0  # seconds in which a start, or an end, must have come; longer is a hang
WATCHDOG = 20  # seconds: longer than any pause
SAMPLES, SHARD_BYTES, BATCH, NOT_FINITE = 64, 40_000, 8, 11  # the last: the sample that is not a number
EPOCH = SAMPLES // BATCH  # steps
# Each process on a core's worth of threads, on CPUs, and with its Python stacks in the log when it is aborted.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


@dataclass(frozen=True)
class TortureLayout:
    processes: int
    stage: int
    expert_parallel: int = 1

    def __str__(self) -> str:
        experts = f", experts over {self.expert_parallel}" if self.expert_parallel > 1 else ""
        return f"{self.processes} x ZeRO-{self.stage}{experts}"


LAYOUTS = (
    *(TortureLayout(processes, stage) for processes in (1, 2) for stage in (1, 2, 3)),
    *(TortureLayout(2, stage, 2) for stage in (1, 2)),  # experts are kept whole: not with ZeRO-3
)


class Rank(Protocol):
    """One process of a start, as subprocess.Popen."""

    pid: int

    def poll(self) -> int | None: ...


StartRank = Callable[..., Rank]  # (command, log, **environment)


@dataclass(frozen=True)
class Workplace:
    """Recipe, sets and DeepSpeed JSONs in a new folder: what all runs of a session have in common."""

    folder: Path
    steps: int = 60
    checkpoint_every: int = 5
    start_rank: StartRank = start_process

    @property
    def train_set(self) -> Path:
        return self.folder / "train"

    @cached_property
    def recipe(self) -> Path:
        """Written, with its sets, when it is asked for first. A constant learning rate and Adam's larger eps keep what
        another layout rounds differently from growing, as in tests/distributed/test_same_curve.py."""
        config = tiny_config(
            data={"train": [str(self.train_set)], "validation": str(self.folder / "validation")},
            training={"num_steps": self.steps, "global_batch_size": BATCH},
            optim={"schedule": "constant", "final_lr_ratio": 1.0, "eps": 1e-5},
            report={"checkpoint_every": self.checkpoint_every, "keep_checkpoints": 3},
        )
        write_shards(self.train_set, config, SAMPLES, 0, SHARD_BYTES)
        write_shards(self.folder / "validation", config, 8, 1)
        make_not_finite(self.train_set, NOT_FINITE)
        path = self.folder / "recipe.json"
        write_json(path, {"recipe": config.model_dump(mode="json", exclude_none=True)})
        return path

    def ds_config(self, layout: TortureLayout) -> Path:
        path = self.folder / f"zero{layout.stage}_experts{layout.expert_parallel}.json"
        settings = {"expert_parallel": layout.expert_parallel, "watchdog_s": WATCHDOG}
        zero = {"stage": layout.stage}
        write_json(path, {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero, "mdit": settings})
        return path


class RunStart:
    """One start of the command in `run_dir`: its processes, and in `logs` what each printed. `more` are arguments of
    single ranks beyond those of all."""

    def __init__(
        self,
        place: Workplace,
        layout: TortureLayout,
        run_dir: Path,
        logs: Path,
        *,
        environment: Mapping[str, str] | None = None,
        more: Mapping[int, Sequence[str]] | None = None,
    ) -> None:
        self.layout = layout
        files = {"--recipe": place.recipe, "--ds_config": place.ds_config(layout), "--run_dir": run_dir}
        command = [sys.executable, str(LAUNCHER), *(str(word) for pair in files.items() for word in pair)]
        self.logs = [logs.with_name(f"{logs.name}_rank{rank}.log") for rank in range(layout.processes)]
        port, self.ranks = str(_free_port()), list[Rank]()
        for rank, log in enumerate(self.logs):
            variables = {**ENVIRONMENT, **(environment or {})}
            if layout.processes > 1:
                number, size = str(rank), str(layout.processes)
                variables |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.ranks.append(place.start_rank([*command, *(more or {}).get(rank, ())], log, **variables))

    @property
    def running(self) -> bool:
        return any(rank.poll() is None for rank in self.ranks)

    @property
    def codes(self) -> list[int | None]:
        return [rank.poll() for rank in self.ranks]

    def text(self, rank: int | None = None) -> str:
        """Everything that a rank printed, or all of them."""
        logs = self.logs if rank is None else [self.logs[rank]]
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in logs if log.exists())

    @property
    def began_at(self) -> int | None:
        """The step that training goes on from; None before it does."""
        found = re.search(r"^(?:starting|resuming) at step (\d+) of", self.text(0), re.MULTILINE)
        return int(found[1]) if found else None

    @property
    def reached(self) -> int:
        """The last step that was reported; the one it began at before any was."""
        found = re.findall(r"^step (\d+) of \d+: ", self.text(0), re.MULTILINE)
        return int(found[-1]) if found else self.began_at or 0

    @property
    def trains(self) -> bool:
        return self.began_at is not None and self.reached > self.began_at

    @property
    def errors(self) -> list[str]:
        """The different lines by which ranks told why they end."""
        return [*dict.fromkeys(re.findall(r"^error: (.*)$", self.text(), re.MULTILINE))]

    def send(self, number: int, ranks: Collection[int] | None = None) -> None:
        """Send a signal to the ranks, by default to all, that still run."""
        for rank in range(len(self.ranks)) if ranks is None else ranks:
            if self.ranks[rank].poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(self.ranks[rank].pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Whether the condition came true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL)
        return True

    def kill(self) -> None:
        """End what still runs, without a word, and wait for it."""
        self.send(signal.SIGKILL)
        self.wait_until(lambda: not self.running, LIMIT)

    def abort(self) -> None:
        """End what hangs, with the stacks of its threads in the logs."""
        self.send(signal.SIGCONT)
        self.send(signal.SIGABRT)
        self.wait_until(lambda: not self.running, 5)
        self.kill()


def make_not_finite(directory: Path, sample: int) -> None:
    """Make a sample's first latent a NaN, which no writer of sets lets through, and all checksums match."""
    dataset = open_dataset(directory)
    [place] = dataset.locate([sample])
    shard, layout = directory / dataset.manifest.shards[place.shard].file, dataset.layout
    content = bytearray(shard.read_bytes())
    at = place.offset + layout.latent_at
    content[at : at + 2] = np.float16(np.nan).tobytes()
    shard.write_bytes(content)
    begin, size = layout.checked(place.text_bytes)
    index = np.load(directory / INDEX)
    index["xxh3"][sample] = xxhash.xxh3_64_intdigest(bytes(content[place.offset + begin :][:size]))
    np.save(directory / INDEX, index)
    manifest = read_json(directory / MANIFEST)
    for entry in (manifest["index"], *manifest["shards"]):
        entry.update(measure(directory / entry["file"]))
    write_json(directory / MANIFEST, manifest)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
