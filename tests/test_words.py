"""Names, docstrings and lengths of files, and documents that are true to the code."""

import ast
import re
import runpy

import pytest

import mdit
from tests.conftest import QUICK
from tests.processes import PRELOAD
from tests.test_house import BESIDE_MDIT, ROOT, part_of, python_files, tracked_files


def test_no_file_is_called_after_nothing():
    nothing = {"utils", "util", "misc", "helpers", "helper", "common"}
    named = [path for path in python_files() if nothing & set(path.removesuffix(".py").split("/"))]
    assert not named


def test_no_class_name_is_that_of_two_classes():
    paths = [path for path in python_files() if part_of(path) not in BESIDE_MDIT]
    sources = [(ROOT / path).read_text(encoding="utf-8") for path in paths]
    names = [node.name for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    assert not {name for name in names if names.count(name) > 1}


def test_docstrings_begin_with_a_noun_or_a_verb():
    begins = re.compile('"""(Of|For|What|Where|Those) ')
    paths = [path for path in python_files() if part_of(path) != "tests"]
    assert not [path for path in paths if begins.search((ROOT / path).read_text(encoding="utf-8"))]


def test_no_file_is_too_long_to_read():
    assert not [path for path in python_files() if len((ROOT / path).read_text(encoding="utf-8").splitlines()) > 400]


def test_what_is_said_twice_agrees():
    """The drawing and its script, the version and the one to cite, modules imported ahead, files of quick tests."""
    drawing = ROOT / "docs/pictures/architecture.svg"
    assert runpy.run_path(str(drawing.with_suffix(".py")))["draw"]() == drawing.read_text(encoding="utf-8")
    assert all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in PRELOAD if name.startswith("mdit."))
    assert all((ROOT / "tests" / path).exists() for path in QUICK)
    assert f"\nversion: {mdit.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_documents_name_what_there_is():
    """Files, and behind a colon the classes and functions in them."""
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    text = "".join(path.read_text(encoding="utf-8") for path in documents)
    found = re.findall(r"`((?:mdit|kernels|launchers|tools|tests)/[a-z0-9_/]+\.py)(?:: ([\w., ]+))?`", text)
    assert len(found) > 100
    for path, names in found:
        defined = set()
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body if names else []:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                inside = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                defined |= {node.name, *(f"{node.name}.{name}" for name in inside)}
        assert (ROOT / path).exists() and (not names or {*names.split(", ")} <= defined), path


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


MACHINE_PATH = re.compile(rb"(?<![\w.~/-])/(?:work|root|home/\w+)/")


@pytest.mark.parametrize("folder", [b"root", b"work", b"home/someone"])
@pytest.mark.parametrize("before", [b"", b"cd ", b"open('", b"--out="])
def test_a_path_of_somebodys_machine_is_recognised(folder, before):
    assert MACHINE_PATH.search(before + b"/" + folder + b"/x")


@pytest.mark.parametrize("before", [b"https://host", b"docs", b"~"])
def test_other_paths_are_not(before):
    assert not MACHINE_PATH.search(before + b"/work" + b"/x")
    assert not MACHINE_PATH.search(before + b"/root" + b"/x")


def test_a_longer_name_is_another():
    assert not MACHINE_PATH.search(b"/workshop/x")


def test_no_tracked_file_names_a_path_of_somebodys_machine():
    named = [path.relative_to(ROOT).as_posix() for path in tracked_files() if MACHINE_PATH.search(path.read_bytes())]
    assert not named
