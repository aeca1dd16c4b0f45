"""The house keeps its floors: who may import whom, and where a heavy package may be named.

A part is a module or package of mdit, or one of the folders beside it. It imports from lower floors and from itself,
never from above and never from a neighbour; imports inside functions count like all others. See docs/architecture.md.
"""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = [  # from the ground up
    {"documents", "provenance", "caches", "captions"},
    {"sections"},
    {"mask_schedule"},
    {"recipe"},
    {"config"},
    {"differences"},
    {"stages"},
    {"dist", "masking", "kernels", "descriptions"},
    {"files", "cli", "meeting"},
    {"models", "diffusion"},
    {"parallel", "data", "sources", "encoders"},
    {"checkpoint"},
    {"precompute", "eval", "costs"},
    {"train"},
    {"bench", "publish"},
    {"launchers", "tools"},
    {"__main__", "__init__"},
    {"tests"},
]
FLOOR_OF = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
BESIDE_MDIT = {"launchers", "tools", "tests"}

ONLY_IN = {  # package: the files that may name it; tests may name all
    "deepspeed": ["mdit/train/engine.py", "mdit/train/zero_step.py", "mdit/train/optim.py", "mdit/parallel/expert.py"],
    "apex": ["mdit/train/optim.py"],
    "megatron": ["mdit/parallel/tensor.py"],
    "triton": ["kernels/*/triton_*.py", "kernels/triton_functions.py", "kernels/ahead_of_time.py"],
    "transformers": ["mdit/encoders/*"],
    "diffusers": ["mdit/encoders/*", "mdit/publish/pipeline.py"],
    "open_clip": ["mdit/encoders/*"],
    "torch_fidelity": ["mdit/encoders/judges.py", "mdit/eval/distances.py"],
    "matplotlib": ["mdit/bench/plots.py"],
    "gradio": ["launchers/demo.py"],
    "nvidia.dali": ["mdit/data/dali.py", "mdit/precompute/dali.py"],
    "tools": ["tools/first_contact.py"],  # run by their paths they do not see each other; this one runs by its name
    # Predictions: no run imports them, but for the lines that say what it would compute and cost.
    "mdit.costs": [
        "mdit/costs/*",
        "mdit/bench/*",
        "tools/*",
        "mdit/publish/card.py",
        "mdit/train/run.py",
        "mdit/train/staged.py",
    ],
}


def part_of(path: str) -> str:
    """mdit/models/dit.py -> models; mdit/config.py -> config; kernels/adaln/__init__.py -> kernels."""
    folders = path.removesuffix(".py").split("/")
    return folders[1] if folders[0] == "mdit" else folders[0]


def imported_modules(source: str, path: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands; relative ones made absolute."""
    package = path.replace("kernels/", "mdit/kernels/", 1) if path.startswith("kernels/") else path
    package = package.split("/")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__", "importorskip") and isinstance(node.args[0].value, str):
                found.append((node.lineno, node.args[0].value))
    return found


def complaints(source: str, path: str) -> list[str]:
    """What is wrong with the imports of the file at `path` (relative to the root, with slashes)."""
    part, found = part_of(path), []
    if part not in FLOOR_OF:
        found.append(f"{path}: {part} stands on no floor; give it one in {Path(__file__).name}")
    for line, module in imported_modules(source, path):
        names = module.split(".")
        target = names[1] if names[0] == "mdit" and len(names) > 1 else names[0] if names[0] in BESIDE_MDIT else None
        if names[0] == "kernels":
            found.append(f"{path}:{line}: imports {module}; this folder is called mdit.kernels")
        elif target in FLOOR_OF and target != part and FLOOR_OF[target] >= FLOOR_OF.get(part, -1):
            found.append(f"{path}:{line}: {part} imports {module}, which is not on a lower floor")
        for package, allowed in ONLY_IN.items():
            named = module == package or module.startswith(package + ".")
            if named and part != "tests" and not any(fnmatch(path, pattern) for pattern in allowed):
                found.append(f"{path}:{line}: imports {module}; {package} belongs in {', '.join(allowed)}")
    return found


def python_files() -> list[str]:
    folders = ("mdit", "kernels", "launchers", "tools", "tests")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [file.relative_to(ROOT).as_posix() for file in files]


def found_outside_tests(check) -> dict[str, list[str]]:
    """Findings of `check` in the source of each file that has some."""
    files = [path for path in python_files() if not path.startswith("tests/")]
    return {path: found for path in files if (found := check((ROOT / path).read_text(encoding="utf-8")))}


def calls_in(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_modules_import_only_from_lower_floors_or_their_own_part():
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in python_files()}
    found = [complaint for path, source in sources.items() for complaint in complaints(source, path)]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    "path, source",
    [
        ("mdit/models/dit.py", "from mdit.train.loop import train"),
        ("mdit/models/dit.py", "from mdit import train"),
        ("mdit/models/dit.py", "from ..diffusion import edm"),
        ("mdit/models/dit.py", "def f():\n    from mdit.diffusion.edm import sample_noise"),
        ("mdit/models/dit.py", "if TYPE_CHECKING:\n    import mdit.parallel"),
        ("mdit/models/dit.py", "import importlib\nimportlib.import_module('mdit.train')"),
        ("mdit/config.py", "from mdit.masking import Mask"),
        ("kernels/adaln/__init__.py", "from ...models.layers import modulate"),
        ("mdit/data/loader.py", "from mdit.encoders.image import encode"),
        ("mdit/train/loop.py", "from launchers.train import main"),
        ("mdit/train/loop.py", "import tests.recipes"),
        ("tools/cost.py", "import launchers.train"),
        ("mdit/models/moe.py", "from kernels import expert_choice"),
        ("mdit/novelty.py", "import torch"),
        ("mdit/train/loop.py", "def f():\n    from deepspeed.utils import groups"),
        ("mdit/parallel/apply.py", "from megatron.core import parallel_state"),
        ("kernels/adaln/reference.py", "import triton"),
        ("mdit/data/loader.py", "from nvidia.dali import fn"),
        ("mdit/data/loader.py", "from nvidia import dali"),
    ],
)
def test_an_import_that_breaks_the_rules_is_found(path, source):
    (complaint,) = complaints(source, path)
    assert complaint.startswith(path)


@pytest.mark.parametrize(
    "path, source",
    [
        ("mdit/models/dit.py", "import torch\nfrom mdit.config import ModelConfig\nfrom mdit.models.layers import Mlp"),
        ("mdit/models/dit.py", "from .layers import Mlp\nfrom ..masking import Mask\nfrom mdit.kernels import adaln"),
        ("mdit/models/dit.py", "from mdit import __version__"),
        ("mdit/masking.py", "from mdit.config import kept_tokens"),
        ("mdit/train/engine.py", "import deepspeed\nfrom mdit.eval.validation import validate"),
        ("mdit/data/dali.py", "from nvidia.dali import fn"),
        ("kernels/adaln/triton_impl.py", "import triton\nimport triton.language as tl"),
        ("kernels/adaln/__init__.py", "from .reference import adaln\nfrom mdit.kernels import dispatch"),
        ("tests/unit/test_engine.py", "import deepspeed\nimport mdit.train.engine\nimport launchers.train"),
        ("mdit/train/meter.py", "import tritonclient\nimport deepspeed_fork"),  # other packages that begin alike
        ("mdit/__init__.py", "import torch"),
    ],
)
def test_an_import_that_keeps_the_rules_is_left_alone(path, source):
    assert complaints(source, path) == []


UNPICKLE = ("load", "loads", "Unpickler", "open", "read_pickle")  # of the packages:
PICKLES = ("pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve", "pandas", "pd")


def trusting(source: str) -> list[str]:
    """Calls that could run code out of a file, or write where it says: torch.load unless weights_only=True, numpy's
    with pickles, pickle's, yaml's, eval, a shell's, models' with code, archives unpacked, pictures of every format."""
    found = []
    for node in calls_in(source):
        call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        unsafe = call == "torch.load" and keywords.get("weights_only") != "True"
        unsafe |= keywords.get("allow_pickle", "False") != "False"
        package, _, name = call.rpartition(".")
        unsafe |= package in PICKLES and name in UNPICKLE
        unsafe |= call in ("eval", "exec", "os.system", "os.popen") or (package == "yaml" and name != "safe_load")
        unsafe |= keywords.get("trust_remote_code", "False") != "False" or keywords.get("shell", "False") != "False"
        unsafe |= name in ("extractall", "extract", "unpack_archive") and keywords.get("filter") != "'data'"
        unsafe |= call == "Image.open" and "formats" not in keywords
        found += [ast.unparse(node)] if unsafe else []
    return found


@pytest.mark.parametrize(
    "source, count",
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, map_location='cpu', weights_only=True)", 0),
        ("np.load(path, allow_pickle=True)", 1),
        ("np.load(path, allow_pickle=False)", 0),
        ("pickle.loads(data)", 1),
        ("json.loads(data)", 0),
        ("shelve.open(path)", 1),
        ("yaml.load(text, Loader=loader)", 1),
        ("yaml.safe_load(text)", 0),
        ("eval(text)", 1),
        ("model.eval()", 0),
        ("subprocess.run(command, shell=True)", 1),
        ("subprocess.run(command)", 0),
        ("Auto.from_pretrained(name, trust_remote_code=True)", 1),
        ("Auto.from_pretrained(name, trust_remote_code=trusted)", 1),
        ("Auto.from_pretrained(name, trust_remote_code=False)", 0),
        ("archive.extractall(folder)", 1),
        ("archive.extractall(folder, filter='data')", 0),
        ("Image.open(file)", 1),
        ("Image.open(file, formats=FORMATS)", 0),
    ],
)
def test_calls_that_trust_a_file_are_found(source, count):
    assert len(trusting(source)) == count


def test_no_file_is_trusted():
    assert not found_outside_tests(trusting)


def in_the_locales_encoding(source: str) -> list[str]:
    """Calls that read or write text in the encoding of whoever's locale it is: without `encoding=` where they take one.

    open() of a string of a mode without "b", and of a Path; read_text, write_text; subprocesses in text mode.
    """
    found = []
    for node in calls_in(source):
        call, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        receiver, _, name = call.rpartition(".")
        text = name in ("NamedTemporaryFile", "TemporaryFile")
        text |= name in ("read_text", "write_text") and receiver not in ("", "files")  # mdit.files' own: UTF-8
        text |= name == "fdopen" or (name == "open" and receiver not in BINARY_OPEN)
        modes = [*map(ast.unparse, node.args), keywords.get("mode", "")]
        text &= not any(re.fullmatch(r"'[rwaxt+]*b[rwaxt+]*'", mode) for mode in modes)
        text &= not (name in ("NamedTemporaryFile", "TemporaryFile") and "mode" not in keywords)  # binary
        text |= keywords.get("text") == "True" or keywords.get("universal_newlines") == "True"
        found += [ast.unparse(node)] if text and "encoding" not in keywords else []
    return found


BINARY_OPEN = {"os", "Image", "tarfile", "zipfile", "archive", "zstandard", "gzip", "self"}  # or no files at all


@pytest.mark.parametrize(
    "source, count",
    [
        ("path.read_text()", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("(folder / name).write_text(text + 'x')", 1),
        ("write_text(path, 'x')", 0),
        ("open(path)", 1),
        ("open(path, 'a')", 1),
        ("open(path, mode='r')", 1),
        ("open(path, 'w', encoding='utf-8')", 0),
        ("open(path, 'rb')", 0),
        ("path.open('a')", 1),
        ("path.open('r+b')", 0),
        ("os.open(path, os.O_RDONLY)", 0),
        ("os.fdopen(descriptor, 'w')", 1),
        ("Image.open(path)", 0),
        ("tempfile.NamedTemporaryFile()", 0),
        ("tempfile.NamedTemporaryFile(mode='w')", 1),
        ("subprocess.run(command, text=True)", 1),
        ("subprocess.run(command, text=True, encoding='utf-8')", 0),
        ("subprocess.run(command)", 0),
    ],
)
def test_text_in_the_locales_encoding_is_found(source, count):
    assert len(in_the_locales_encoding(source)) == count


def test_text_is_utf_8_under_any_locale():
    assert not found_outside_tests(in_the_locales_encoding)


# Files whose threads touch no CUDA, and what they do instead.
WITHOUT_CUDA = {
    "mdit/train/lock.py": "keeps a lock's file young",
    "mdit/train/watchdog.py": "looks at stacks and speaks with the store",
    "mdit/sources/folder.py": "reads the headers of pictures",
    "mdit/precompute/build.py": "looks at files",
    "mdit/precompute/decode.py": "decodes in Pillow",
    "tools/bench_checkpoint.py": "writes files",
    "tools/first_contact.py": "reads what a part prints",
    "tools/verify_shards.py": "reads files",
}


def threads(source: str) -> list[str]:
    """Where a file starts threads; empty where it also says on which device they work."""
    calls = calls_in(source)
    starts = ("threading.Thread", "Thread", "ThreadPoolExecutor")
    names = [call.func for call in calls] + [keyword.value for call in calls for keyword in call.keywords]
    at_work = "work_on" in map(ast.unparse, names)
    return [] if at_work else [ast.unparse(call) for call in calls if ast.unparse(call.func) in starts]


def test_threads_that_may_touch_cuda_are_told_their_device():
    """A new thread is on GPU 0, whichever is its process's: see mdit.dist.work_on."""
    assert {*found_outside_tests(threads)} == {*WITHOUT_CUDA}


def own_endings(source: str) -> list[str]:
    """Calls that a command must leave to mdit.cli: exits, and lines that begin with "error: "."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "os._exit", "SystemExit"):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("error: "):
            found.append(node.value)
    return found


@pytest.mark.parametrize("source", ["sys.exit(2)", "print(f'error: {error}')", "raise SystemExit(2)"])
def test_a_command_that_ends_in_its_own_way_is_found(source):
    assert own_endings(source)
    assert not own_endings("cli.run(main)")


def test_commands_end_in_one_way():
    assert not [path for path in found_outside_tests(own_endings) if path.startswith(("launchers/", "tools/"))]


def test_the_check_sees_the_files_of_this_checkout():
    assert {"mdit/models/dit.py", "kernels/expert_choice/reference.py", "tests/test_house.py"} <= {*python_files()}
    imports = imported_modules((ROOT / "mdit/models/dit.py").read_text(encoding="utf-8"), "mdit/models/dit.py")
    assert "mdit.masking.Mask" in [module for _, module in imports]


def test_importing_the_models_needs_torch_and_little_else():
    program = "import sys, torch; before = {*sys.modules}; import mdit.models; print(*{*sys.modules} - before)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    imported = {module.split(".")[0] for module in ran.stdout.split()} - sys.stdlib_module_names
    little = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert {name for name in imported if not name.startswith("_")} <= {"mdit", "torch", "numpy", *little}
