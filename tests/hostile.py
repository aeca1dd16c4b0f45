"""A process that goes through a table of hostile files, with little memory, and what became of each.

Beside the files of each case is a folder `outside`, whose content nobody may read as data or change, and a name,
`executed`, at which nothing may appear.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mdit import cli
from tests.latent_sets import write_set
from tests.processes import run_forked

SECRET, COLOUR = "the secret of another folder", (201, 17, 93)
MOST_MEMORY = 2**30  # bytes beyond those at the begin of a process
MOST_SECONDS = 20  # for one file


class Case(NamedTuple):
    """`run` makes its files in a folder of its own, whose parent has `outside`, and reads them -> lines to look at.
    `expected` is in these, or in what is told on stderr with exit code 2."""

    name: str
    run: Callable[[Path], Any]
    expected: str


class Pickled:
    """Unpickling it writes the file that nothing must write."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.write_text, (self.marker, "executed")


def marker(folder: Path) -> Path:
    return folder.parent / "executed"


def code(folder: Path) -> str:
    return f"open({str(marker(folder))!r}, 'w').write('executed')\n"


def go_through(module: str, table: str, root: Path) -> None:
    """Write what became of each case of a module's table to root/outcomes.json; runs in a process of its own."""
    cases: list[Case] = getattr(import_module(module), table)
    outside = root / "outside"
    outside.mkdir(parents=True)
    Image.new("RGB", (16, 16), COLOUR).save(outside / "secret.png")
    (outside / "secret.txt").write_text(SECRET)
    (outside / "secret.json").write_text(json.dumps({"caption": SECRET}))
    write_set(outside / "set", 3)
    before = contents(outside)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MOST_MEMORY, resource.RLIM_INFINITY))  # spares this machine
    signal.signal(signal.SIGALRM, timed_out)
    started, outcomes = peak(), {}
    for number, case in enumerate(cases):
        (folder := root / f"case_{number:02d}").mkdir()
        told, began = io.StringIO(), peak()
        found: list[str] = []
        signal.alarm(MOST_SECONDS)
        start = time.monotonic()
        with contextlib.redirect_stderr(told), warnings.catch_warnings(action="ignore"):
            try:
                cli.run(lambda case=case, found=found, folder=folder: found.extend(map(str, case.run(folder) or ())))
            except SystemExit as ended:
                status = ended.code
            except BaseException as error:
                status = f"{type(error).__name__}: {error}"
        signal.alarm(0)
        lines = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
        outcomes[case.name] = {"code": status, "errors": lines, "found": found, "memory": peak() - began}
        outcomes[case.name] |= {"seconds": round(time.monotonic() - start, 1)}
        outcomes[case.name] |= {"executed": marker(folder).exists(), "untouched": contents(outside) == before}
    outcomes[""] = {"memory": peak() - started}
    (root / "outcomes.json").write_text(json.dumps(outcomes))


def timed_out(*signal) -> None:
    raise AssertionError(f"not done in {MOST_SECONDS} seconds")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def check(module: str, table: str, root: Path) -> None:
    """Go through a table and compare what became of each case with what is promised."""
    cases: list[Case] = getattr(import_module(module), table)
    ended = run_forked(go_through, module, table, root)
    assert ended.returncode == 0, ended.output
    outcomes = json.loads((root / "outcomes.json").read_text())
    assert outcomes.pop("")["memory"] < MOST_MEMORY
    assert [*outcomes] == [case.name for case in cases]
    faults = {}
    for case in cases:
        outcome = outcomes[case.name]
        text = "\n".join([*outcome["errors"], *outcome["found"]])
        right = outcome["code"] == (2 if outcome["errors"] else 0) and len(outcome["errors"]) <= 1
        right &= not outcome["executed"] and outcome["untouched"] and re.search(case.expected, text) is not None
        if not right or SECRET in text or str(COLOUR) in text:
            faults[case.name] = outcome
    assert not faults, json.dumps(faults, indent=1)
