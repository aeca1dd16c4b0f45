"""Segment Anything 1B: about 11.2 million photographs, with the captions that PixArt-alpha's authors had LLaVA write.

Pictures   1,000 tars of about 10 GB, from https://ai.meta.com/datasets/segment-anything-downloads/ (a list of links
           that are valid for some days). Licence: SA-1B Dataset Research License, for research alone.
Captions   https://huggingface.co/datasets/PixArt-alpha/SAM-LLaVA-Captions10M: SA1B_caption.tar.gz with a text for
           each of about 10 million pictures; unpack it: mkdir captions; tar -xzf SA1B_caption.tar.gz -C captions

    images/sa_000000.tar         ./sa_223750.jpg and ./sa_223750.json (masks, not read); any number of tars
    raw/**/sa_223750.jpg         or unpacked pictures; a directory is taken instead of the tar of its name
    captions/**/sa_223750.txt    all in one directory, or in one for each tar, named like it

The captions are not read from SA1B_caption.tar.gz itself: that would have to be held in memory or unpacked all the
same. A picture without a caption is rejected.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mdit.sources import FilePart, Picture, Rejected, Source, captioned, not_found, part_name
from mdit.sources.archives import ArchiveMember, is_picture, read_members, rejected_file, walk, without_unpacked
from mdit.sources.storage import read_file

IMAGES = "get the tars from https://ai.meta.com/datasets/segment-anything-downloads/"
CAPTIONS = "unpack SA1B_caption.tar.gz of https://huggingface.co/datasets/PixArt-alpha/SAM-LLaVA-Captions10M there"


def open_pictures(root: Path) -> Source:
    unpacked = [folder for folder, names in walk(root / "raw") if any(map(_is_picture, names))]
    places = without_unpacked(root.glob("images/*.tar"), unpacked)
    if not places:
        raise not_found(root, "images/*.tar and no raw/**/sa_*.jpg", IMAGES)
    texts = list(_text_folders(root / "captions"))
    if not texts:
        raise not_found(root, "captions/**/sa_*.txt", CAPTIONS)
    parts = []
    for path in places:
        named_alike = [folder for folder in texts if folder.name == path.name.split(".")[0]]
        parts.append(Photographs(part_name(path, root), path, named_alike or texts))
    return Source(parts, pictures=None)


@dataclass(frozen=True)
class Photographs(FilePart):
    """One tar or directory; `texts` are the directories that may hold its captions, too many to be fingerprinted."""

    texts: Sequence[Path]

    def __iter__(self) -> Iterator[Picture | Rejected]:
        for item in read_members(self.path, self.name, _is_picture):
            yield self._with_caption(item) if isinstance(item, ArchiveMember) else item

    def _with_caption(self, member: ArchiveMember) -> Picture | Rejected:
        origin, name = f"{self.name}/{member.name}", f"{PurePosixPath(member.name).stem}.txt"
        for folder in self.texts:
            try:
                return captioned(origin, member.data, read_file(folder / name).decode())
            except Exception as error:
                rejected = rejected_file(error, origin, str(folder / name), folder)
                if rejected.reason != "missing picture":
                    return Rejected(origin, "unreadable caption", rejected.detail)
        return Rejected(origin, "no caption")


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).name.startswith("sa_") and is_picture(name)


def _text_folders(folder: Path, inside: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Directories with captions. The first one that is met settles a directory: it may hold ten million more. Those
    that a link leads back to are not looked at again."""
    below = []
    if folder.is_dir() and (real := folder.resolve()) not in inside:
        inside |= {real}
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("sa_") and entry.name.endswith(".txt"):
                    yield folder
                    return
                if entry.is_dir():
                    below.append(Path(entry.path))
    for path in sorted(below):
        yield from _text_folders(path, inside)
