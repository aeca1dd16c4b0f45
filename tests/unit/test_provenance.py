"""The commit that results are recorded with: mdit's own checkout's, what is given, or none; never an error."""

import shutil
import subprocess

import pytest

import mdit
from mdit import provenance


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
