"""Tars of the WebDataset layout: files that share a name up to its last dot, one after the other, are one sample.

    *.tar    KEY.jpg (or another of archives.PICTURES)    KEY.txt and/or KEY.json    anything else, not read

The caption is KEY.txt, or what KEY.json holds under "caption". With a caption key it is what KEY.json holds there. With
--captions the kinds are keys of KEY.json, and "txt" is KEY.txt.
img2dataset (https://github.com/rom1504/img2dataset, output_format webdataset) writes such tars. Each tar is one part.
`mdit.sources.samples` has the rules.
"""

from collections.abc import Sequence
from pathlib import Path

from mdit.sources import Source, not_found, part_name
from mdit.sources.fields import caption_fields
from mdit.sources.samples import CAPTION, SampleFiles, require_caption

HOW = "put tars of KEY.jpg and KEY.txt there, as img2dataset writes them (output_format webdataset)"


def open_pictures(root: Path, caption_key: str | None, kinds: Sequence[str] | None = None, how: str = HOW) -> Source:
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise not_found(root, "*.tar", how)
    fields = caption_fields(kinds, caption_key or CAPTION)
    parts = [SampleFiles(part_name(path, root), path, fields, text_first=caption_key is None) for path in tars]
    require_caption(parts)
    return Source(parts, pictures=None)
