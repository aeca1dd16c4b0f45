"""MONET: 104.9 million pictures of open sources, real and synthetic, each with several captions from short to long.

From https://huggingface.co/datasets/jasperai/monet (arXiv 2605.21272), any number of its tars. Licence: Apache-2.0;
that of a picture is its source's.

    VERSION/SOURCE/**/*.tar    KEY.jpg    KEY.json    KEY.embedding_....pth and others, which are passed over

`--root` may be the folder of a version or of one of its sources (synthetic, coyo, laion, ...). KEY.json holds captions
under "caption_KIND", where a kind is who wrote it (KNOWN), and "original" the alt text, or the prompt of a synthetic
picture. A picture may lack some of them. Without --captions the original one counts.

The layout is that which public readers of the set rely on (https://github.com/gojasper/nano-t2i); the set itself has
not been read.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mdit.config import UserError
from mdit.sources import Source, not_found, part_name
from mdit.sources.archives import ArchiveMember, walk
from mdit.sources.fields import Found, caption_fields
from mdit.sources.samples import SampleFiles, require_caption

KEY, VERSION = "caption_{}", re.compile(r"v\d+(\.\d+)*")
KNOWN = ("original", "florence-2-large", "internvl-3-8b", "sharegpt4v-7b", "gemini-2.5-flash-lite")
NOTHING = "nan"  # a caption that is not there, as a table's writer left it
HOW = "get tars of https://huggingface.co/datasets/jasperai/monet"


def open_pictures(root: Path, kinds: Sequence[str] | None) -> Source:
    tars = sorted(folder / name for folder, names in walk(root) for name in names if name.endswith(".tar"))
    if not tars:
        raise not_found(root, "VERSION/SOURCE/**/*.tar", HOW)
    versions = sorted({name for path in tars if VERSION.fullmatch(name := path.relative_to(root).parts[0])})
    if len(versions) > 1:
        raise UserError(f"{root}: holds {' and '.join(versions)} of one set; give --root {root / versions[-1]}")
    fields = caption_fields(kinds, KEY.format("original"), KEY)
    parts = [Tar(part_name(path, root), path, fields, text_first=False) for path in tars]
    require_caption(parts, known=[KEY.format(kind) for kind in KNOWN])
    return Source(parts, pictures=None)


@dataclass(frozen=True)
class Tar(SampleFiles):
    def captions(self, words: list[ArchiveMember]) -> Found:
        found = super().captions(words)
        if isinstance(found, list):
            return [caption for caption in found if caption.text.strip().lower() != NOTHING]
        return None if (found or "").strip().lower() == NOTHING else found
