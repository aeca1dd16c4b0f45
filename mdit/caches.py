"""Caches of compiled code, on this machine's own disk.

Triton keeps its kernels and DeepSpeed its extensions in the home directory unless told otherwise. On a cluster that is
shared: all ranks of all nodes would write there at once, and a lock that a killed build left behind would hold up all.
"""

import os
import stat
import tempfile
from pathlib import Path

# Variables that say where a cache is, its directory in ours, and what else says it.
CACHES = {
    "TRITON_CACHE_DIR": ("triton", "TRITON_HOME"),
    "TORCHINDUCTOR_CACHE_DIR": ("inductor", None),
    "TORCH_EXTENSIONS_DIR": ("extensions", None),
}


def keep_on_local_disk() -> None:
    """Set the variables of CACHES that are not set to directories of this user below $TMPDIR, or /tmp.

    Nothing is set where that place is another user's, is open to others, or runs no programs: whoever can write there
    could have this process run anything, and what is compiled could not be loaded.
    """
    try:
        place = Path(tempfile.gettempdir()) / f"mdit_{os.getuid()}"
        if not _is_ours(place):
            return
    except (AttributeError, OSError):  # no users, or no place at all
        return
    for name, (folder, other) in CACHES.items():
        if not os.environ.get(name) and not (other and os.environ.get(other)):
            os.environ[name] = str(place / folder)


def _is_ours(place: Path) -> bool:
    """Whether `place`, made where it is missing, is a directory of this user alone, with programs that may run."""
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()  # not what a link points to
    private = found.st_uid == os.getuid() and not found.st_mode & 0o077
    return stat.S_ISDIR(found.st_mode) and private and not os.statvfs(place).f_flag & os.ST_NOEXEC
