"""The reader of JSON and TOML: what it gives back, and that all else is one bounded, printable line."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdit.documents import MAX_DEPTH, MAX_MESSAGE, UserError, parse_json, parse_toml, read_json, read_toml, to_json

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT, lambda inside: st.lists(inside) | st.dictionaries(TEXT, inside)
)
BOM = b"\xef\xbb\xbf"


def refused(parse, content) -> str:
    with pytest.raises(UserError) as caught:
        parse(content, "a file")
    message = str(caught.value)
    assert message.startswith("a file: not valid ") and message.isprintable() and len(message) < MAX_MESSAGE + 10
    return message


@settings(max_examples=50)
@given(VALUES)
def test_what_is_written_is_read_again(values):
    assert parse_json(to_json(values), "a file") == values
    assert parse_json(BOM + to_json(values).encode(), "a file") == values


@settings(max_examples=50)
@given(st.binary() | st.text() | st.text('{}[]",:e+-0123456789\\u\n', max_size=40))
def test_anything_else_is_a_value_or_one_line(content):
    for parse in (parse_json, parse_toml):
        try:
            parse(content, "a file")
        except UserError as error:
            assert str(error).isprintable()


@pytest.mark.parametrize("depth", [0, 1, MAX_DEPTH - 1])
@pytest.mark.parametrize("table", ['{"a": %s}', '[{"b": 1}, %s]'])
def test_a_key_twice_is_refused_at_any_depth_with_both_values(depth, table):
    content = '{"key": "one", "other": 2, "key": "two"}'
    for _ in range(depth):
        content = table % content
    assert "key 'key' is there 2 times, with 'one' and 'two'" in refused(parse_json, content)


def test_finding_the_key_that_is_there_twice_takes_no_time():
    pairs = ", ".join(f'"{number}": 0' for number in range(100_000))
    assert "'99999'" in refused(parse_json, "{" + pairs + ', "99999": 1}')


DEEP, BITS = f"nested more than {MAX_DEPTH} deep", "seed is a number of more than 64 bits"
REFUSED = [
    *((parse_json, f'{{"a": [{number}]}}', number) for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999")),
    *((parse_json, f'{{"a": [{{"seed": {n}}}]}}', BITS) for n in (2**64, -(2**63) - 1, "1" * 4000)),
    *((parse_toml, f"seed = {number}", BITS) for number in (2**64, -(2**63) - 1, "0x" + "f" * 10**5)),
    *((parse_toml, f"[a]\nwhen = {date}", "when = ") for date in ("2024-01-01", "2024-01-01T00:00:00Z", "07:32:00")),
    *((parse_json, text, "not Unicode text") for text in ('{"name": "\\ud83d"}', '{"\\ude00": 1}', '["\\ud83d x"]')),
    *((parse_json, data, "") for data in (b'"\xff"', b"\xff\xfe{\x00}\x00", b'"\xed\xa0\xbd"')),
    *((parse_toml, b"a = " + data, "") for data in (b'"\xff"', b"\xff\xfe{\x00}\x00", b'"\xed\xa0\xbd"')),
    (parse_json, "1" * 5000, "digits"),  # more than Python reads
    (parse_json, "[" * 10**6, DEEP),
    (parse_json, '{"a": ' * 10**5 + "1" + "}" * 10**5, DEEP),
    (parse_json, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), DEEP),
    (parse_toml, "a = " + "[" * 10**5, DEEP),
    (parse_toml, "a = " + "{a = " * 10**5, DEEP),
    (parse_toml, f"[{'.'.join('a' * (MAX_DEPTH + 1))}]", DEEP),
]


@pytest.mark.parametrize("parse, content, message", REFUSED, ids=lambda value: str(value)[:20])
def test_what_no_document_may_hold_is_refused(parse, content, message):
    assert message in refused(parse, content)


def test_a_whole_surrogate_pair_is_text():
    assert parse_json('"\\ud83d\\ude00"', "a file") == "\U0001f600"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    (tmp_path / "a.toml").write_bytes(BOM + b"[a]\r\nb = 1\r\n")
    (tmp_path / "a.json").write_bytes(BOM + b'{"a": {"b": 1}}\r\n')
    assert read_toml(tmp_path / "a.toml") == read_json(tmp_path / "a.json") == {"a": {"b": 1}}


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "directory"), ("a\0b", "null")):
        with pytest.raises(UserError, match=f"cannot read the thing: .*{reason}"):
            read_json(path, "the thing")


@pytest.mark.parametrize(
    "text", ["x" * 10**7, "\n" * 10**5, "\x1b[31m\r\x00\u2028", "\ud83d", "\x07" * 10**5], ids=range(5)
)
def test_a_message_is_one_bounded_printable_line(text):
    message = str(UserError(f"begin {text} end"))
    assert message.isprintable() and message.startswith("begin ") and message.endswith(" end")
    assert len(message) < MAX_MESSAGE + 10


def test_what_json_does_not_have_is_not_written():
    with pytest.raises(ValueError):
        to_json({"a": float("nan")})
    assert json.loads(to_json({"a": "ä"})) == {"a": "ä"}
