"""The commit that results are recorded with: mdit's own checkout's, what is given, or none; never an error."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import mdit
from mdit import provenance
from mdit.bench.report import environment
from mdit.train import run


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A place with a repository around it, in which mdit is installed without its own."""
    for command in (["init"], ["commit", "--allow-empty", "--message", "theirs"]):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, *command], cwd=tmp_path, check=True, capture_output=True)
    package = tmp_path / ".venv" / "site-packages" / "mdit"
    package.mkdir(parents=True)
    monkeypatch.setattr(mdit, "__file__", str(package / "__init__.py"))
    monkeypatch.delenv(provenance.COMMIT, raising=False)
    return package


def test_a_repository_around_site_packages_is_not_ours(installed):
    assert provenance.commit() is None


def test_our_own_checkout_is(installed):
    shutil.move(installed.parent.parent.parent / ".git", installed.parent)
    assert len(provenance.commit()) == 12


def test_no_git_is_no_error(installed, monkeypatch):
    shutil.move(installed.parent.parent.parent / ".git", installed.parent)
    monkeypatch.setenv("PATH", str(installed))
    assert provenance.commit() is None
    monkeypatch.setenv(provenance.COMMIT, "abc")
    assert provenance.commit() == "abc"


def test_a_git_that_refuses_is_no_error(installed, tmp_path, monkeypatch):
    shutil.move(installed.parent.parent.parent / ".git", installed.parent)
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text(
        "#!/bin/sh\necho 'fatal: detected dubious ownership in repository' >&2\nexit 128\n", encoding="utf-8"
    )
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(git.parent))
    assert provenance.commit() is None


def test_all_results_have_their_commit_from_here(monkeypatch):
    """Nothing else asks git: training, the benchmarks and the precompute go on without it, as these tests say."""
    root = Path(provenance.__file__).resolve().parents[1]
    files = [file for folder in ("mdit", "kernels", "launchers", "tools") for file in (root / folder).rglob("*.py")]
    asking = [file.name for file in files if re.search(r"""["']git["']""", file.read_text(encoding="utf-8"))]
    assert asking == ["provenance.py"]
    monkeypatch.setenv(provenance.COMMIT, "abc")
    assert environment(torch.device("cpu")).commit == run.commit() == "abc"
