"""Measure everything worth measuring on a GPU that is there for minutes, in the order of its worth, by one command.

    python -m tools.first_contact --prepare --kit KIT --python PYTHON     before: with a package index, without a GPU
    python -m tools.first_contact --kit KIT --out DIR                     on the GPU machine, which needs no network
    python tools/fill_benchmarks.py DIR                                   then: DIR's figures into the documents

All from the repository's root; neither mdit nor git need be installed there. KIT holds what the GPU machine lacks:
wheels, kernels built ahead (by PYTHON, which has that machine's versions of Python and Triton), a training set with its
recipe, the commit; what KIT lacks is done without. Each part has a time limit, and none begins that is not expected to
end within --budget_s. After each, all figures are packed into DIR.tar.gz. The same command again goes on with what is
missing, on a fresh machine if KIT/earlier.tar.gz is that pack. DIR/first_contact.json says how each part ended,
DIR/logs what it printed. --rehearse goes through all of it with tiny shapes on a CPU; its figures fill no table.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

# Nothing else of mdit: the packages it needs may only come with the kit.
from mdit import cli
from mdit.documents import UserError, explain, parse_json, read_json, to_json
from mdit.provenance import commit
from tools.first_contact_kit import KIT, ROOT, arriving, move_cache, pack, prepare, unpack

START = time.monotonic()
SCHEMA = "mdit-first-contact/1"
BUDGET_S = 510.0
PACKING_S = 3.0  # kept for the last pack
LARGEST_BYTES = 8 * 2**20  # of a file that is packed
NOT_PACKED = {"scratch", "checkpoints", "snapshots"}

ENVIRONMENT = """
import hashlib, json
import torch, triton, deepspeed
import mdit.kernels
from mdit.provenance import package_versions
from triton.runtime.cache import triton_key
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
key = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
print(json.dumps({"gpu": gpu, "cuda": torch.version.cuda or "none", "triton_key": key, **package_versions()}))
"""
NVIDIA_SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.max.memory,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Task:
    """A measurement: begins where `needs` seconds are left (processes' start included), is asked to stop after `limit`
    seconds and killed `grace` seconds later."""

    name: str
    needs: float
    limit: float
    arguments: str  # Python's; {out} is the folder of the figures
    tiny: str  # come behind them in a rehearsal
    grace: float = 2.0

    def command(self, out: Path, rehearse: bool) -> list[str]:
        words = shlex.split(f"{self.arguments} {self.tiny}" if rehearse else self.arguments)
        return [sys.executable, *(word.replace("{out}", str(out)) for word in words)]


TRAIN = "-m tools.bench_train --resume --out {out}/throughput --steps 3 --seconds 4"
STAGE_1 = f"{TRAIN} --recipe configs/res_256_pretrain.toml"
OTHERS = " ".join(f"--recipe configs/res_{name}.toml" for name in ("256_finetune", "512_pretrain", "512_finetune"))
TINY = "--tiny --steps 1 --seconds 0.01 --warm_up 0 --micro_batch 2 --global_batch 8"
PARTS = (
    Task("throughput", 60, 200, f"{STAGE_1} --micro_batch 256 128", f"{TINY} --micro_batch 4 2"),
    Task("profile", 30, 75, f"{STAGE_1} --profile", TINY),
    Task(
        "kernels",
        60,
        110,
        "-m tools.bench_kernels --resume --out {out}/kernels --repeats 10 --budget_s 95",
        "--tiny --repeats 1 --contenders eager --budget_s 10",
    ),
    Task("plain", 30, 60, f"{STAGE_1} --kernels reference --micro_batch 128 --global_batch 512", TINY),
    Task("stages", 50, 120, f"{TRAIN} {OTHERS} --global_batch 256 --budget_s 110", TINY),
    Task("zero2", 30, 50, f"{STAGE_1} --ds_config configs/zero2.json --micro_batch 256 --global_batch 1024", TINY),
    Task("fp8", 35, 60, f"{STAGE_1} --fp8 --micro_batch 256 --global_batch 1024", f"{TINY} --no-fp8"),
    Task("reductions", 20, 40, "-m tools.bench_reductions --out {out}/reductions", "--tiny"),
    Task(
        "training",
        50,
        600,
        "launchers/train.py --recipe {out}/scratch/training/recipe.json --ds_config configs/zero1.json "
        "--run_dir {out}/training --set \"data.train=['{out}/scratch/training/train']\" "
        "--set data.validation={out}/scratch/training/validation",
        "",
        grace=20.0,  # it saves what it has
    ),
)


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
    add("--budget_s", type=cli.positive, default=BUDGET_S, help=f"seconds for all of it; default: {BUDGET_S:g}")
    add("--parts", nargs="+", choices=[part.name for part in PARTS], metavar="NAME", help="only these")
    add("--rehearse", action="store_true", help="tiny shapes, on a CPU")
    args = parser.parse_args(arguments)
    if args.prepare == (args.out is not None):
        parser.error("expected --prepare, or --out DIR")
    return args


class Contact:
    """The way through all parts, and the folder that tells of it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.kit, self.out, self.rehearse = args.kit.resolve(), args.out.resolve(), args.rehearse
        self.pack_file = args.pack.resolve() if args.pack else self.out.with_name(f"{self.out.name}.tar.gz")
        self.deadline = START + args.budget_s
        self.parts = [part for part in PARTS if args.parts is None or part.name in args.parts]
        self.state_file, self.scratch = self.out / "first_contact.json", self.out / "scratch"
        file = self.kit / "COMMIT"
        self.commit = commit() or (file.read_text(encoding="utf-8").strip() if file.exists() else "unknown")

    def run(self) -> int:
        """Exit code: 0 where every part that was asked for is done."""
        if not self.state_file.exists() and (earlier := self.kit / "earlier.tar.gz").exists():
            unpack(earlier, self.out)
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        if not (link := ROOT / "mdit" / "kernels").exists():  # in a copy that has left links out
            link.symlink_to("../kernels")
        self.unpack_kit()
        state = self.load_state()
        self.save(state)
        ended = state["parts"]
        for part in self.parts:
            if ended.get(part.name, {}).get("done"):
                print(f"=== {part.name}: done before", flush=True)
                continue
            if reason := self.hindrance(part):
                print(f"=== {part.name}: not begun: {reason}", flush=True)
                ended.setdefault(part.name, {"done": False, "ended": f"not begun: {reason}"})
            else:
                ended[part.name] = self.measure(part)
            self.save(state)
        undone = [part.name for part in self.parts if not ended[part.name]["done"]]
        print(f"=== all after {elapsed():.0f} s: {self.pack_file}" + f"; not done: {undone}" * bool(undone))
        return 1 if undone else 0

    def hindrance(self, part: Task) -> str | None:
        """The reason why a part cannot begin now, if there is one."""
        if part.name == "training" and not (self.scratch / "training").exists():
            return "the kit has no training.tar.gz"
        needs = 0.0 if self.rehearse else part.needs
        if (left := self.left(part)) < max(needs, 1.0):
            return f"{left:.0f} s are left, it needs {needs:.0f}"
        return None

    def left(self, part: Task) -> float:
        """Seconds that a part may take."""
        return self.deadline - time.monotonic() - part.grace - PACKING_S

    def measure(self, part: Task) -> dict[str, Any]:
        """Run a part -> how that ended. A training run that was asked to stop, and did, is done."""
        limit, began = min(part.limit, self.left(part)), time.monotonic()
        print(f"=== {part.name} at {elapsed():.0f} s, for {limit:.0f} s at most", flush=True)
        command, log = part.command(self.out, self.rehearse), self.out / "logs" / f"{part.name}.log"
        code, cut = run(command, self.environment(), log, limit, part.grace)
        seconds = round(time.monotonic() - began, 1)
        ended = f"stopped after {limit:.3g} s" if cut else f"exit code {code}"
        print(f"=== {part.name}: {ended}, {seconds:.0f} s", flush=True)
        words = shlex.join(["python", *command[1:]]).replace(str(self.out), "DIR")
        return {"done": code == 0, "ended": ended, "seconds": seconds, "command": words}

    def environment(self) -> dict[str, str]:
        """Variables of every part: packages and compiled code of the kit, no network, the name of the commit."""
        paths = [str(self.scratch / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        found = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        found |= {"TRITON_CACHE_DIR": str(self.scratch / "kernels"), "MDIT_COMMIT": self.commit}
        found |= dict.fromkeys(("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), "lo")
        return os.environ | found | ({"CUDA_VISIBLE_DEVICES": ""} if self.rehearse else {})

    def unpack_kit(self) -> None:
        """Put what the kit brings where the parts find it; what is there from an earlier call stays."""
        for name in KIT:
            if (archive := self.kit / f"{name}.tar.gz").exists() and not (self.scratch / name).exists():
                try:
                    unpack(archive, self.scratch / name)
                    if name == "kernels":
                        move_cache(self.scratch / name)
                except Exception as error:  # of tarfile's many kinds; what can be measured without it still counts
                    print(f"{archive}: done without: {explain(error)}", flush=True)
        wheels, site = sorted(map(str, (self.scratch / "wheels").glob("*.whl"))), self.scratch / "site"
        if wheels and not site.exists():
            install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            with arriving(site) as partial:
                self.must([*install, "--no-cache-dir", "--target", str(partial), *wheels], "wheels")

    def load_state(self) -> dict[str, Any]:
        """The state to go on with. Raises UserError where DIR holds figures of another machine or commit."""
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

    def save(self, state: dict[str, Any]) -> None:
        """Write first_contact.json, and the pack."""
        with arriving(self.state_file) as partial:
            partial.write_text(to_json(state), encoding="utf-8")
        pack(self.out, self.pack_file, figures_only)


def elapsed() -> float:
    return time.monotonic() - START


def run(command: list[str], environment: dict[str, str], log: Path, limit: float, grace: float) -> tuple[int, bool]:
    """Run a command and all it starts, its output to the screen and to the end of `log` -> exit code, and whether it
    was stopped: asked with SIGTERM after `limit` seconds, killed `grace` seconds later."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)
        shower = threading.Thread(target=show, args=(process.stdout, file), daemon=True)
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


def show(lines: IO[bytes], file: IO[bytes]) -> None:
    for line in lines:
        file.write(line)
        file.flush()
        with suppress(OSError):
            print(line.decode(errors="replace"), end="", flush=True)


def figures_only(info: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """The file if it goes back: not if it is NOT_PACKED or too large, of which it tells."""
    if info.isfile() and info.size > LARGEST_BYTES:
        print(f"not packed: {info.name}, {info.size / 2**20:.0f} MiB", flush=True)
        return None
    return None if NOT_PACKED & {*Path(info.name).parts} else info


if __name__ == "__main__":
    cli.run(main)
