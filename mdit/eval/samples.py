"""Pictures from a network: latents by the Heun sampler, decoded, in a grid with their captions."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from mdit.checkpoint.snapshot import Snapshot, WeightKind, load_model
from mdit.config import ReportConfig, TrainConfig, UserError, parse_section
from mdit.diffusion.edm import denoiser, generator_for
from mdit.diffusion.sampler import sample
from mdit.dist import logger, work_on, world_from_env
from mdit.encoders import ImageEncoder, build_image_encoder, build_text_encoder
from mdit.eval.lettering import lettering
from mdit.files import replacing
from mdit.kernels.selection import choose_kernels
from mdit.models import MicroDiT
from mdit.parallel.fuse import fuse

MIN_CELL = 96  # pixels: smaller pictures are enlarged so that captions fit and eyes can judge
ANY_SIZE = 512  # of a picture, in pixels
BATCH_SIZE = 16  # pictures drawn at a time
ENCODED_AHEAD = 256  # captions, about: of many the embeddings would fill the memory
FONT_SIZE, MAX_LINES, MARGIN = 11, 5, 6


def sampling_options(config: TrainConfig, guidance: float | None, num_steps: int | None) -> dict:
    """`guidance` and `num_steps` for sample_latents: as given, the recipe's where None. Checked as a recipe's are."""
    given = {"guidance": guidance, "sampler_steps": num_steps}
    values = config.report.model_dump() | {key: value for key, value in given.items() if value is not None}
    report = parse_section(ReportConfig, values, "command line")
    return {"guidance": report.guidance, "num_steps": report.sampler_steps}


def drawn_by(snapshot: Snapshot, kind: WeightKind, guidance: float | None, num_steps: int | None) -> dict[str, Any]:
    """Sampler and weights of pictures, as files tell them."""
    options, file = sampling_options(snapshot.config, guidance, num_steps), snapshot.weights_file(kind).name
    weights = {"weights": file, "step": snapshot.step, "xxh3": snapshot.checksums[file]["xxh3"]}
    return {**options, **weights, "recipe": snapshot.config.name}


def sampling_model(
    snapshot: Snapshot, kind: WeightKind, device: torch.device, weights: dict[str, Tensor] | None = None
) -> MicroDiT:
    """A snapshot's network, or with other `weights` in place of its own, fused, in the number format and with the
    kernels that "auto" takes for training here."""
    work_on(device)
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return fused_for_sampling(load_model(snapshot, kind, device, dtype, weights))


def fused_for_sampling(model: MicroDiT) -> MicroDiT:
    """A plain network in its fused form, with the kernels that "auto" takes for its device and format."""
    weight = next(model.parameters())
    in_triton, reason = choose_kernels("auto", weight.device, weight.dtype, model.config.head_dim, "a model to sample")
    logger.info(f"{weight.dtype}; kernels: {', '.join(sorted(in_triton)) or 'none'} in Triton ({reason})")
    return fuse(model)


@torch.no_grad()
def sample_latents(
    net: Callable,
    captions_NLC: Tensor,
    *,
    config: TrainConfig,
    seed: int,
    indices: Sequence[int],
    guidance: float,
    num_steps: int,
    batch_size: int,
) -> Tensor:
    """(N, C, H, W) float32 latents of N captions, on the captions' device.

    Picture i starts from noise drawn on the CPU from (seed, indices[i]) alone: the same on any device, in any batch.
    """
    shape = config.model.latent_shape
    latents_NCHW = torch.empty(len(indices), *shape, device=captions_NLC.device)
    for start in range(0, len(indices), batch_size):
        rows = slice(start, start + batch_size)
        noise = torch.stack([torch.randn(shape, generator=generator_for(seed, "sample", i)) for i in indices[rows]])
        captions = captions_NLC[rows]
        denoise = denoiser(net, captions, config.noise, guidance)
        latents_NCHW[rows] = sample(config.noise, denoise, noise.to(captions.device), num_steps)
    return latents_NCHW


@torch.no_grad()
def to_images(image_encoder, latents_NCHW: Tensor) -> Tensor:
    """Decode to (N, H, W, 3) uint8 pictures on the CPU. One by one: of 512 px an autoencoder takes a GB for each."""
    return torch.cat([to_uint8(image_encoder.decode(latent_1CHW)).cpu() for latent_1CHW in latents_NCHW.split(1)])


def draw_pictures(snapshot: Snapshot, model: MicroDiT, captions_NLC: Tensor, seed: int, options: dict) -> Tensor:
    """(N, H, W, 3) uint8 pictures of a snapshot's model on the CPU; `options` are those of sampling_options."""
    device, source = next(model.parameters()).device, snapshot.path / "encoders.json"
    image_encoder = build_image_encoder(snapshot.encoders["image"], device)
    rows = range(len(captions_NLC))
    batches = draw_batches(model, image_encoder, captions_NLC, snapshot.config, seed, rows, source, **options)
    return torch.cat([*batches])


def draw_batches(
    model: MicroDiT,
    image_encoder: ImageEncoder,
    captions_NLC: Tensor,
    config: TrainConfig,
    seed: int,
    numbers: Sequence[int],
    source: Path,
    *,
    guidance: float,
    num_steps: int,
    batch_size: int = BATCH_SIZE,
) -> Iterator[Tensor]:
    """Pictures as uint8 (n, H, W, 3) on the CPU, batch by batch; the i-th starts from the noise of (seed, numbers[i]).
    Raises UserError where the encoders, which `source` describes, do not fit the model, or what it draws is not
    finite."""
    device, sizes = next(model.parameters()).device, config.model
    channels = image_encoder.latent_shape(ANY_SIZE)[0]
    require_shape(source, "an image encoder of latents", (channels,), (sizes.latent_channels,))
    require_shape(source, "a text encoder of captions", captions_NLC.shape[1:], sizes.caption_shape)
    options = {"guidance": guidance, "num_steps": num_steps}
    for start in range(0, len(numbers), batch_size):
        rows = slice(start, start + batch_size)
        latents_NCHW = sample_latents(
            model,
            captions_NLC[rows].to(device),
            config=config,
            seed=seed,
            indices=numbers[rows],
            batch_size=batch_size,
            **options,
        )
        if not latents_NCHW.isfinite().all():
            raise UserError(f"{source.parent}: draws NaN or infinities with {options}")
        yield to_images(image_encoder, latents_NCHW)


class Painter:
    """A snapshot's model and its encoders on this process's device, for as many pictures as are wanted."""

    def __init__(self, snapshot: Snapshot, weights: WeightKind = "ema") -> None:
        self.snapshot = snapshot
        self.weights: WeightKind = weights
        device = world_from_env().device
        self.text_encoder = build_text_encoder(snapshot.encoders["text"], device)
        self.image_encoder = build_image_encoder(snapshot.encoders["image"], device)
        self.model = sampling_model(snapshot, weights, device)

    def draw(
        self,
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        batch_size: int = BATCH_SIZE,
    ) -> Iterator[Image.Image]:
        """One RGB picture for each prompt, as soon as its batch is drawn. Raises UserError.

        Picture i depends on its prompt, `seed` and i alone, or numbers[i] in its place. `guidance` (1 is none) and
        `steps` of the Heun sampler are the recipe's by default.
        """
        config, file = self.snapshot.config, self.snapshot.path / "encoders.json"
        options = sampling_options(config, guidance, steps) | {"batch_size": batch_size}
        numbers = range(len(prompts)) if numbers is None else numbers
        together = -(-ENCODED_AHEAD // batch_size) * batch_size
        for start in range(0, len(prompts), together):
            rows = slice(start, start + together)
            captions_NLC = self.text_encoder.encode(prompts[rows])
            some = self.model, self.image_encoder, captions_NLC, config, seed, numbers[rows], file
            for batch in draw_batches(*some, **options):
                yield from (Image.fromarray(image.numpy()) for image in batch)

    def about(
        self, prompt: str, *, guidance: float | None, steps: int | None, seed: int, number: int
    ) -> dict[str, str]:
        """Prompt, settings and weights of a picture, as texts for `save_png`."""
        told = {"seed": seed, "number": number, **drawn_by(self.snapshot, self.weights, guidance, steps)}
        return {"prompt": prompt, "mdit": json.dumps(told)}


def generate(
    snapshot: Snapshot,
    prompts: str | Sequence[str],
    *,
    guidance: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    weights: WeightKind = "ema",
) -> list[Image.Image]:
    """One RGB picture for each prompt, drawn by the model of a snapshot: all of what `Painter.draw` draws.

    On this process's GPU where there is one. Raises UserError.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    return [*Painter(snapshot, weights).draw(prompts, guidance=guidance, steps=steps, seed=seed)]


def require_shape(source: Path, what: str, found: Sequence[int], wanted: tuple[int, ...]) -> None:
    """Raise UserError unless a model, which takes `wanted`, can take what `source` gives."""
    if tuple(found) != wanted:
        raise UserError(f"{source}: {what} of shape {tuple(found)}, and the snapshot's model takes {wanted}")


def to_uint8(images_NCHW: Tensor) -> Tensor:
    """[-1, 1] -> (N, H, W, C) uint8, values outside clipped."""
    return (images_NCHW.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def grid(pictures: Iterable[Image.Image | Tensor], captions: Sequence[str], columns: int | None = None) -> Image.Image:
    """One picture of many, which may be (H, W, 3) uint8 tensors: row by row, each above its caption; near a square by
    default."""
    pictures = [_enlarged(p if isinstance(p, Image.Image) else Image.fromarray(p.cpu().numpy())) for p in pictures]
    font, captions = lettering(list(captions), FONT_SIZE)
    width, height = pictures[0].size
    texts = ["\n".join(wrap(caption, font, width)) for caption in captions]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    text_height = max(ruler.multiline_textbbox((0, 0), text, font=font)[3] for text in texts)
    cell_width, cell_height = width + MARGIN, height + int(text_height) + 2 * MARGIN
    columns = min(columns or math.isqrt(len(pictures) - 1) + 1, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), "white")
    ink = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        left, top = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        sheet.paste(picture, (left, top))
        ink.multiline_text((left, top + height + MARGIN // 2), text, fill="black", font=font)
    return sheet


def save_png(picture: Image.Image, path: Path, about: Mapping[str, str] | None = None) -> None:
    """Write all of it or nothing, in place of what was there. `about`: texts that the file carries, as UTF-8."""
    info = PngInfo()
    for key, text in (about or {}).items():
        info.add_itxt(key, text)
    with replacing(path) as partial:
        picture.save(partial, format="PNG", pnginfo=info)


def read_about(path: Path) -> dict[str, str]:
    """The texts that a PNG file carries. Raises OSError where it is no picture."""
    with Image.open(path, formats=["PNG"]) as picture:
        picture.load()
        return {key: str(text) for key, text in getattr(picture, "text", {}).items()}


def missing(files: Sequence[Path], abouts: Sequence[Mapping[str, str]]) -> list[int]:
    """Numbers of the pictures that are not there. Raises UserError for one that is of something else than `about`."""
    found = []
    for number, (path, about) in enumerate(zip(files, abouts, strict=True)):
        if not path.exists():
            found.append(number)
        elif (there := read_about(path)) != about:
            key = next(key for key in about if there.get(key) != about[key])
            raise UserError(f"{path}: its {key} is {there.get(key)}, now it is {about[key]}; choose another --out")
    return found


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """At most MAX_LINES lines of at most `width` pixels; longer words are broken, a longer text ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        separator = " " if lines[-1] else ""
        if font.getlength(lines[-1] + separator + word) <= width:
            lines[-1] += separator + word
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], lines[MAX_LINES - 1][:-1] + "…"]
    return lines


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = -(-MIN_CELL // min(picture.size))
    if factor == 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
