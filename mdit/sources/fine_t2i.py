"""Fine-T2I: about 6 million synthetic and curated pictures (2 TB), with a prompt and a longer, enhanced one.

From https://huggingface.co/datasets/ma-xu/fine-t2i (arXiv 2602.09439), any number of its tars. Licence: Apache-2.0 for
the synthetic subsets; look at the set's page for "curated".

    synthetic_original_prompt_square_resolution/train-000000.tar    ID.jpg    ID.json    ID.txt
    synthetic_..._random_resolution/, synthetic_enhanced_prompt_.../, curated/ (without ID.txt)

`--root` may be one of the subsets. The caption is ID.txt, or else "prompt" of ID.json. With --captions there are two
kinds: "original" ("prompt") and "enhanced" ("enhanced_prompt").

The layout is that which public readers of the set rely on; the set itself has not been read.
"""

from collections.abc import Sequence
from pathlib import Path

from mdit.sources import Source, not_found, part_name
from mdit.sources.archives import walk
from mdit.sources.fields import CaptionFields, caption_fields
from mdit.sources.samples import SampleFiles

FIELDS = {"original": "prompt", "enhanced": "enhanced_prompt"}
KINDS = tuple(FIELDS)
HOW = "get tars of https://huggingface.co/datasets/ma-xu/fine-t2i"


def open_pictures(root: Path, kinds: Sequence[str] | None) -> Source:
    tars = sorted(folder / name for folder, names in walk(root) for name in names if name.endswith(".tar"))
    if not tars:
        raise not_found(root, "*/train-*.tar", HOW)
    if kinds is None:
        fields = caption_fields(None, FIELDS["original"])
    else:
        fields = CaptionFields({kind: FIELDS[kind] for kind in kinds}, several=True)
    return Source([SampleFiles(part_name(path, root), path, fields) for path in tars], pictures=None)
