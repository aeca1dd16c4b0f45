"""Make a recipe's latent shards, or check those that are there.

    python launchers/precompute.py --recipe configs/quickstart.toml
    python launchers/precompute.py --recipe configs/quickstart.toml --verify

Training makes missing shards by itself; this is for doing it beforehand. See docs/data.md.
"""

import argparse
import sys
from pathlib import Path

from mdit.config import DEFAULT_RECIPE, UserError, load_config
from mdit.dist import configure_logging, identify


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=DEFAULT_RECIPE, help="its [data] section is what counts")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="change one recipe key")
    parser.add_argument("--verify", action="store_true", help="read every shard again and compare its checksum")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    world = identify()
    configure_logging(world)
    try:
        config = load_config(args.recipe, args.set)
        from mdit.data.shards import open_dataset
        from mdit.prepare import prepare

        prepare(config, device=world.device)
        for directory in dict.fromkeys((*config.data.train, config.data.validation)):
            dataset = open_dataset(directory)
            if args.verify:
                dataset.verify()
            size = sum(shard.bytes for shard in dataset.manifest.shards)
            print(
                f"{directory}: {dataset.samples:,} samples in {len(dataset.shard_sizes)} shards, {size / 1e6:,.1f} MB, "
                f"latents {dataset.latent_shape}, caption embeddings {dataset.embedding_shape}"
                + (", checksums right" if args.verify else "")
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
