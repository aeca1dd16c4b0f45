"""The model card of a published model: README.md as the Hugging Face Hub reads it."""

from pathlib import Path
from typing import Any

from mdit.checkpoint.snapshot import Snapshot, WeightKind
from mdit.config import TrainConfig, portable
from mdit.costs.flops import run_flops
from mdit.documents import read_json
from mdit.parallel.settings import count_parameters
from mdit.train.meter import training_seconds
from mdit.train.run_directory import CONFIG, METRICS

CARD = """---
license: {licence}
library_name: diffusers
pipeline_tag: text-to-image
tags:
- microdit
- mdit
---

# {name}

A MicroDiT (arXiv 2407.15811) of {parameters:.1f} M parameters that draws pictures of {size} px for captions of up to
{caption_length} tokens. Trained with mdit.

```python
from mdit import MicroDiTPipeline  # pip install mdit

pipeline = MicroDiTPipeline.from_pretrained("{name}")
pipeline("{prompt}", seed=0).images[0].save("picture.png")
```

With diffusers: `DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)`; mdit has to be installed as well.

| | |
|---|---|
{rows}

The whole recipe, which trains the model again, is `recipe` in `model_index.json`.
"""


def model_card(snapshot: Snapshot, kind: WeightKind, licence: str) -> str:
    config, file = snapshot.config, snapshot.weights_file(kind)
    facts = {
        "weights": f"{file.stem} of step {snapshot.step}, xxh3 {snapshot.checksums[file.name]['xxh3']}",
        "data": ", ".join(portable(config, snapshot.path / CONFIG)["data"]["train"]),
        "images": f"{config.training.num_steps * config.training.global_batch_size / 1e6:,.3g} M",
        "mask ratio": ", ".join(f"{ratio:g}" for ratio in config.training.mask_ratios),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "compute": f"{run_flops(config) / 1e15:,.3g} PFLOP",
        **cost_of_run(snapshot.path.parent.parent, config),
        "image encoder": snapshot.encoders["image"]["id"],
        "text encoder": snapshot.encoders["text"]["id"],
        "sampler": f"Heun, {config.report.sampler_steps} steps, guidance {config.report.guidance:g}",
        "licence": licence,
    }
    prompts = config.report.prompts
    return CARD.format(
        licence=licence,
        name=config.name,
        parameters=count_parameters(config.model) / 1e6,
        size=config.model.latent_size * (1 if snapshot.encoders["image"]["id"] == "pixels" else 8),
        caption_length=config.model.caption_length,
        prompt=prompts[0] if prompts != "validation" else "a red apple on a blue background",
        rows="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
    )


def cost_of_run(run_dir: Path, config: TrainConfig) -> dict[str, Any]:
    """Time and machine of the run that the snapshot lies in, where it does."""
    if not (run_dir / METRICS).is_file() or not (run_dir / CONFIG).is_file():
        return {}
    seconds, run = training_seconds(run_dir / METRICS, config.training.num_steps), read_json(run_dir / CONFIG)
    versions = ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items())
    processes = run.get("world_size", 1)
    told = f"{seconds / 3600:,.2f} hours of steps on {processes} process{'es' * (processes > 1)}"
    return {"training": told, "versions": f"{versions}, commit {run.get('commit')}"}
