"""Make latent shards, or check those that are there: of a recipe, or of a data set as it was downloaded.

    python launchers/precompute.py --recipe configs/quickstart.toml [--verify]
    deepspeed launchers/precompute.py --source cc12m --root downloads/cc12m --out data/cc12m \\
        --image_size 256 --image_size 512 --image_encoder ID_OR_PATH --text_encoder ID_OR_PATH

Also under torchrun, srun and plain python, on any number of machines at once. The same command again goes on where it
stopped. Training makes the shards of a recipe by itself. See docs/data.md.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mdit import cli
from mdit.captions import parse_weights
from mdit.config import DEFAULT_RECIPE, UserError, load_config
from mdit.data.manifest import MANIFEST, read_manifest
from mdit.data.report import read_report
from mdit.data.shards import open_dataset
from mdit.data.writer import SHARD_BYTES
from mdit.dist import World, configure_logging, logger, shared, work_on, world_from_env
from mdit.encoders import build_image_encoder, build_text_encoder, build_vision_tower
from mdit.precompute import precompute
from mdit.precompute.build import MAX_REJECTED, BuildJob, build_sets, check_source
from mdit.precompute.coordination import check_set, is_changing, is_finished, plan_of_finished
from mdit.precompute.dali import build_decoder
from mdit.precompute.mds_latents import IMAGE_ENCODER, TEXT_ENCODER, ImportedLatents
from mdit.precompute.pipeline import BATCH_SIZE, EncodingPipeline, PatchFeatures, SampleProducer
from mdit.sources import Source, check_name, open_named_source
from mdit.sources.mds import holds_latents, open_latents

OWNER = "this command's"
PATCH_SIZE = 2  # of the paper's models
FOR_BOTH = ("recipe", "set", "max_rejected", "verify", "local_rank")  # flags that go without --source
FOR_PICTURES = ("split", "caption_key", "captions", "caption_length", "min_side", "features", "patch_size", "precision")
FOR_PICTURES += ("batch_size", "decoder")
Jobs = list[tuple[BuildJob, SampleProducer]]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=cli.config, help="its [data] section is what counts; default: configs/quickstart.toml")
    add("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one recipe key")
    add("--source", metavar="NAME", help="instead of a recipe: cc12m, webdataset, folder, ...")
    add("--root", type=Path, metavar="DIR", help="where it was downloaded to")
    add("--out", type=Path, metavar="DIR", help="sets are written to DIR/256, DIR/512, ...")
    add("--image_size", type=cli.whole(1), action="append", help="in pixels; may be given several times")
    add("--image_encoder", metavar="ID_OR_PATH", help="pixels, or a diffusers AutoencoderKL")
    add("--text_encoder", metavar="ID_OR_PATH", help="minilm, openclip:ID, CLIP, T5, or a set to take it over from")
    add("--caption_length", type=cli.whole(1), help="tokens; default: the text encoder's")
    add("--split", help="default: train")
    add("--caption_key", help="the field with the captions, where there may be several")
    add("--captions", type=weights, metavar="KIND=WEIGHT,...", help="several captions a picture: alt=1,recaption=3")
    add("--limit", type=cli.whole(1), help="take the first so many pictures only")
    add("--min_side", type=cli.whole(1), help="leave out pictures with a shorter side; default: the least image size")
    add("--embeddings", choices=("f16", "i8b64"), help="how caption embeddings are stored; default: f16")
    add("--features", metavar="ID_OR_PATH", help="of which vision tower, for a recipe's [align]; default: none")
    add("--patch_size", type=cli.whole(1), help="of the models that are to train with the features; default: 2")
    add("--precision", choices=("float32", "bfloat16"), help="of the image encoder; default: float32")
    add("--batch_size", type=cli.whole(1), help="pictures in the encoder at a time; default: 32")
    add("--shard_bytes", type=cli.whole(1), help="size of a shard; default: 10^9")
    add("--decoder", choices=("auto", "pillow", "dali"), help="default: dali where it works on a GPU, else pillow")
    add("--max_rejected", type=share, metavar="SHARE", default=MAX_REJECTED, help="more left out than that is no set")
    add("--extend", action="store_true", default=None, help="bring sets that are there up to the source")
    add("--remake", action="append", metavar="PART", help="make a part of a set that is there again: 00012.tar")
    add("--verify", action="store_true", help="read every shard again and compare its checksums")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    return parser.parse_args(arguments)


def share(text: str) -> float:
    """A type for argparse: numbers from 0 to 1."""
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def weights(text: str) -> dict[str, float]:
    """A type for argparse: weights by kinds of captions."""
    try:
        return parse_weights(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    world = world_from_env()
    configure_logging(world)
    try:
        work_on(world.device)
        make_sets = (_plan_recipe if args.source is None else _plan_source)(args, world)
    except (UserError, OSError) as error:
        raise shared(error) from None  # until now all processes see the same
    for directory in make_sets():
        print(describe(directory, args.verify), flush=True)


def _plan_recipe(args: argparse.Namespace, world: World) -> Callable[[], list[Path]]:
    """Check all flags. -> what makes the sets as far as other processes do not, and returns those that are finished and
    that this process is to tell about. Both raise UserError."""
    if given := [name for name, value in vars(args).items() if value is not None and name not in FOR_BOTH]:
        raise UserError(f"--{given[0]}: needs --source")
    config = load_config(args.recipe or DEFAULT_RECIPE, args.set)

    def make() -> list[Path]:
        precompute(config, progress=world.is_rank_zero, device=world.device, max_rejected=args.max_rejected)
        directories = dict.fromkeys(map(Path, (*config.data.train, config.data.validation)))
        return list(directories) if world.is_rank_zero else []

    return make


def describe(directory: Path, verify: bool) -> str:
    """A set in a line, and what was left out in another. With `verify` all of it is read. Raises ShardError."""
    dataset = open_dataset(directory)
    if verify:
        dataset.verify()
    size = sum(shard.bytes for shard in dataset.manifest.shards)
    captions = "" if dataset.weights is None else f" with {dataset.captions():,} captions"
    text = (
        f"{directory}: {dataset.samples:,} samples{captions} in {len(dataset.shard_sizes)} shards, "
        f"{size / 1e6:,.1f} MB, latents {dataset.latent_shape}, caption embeddings {dataset.embedding_shape}"
    )
    if dataset.layout.features_shape is not None:
        text += f", features {dataset.layout.features_shape} by {dataset.encoders['features']['id']}"
    text += ", checksums right" if verify else ""
    report = read_report(directory)
    return text + (f"\n{directory}: {report.summary()}" if report and (report.rejected or report.captions) else "")


def _plan_source(args: argparse.Namespace, world: World) -> Callable[[], list[Path]]:
    """As `_plan_recipe`; opens the source and loads the encoders too."""
    check_name(args.source)
    imports = args.source == "mds" and args.root is not None and holds_latents(args.root)
    _check_flags(args, imports)
    build_settings = _build_settings(args, imports)
    sets = {size: args.out / str(size) for size in sorted(set(args.image_size))}
    for size, directory in sets.items():
        check_set(directory, {**build_settings, "image_size": size}, OWNER)
        if args.remake and not is_finished(directory):
            raise UserError(f"--remake {args.remake[0]}: {directory} is not there yet")
    open_sources = partial(_latents if imports else _pictures, args)
    finished = [] if args.extend or args.remake else [path for path in sets.values() if is_finished(path)]
    if finished:
        _look_at_finished({size: path for size, path in sets.items() if path in finished}, open_sources, args.limit)
    unfinished = {size: directory for size, directory in sets.items() if directory not in finished}
    jobs = (_imports if imports else _encodings)(args, world, unfinished, build_settings) if unfinished else []

    def make() -> list[Path]:
        return [*(finished if world.is_rank_zero else []), *(path for job in jobs for path in _finished_by(job))]

    return make


def _look_at_finished(sets: dict[int, Path], open_sources: Callable, limit: int | None) -> None:
    """Raise UserError where the source is no longer what a finished set was made from; it may be gone."""
    try:
        sources = open_sources(sets)
    except UserError as error:
        logger.info(f"the source cannot be compared with the sets that are there: {error}")
        sources = {}
    for size, directory in sets.items():
        if size in sources:
            check_source(sources[size], directory, limit)
        changing = "; it was being changed: give the same --extend or --remake again" if is_changing(directory) else ""
        logger.info(f"{directory}: is there already{changing}")


def _finished_by(job: tuple[BuildJob, SampleProducer]) -> list[Path]:
    outcome = build_sets(*job)
    for directory, parts in outcome.left.items():
        what = f"parts that other processes are making: {parts}" if parts else "another process is finishing it"
        logger.info(f"{directory}: {what}")
    return list(outcome.finished)


def _check_flags(args: argparse.Namespace, imports: bool) -> None:
    if args.recipe is not None or args.set:
        raise UserError(f"--{'set' if args.set else 'recipe'}: goes without --source {args.source}")
    needed = ("out", "image_size") if imports else ("out", "image_size", "image_encoder", "text_encoder")
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--{name}: is missing; --source {args.source} needs it")
    if args.patch_size is not None and args.features is None:
        raise UserError(f"--patch_size {args.patch_size}: changes nothing without --features")
    if args.limit is not None and (args.extend or args.remake):
        raise UserError(f"--{'extend' if args.extend else 'remake'}: goes without --limit {args.limit}")
    for name in FOR_PICTURES if imports else ():
        if getattr(args, name) is not None:
            raise UserError(f"--{name} {getattr(args, name)}: changes nothing; {args.root} holds latents, not pictures")


def _build_settings(args: argparse.Namespace, imports: bool) -> dict[str, Any]:
    """Settings that decide a set's content, for its fingerprint; with the name of the source's folder, not its path."""
    build_settings = {
        "source": args.source,
        "root": args.root and args.root.absolute().name,
        "limit": args.limit,
        "embeddings": args.embeddings or "f16",
    }
    if imports:
        encoders = {"image_encoder": args.image_encoder or IMAGE_ENCODER}
        return build_settings | encoders | {"text_encoder": args.text_encoder or TEXT_ENCODER}
    if args.features is not None:
        build_settings |= {"features": args.features, "patch_size": args.patch_size or PATCH_SIZE}
    return build_settings | {
        "split": args.split or "train",
        "caption_key": args.caption_key,
        "min_side": args.min_side or min(args.image_size),
        "image_encoder": args.image_encoder,
        "text_encoder": _text_description(args).get("id", args.text_encoder),
        "caption_length": _text_description(args).get("max_tokens", args.caption_length),
        "precision": args.precision or "float32",
        **({"captions": args.captions} if args.captions else {}),
    }


def _text_description(args: argparse.Namespace) -> dict[str, Any]:
    """Description of the text encoder, where --text_encoder is a set that is there; else empty."""
    directory = Path(args.text_encoder)
    if not (directory / MANIFEST).exists():
        return {}
    description = read_manifest(directory).encoders.plain()["text"]
    if args.caption_length not in (None, description["max_tokens"]):
        raise UserError(
            f"--caption_length {args.caption_length}: the captions of {directory} have {description['max_tokens']}"
        )
    return description


def _pictures(args: argparse.Namespace, sets: Iterable[int]) -> dict[int, Source]:
    """Image size -> source: one for all."""
    kinds = args.captions and [*args.captions]
    options = {"split": args.split or "train", "caption_key": args.caption_key, "kinds": kinds}
    source = open_named_source(args.source, args.root, **options)
    return dict.fromkeys(sets, source)


def _latents(args: argparse.Namespace, sets: Iterable[int]) -> dict[int, Source]:
    """Image size -> source, as each has latents of its own."""
    parts = {size: open_latents(args.root, size) for size in sets}
    return {size: Source(found, sum(part.samples for part in found)) for size, found in parts.items()}


def _encodings(args, world: World, sets: dict[int, Path], settings: dict[str, Any]) -> Jobs:
    """One for all sets that are to have the same parts made."""
    image_encoder = build_image_encoder(args.image_encoder, world.device, precision=settings["precision"])
    features = None
    if args.features is not None:
        features = PatchFeatures(build_vision_tower(args.features, world.device), settings["patch_size"])
    for size in sets:
        _, side, _ = image_encoder.latent_shape(size)  # raises for a size that it cannot take
        if features is not None:
            features.grid(side)
    source = next(iter(_pictures(args, sets).values()))
    jobs, alike = [], defaultdict(dict)
    for size, directory in sets.items():
        plan = plan_of_finished(directory) if is_finished(directory) else None
        alike[plan and (tuple(plan.parts.items()), plan.encoders.text)][size] = directory
    for together in alike.values():
        text_encoder = build_text_encoder(  # one for each, as it keeps the statistics of a set
            _text_description(args) or args.text_encoder, world.device, max_tokens=args.caption_length
        )
        decoder = build_decoder(tuple(together), settings["min_side"], world.device, engine=args.decoder or "auto")
        batch_size = args.batch_size or BATCH_SIZE
        pipeline = EncodingPipeline(image_encoder, text_encoder, decoder, batch_size, features=features)
        jobs.append((_job(args, world, source, together, settings), pipeline))
    return jobs


def _imports(args, world: World, sets: dict[int, Path], settings: dict[str, Any]) -> Jobs:
    jobs = []
    for size, source in _latents(args, sets).items():
        producer = ImportedLatents(source.parts[0], settings["image_encoder"], settings["text_encoder"])
        jobs.append((_job(args, world, source, {size: sets[size]}, settings), producer))
    return jobs


def _job(args, world: World, source: Source, sets: dict[int, Path], settings: dict[str, Any]) -> BuildJob:
    return BuildJob(
        source=source,
        sets=sets,
        build_settings=settings,
        owner=OWNER,
        embeddings=settings["embeddings"],
        weights=args.captions,
        shard_bytes=args.shard_bytes or SHARD_BYTES,
        limit=args.limit,
        progress=world.is_rank_zero,
        max_rejected=args.max_rejected,
        extend=bool(args.extend),
        remake=args.remake or (),
    )


if __name__ == "__main__":
    cli.run(main)
