"""Files of tars and directories, put together to samples by their names: KEY.jpg, KEY.txt and KEY.json are one.

The key is all before the last dot of the file's name, so `v1.0_0001.jpg` and `v1.0_0002.jpg` are two. webdataset itself
ends the key at the first dot; `KEY.seg.png`, to which no caption belongs, is a further file of the sample KEY in either
reading. Lines in the log say so. Every picture and every caption ends in a sample, in one that is rejected, or in an
error.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mdit.config import UserError
from mdit.dist import logger
from mdit.sources import FilePart, Picture, Rejected, captioned
from mdit.sources.archives import PICTURES, ArchiveMember, is_hidden, is_picture, read_members
from mdit.sources.fields import CaptionFields, Found, require_fields
from mdit.sources.files import PEEKED, parse_object, read_object

TEXT, OBJECT = ".txt", ".json"
CAPTION, FIELD_OF_TEXT = "caption", "txt"  # the key of KEY.json that is read by default, and the field that is KEY.txt
NAMED = 4  # files, in a line about many
_told: set[tuple[Path, str]] = set()  # folders, and the kinds of lines that were logged about them


@dataclass(frozen=True)
class SampleFiles(FilePart):
    """The samples of a tar or of a directory. The only caption is what KEY.json holds in the field, or KEY.txt where
    there is one and it goes `text_first`. Of several, the field "txt" is KEY.txt."""

    fields: CaptionFields
    text_first: bool = True

    def __iter__(self) -> Iterator[Picture | Rejected]:
        halves: dict[str, bool] = {}  # key -> was it the picture that was there
        times: Counter[str] = Counter()
        for item in grouped(read_members(self.path, self.name, _is_wanted)):
            if isinstance(item, Rejected):
                yield item
                continue
            times[item.key] += 1
            again = f" ({times[item.key]})" if times[item.key] > 1 else ""
            sample = self._sample(item, f"{self.name}/{item.key}{again}")
            self._tell(item)
            if not item.is_whole and not item.clashes:
                if halves.setdefault(item.key, item.has_picture) != item.has_picture:
                    raise UserError(_unsorted(self.path, item.key))
            yield sample

    def _sample(self, group: "Group", origin: str) -> Picture | Rejected:
        files = f"files {_some(group.names)}"
        if group.clashes:
            return Rejected(origin, "name twice", files)
        picture = next((group.files[suffix] for suffix in PICTURES if suffix in group.files), None)
        if picture is None:
            return Rejected(origin, "missing picture", files)
        words = [group.files[suffix] for suffix in self._suffixes(group) if suffix in group.files]
        for item in (picture, *words):
            if isinstance(item, Rejected):
                return Rejected(origin, item.reason, item.detail)
        try:
            found = self.captions([item for item in words if isinstance(item, ArchiveMember)])
        except ValueError as error:
            return Rejected(origin, "unreadable caption", f"{files}: {error}")
        assert isinstance(picture, ArchiveMember)
        sample = captioned(origin, picture.data, found)
        return Rejected(origin, sample.reason, f"{files}: {sample.detail}") if isinstance(sample, Rejected) else sample

    def captions(self, words: list[ArchiveMember]) -> Found:
        """The captions in a sample's texts and objects. Raises ValueError for what cannot be read."""
        values, only = {}, None
        for item in words:
            if _split(item.name)[1] == OBJECT:
                values = parse_object(item.data) | values
            else:
                values[FIELD_OF_TEXT] = only = item.data.decode("utf-8-sig")
        return self.fields.read(values) if self.fields.several or only is None else only

    def _suffixes(self, group: "Group") -> list[str]:
        """Suffixes of the files that captions are read from."""
        if not self.fields.several:
            return [TEXT if self.text_first and TEXT in group.files else OBJECT]
        return sorted({TEXT if name == FIELD_OF_TEXT else OBJECT for name in self.fields.names})

    def _tell(self, group: "Group") -> None:
        others = [name for name in group.names if _split(name)[0] != group.key]
        others += [group.key + suffix for suffix in [s for s in PICTURES if s in group.files][1:]]
        if others and group.is_whole:
            line = f"of a sample one picture is read, and of {group.key} not {others[0]}, for example"
            _tell_once(self.path.parent, "further", line)
        if (by_webdataset := _outer(group.key + ".")) != group.key:
            line = f"a sample's key ends at the last dot ({group.key}); webdataset itself would end it at the first"
            _tell_once(self.path.parent, "key", f"{line} ({by_webdataset})")


def require_caption(parts: Sequence[SampleFiles], known: Collection[str] = ()) -> None:
    """Look at the first captions. Raises UserError naming the keys of KEY.json when none has a wanted one, unless that
    is known to be somewhere in the set."""
    peeked: list[dict] = []
    for part in parts[:3]:
        fields, objects, texts = part.fields, [], 0
        members = read_members(part.path, part.name, lambda name: _is_wanted(name) and not is_picture(name))
        for item in islice(members, PEEKED):
            if isinstance(item, ArchiveMember) and _split(item.name)[1] == TEXT:
                texts += 1
                peeked.append({FIELD_OF_TEXT: item.data})
            elif isinstance(item, ArchiveMember) and (values := read_object(item.data)) is not None:
                objects.append(values)
            if not fields.several and ((texts and part.text_first) or any(fields.names[0] in o for o in objects[-1:])):
                return
        peeked += objects
        if not fields.several:
            require_fields(objects, fields, f"{part.path}: KEY.json")
            if texts:
                raise UserError(f"--caption_key {fields.names[0]}: {part.path} has captions in KEY.txt and no KEY.json")
    if peeked and (unknown := {kind: name for kind, name in parts[0].fields.fields.items() if name not in known}):
        require_fields(peeked, CaptionFields(unknown, several=True), f"{parts[0].path.parent}: KEY.json or KEY.txt")


@dataclass
class Group:
    """Files that belong to one sample. `parts` are such of longer keys, which have no sample of their own."""

    key: str
    files: dict[str, ArchiveMember | Rejected] = field(default_factory=dict)  # by suffix
    parts: list["Group"] = field(default_factory=list)
    clashes: list[str] = field(default_factory=list)  # further files of the same names

    @property
    def has_picture(self) -> bool:
        return any(suffix in PICTURES for suffix in self.files)

    @property
    def is_whole(self) -> bool:
        return self.has_picture and (TEXT in self.files or OBJECT in self.files) and not self.clashes

    @property
    def names(self) -> list[str]:
        own = [_name(item) for item in self.files.values()]
        return own + self.clashes + [name for part in self.parts for name in part.names]

    def forget(self) -> "Group":
        """The group without the files' content, which nobody will ask for."""
        self.files = {suffix: ArchiveMember(_name(item), b"") for suffix, item in self.files.items()}
        return self


def grouped(members: Iterable[ArchiveMember | Rejected]) -> Iterator[Group | Rejected]:
    """Files to groups, each file in one of them, in little memory: a group ends with the first file whose name does not
    begin with its key and a dot. What is Rejected as a whole comes through."""
    open_: list[Group] = []  # each key begins with the one before; the first ends where webdataset ends it
    for item in members:
        if isinstance(item, Rejected) and item.member is None:
            yield item
            continue
        name = _name(item)
        while open_ and not name.startswith(open_[-1].key + "."):
            yield from _closed(open_.pop(), open_)
        key, suffix = _split(name)
        if not open_:
            open_.append(Group(_outer(name)))
        if key != open_[-1].key:
            open_.append(Group(key))
        group = open_[-1]
        if suffix in group.files and group.is_whole:
            yield group  # and again such a sample
            group = open_[-1] = Group(key)
        if suffix in group.files:
            group.clashes.append(name)
        else:
            group.files[suffix] = item
    while open_:
        yield from _closed(open_.pop(), open_)


def _closed(group: Group, around: list[Group]) -> Iterator[Group]:
    if group.is_whole or group.clashes:
        yield group
    elif around:
        around[-1].parts.append(group.forget())
    elif group.files:
        yield group
    else:
        yield from group.parts


def _name(item: ArchiveMember | Rejected) -> str:
    return item.name if isinstance(item, ArchiveMember) else str(item.member)


def _is_wanted(name: str) -> bool:
    return not is_hidden(name) and (is_picture(name) or _split(name)[1] in (TEXT, OBJECT))


def _split(name: str) -> tuple[str, str]:
    """ "a/b.c.JPG" -> "a/b.c", ".jpg"."""
    key, _, suffix = name.rpartition(".")
    return key, f".{suffix.lower()}"


def _outer(name: str) -> str:
    """ "a/b.c.jpg" -> "a/b", which is webdataset's key."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _unsorted(path: Path, key: str) -> str:
    return (
        f"{path}: is not sorted by name: the files of {key} are apart. Pack it again: mkdir sorted && "
        f"tar -xf {path.name} -C sorted && tar --sort=name -cf {path.name} -C sorted ."
    )


def _tell_once(folder: Path, kind: str, line: str) -> None:
    if (folder, kind) not in _told:
        _told.add((folder, kind))
        logger.warning(f"{folder}: {line}")
