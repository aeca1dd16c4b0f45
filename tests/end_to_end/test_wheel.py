"""The package installed from a wheel, away from the checkout: recipes, JSONs and commands come with it."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from tests.training import REPOSITORY, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment whose site-packages hold mdit's wheel; all else is this environment's."""
    folder = tmp_path_factory.mktemp("wheel")
    sources, env = folder / "sources", folder / "env"
    for name in ("mdit", "kernels", "launchers", "configs"):  # a copy, as setuptools builds beside its sources
        shutil.copytree(REPOSITORY / name, sources / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sources)
    venv.create(env, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(env), "installed_base": str(env)}))
    (site / "shared.pth").write_text(str(Path(torch.__file__).parent.parent))
    call(*pip, "--python", env / "bin" / "python", "install", "--no-deps", "--no-index", *folder.glob("*.whl"))
    return env / "bin"


def call(*command: object, cwd: Path | None = None) -> str:
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_commands_of_a_wheel_outside_the_checkout(installed, tmp_path):
    for command in ("sample", "precompute"):
        assert f"usage: mdit {command}" in call(installed / "mdit", command, "--help", cwd=tmp_path)
    told = call(installed / "mdit", "train", "--ds_config", "configs/zero1.json", "--dry_run", cwd=tmp_path)
    assert '"name": "quickstart"' in told and '"stage": 1' in told
    assert str(tmp_path / "data") in told, "data lie below the current directory, not in site-packages"
    assert not [*tmp_path.iterdir()]
