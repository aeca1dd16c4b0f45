"""Processes for tests, forked from a server that has imported everything: one starts in milliseconds, not in seconds.

What a process does, it does as in a process of its own: its environment, its standard streams, its exit status.
"""

import functools
import gc
import os
import pickle
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import connection, forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from torch.distributed import TCPStore

# By importing alone, none of them starts a thread, which a fork would lose, or CUDA, which does not survive one.
PRELOAD = [
    "mdit.train.run",
    "mdit.train.loop",
    "mdit.precompute.mds_latents",
    "mdit.bench.session",
    "mdit.parallel.tensor",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "setuptools",
    "distutils.ccompiler",
    "pytest",
    "PIL.PngImagePlugin",
    "torch.utils.tensorboard",
    "transformers.models.bert.modeling_bert",
]
EACH = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # read when libraries are imported, so for the server as well
# Lets imports ask whether there is a GPU without starting CUDA: https://docs.pytorch.org/docs/stable/notes/cuda.html
ASK_THE_DRIVER = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
GRACE = 5.0  # seconds that the others have when one process has failed


@functools.cache
def fork_server() -> ForkServerContext:
    """A way to start processes, and the server behind it: one for this whole process, started at the first call."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, EACH | ASK_THE_DRIVER):
        forkserver.ensure_running()
    return context


@dataclass(frozen=True)
class Ended:
    """`returncode` is the first that was not 0 (negative: killed by that signal); `output` is what all of them wrote
    to stdout and stderr, process by process."""

    returncode: int
    output: str


def run_forked(
    function: Callable, *args, processes: int = 1, env: Mapping[str, str] | None = None, timeout: float = 280
) -> Ended:
    """Call a top-level function in each of `processes` new processes, with the environment that torchrun would give
    them (with none when there is one) and `env` over it. When one fails, the others are killed soon after.

    Raises AssertionError, with the output so far, when they have not ended after `timeout` seconds.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if processes > 1 else None
    with TemporaryDirectory() as folder:
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        children = []
        try:
            for rank, log in enumerate(logs):
                environment = _environment(rank, processes, store, env)
                children.append(start_forked(function, *args, environment=environment, log=log, timeout=timeout))
            returncode = _wait(children, timeout)
        finally:
            for child in children:
                child.kill()
                child.join()
        output = "".join(log.read_text(errors="replace") for log in logs if log.exists())
    assert returncode is not None, f"{output}\nnot done after {timeout} seconds"
    return Ended(returncode, output)


def start_forked(
    function: Callable, *args, environment: Mapping[str, str] | None = None, log: Path, timeout: float = 280
) -> BaseProcess:
    """Call a top-level function in a new process, which writes to `log`; without `environment`, alone in this one's."""
    payload = pickle.dumps((function, args))  # by value: torch would send tensors to processes as shared memory
    environment = _environment(0, 1, None, None) if environment is None else environment
    child = fork_server().Process(target=_child, args=(log, environment, timeout, payload))
    child.start()
    return child


def _environment(rank: int, processes: int, store: TCPStore | None, env: Mapping[str, str] | None) -> dict[str, str]:
    """This process's own, with what torchrun would add: its workers meet at a store that torchrun keeps, too."""
    meeting = {}
    if store is not None:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        address = {"MASTER_ADDR": store.host, "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        meeting = {name: str(value) for name, value in (ranks | address).items()}
    return {**os.environ, **EACH, **meeting, **(env or {})}


def _child(log: Path, environment: Mapping[str, str], timeout: float, payload: bytes) -> None:
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(written, 1)
    os.dup2(written, 2)
    signal.alarm(int(timeout + 2 * GRACE))  # the end, should the process that waits for this one be gone
    gc.freeze()  # what the server imported is no garbage: collections need not look through all of it
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    function, args = pickle.loads(payload)
    function(*args)


def _wait(children: list[BaseProcess], timeout: float) -> int | None:
    """Until all have ended -> the first exit status that was not 0, or 0; None when `timeout` seconds are over."""
    failed, running, deadline = 0, list(children), time.monotonic() + timeout
    while running:
        ended = connection.wait([child.sentinel for child in running], max(0.0, deadline - time.monotonic()))
        if not ended:
            return failed or None
        for child in [child for child in running if child.sentinel in ended]:
            child.join()
            running.remove(child)
            if child.exitcode and not failed:
                failed, deadline = child.exitcode, min(deadline, time.monotonic() + GRACE)
    return failed
