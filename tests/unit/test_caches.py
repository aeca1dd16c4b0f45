"""Compiled code is kept on local disk, where only this user can put any."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils.cpp_extension import _get_build_directory

from mdit.caches import CACHES, keep_on_local_disk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where caches go: nothing is set, and $TMPDIR is of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in (*CACHES, "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / f"mdit_{os.getuid()}"


def settings():
    return {name: os.environ[name] for name in CACHES if name in os.environ}


def test_the_libraries_write_below_the_temporary_directory(place):
    keep_on_local_disk()
    knobs = pytest.importorskip("triton").knobs
    found = [knobs.cache.dir, cache_dir(), _get_build_directory("some_extension", verbose=False)]
    assert all(Path(directory).is_relative_to(place) for directory in found), found
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    keep_on_local_disk()  # another process, or the same
    assert settings() == {name: str(place / folder) for name, (folder, _) in CACHES.items()}


def test_what_is_set_stays(place, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine_too")
    keep_on_local_disk()
    assert settings() == {
        "TRITON_CACHE_DIR": "mine",
        "TORCHINDUCTOR_CACHE_DIR": "mine_too",
        "TORCH_EXTENSIONS_DIR": str(place / "extensions"),
    }
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("TRITON_HOME", "home")
    keep_on_local_disk()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_place_that_is_not_ours_alone_is_left(place, tmp_path, monkeypatch):
    place.mkdir(mode=0o777)
    place.chmod(0o770)
    keep_on_local_disk()
    place.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    place.symlink_to("elsewhere")
    keep_on_local_disk()
    place.unlink()
    place.write_text("", encoding="utf-8")
    keep_on_local_disk()
    place.unlink()
    place.mkdir(mode=0o700)
    with monkeypatch.context() as patch:
        owner = os.getuid()
        patch.setattr(os, "getuid", lambda: owner + 1)
        (tmp_path / f"mdit_{owner + 1}").mkdir(mode=0o700)  # which somebody else was quick to make
        keep_on_local_disk()
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((0,) * 8 + (os.ST_NOEXEC, 255)))
    keep_on_local_disk()
    assert settings() == {}


def test_every_command_keeps_it_so(tmp_path):
    program = "import os; from mdit import cli; cli.run(lambda: print(*map(os.environ.get, sys.argv[1:]), sep='\\n'))"
    environment = {name: value for name, value in os.environ.items() if name not in (*CACHES, "TRITON_HOME")}
    command = [sys.executable, "-c", f"import sys; {program}", *CACHES]
    ran = subprocess.run(
        command, env=environment | {"TMPDIR": str(tmp_path)}, cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    place = tmp_path / f"mdit_{os.getuid()}"
    assert ran.stdout.splitlines() == [str(place / folder) for folder, _ in CACHES.values()], ran.stderr
