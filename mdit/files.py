"""Files that survive a power cut and can be trusted later."""

import hashlib
import os
from pathlib import Path

import xxhash


def checksum(path: Path) -> str:
    """xxh3 (64 bits) of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
