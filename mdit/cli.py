"""The front of every command: what a user can mend is one line and exit code 2, whatever raised it."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mdit.caches import keep_on_local_disk
from mdit.documents import UserError, explain, one_line

USER_ERROR = 2
# torch reads it when it is imported. Its warnings that a process at the other end has gone are pages of C++ frames.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

try:
    os.getcwd()
except FileNotFoundError:  # before compiled packages are imported: torch's and pydantic's libraries end a process there
    print(f"error: the working directory {os.environ.get('PWD', '')} is gone; change to another", file=sys.stderr)
    sys.exit(USER_ERROR)


def tells(error: BaseException) -> bool:
    """Whether this process is the one to print an error that all processes of a run may have: `mdit.dist.tells`, where
    that, and torch with it, has been imported."""
    asked = getattr(sys.modules.get("mdit.dist"), "tells", None)
    return asked is None or asked(error)


def run(command: Callable[[], int | None], *, tells: Callable[[BaseException], bool] = tells) -> NoReturn:
    """Call `command` and exit with what it returns (None is 0), or, after one line on stderr, with

        2    for UserError, and for OSError and MemoryError: the machine, a file or a disk is not as it should be
        130  for Ctrl-C (what a KeyboardInterrupt says is told as well); a second one ends the process at once

    and silently with 141 when nobody reads stdout any more, as under `| head`. `tells` says whether this process is the
    one to print an error. MDIT_TRACEBACK=1 shows where an error came from. What the terminal's encoding lacks is
    printed escaped. What `command` compiles is kept on this machine's disk (mdit/caches.py).
    """
    keep_on_local_disk()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # None: it was closed, as by `>&-`
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a descriptor that is another file by now, as after dup2
                stream.reconfigure(errors="backslashreplace")
    code = 0
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            code = command() or 0
        finally:
            sys.stdout.flush()  # here, where an error of it still finds a handler; also after argparse's --help
    except KeyboardInterrupt as error:
        code = 128 + signal.SIGINT
        _tell("; ".join(["interrupted", *map(str, error.args)]), error, tells)
    except BrokenPipeError:
        code = 128 + signal.SIGPIPE
    except (UserError, OSError, MemoryError) as error:
        if os.environ.get("MDIT_TRACEBACK"):
            raise
        code = USER_ERROR
        out_of_memory = "out of memory: " if isinstance(error, MemoryError) else ""
        _tell(f"error: {out_of_memory}{explain(error)}", error, tells)
    finally:
        _give_up_on_stdout()
    sys.exit(code)


def path(text: str) -> Path:
    """A path of the command line. An empty one, as of a variable that is not set, is not the current directory."""
    if not text.strip() or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: is no path")
    return Path(text)


def config(text: str) -> Path:
    """A recipe or a DeepSpeed JSON of the command line: outside a checkout configs/NAME is the one that mdit brings."""
    from mdit.config import CONFIGS  # here, as it imports pydantic: tools/first_contact.py begins without it

    given = path(text)
    brought = CONFIGS / given.name
    return brought if given.parent == Path("configs") and not given.exists() and brought.exists() else given


class Parser(argparse.ArgumentParser):
    """argparse's, with the description as it is written and errors in one line."""

    def __init__(self, description: str | None = None, **options) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {one_line(message)}\n")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that draws into files: snapshot, which of its weights, sampler."""
    add = parser.add_argument
    add("--snapshot", type=Path, required=True, help="a run's snapshots/latest, or one step of it")
    add("--weights", choices=("ema", "raw"), default="ema")
    add("--guidance", type=float, help="classifier-free guidance; default: the recipe's")
    add("--num_steps", type=int, help="steps of the Heun sampler; default: the recipe's")
    add("--seed", type=whole(0), default=0)
    add("--batch_size", type=whole(1, 10_000), default=16, help="pictures at a time; default: 16")


def whole(minimum: int, maximum: int = 2**63 - 1) -> Callable[[str], int]:
    """A type for argparse: integers of a range."""

    def number(text: str) -> int:
        value = int(text)
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{one_line(text)} is not between {minimum} and {maximum}")
        return value

    return number


def positive(text: str) -> float:
    """A type for argparse: finite numbers above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{one_line(text)}: expected more than 0")
    return value


def _interrupt(number: int, frame) -> None:
    signal.signal(number, signal.SIG_DFL)  # needs no Python: ends a process that waits for something, too
    raise KeyboardInterrupt


def _give_up_on_stdout() -> None:
    """Let what cannot be written to stdout go: Python would complain of it once more at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):  # a stdout that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(line: str, error: BaseException, tells: Callable[[BaseException], bool]) -> None:
    if tells(error):
        with suppress(OSError):  # nobody reads stderr either
            print(line, file=sys.stderr, flush=True)
