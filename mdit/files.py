"""Files that survive a power cut and can be trusted later."""

import hashlib
import os
from pathlib import Path

import xxhash
from safetensors.torch import save_file
from torch import Tensor


def checksum(path: Path) -> str:
    """xxh3 (64 bits) of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_64).hexdigest()


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and wait until it is on disk. Others may read it as far as the umask lets them:
    safetensors itself makes files that only their owner can read."""
    save_file(tensors, path, metadata)
    os.umask(mask := os.umask(0))
    path.chmod(0o666 & ~mask)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
