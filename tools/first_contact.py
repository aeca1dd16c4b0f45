"""Everything worth measuring on a GPU that is there for minutes, by one command, in the order of its worth.

    python -m tools.first_contact --prepare --kit KIT --python PYTHON     before: with a package index, without a GPU
    python -m tools.first_contact --kit KIT --out DIR                     on the GPU machine, which needs no network
    python tools/fill_benchmarks.py DIR                                   then: DIR's figures into the documents

All from the repository's root; neither mdit nor git need be installed there. KIT holds what the GPU machine lacks:
wheels, kernels built ahead (by PYTHON, which has that machine's versions of Python and Triton), a training set with its
recipe, the commit; what it lacks itself is done without. Parts have limits of their own, and none begins that is not
expected to end within --budget_s. After each, all figures are packed into DIR.tar.gz. The same command again goes on
with what is missing, on a fresh machine if KIT/earlier.tar.gz is that pack. DIR/first_contact.json says how each part
ended, DIR/logs what it printed. --rehearse goes through all of it with tiny shapes on a CPU; its figures fill no table.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Nothing else of mdit: the packages it needs may only come with the kit.
from mdit import cli
from mdit.documents import UserError, explain, parse_json, read_json
from mdit.provenance import commit

START = time.monotonic()
ROOT = Path(__file__).resolve().parents[1]
SCHEMA = "mdit-first-contact/1"
BUDGET_S = 510.0
PACKING_S = 3.0  # kept for the last pack
LARGEST_BYTES = 8 * 2**20  # of a file that is packed
NOT_PACKED = {"scratch", "checkpoints", "snapshots"}

# Wheels beside torch, numpy, pillow, tensorboard and transformers, of the versions in constraints.txt.
WHEELS = (
    *("pydantic", "pydantic_core", "annotated-types", "typing_extensions", "typing-inspection"),
    *("webdataset", "braceexpand", "xxhash", "safetensors", "tqdm"),
    *("hjson", "einops", "msgpack", "ninja", "py-cpuinfo", "psutil", "packaging"),  # DeepSpeed's
)
BUILT = ("deepspeed",)  # from source, of Python alone
TARGET_PYTHON = "3.12"
PLATFORMS = [f"manylinux{version}_x86_64" for version in ("_2_28", "_2_27", "_2_17", "2014", "_2_12", "2010", "1")]

# The scenes of configs/emoji_64.toml that a few minutes can learn, in a set small enough to travel.
SCENES = (
    "data.prepare.source.objects=200",
    "data.prepare.source.scenes=3500",
    "data.prepare.source.validation_scenes=256",
    'data.prepare.embeddings="i8b64"',
    "training.num_steps=20000",  # until time is up
    'optim.schedule="constant"',
    "optim.final_lr_ratio=1.0",
    "ema.start_step=250",
    "report.log_every=25",
    "report.validate_every=500",
    "report.sample_every=250",
    "report.snapshot_every=0",
    "report.checkpoint_every=20000",
)

ENVIRONMENT = """
import hashlib, json, platform, sys
import torch, triton, deepspeed
import mdit.kernels
from triton.runtime.cache import triton_key
gpu = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if gpu else "none",
    "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda or "none",
    "triton": triton.__version__, "triton_key": hashlib.sha256(triton_key().encode()).hexdigest()[:16],
    "deepspeed": deepspeed.__version__,
}))
"""
NVIDIA_SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"


# Name; seconds that it is expected to take, processes' start included; seconds at most; what Python runs.
TRAIN = "-m tools.bench_train --resume --out {out}/throughput --steps 3 --seconds 4"
STAGE_1 = "--recipe configs/res_256_pretrain.toml"
OTHERS = " ".join(f"--recipe configs/res_{name}.toml" for name in ("256_finetune", "512_pretrain", "512_finetune"))
PARTS = (
    ("throughput", 60, 200, f"{TRAIN} {STAGE_1} --micro_batch 256 128"),
    ("profile", 30, 75, f"{TRAIN} {STAGE_1} --profile"),
    ("kernels", 60, 110, "-m tools.bench_kernels --resume --out {out}/kernels --repeats 10 --budget_s 95"),
    ("plain", 30, 60, f"{TRAIN} {STAGE_1} --kernels reference --micro_batch 128 --global_batch 512"),
    ("stages", 50, 120, f"{TRAIN} {OTHERS} --global_batch 256 --budget_s 110"),
    ("zero2", 30, 50, f"{TRAIN} {STAGE_1} --ds_config configs/zero2.json --micro_batch 256 --global_batch 1024"),
    ("fp8", 35, 60, f"{TRAIN} {STAGE_1} --fp8 --micro_batch 256 --global_batch 1024"),
    ("reductions", 20, 40, "-m tools.bench_reductions --out {out}/reductions"),
    (
        "training",
        50,
        600,
        "launchers/train.py --recipe {out}/scratch/training/recipe.json --ds_config configs/zero1.json "
        "--run_dir {out}/training --set \"data.train=['{out}/scratch/training/train']\" "
        "--set data.validation={out}/scratch/training/validation",
    ),
)
# Comes behind the command of a rehearsal, and counts.
TINY = "--tiny --steps 1 --seconds 0.01 --warm_up 0 --micro_batch 2 --global_batch 8"
REHEARSED = dict.fromkeys(("throughput", "profile", "plain", "stages", "zero2"), TINY)
REHEARSED |= {"throughput": f"{TINY} --micro_batch 4 2", "fp8": f"{TINY} --no-fp8"}
REHEARSED |= {"kernels": "--tiny --repeats 1 --contenders eager --budget_s 10", "reductions": "--tiny"}


@dataclass(frozen=True)
class Part:
    """One step of the way: begins where `needs` seconds are left, is asked to stop after `limit`."""

    name: str
    needs: float
    limit: float
    command: list[str]

    @property
    def grace(self) -> float:
        """Seconds between being asked to stop and being stopped: a training run saves what it has."""
        return 20.0 if self.name == "training" else 2.0


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.prepare:
        prepare(args.kit, args.python)
        return 0
    return Contact(args).run()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--kit", type=cli.path, required=True, help="what the GPU machine lacks")
    add("--prepare", action="store_true", help="fill KIT with what it does not have yet")
    add("--python", type=cli.path, help="with --prepare: of the GPU machine's versions, to build kernels with")
    add("--out", type=cli.path, metavar="DIR", help="figures, logs and, in DIR/scratch, what only helps to make them")
    add("--pack", type=cli.path, metavar="FILE", help="default: DIR.tar.gz")
    add("--budget_s", type=float, default=BUDGET_S, help=f"seconds for all of it; default: {BUDGET_S:g}")
    add("--parts", nargs="+", choices=[name for name, *_ in PARTS], metavar="NAME", help="only these")
    add("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    args = parser.parse_args(arguments)
    if args.prepare == (args.out is not None):
        parser.error("expected --prepare, or --out DIR")
    if not args.budget_s > 0:
        parser.error(f"--budget_s {args.budget_s:g}: expected more than 0")
    return args


# On the GPU machine.


class Contact:
    """The way through all parts, and the folder that tells of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.kit, self.out, self.rehearse = args.kit.resolve(), args.out.resolve(), args.rehearse
        self.pack_file = args.pack.resolve() if args.pack else self.out.with_name(f"{self.out.name}.tar.gz")
        self.deadline, self.wanted = START + args.budget_s, args.parts
        self.state_file, self.scratch = self.out / "first_contact.json", self.out / "scratch"
        file = self.kit / "COMMIT"
        self.commit = commit() or (file.read_text(encoding="utf-8").strip() if file.exists() else "unknown")

    def run(self) -> int:
        """Exit code: 0 where every part that was asked for is done."""
        if not self.state_file.exists() and (earlier := self.kit / "earlier.tar.gz").exists():
            unpack(earlier, self.out)
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.unpack_kit()
        with kernels_in_place(sys.executable):
            return self.go()

    def go(self) -> int:
        self.state = self.settled_state()
        self.save()
        for part in self.parts():
            if self.state["parts"].get(part.name, {}).get("done"):
                print(f"=== {part.name}: done before", flush=True)
                continue
            reason = self.hindrance(part)
            if reason is None:
                self.state["parts"][part.name] = self.take(part)
            else:
                print(f"=== {part.name}: not begun: {reason}", flush=True)
                self.state["parts"].setdefault(part.name, {"done": False, "ended": f"not begun: {reason}"})
            self.save()
        undone = [part.name for part in self.parts() if not self.state["parts"][part.name]["done"]]
        print(f"=== all after {self.elapsed():.0f} s: {self.pack_file}" + f"; not done: {undone}" * bool(undone))
        return 1 if undone else 0

    def parts(self) -> list[Part]:
        found = []
        for name, needs, limit, command in PARTS:
            words = shlex.split(f"{command} {REHEARSED.get(name, '')}" if self.rehearse else command)
            words = [word.replace("{out}", str(self.out)) for word in words]
            if self.wanted is None or name in self.wanted:
                found.append(Part(name, 0.0 if self.rehearse else needs, limit, [sys.executable, *words]))
        return found

    def hindrance(self, part: Part) -> str | None:
        """What keeps a part from beginning now."""
        if part.name == "training" and not (self.scratch / "training").exists():
            return "the kit has no training.tar.gz"
        if (left := self.left(part)) < max(part.needs, 1.0):
            return f"{left:.0f} s are left, it needs {part.needs:.0f}"
        return None

    def left(self, part: Part) -> float:
        """Seconds that a part may take."""
        return self.deadline - time.monotonic() - part.grace - PACKING_S

    def elapsed(self) -> float:
        return time.monotonic() - START

    def take(self, part: Part) -> dict[str, Any]:
        """Run a part -> how that ended. A training run that was asked to stop, and did, is done."""
        limit, began = min(part.limit, self.left(part)), time.monotonic()
        print(f"=== {part.name} at {self.elapsed():.0f} s, for {limit:.0f} s at most", flush=True)
        code, cut = run(part.command, self.environment(), self.out / "logs" / f"{part.name}.log", limit, part.grace)
        seconds = round(time.monotonic() - began, 1)
        ended = f"stopped after {limit:.3g} s" if cut else f"exit code {code}"
        print(f"=== {part.name}: {ended}, {seconds:.0f} s", flush=True)
        command = shlex.join(["python", *part.command[1:]]).replace(str(self.out), "DIR")
        return {"done": code == 0, "ended": ended, "seconds": seconds, "command": command}

    def environment(self) -> dict[str, str]:
        """Variables of every part: packages and compiled code of the kit, no network, the name of the commit."""
        paths = [str(self.scratch / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        found |= {
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "NCCL_SOCKET_IFNAME": "lo",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return found | {"MDIT_COMMIT": self.commit} | ({"CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {})

    def unpack_kit(self) -> None:
        """Put what the kit brings where the parts find it; what is there from an earlier call stays."""
        wheels = sorted(map(str, (self.kit / "whl").glob("*.whl")))
        if wheels and not (self.scratch / "site").exists():
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            install += ["--no-cache-dir", "--target", str(self.scratch / "site.partial"), *wheels]
            self.must(install, "wheels")
            (self.scratch / "site.partial").rename(self.scratch / "site")
        for name, folder in (("kernels", "triton"), ("training", "training")):
            if (archive := self.kit / f"{name}.tar.gz").exists() and not (self.scratch / folder).exists():
                try:
                    unpack(archive, self.scratch / folder)
                    if name == "kernels":
                        move_cache(self.scratch / folder)
                except Exception as error:  # of tarfile's many kinds; what can be measured without it still counts
                    print(f"{archive}: done without: {explain(error)}", flush=True)

    def settled_state(self) -> dict[str, Any]:
        """What this call goes on with. Raises UserError where DIR holds figures of another machine or commit."""
        with suppress(OSError, UserError):
            self.must(["nvidia-smi", f"--query-gpu={NVIDIA_SMI}", "--format=csv"], "nvidia-smi")
        here = parse_json(self.must([sys.executable, "-c", ENVIRONMENT], "environment").splitlines()[-1], "torch")
        here |= {"rehearsal": self.rehearse, "commit": self.commit}
        print(", ".join(f"{name} {value}" for name, value in here.items()), flush=True)
        if not self.rehearse and here["gpu"] == "none":
            raise UserError("torch sees no GPU here; --rehearse goes through all parts on a CPU")
        if not self.state_file.exists():
            now = datetime.now(UTC).isoformat(timespec="seconds")
            return {"schema": SCHEMA, "began": now, "environment": here, "parts": {}}
        before = read_json(self.state_file, "the earlier state")
        for name, value in here.items():
            if (found := before["environment"].get(name)) != value:
                raise UserError(f"{self.state_file}: {name} = {found!r}, here it is {value!r}; choose another --out")
        return before

    def must(self, command: list[str], name: str) -> str:
        """Run what all parts need -> its output. Raises UserError."""
        log = self.out / "logs" / f"{name}.log"
        code, cut = run(command, self.environment(), log, min(120.0, self.deadline - time.monotonic()), 2.0)
        if code or cut:
            raise UserError(f"{command[0]}: {'took too long' if cut else f'exit code {code}'}; {log} has what it said")
        return log.read_text(encoding="utf-8", errors="replace")

    def save(self) -> None:
        """first_contact.json, and the pack."""
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.state_file)
        pack(self.out, self.pack_file, figures_only)


def run(command: list[str], environment: dict[str, str], log: Path, limit: float, grace: float) -> tuple[int, bool]:
    """Run a command and all it starts, its output to the screen and to the end of `log` -> exit code, and whether it
    was stopped: asked with SIGTERM after `limit` seconds, ended `grace` seconds later."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)
        shower = threading.Thread(target=show, args=(process, file), daemon=True)
        shower.start()
        cut = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            cut = True
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with suppress(ProcessLookupError):  # whatever is left of it, also where this process is interrupted
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            shower.join(2.0)
    return code, cut


def show(process: subprocess.Popen, file: Any) -> None:
    for line in process.stdout:
        file.write(line)
        file.flush()
        with suppress(OSError):
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def figures_only(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Whether a file goes back: not if it is NOT_PACKED or too large, of which it tells."""
    if info.isfile() and info.size > LARGEST_BYTES:
        print(f"not packed: {info.name}, {info.size / 2**20:.0f} MiB", flush=True)
        return None
    return None if NOT_PACKED & {*Path(info.name).parts} else info


def pack(folder: Path, target: Path, choose: Callable[[tarfile.TarInfo], Any] = lambda info: info) -> None:
    """What `choose` leaves of a folder, in a file that is whole, or as it was."""
    partial = target.with_name(f"{target.name}.partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
        archive.add(folder, arcname=folder.name, filter=choose)
    partial.replace(target)


def unpack(archive: Path, place: Path) -> None:
    """Put the one folder that an archive holds at `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder, tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
        (inside,) = Path(folder).iterdir()
        inside.rename(place)


@contextmanager
def kernels_in_place(python: str) -> Iterator[None]:
    """Inside, the folder `kernels` is mdit.kernels to this Python, whether or not mdit is installed there."""
    link, path = ROOT / "mdit" / "kernels", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    asked = subprocess.run(
        [python, "-c", "import mdit.kernels"], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    if asked.returncode == 0:
        yield
        return
    link.symlink_to("../kernels")
    try:
        yield
    finally:
        link.unlink()


def move_cache(cache: Path) -> None:
    """Let Triton find in `cache` what was built in another place: its lists of files name them by absolute paths."""
    for listing in cache.glob("*/__grp__*"):
        content = read_json(listing)
        paths = {name: str(listing.with_name(Path(path).name)) for name, path in content["child_paths"].items()}
        content["child_paths"] = paths
        listing.write_text(json.dumps(content), encoding="utf-8")


# Before.


def prepare(kit: Path, python: Path | None) -> None:
    """Fill the kit with what it does not have yet. Raises UserError where something cannot be had."""
    kit.mkdir(parents=True, exist_ok=True)
    (kit / "COMMIT").write_text(f"{commit() or 'unknown'}\n", encoding="utf-8")
    if not (kit / "whl").exists():
        with arriving(kit / "whl") as folder:
            fetch_wheels(folder)
    if not (kit / "kernels.tar.gz").exists():
        if python is None:
            print("kernels: not built ahead; --python says with what")
        else:
            with arriving_pack(kit / "kernels.tar.gz") as folder, kernels_in_place(str(python)):
                build = [str(python), "-m", "tools.build_kernels", "--cache", str(folder)]
                call([*build, "--micro_batch", "128", "--recipe", "configs/emoji_64.toml"], PYTHONPATH=str(ROOT))
    if not (kit / "training.tar.gz").exists():
        with arriving_pack(kit / "training.tar.gz") as folder:
            make_training_set(folder)
    sizes = {path.relative_to(kit): path.stat().st_size / 2**20 for path in sorted(kit.rglob("*")) if path.is_file()}
    print(*(f"{size:7.2f} MiB  {path}" for path, size in sizes.items()), sep="\n")
    print(f"{sum(sizes.values()):7.2f} MiB in all")


def fetch_wheels(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    options = ["-q", "--no-deps", "-c", str(ROOT / "constraints.txt")]
    wanted = ["--only-binary=:all:", "--implementation", "cp", "--python-version", TARGET_PYTHON]
    wanted += [word for platform in PLATFORMS for word in ("--platform", platform)]
    call([*pip, "download", *options, *wanted, "-d", str(folder), *WHEELS])
    call([*pip, "wheel", *options, "-w", str(folder), *BUILT], DS_BUILD_OPS="0")


def make_training_set(folder: Path) -> None:
    """The recipe and its sets, all in `folder`."""
    from mdit import files
    from mdit.config import load_config
    from mdit.prepare import prepare as make_sets

    places = [f'data.train=["{folder / "train"}"]', f"data.validation={folder / 'validation'}"]
    config = load_config(ROOT / "configs" / "emoji_64.toml", [*SCENES, *places])
    make_sets(config)
    files.write_json(folder / "recipe.json", {"recipe": config.model_dump(mode="json", exclude_none=True)})


def call(command: list[str], **environment: str) -> None:
    if code := subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT).returncode:
        raise UserError(f"{shlex.join(command)}: exit code {code}")


@contextmanager
def arriving(place: Path) -> Iterator[Path]:
    """A new folder, which is at `place` once all went well."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = Path(folder, place.name)
        new.mkdir()
        yield new
        new.rename(place)


@contextmanager
def arriving_pack(place: Path) -> Iterator[Path]:
    """A new folder, which is packed at `place` once all went well."""
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        new = Path(folder, place.name.split(".")[0])
        new.mkdir()
        yield new
        pack(new, place)


if __name__ == "__main__":
    cli.run(main)
