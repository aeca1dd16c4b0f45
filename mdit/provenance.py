"""Provenance of results: the versions and the commit that a run, a benchmark or a snapshot was made with."""

import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mdit

PACKAGES = ("torch", "deepspeed", "triton", "transformers", "numpy")
COMMIT = "MDIT_COMMIT"  # environment variable: the commit, where git cannot say it (a container, a wheel)


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of mdit, Python and the packages that results depend on, as far as they are installed."""
    found = {"mdit": mdit.__version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    return found


def package_folder(name: str) -> Path | None:
    """The directory of an installed package; None where it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def commit() -> str | None:
    """The commit of mdit's own checkout, with "-dirty" where files differ from it; $MDIT_COMMIT where that is set; None
    where mdit is installed without its repository, or git is missing or refuses."""
    if given := os.environ.get(COMMIT):
        return given
    root = Path(mdit.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # never a repository around site-packages: that is somebody else's
        return None
    git = ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}"]
    try:
        ran = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.decode(errors="replace").strip() or None
