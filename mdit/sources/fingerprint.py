"""A part's content in 16 digits, from what is cheap to look at: whether a set was made from it, or from another.

Three things are hashed: the first pictures that the part gives, with their captions; the captions of all of them where
they lie in memory or in one text file; and of each file or archive the size and four blocks of 64 KiB. So another
folder of the same name, captions that were rewritten and archives that were packed anew are seen. Not seen are a change
inside an archive, of the same length and between the blocks, and pictures in single files behind the first ones. No
time of writing counts, as copies have other ones.
"""

import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from mdit.sources import Part, Rejected

FIRST = 3  # pictures
BLOCKS, BLOCK_BYTES = 4, 2**16
FILES = 4  # of a directory


def fingerprint(part: Part, items: Iterable[Any]) -> str:
    """`items` are what the part gives, of which the first count unless they are `drawn`. A part may have a method
    `inputs()` that returns the files and directories that it reads, as paths, and texts, as bytes. Raises OSError."""
    digest = xxhash.xxh3_64()
    for item in () if getattr(part, "drawn", False) else islice(items, FIRST):
        _add(digest, item.origin.encode(errors="surrogatepass"))
        if isinstance(item, Rejected):
            _add(digest, item.reason.encode())
            continue
        _add(digest, item.caption.encode(errors="surrogatepass"))
        for kind, text in getattr(item, "captions", ()):
            _add(digest, f"{kind}: {text}".encode(errors="surrogatepass"))
        for name in ("image", "latent", "embedding"):
            if (data := getattr(item, name, None)) is not None:
                _add(digest, data if isinstance(data, bytes) else data.tobytes())
    for thing in getattr(part, "inputs", tuple)():
        if isinstance(thing, bytes):
            _add(digest, thing)
        elif thing.is_dir():
            _add_directory(digest, thing)
        else:
            _add_file(digest, thing)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_64, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_file(digest: xxhash.xxh3_64, path: Path) -> None:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        for block in range(BLOCKS):
            file.seek(max(size - BLOCK_BYTES, 0) * block // (BLOCKS - 1))
            _add(digest, file.read(BLOCK_BYTES))


def _add_directory(digest: xxhash.xxh3_64, path: Path) -> None:
    names = sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    _add(digest, "\0".join(names).encode(errors="surrogatepass"))
    for name in names[:: max(len(names) // FILES, 1)][:FILES]:
        _add_file(digest, path / name)
