"""Fields of a picture's record, of a JSON object or a row of a table, that hold its captions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mdit.captions import Caption
from mdit.config import UserError, near_key

Found = str | None | list[Caption]  # the only caption of a picture, or all of the kinds that were asked for


@dataclass(frozen=True)
class CaptionFields:
    """`fields` maps kinds of captions to the fields that hold them. Unless there are `several`, only the first text of
    the only field counts."""

    fields: Mapping[str, str]
    several: bool

    @property
    def names(self) -> list[str]:
        return [*self.fields.values()]

    def read(self, values: Mapping[str, Any]) -> Found:
        if not self.several:
            return text(values.get(self.names[0]))
        return [Caption(kind, each) for kind, name in self.fields.items() for each in texts(values.get(name))]


def caption_fields(kinds: Sequence[str] | None, key: str, form: str = "{}") -> CaptionFields:
    """The field `key`, or those of all `kinds`, which are named by `form`."""
    if kinds is None:
        return CaptionFields({"": key}, several=False)
    return CaptionFields({kind: form.format(kind) for kind in kinds}, several=True)


def of_kind(kinds: Sequence[str] | None, kind: str, found: Sequence[str | None]) -> Found:
    """The captions of a picture that are all of one kind: the first, or all where kinds were asked for."""
    if kinds is None:
        return found[0] if found else None
    return [Caption(kind, each) for each in found if each is not None]


def all_texts(found: Found) -> list[str]:
    return [caption.text for caption in found] if isinstance(found, list) else [found or ""]


def check_kinds(kinds: Iterable[str], known: Iterable[str], of: str) -> None:
    """Raise UserError naming the first of the kinds that is not known."""
    for kind in kinds:
        if kind not in known:
            there = f"{near_key(kind, known)}; there are {', '.join(known)}"
            raise UserError(f"captions.{kind}: {of} has no captions of this kind{there}")


def require_key(objects: Iterable[Mapping], key: str, where: object, remedy: str = "name one by --caption_key") -> None:
    """Raise UserError naming the keys that are there when none of the objects has `key` (and there are some)."""
    there: dict[str, None] = {}
    count = 0
    for values in objects:
        if key in values:
            return
        count += 1
        there |= dict.fromkeys(values)
    if count:
        raise UserError(
            f"{where}: no caption: none of the first {count} objects has the key {key}; the keys there are "
            f"{', '.join(map(str, there)) or 'none'}; {remedy}"
        )


def require_fields(objects: Sequence[Mapping], fields: CaptionFields, where: object) -> None:
    """Raise UserError when none of the objects has one of the fields."""
    for name in fields.names:
        remedy = "name those by --captions" if fields.several else "name one by --caption_key"
        require_key(objects, name, where, remedy)


def text(value: Any) -> str | None:
    """A caption, or the first of several; None when it is neither."""
    if isinstance(value, list | tuple) and value:
        value = value[0]
    return value if isinstance(value, str) else None


def texts(value: Any) -> list[str]:
    """A caption, or several; whatever else there is does not count."""
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, str)]
