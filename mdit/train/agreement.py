"""Agreement of the ranks on what they run: compared before anything is trained, so that none goes its own way.

All ranks know the same short digest, and only where digests differ do they look at what is behind them.
"""

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

import mdit.kernels
from mdit.data.manifest import MANIFEST
from mdit.dist import World, gather, on_all_ranks, shared
from mdit.documents import differences, to_json
from mdit.files import checksum
from mdit.meeting import while_others_wait
from mdit.precompute import precompute
from mdit.provenance import package_versions
from mdit.train.run import Run, check_data


def require_agreement(world: World, values: Mapping[str, Any]) -> None:
    """Raise UserError, on all ranks, naming the first key whose value differs between two ranks. A collective."""
    digest = xxhash.xxh3_128_hexdigest(to_json(values).encode())
    if len(set(gather(digest, world))) == 1:
        return
    (first_host, first), *others = gather((socket.gethostname(), dict(values)), world)
    for rank, (host, other) in enumerate(others, 1):
        for key, at_first, here in differences(first, other):
            raise shared(
                f"rank {rank} on {host} has {key} = {here!r}, but rank 0 on {first_host} has {at_first!r}; start all "
                "processes of a run with the same"
            )


def what_runs(run: Run) -> dict[str, Any]:
    """Everything that this rank is about to train, and the code it does it with."""
    return {
        "recipe": run.config.model_dump(mode="json"),
        "deepspeed": run.execution.deepspeed,
        "mdit": run.execution.settings.model_dump(mode="json"),
        "kernels": ", ".join(sorted(run.execution.triton_ops)),
        "device": run.world.device.type,
        "run_dir": str(run.run_dir.absolute()),
        "restart": run.restart,
        "init_from": run.init_from and str(run.init_from.absolute()),
        "moments": run.moments and str(run.moments),
        "initial_weights": run.initial_weights and weights_digest(run.initial_weights),
        "versions": package_versions(),
        "code": code_digests(),
    }


def what_is_read(run: Run) -> dict[str, Any]:
    """The samples that this rank is about to train on: manifests name every shard by its checksum."""
    directories = dict.fromkeys((*run.config.data.train, run.config.data.validation))
    return {f"xxh3 of {Path(directory) / MANIFEST}": checksum(Path(directory) / MANIFEST) for directory in directories}


def weights_digest(weights: Mapping[str, Any]) -> str:
    digest = xxhash.xxh3_64()
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def code_digests() -> dict[str, str]:
    """xxh3 of each of mdit's own Python files."""
    folders = [Path(package.__path__[0]) for package in (mdit, mdit.kernels)]
    files = {f"{each.name}/{file.relative_to(each)}": file for each in folders for file in each.rglob("*.py")}
    return {f"xxh3 of {name}": checksum(files[name]) for name in sorted(files)}


def prepare_on_first(run: Run) -> None:
    """Rank 0 makes the data if it is missing, while the others wait for it; all check it, and that it is the same. A
    collective; raises on all ranks alike."""
    while_others_wait(run.world, "makes the data", lambda: precompute(run.config, device=run.world.device))
    on_all_ranks(run.world, lambda: check_data(run))
    require_agreement(run.world, what_is_read(run))
