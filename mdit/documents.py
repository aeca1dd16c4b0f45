"""JSON and TOML from outside, read strictly: one function for each, and the error that a user can mend.

Everything a person or another program may have written (recipes, DeepSpeed JSONs, manifests, states, plans) comes
through here. Twice the same key, NaN, a number beyond 64 bits, text that is not Unicode, a date, or nesting without end
is an error in one line that names the file; nothing reaches a parser or a printer that would choke on it. A file is
read as far as MAX_BYTES, and parsed where its values take no more memory than MAX_MEMORY.
"""

import errno
import json
import math
import os
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

MAX_DEPTH = 64
MAX_MESSAGE = 2000  # characters
MAX_BYTES = 2**26  # of a document
MAX_TOML_BYTES = 2**20  # tomllib is slow
MAX_MEMORY = 2**28  # bytes of what JSON becomes, by MEMORY_OF
# Bytes that CPython needs at most for the values that begin with, or end at, each of these letters.
MEMORY_OF = {b"[": 80, b"{": 80, b",": 40, b":": 60, b'"': 16}


class UserError(Exception):
    """Something the user can mend: one line, which the commands print before they exit with code 2 (`mdit.cli`)."""

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """`text` printable on any terminal: line breaks as spaces, control characters and what is no Unicode escaped, the
    middle of long ones left out."""
    text = _without_middle(text).replace("\n", " ")
    return _without_middle("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _without_middle(text: str) -> str:
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[: MAX_MESSAGE * 3 // 4]} [...] {text[-MAX_MESSAGE // 4 :]}"


def explain(error: BaseException) -> str:
    """The line to tell of an error: for OSError "runs/a/config.json: No space left on device", else its own words."""
    if isinstance(error, OSError):
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        reason = error.strerror or str(error) or type(error).__name__
        return one_line(": ".join([*dict.fromkeys(names), reason]))
    return one_line(str(error) or type(error).__name__)


def brief(error: BaseException) -> str:
    """Type and words of an error that anything may have raised, on one line, cut off after 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def read_json(path: str | Path, what: str = "the file") -> Any:
    """The content of a JSON file. Raises UserError naming it; `what` says there what could not be read."""
    return parse_json(_read(path, what), path)


def read_toml(path: str | Path, what: str = "the file") -> dict[str, Any]:
    """The content of a TOML file. Raises UserError naming it."""
    return parse_toml(_read(path, what), path)


def parse_json(content: bytes | str, source: object) -> Any:
    """Raises UserError, beginning with `source`, for what is not JSON or not fit for use (`check`)."""
    loads = partial(json.loads, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    return _parse(lambda text: loads(_small(text, MAX_MEMORY)), "JSON", content, source)


def parse_foreign_json(content: bytes | str, most: int = MAX_MEMORY) -> Any:
    """JSON of other programs' data, which may hold NaN, a key twice and any numbers and texts. Raises ValueError for
    what is not JSON, not UTF-8, nested deeper than MAX_DEPTH, or takes more than `most` bytes of memory."""
    try:
        values = json.loads(_small(_text(content), most))
    except RecursionError as error:
        raise ValueError(_reason(error)) from None
    if any(depth > MAX_DEPTH for depth, _, _ in _walk(values)):
        raise ValueError(_reason(RecursionError()))
    return values


def parse_toml(content: bytes | str, source: object) -> dict[str, Any]:
    """Raises UserError, beginning with `source`, for what is not TOML or not fit for use (`check`)."""
    if len(content) > MAX_TOML_BYTES:
        raise UserError(f"{source}: not valid TOML: longer than {MAX_TOML_BYTES} bytes")
    return _parse(tomllib.loads, "TOML", content, source)


def _parse(loads: Callable[[str], Any], form: str, content: bytes | str, source: object) -> Any:
    try:
        check(values := loads(_text(content)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid {form}: {_reason(error)}") from None
    return values


def check(values: Any) -> None:
    """Raise ValueError where values nest deeper than MAX_DEPTH, where an integer takes more than 64 bits, where a text
    holds half of a surrogate pair, and for what JSON does not have, such as TOML's dates."""
    for depth, key, value in _walk(values):
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if isinstance(value, int) and not -(2**63) <= value < 2**64:
            raise ValueError(f"{key} is a number of more than 64 bits")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(f"{key} is not Unicode text: {value!r}") from None
        if not isinstance(value, str | int | float | dict | list | tuple | None):
            raise ValueError(f"{key} = {value} is a {type(value).__name__}, which no key takes")


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}"""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    flat = {}
    for key, value in items:
        inside = isinstance(value, dict | list | tuple)
        flat |= flatten(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return flat


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value in `one`, value in `other`) where they differ, keys like "a.b.0". A missing value is None."""
    first, second = flatten(one), flatten(other)
    for key in {**first, **second}:
        if first.get(key) != second.get(key):
            yield key, first.get(key), second.get(key)


def to_json(values: Any) -> str:
    """The text of a JSON file of ours. Raises ValueError for NaN and infinities, which JSON does not have."""
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _walk(values: Any) -> Iterator[tuple[int, str, Any]]:
    """(depth, key, value) of all that is inside, without recursion; keys themselves as values too."""
    yield 0, "the value", values
    waiting = [_inside("the value", values)]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
            continue
        key, value, is_key = found
        yield len(waiting) - is_key, "a key" if is_key else key, value
        if isinstance(value, dict | list | tuple):
            waiting.append(_inside(key, value))


def _inside(key: str, value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(key, value, is it a key itself) of what is in a table or list."""
    if isinstance(value, dict):
        for name, inside in value.items():
            yield name, name, True
            yield name, inside, False
    elif isinstance(value, list | tuple):
        for inside in value:
            yield key, inside, False


def open_regular(path: str | Path) -> int:
    """A descriptor of a file to read from. Raises OSError, also for what is no regular file: a pipe would block, a
    device has no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        number = errno.EISDIR if os.path.isdir(path) else errno.EINVAL
        raise OSError(number, "no regular file" if number == errno.EINVAL else os.strerror(number), str(path))
    return descriptor


def read_bytes(path: str | Path) -> bytes:
    """A file of at most MAX_BYTES. A pipe is read where it is named as one: /dev/stdin, /dev/fd/63. Raises OSError and
    ValueError."""
    is_stream = str(path).startswith("/dev/") and not os.path.isfile(path)
    with open(path, "rb") if is_stream else open(open_regular(path), "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"has more than {MAX_BYTES} bytes")
    return content


def read_text(path: str | Path) -> str:
    """A text file of at most MAX_BYTES, UTF-8, with or without the mark that some editors put first, its lines ended by
    line feeds. Raises UserError naming it."""
    try:
        return _text(_read(path, "the file")).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None


def plain_name(name: str) -> str:
    """`name`, the name of a file beside the one that names it. Raises ValueError where it leads elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file in this directory")
    return name


def path_below(folder: Path, name: str) -> Path:
    """The file that a document in `folder` means by `name`. Raises ValueError where the name leads out of the folder;
    whether there is a link on the way is the folder's own matter."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(f"{name!r} leads out of {folder}")
    return folder / name


def _read(path: str | Path, what: str) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have, or too much
        raise UserError(f"{path}: cannot read {what}: {getattr(error, 'strerror', None) or error}") from None


def _small(text: str, most: int) -> str:
    """`text`, JSON that takes at most so many bytes when it is parsed. Raises ValueError."""
    if 80 * len(text) > most:  # else it cannot be more
        needed = len(text) + sum(text.count(letter.decode()) * size for letter, size in MEMORY_OF.items())
        if needed > most:
            raise ValueError(f"would take about {needed / 2**20:,.0f} MiB of memory, more than {most / 2**20:,.0f}")
    return text


def _text(content: bytes | str) -> str:
    """UTF-8, with or without the mark that some editors put first."""
    return content.decode("utf-8-sig") if isinstance(content, bytes) else content.removeprefix("\ufeff")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        both = [value for name, value in pairs if name == twice]
        raise ValueError(f"key {twice!r} is there {len(both)} times, with {both[0]!r} and {both[1]!r}")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is beyond a float of 64 bits")
    return value


def _reason(error: Exception) -> str:
    return f"nested more than {MAX_DEPTH} deep" if isinstance(error, RecursionError) else str(error)
