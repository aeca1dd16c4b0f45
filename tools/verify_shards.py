"""Read sets of shards whole and compare every checksum.

    python tools/verify_shards.py data/sa1b/256 data/coco/256 --jobs 4

Prints a line for every shard that is not as it was written, with its first damaged sample. Ends with status 1 if there
is one, and with 2 if a manifest or an index is damaged, so that nothing can be compared.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mdit import cli
from mdit.data.manifest import ShardError
from mdit.data.shards import open_dataset


def main(arguments: list[str] | None = None) -> int:
    parser = cli.Parser(__doc__)
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    parser.add_argument("--jobs", type=cli.whole(1, 1024), default=1, help="shards that are read side by side")
    args = parser.parse_args(arguments)
    return 1 if sum(verify(directory, args.jobs) for directory in args.directories) else 0


def verify(directory: Path, jobs: int) -> int:
    """-> how many of the directory's shards are damaged. Raises ShardError when the manifest or the index is."""
    dataset = open_dataset(directory, check_sizes=False)
    shards, damaged = len(dataset.shard_sizes), 0

    def first_damage(shard: int) -> str | None:
        try:
            dataset.check_shard(shard)
        except ShardError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(jobs) as workers:  # reading and checksums leave Python's lock to others
        try:
            found = workers.map(first_damage, range(shards))
            for damage in tqdm(found, str(directory), shards, unit="shard", disable=None):
                if damage is not None:
                    damaged += 1
                    tqdm.write(damage)
        except BaseException:
            workers.shutdown(cancel_futures=True)  # what is left need not be read
            raise
    found = f"{damaged} of them damaged" if damaged else "all as they were written"
    captions = "" if dataset.weights is None else f" with {dataset.captions()} captions"
    print(f"{directory}: {dataset.samples} samples{captions} in {shards} shards, {found}")
    return damaged


if __name__ == "__main__":
    cli.run(main)
