import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdit.__main__ import COMMANDS
from mdit.cli import Parser, path, positive, run, whole
from mdit.documents import UserError
from tests.training import REPOSITORY


def ending(function, capsys, **options):
    """-> exit code, stdout, stderr"""
    with pytest.raises(SystemExit) as stop:
        run(function, **options)
    return stop.value.code or 0, *capsys.readouterr()


def raising(error):
    def command():
        print("begun")
        raise error

    return command


@pytest.mark.parametrize(
    "error, code, line",
    [
        (UserError("recipe.toml: seed is -1"), 2, "error: recipe.toml: seed is -1"),
        (UserError("two\nlines"), 2, "error: two lines"),
        (FileNotFoundError(2, "No such file or directory", "a/b"), 2, "error: a/b: No such file or directory"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (OSError(18, "Cross-device link", "a", None, "b"), 2, "error: a: b: Cross-device link"),
        (OSError(5, "Input/output error", b"bytes\nname"), 2, "error: bytes name: Input/output error"),
        (TimeoutError("timed out"), 2, "error: timed out"),
        (ConnectionError(), 2, "error: ConnectionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_is_one_line_and_a_code(error, code, line, capsys):
    assert ending(raising(error), capsys) == (code, "begun\n", line + "\n")
    assert ending(raising(error), capsys, tells=lambda error: False) == (code, "begun\n", "")


def test_results_are_exit_codes(capsys):
    assert ending(lambda: None, capsys)[0] == 0
    assert ending(lambda: 3, capsys)[0] == 3
    assert ending(lambda: sys.exit(7), capsys)[0] == 7


def test_what_only_we_can_break_keeps_its_traceback(capsys):
    with pytest.raises(AssertionError):
        run(raising(AssertionError()))


def test_where_an_error_came_from_can_be_asked(monkeypatch):
    monkeypatch.setenv("MDIT_TRACEBACK", "1")
    with pytest.raises(UserError):
        run(raising(UserError("x")))


def test_text_beyond_the_terminals_encoding_is_escaped(monkeypatch):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)

    def command():
        print("café 漢 \udcff")
        raise UserError("漢.toml: is missing")

    with pytest.raises(SystemExit):
        run(command)
    assert out.buffer.getvalue() == rb"caf\xe9 \u6f22 \udcff" + b"\n"
    assert err.buffer.getvalue() == rb"error: \u6f22.toml: is missing" + b"\n"


PRINTING = """
from mdit.cli import Parser, path, run, whole

def command():
    for _ in range({lines}):
        print("a line", end={end!r})

run(command)
"""


def program(lines, end="\n"):
    return [sys.executable, "-c", PRINTING.format(lines=lines, end=end)]


@pytest.mark.parametrize("lines", [1, 100_000])
def test_nobody_reads_any_more(lines):
    """Whether the pipe breaks while the command prints or when the rest is written at its end."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        ended = subprocess.run(program(lines), stdout=stdout, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_stdout():
    with open("/dev/full", "wb") as stdout:
        ended = subprocess.run(program(1), stdout=stdout, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (2, b"error: No space left on device\n")


def test_no_stdout_at_all():
    command = " ".join(f"'{part}'" if i < 2 else '"$P"' for i, part in enumerate(program(1))) + " >&-"
    ended = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, env={**os.environ, "P": program(1)[2]})
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize("text", ["", " ", "a\0b"])
def test_an_empty_path_is_not_the_current_directory(text, capsys):
    parser = Parser()
    parser.add_argument("--run_dir", type=path)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--run_dir", text])
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: argument --run_dir: {text!r}: is no path\n"
    assert parser.parse_args(["--run_dir", "runs/a"]).run_dir == Path("runs/a")


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--unknown", "two\nlines"], "error: unrecognized arguments: --unknown two lines"),
        (["--count", "0"], "error: argument --count: 0 is not between 1 and 9"),
        (["--count", "9" * 5000], "error: argument --count: invalid number value"),
        (["--count", "1.5"], "error: argument --count: invalid number value: '1.5'"),
        (["--seconds", "0"], "error: argument --seconds: 0: expected more than 0"),
        (["--seconds", "nan"], "error: argument --seconds: nan: expected more than 0"),
        (["--seconds", "1 s"], "error: argument --seconds: invalid positive value: '1 s'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, line, capsys):
    parser = Parser("What it does\n    as it is written")
    parser.add_argument("--count", type=whole(1, 9))
    parser.add_argument("--seconds", type=positive)
    assert "\n    as it is written" in parser.format_help() and parser.parse_args(["--count", "9"]).count == 9
    code, _, error = ending(lambda: parser.parse_args(arguments), capsys)
    assert code == 2 and error.startswith(line) and error.count("\n") == 1


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    """Found before anything compiled is loaded: torch's libraries, and pydantic's from Python 3.13 on, would end the
    process with a line of their own."""
    program = "import sys; before = {*sys.modules}; import mdit.cli; print(*{*sys.modules} - before)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in ran.stdout.split()} - sys.stdlib_module_names == {"mdit"}
    here = tmp_path / "here"
    here.mkdir()
    program = f"import os; os.chdir({str(here)!r}); os.rmdir({str(here)!r}); import mdit.cli"
    env = {**os.environ, "PWD": str(here)}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (2, f"error: the working directory {here} is gone; change to another\n")


def test_every_launcher_is_a_command():
    """A wheel has no other way to start one."""
    assert sorted(COMMANDS) == sorted(path.stem for path in (REPOSITORY / "launchers").glob("*.py"))
