"""JourneyDB: 4.2 million pictures by Midjourney with their prompts, and about 230,000 more for validation.

From https://huggingface.co/datasets/JourneyDB/JourneyDB (accept its terms first): data/train/imgs/000.tgz to 199.tgz,
any number of them, and data/train/train_anno_realease_repath.jsonl.tgz (spelled like that), to be unpacked where it
lies. Likewise data/valid with valid_anno_repath.jsonl.tgz. Licence: JourneyDB Terms of Usage, for non-commercial
research.

    data/train/train_anno_realease_repath.jsonl    {"img_path": "./000/UUID.jpg", "prompt": ...} a line
    data/train/imgs/000.tgz                        or the directory 000 that it unpacks to; taken if both are there
    data/valid/valid_anno_repath.jsonl, data/valid/imgs/000.tgz

`data/` may be left out, as in the layout of the paper's code. Lines of archives that are not there are skipped. The
prompts come as they are, Midjourney's options ("--v 4") included. With --captions there are two kinds: "prompt", and
"caption" for what GPT-3.5 made of it, in "Task2": {"Caption": ...} of a labelled line.
"""

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mdit.dist import logger
from mdit.sources import Picture, Rejected, Source, captioned, not_found, part_name
from mdit.sources.archives import ArchiveMember, is_picture, read_members, without_unpacked
from mdit.sources.fields import CaptionFields, Found, caption_fields
from mdit.sources.files import read_object
from mdit.sources.storage import opened

SPLITS = {
    "train": ("train", "train_anno_realease_repath.jsonl"),
    "validation": ("valid", "valid_anno_repath.jsonl"),
}
KINDS = ("prompt", "caption")
HOW = "get it from https://huggingface.co/datasets/JourneyDB/JourneyDB"
DIRECTORY = re.compile(rb'"img_path"\s*:\s*"(?:\./)?([^/"]+)/')


def open_pictures(root: Path, split: str, kinds: Sequence[str] | None) -> Source:
    """Reads all captions once, to learn where those of each archive are: a minute for the whole set."""
    folder_name, captions_name = SPLITS[split]
    folder = root / "data" / folder_name
    if not folder.is_dir() and (root / folder_name).is_dir():
        folder = root / folder_name
    below = folder.relative_to(root)
    images = without_unpacked(
        folder.glob("imgs/[0-9]*.tgz"), (path for path in folder.glob("imgs/[0-9]*") if path.is_dir())
    )
    if not images:
        raise not_found(root, f"{below}/imgs/000.tgz and no {below}/imgs/000/", HOW)
    captions = folder / captions_name
    if not captions.is_file():
        packed = captions.with_name(captions_name + ".tgz")
        raise not_found(root, f"{below}/{captions_name}", f"unpack {packed}" if packed.is_file() else HOW)
    names = [path.name.split(".")[0] for path in images]
    lines, fields = find_lines(captions, names), caption_fields(kinds, "prompt")
    parts = [
        Archive(part_name(Path(name), Path()), path, captions, lines[name], fields) for name, path in zip(names, images)
    ]
    return Source(parts, sum(map(len, lines.values())))


def find_lines(captions: Path, names: list[str]) -> dict[str, array]:
    """Byte offsets of the lines of each archive. Raises OSError."""
    lines, strange, offset = {name: array("Q") for name in names}, 0, 0
    with opened(captions) as file:
        for line in file:
            if (match := DIRECTORY.search(line)) is None:
                strange += 1
            elif (found := lines.get(match[1].decode(errors="replace"))) is not None:
                found.append(offset)
            offset += len(line)
    if strange:
        logger.warning(f"{captions}: {strange} lines name no picture and are skipped")
    return lines


@dataclass(frozen=True, eq=False)
class Archive:
    """One of the archives, packed or unpacked; `lines` are the byte offsets of its lines in `captions`."""

    name: str
    path: Path
    captions: Path
    lines: array
    fields: CaptionFields

    def __iter__(self) -> Iterator[Picture | Rejected]:
        prompts: dict[str, Found] = {}
        with opened(self.captions) as file:
            for offset in self.lines:
                file.seek(offset)
                if (values := read_object(file.readline())) is None or not isinstance(values.get("img_path"), str):
                    yield Rejected(f"{self.captions.name}:byte {offset}", "unreadable caption")
                elif (name := PurePosixPath(values["img_path"]).name) in prompts:
                    yield Rejected(f"{self.captions.name}:byte {offset}", "name twice", f"{name} has another line")
                else:
                    answer = values.get("Task2")
                    values["caption"] = answer.get("Caption") if isinstance(answer, dict) else None
                    prompts[name] = self.fields.read(values)
        for item in read_members(self.path, self.path.name, is_picture):
            name = PurePosixPath(item.name if isinstance(item, ArchiveMember) else item.origin).name
            prompt = prompts.pop(name, None)
            yield captioned(f"{self.path.name}/{name}", item.data, prompt) if isinstance(item, ArchiveMember) else item
        for name in prompts:
            yield Rejected(f"{self.path.name}/{name}", "missing picture")

    def inputs(self) -> list[Path | bytes]:
        return [self.path, self.lines.tobytes()]  # where the captions begin: it changes with the length of any
