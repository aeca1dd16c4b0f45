"""What launchers/precompute.py does with its flags."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mdit.config import DEFAULT_RECIPE, UserError, load_config
from mdit.data.manifest import MANIFEST, read_manifest
from mdit.data.shards import open_dataset
from mdit.data.writer import SHARD_BYTES
from mdit.dist import World, logger
from mdit.encoders import TextEncoder, build_image_encoder, build_text_encoder, build_text_encoder_from
from mdit.prepare.decoders import build_decoder
from mdit.prepare.imported import IMAGE_ENCODER, TEXT_ENCODER, ImportedLatents
from mdit.prepare.in_progress import check_set, is_changing, is_finished, plan_of_finished
from mdit.prepare.precompute import MAX_REJECTED, Job, Maker, check_source, precompute
from mdit.prepare.recipe import prepare
from mdit.prepare.report import read_report, summary
from mdit.prepare.towers import Towers
from mdit.sources import Source, check_name, open_named_source
from mdit.sources.mds import holds_latents, open_latents

WHOSE = "this command's"
FOR_BOTH = ("recipe", "set", "max_rejected", "verify", "local_rank")  # flags that go without --source
FOR_PICTURES = ("split", "caption_key", "caption_length", "min_side", "precision", "batch_size", "decoder")
NUMBERS = ("image_size", "min_side", "limit", "batch_size", "shard_bytes", "caption_length")
BATCH_SIZE = 32


def plan_sets(args: argparse.Namespace, world: World) -> Callable[[], list[Path]]:
    """Check all flags, open the source and load the encoders. -> what makes the sets as far as other processes do not,
    and returns those that are finished and that this process is to tell about. Both raise UserError."""
    return _plan_recipe(args, world) if args.source is None else _plan_source(args, world)


def _plan_recipe(args: argparse.Namespace, world: World) -> Callable[[], list[Path]]:
    if given := [name for name, value in vars(args).items() if value is not None and name not in FOR_BOTH]:
        raise UserError(f"--{given[0]}: needs --source")
    config = load_config(args.recipe or DEFAULT_RECIPE, args.set)

    def make() -> list[Path]:
        prepare(config, progress=world.is_first, device=world.device, max_rejected=_max_rejected(args))
        directories = dict.fromkeys(map(Path, (*config.data.train, config.data.validation)))
        return list(directories) if world.is_first else []

    return make


def describe(directory: Path, verify: bool) -> str:
    """A set in a line, and what was left out in another. With `verify` all of it is read. Raises ShardError."""
    dataset = open_dataset(directory)
    if verify:
        dataset.verify()
    size = sum(shard.bytes for shard in dataset.manifest.shards)
    text = (
        f"{directory}: {dataset.samples:,} samples in {len(dataset.shard_sizes)} shards, {size / 1e6:,.1f} MB, "
        f"latents {dataset.latent_shape}, caption embeddings {dataset.embedding_shape}"
    ) + (", checksums right" if verify else "")
    report = read_report(directory)
    return text + (f"\n{directory}: {summary(report)}" if report and report["rejected"] else "")


def _plan_source(args: argparse.Namespace, world: World) -> Callable[[], list[Path]]:
    check_name(args.source)
    imports = args.source == "mds" and args.root is not None and holds_latents(args.root)
    _check_flags(args, imports)
    made_from = _made_from(args, imports)
    sets = {size: args.out / str(size) for size in sorted(set(args.image_size))}
    for size, directory in sets.items():
        check_set(directory, {**made_from, "image_size": size}, WHOSE)
        if args.remake and not is_finished(directory):
            raise UserError(f"--remake {args.remake[0]}: {directory} is not there yet")
    open_sources = partial(_latents if imports else _pictures, args)
    finished = [] if args.extend or args.remake else [path for path in sets.values() if is_finished(path)]
    if finished:
        _look_at_finished({size: path for size, path in sets.items() if path in finished}, open_sources, args.limit)
    unfinished = {size: directory for size, directory in sets.items() if directory not in finished}
    jobs = (_imports if imports else _encodings)(args, world, unfinished, made_from) if unfinished else []

    def make() -> list[Path]:
        return [*(finished if world.is_first else []), *(path for job in jobs for path in _finished_by(job))]

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


def _finished_by(job: tuple[Job, Maker]) -> list[Path]:
    outcome = precompute(*job)
    for directory, parts in outcome.left.items():
        what = f"parts that other processes are making: {parts}" if parts else "another process is finishing it"
        logger.info(f"{directory}: {what}")
    return list(outcome.finished)


def _max_rejected(args: argparse.Namespace) -> float:
    """Raises UserError for what is no share."""
    share = MAX_REJECTED if args.max_rejected is None else args.max_rejected
    if not 0 <= share <= 1:
        raise UserError(f"--max_rejected {share}: must be a share, from 0 to 1")
    return share


def _check_flags(args: argparse.Namespace, imports: bool) -> None:
    if args.recipe is not None or args.set:
        raise UserError(f"--{'set' if args.set else 'recipe'}: goes without --source {args.source}")
    needed = ("out", "image_size") if imports else ("out", "image_size", "image_encoder", "text_encoder")
    for name in needed:
        if getattr(args, name) is None:
            raise UserError(f"--{name}: is missing; --source {args.source} needs it")
    for name in NUMBERS:
        numbers = getattr(args, name)
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if number is not None and number < 1:
                raise UserError(f"--{name} {number}: must be at least 1")
    _max_rejected(args)
    if args.limit is not None and (args.extend or args.remake):
        raise UserError(f"--{'extend' if args.extend else 'remake'}: goes without --limit {args.limit}")
    for name in FOR_PICTURES if imports else ():
        if getattr(args, name) is not None:
            raise UserError(f"--{name} {getattr(args, name)}: changes nothing; {args.root} holds latents, not pictures")


def _made_from(args: argparse.Namespace, imports: bool) -> dict[str, Any]:
    """What a set's fingerprint says, and its image size. Not where the source lies, but what it is called there."""
    made_from = {
        "source": args.source,
        "root": args.root and args.root.absolute().name,
        "limit": args.limit,
        "embeddings": args.embeddings or "f16",
    }
    if imports:
        encoders = {"image_encoder": args.image_encoder or IMAGE_ENCODER}
        return made_from | encoders | {"text_encoder": args.text_encoder or TEXT_ENCODER}
    return made_from | {
        "split": args.split or "train",
        "caption_key": args.caption_key,
        "min_side": args.min_side or min(args.image_size),
        "image_encoder": args.image_encoder,
        "text_encoder": _text_description(args).get("id", args.text_encoder),
        "caption_length": _text_description(args).get("max_tokens", args.caption_length),
        "precision": args.precision or "float32",
    }


def _text_description(args: argparse.Namespace) -> dict[str, Any]:
    """Of the text encoder, where --text_encoder is a set that is there. Else nothing."""
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
    source = open_named_source(args.source, args.root, split=args.split or "train", caption_key=args.caption_key)
    return dict.fromkeys(sets, source)


def _latents(args: argparse.Namespace, sets: Iterable[int]) -> dict[int, Source]:
    """Image size -> source, as each has latents of its own."""
    parts = {size: open_latents(args.root, size) for size in sets}
    return {size: Source(found, sum(part.samples for part in found)) for size, found in parts.items()}


def _encodings(args, world: World, sets: dict[int, Path], made_from: dict[str, Any]) -> list[tuple[Job, Maker]]:
    """One for all sets that are to have the same parts made."""
    image_encoder = build_image_encoder(args.image_encoder, world.device, precision=made_from["precision"])
    for size in sets:
        image_encoder.latent_shape(size)  # raises for a size that it cannot take
    source = next(iter(_pictures(args, sets).values()))
    overlap, jobs, alike = world.device.type == "cuda", [], defaultdict(dict)
    for size, directory in sets.items():
        plan = plan_of_finished(directory) if is_finished(directory) else None
        alike[plan and (tuple(plan.parts.items()), plan.encoders.text)][size] = directory
    for together in alike.values():
        text_encoder = _text_encoder(args, world)  # one for each, as it keeps the statistics of a set
        decoder = build_decoder(tuple(together), made_from["min_side"], world.device, engine=args.decoder or "auto")
        towers = Towers(image_encoder, text_encoder, decoder, args.batch_size or BATCH_SIZE, overlap)
        jobs.append((_job(args, world, source, together, made_from), towers))
    return jobs


def _text_encoder(args: argparse.Namespace, world: World) -> TextEncoder:
    if description := _text_description(args):
        return build_text_encoder_from(description, world.device)
    return build_text_encoder(args.text_encoder, max_tokens=args.caption_length, device=world.device)


def _imports(args, world: World, sets: dict[int, Path], made_from: dict[str, Any]) -> list[tuple[Job, Maker]]:
    jobs = []
    for size, source in _latents(args, sets).items():
        maker = ImportedLatents(source.parts[0], made_from["image_encoder"], made_from["text_encoder"])
        jobs.append((_job(args, world, source, {size: sets[size]}, made_from), maker))
    return jobs


def _job(args, world: World, source: Source, sets: dict[int, Path], made_from: dict[str, Any]) -> Job:
    return Job(
        source=source,
        sets=sets,
        made_from=made_from,
        whose=WHOSE,
        embeddings=made_from["embeddings"],
        shard_bytes=args.shard_bytes or SHARD_BYTES,
        limit=args.limit,
        progress=world.is_first,
        max_rejected=_max_rejected(args),
        extend=bool(args.extend),
        remake=args.remake or (),
    )
