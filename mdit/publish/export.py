"""A snapshot to a diffusers pipeline, and back, with the same weights bit for bit."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from mdit.checkpoint.snapshot import Snapshot, WeightKind, check_numbers, check_weights, load_model, save_snapshot
from mdit.config import UserError, parse_recipe, portable
from mdit.descriptions import check_descriptions
from mdit.documents import read_json
from mdit.encoders import build_image_encoder, build_text_encoder
from mdit.encoders.image import AutoencoderEncoder
from mdit.encoders.text_transformers import TransformersTower
from mdit.publish.card import model_card

WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")
PREFIX = "network."  # of the transformer's tensors


def export_pipeline(snapshot: Snapshot, kind: WeightKind, folder: Path, licence: str) -> None:
    """Write a snapshot's weights of one kind and its encoders as a pipeline. Raises UserError where an encoder cannot
    be loaded."""
    from mdit.publish.pipeline import MicroDiTPipeline, MicroDiTScheduler, MicroDiTTransformer

    encoders, file = snapshot.encoders, snapshot.weights_file(kind)
    tower = build_text_encoder(encoders["text"]).tower
    packed = isinstance(tower, TransformersTower)
    image_encoder = build_image_encoder(encoders["image"])
    recipe = portable(snapshot.config, snapshot.path / "config.json")
    transformer = MicroDiTTransformer(model=recipe["model"])
    transformer.network = load_model(snapshot, kind)
    pipeline = MicroDiTPipeline(
        transformer=transformer,
        scheduler=MicroDiTScheduler(noise=recipe["noise"]),
        vae=image_encoder.autoencoder if isinstance(image_encoder, AutoencoderEncoder) else None,
        text_encoder=tower.model if packed else None,
        tokenizer=tower.tokenizer if packed else None,
        recipe=recipe,
        encoders=encoders,
        weights={"kind": file.stem, "step": snapshot.step, **snapshot.checksums[file.name]},
    )
    pipeline.save_pretrained(folder, max_shard_size="1TB")
    (folder / "README.md").write_text(model_card(snapshot, kind, licence), encoding="utf-8")


def import_pipeline(folder: Path, out: Path) -> str:
    """Write `out`, a snapshot of a pipeline's weights (raw) -> a line that says what was found. Raises UserError naming
    what does not fit."""
    if out.exists():
        raise UserError(f"{out}: exists already")
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder}: is a directory and no pipeline: it has no {index.name}")
    content = read_json(index)
    missing = [key for key in ("recipe", "encoders", "weights") if not isinstance(content.get(key), dict)]
    if missing:
        raise UserError(f"{index}: has no {missing[0]}: not a pipeline of mdit")
    config = parse_recipe({**content["recipe"], "ema": None}, index)
    encoders = check_descriptions(content["encoders"], index)
    for which, place in (("image", "vae"), ("text", "text_encoder")):
        if (folder / place).is_dir() and encoders[which]["id"] != "minilm":
            encoders[which] = encoders[which] | {"id": str(folder.absolute())}
    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read: {error}") from None
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    check_weights(weights, config.model, folder / WEIGHTS)
    check_numbers(weights, folder / WEIGHTS)
    step = content["weights"].get("step", 0)
    written = {"recipe": portable(config, out / "config.json"), "imported_from": folder.name}
    save_snapshot(out, step=step, config_json=written, raw=weights, ema=None, encoders=encoders)
    return f"{config.name}, step {step}, {content['weights'].get('kind')} weights"
