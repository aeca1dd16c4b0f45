"""Real training runs for tests: made-up latent shards, recipes as files, the launcher in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from mdit.data.writer import ShardWriter
from tests.recipes import tiny_config

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = REPOSITORY / "launchers" / "train.py"
# Decodes by itself and embeds nothing: enough for runs whose prompts are the validation set's.
ENCODERS = {"image": {"id": "pixels", "scale": 1.0}, "text": {"id": "none"}}


def write_shards(directory: Path, config, samples: int, seed: int) -> None:
    """Random latents whose mean depends on the caption, so that there is something to learn."""
    model, rng = config.model, np.random.default_rng(seed)
    latent_shape = (model.latent_channels, model.latent_size, model.latent_size)
    embedding_shape = (model.caption_length, model.caption_channels)
    with ShardWriter(
        directory, latent_shape=latent_shape, embedding_shape=embedding_shape, encoders=ENCODERS, fingerprint={}
    ) as writer:
        for i in range(samples):
            kind = i % 3
            embedding = np.full(embedding_shape, kind - 1, dtype=np.float16)
            latent = rng.normal(kind - 1, 0.3, latent_shape).astype(np.float16)
            writer.write(f"{i:06d}", latent, embedding, f"kind {kind}")


def write_recipe(folder: Path, *, samples: int = 64, **changes) -> Path:
    """A tiny recipe with its shards, in the form of a run's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"train": [str(folder / "train")], "validation": str(folder / "validation")}
    config = tiny_config(**{**changes, "data": {**data, **changes.get("data", {})}})
    for name, count, seed in (("train", samples, 0), ("validation", 8, 1)):
        if not (folder / name).exists():
            write_shards(folder / name, config, count, seed)
    path = folder / "recipe.json"
    path.write_text(json.dumps({"recipe": config.model_dump(mode="json", exclude_none=True)}))
    return path


def write_ds_json(path: Path, stage: int = 2, micro_batch="auto", **keys) -> Path:
    content = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": stage}, **keys}
    path.write_text(json.dumps(content))
    return path


def command(recipe: Path, ds_json: Path, run_dir: Path, *extra: str, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [
        *start,
        str(LAUNCHER),
        "--recipe",
        str(recipe),
        "--ds_config",
        str(ds_json),
        "--run_dir",
        str(run_dir),
        *extra,
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train(recipe: Path, ds_json: Path, run_dir: Path, *extra: str, processes: int = 1) -> str:
    """Run to the end; -> everything that was printed."""
    done = subprocess.run(
        command(recipe, ds_json, run_dir, *extra, processes=processes),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=280,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    return output


def read_metrics(run_dir: Path, key: str = "loss") -> dict[int, float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}
