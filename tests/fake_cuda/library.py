"""guard.cpp, compiled for this torch. Imports no torch: the library has to be loaded before it."""

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")


def compiler() -> list[str] | None:
    """The command of a C++ compiler, None where there is none."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    return command if shutil.which(command[0]) else None


def build() -> Path:
    """Compile guard.cpp, unless it has been for this source and this torch (5 to 20 s). Raises CalledProcessError."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    key = f"{SOURCE.read_text(encoding='utf-8')} {torch} {(torch / 'version.py').read_text(encoding='utf-8')}"
    name = f"mdit-fake-cuda-{os.getuid()}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    built = Path(tempfile.gettempdir(), name)
    if not built.exists():
        partial = built.with_suffix(f".{os.getpid()}")
        includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
        command = [*compiler(), "-w", "-shared", "-fPIC", "-std=c++20", "-O0", *includes, str(SOURCE), *libraries]
        subprocess.run([*command, "-o", str(partial)], check=True, capture_output=True, text=True, encoding="utf-8")
        partial.replace(built)
    return built
