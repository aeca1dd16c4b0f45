"""Tars of the WebDataset layout: files that share a name up to its first dot, one after the other, are one sample.

    *.tar    KEY.jpg (or jpeg, png, webp)    KEY.txt and/or KEY.json    anything else, not read

The caption is KEY.txt, or what KEY.json holds under "caption". With a caption key it is what KEY.json holds there.
img2dataset (https://github.com/rom1504/img2dataset, output_format webdataset) writes such tars. Each tar is one part.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mdit.sources import Picture, Rejected, Source, captioned, not_found
from mdit.sources.archives import PICTURES, Member, read_members
from mdit.sources.files import read_object, text

READ = (*PICTURES, ".txt", ".json")
HOW = "put tars of KEY.jpg and KEY.txt there, as img2dataset writes them (output_format webdataset)"


def open_pictures(root: Path, caption_key: str | None, how: str = HOW) -> Source:
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise not_found(root, "*.tar", how)
    return Source([Tar(path.name, path, caption_key) for path in tars], pictures=None)


@dataclass(frozen=True)
class Tar:
    name: str
    path: Path
    caption_key: str | None

    def __iter__(self) -> Iterator[Picture | Rejected]:
        members = read_members(self.path, self.name, lambda name: _split(name)[1] in READ)
        for key, group in itertools.groupby(members, _key):
            if key is None:
                yield from group
            else:
                yield self._sample(f"{self.name}/{key}", {_split(member.name)[1]: member.data for member in group})

    def look(self) -> list[Path]:
        return [self.path]

    def _sample(self, origin: str, files: dict[str, bytes]) -> Picture | Rejected:
        picture = next((files[suffix] for suffix in PICTURES if suffix in files), None)
        if picture is None:
            return Rejected(origin, "missing picture")
        try:
            return captioned(origin, picture, self._caption(files))
        except ValueError:
            return Rejected(origin, "unreadable caption")

    def _caption(self, files: dict[str, bytes]) -> str | None:
        """Raises ValueError when it is not UTF-8 or not JSON."""
        if self.caption_key is None and ".txt" in files:
            return files[".txt"].decode()
        if ".json" not in files:
            return None
        if (values := read_object(files[".json"])) is None:
            raise ValueError("not a JSON object")
        return text(values.get(self.caption_key or "caption"))


def _split(name: str) -> tuple[str, str]:
    """ "a/b.c.jpg" -> "a/b", ".c.jpg"."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot + suffix.lower()


def _key(item: Member | Rejected) -> str | None:
    return _split(item.name)[0] if isinstance(item, Member) else None
