"""Read sets of shards whole and compare every checksum.

    python tools/verify_shards.py data/sa1b/256 data/coco/256 --jobs 4

Prints a line for every shard that is not as it was written, with its first damaged sample. Ends with status 1 if there
is one, and with 2 if a manifest or an index is damaged, so that nothing can be compared.
"""

import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from mdit import cli
from mdit.config import UserError
from mdit.data.manifest import ShardError
from mdit.data.shards import LatentSet, open_dataset

_dataset: LatentSet  # of a worker process


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
    with ProcessPoolExecutor(jobs, initializer=open_in_worker, initargs=(directory,)) as workers:
        found = workers.map(first_damage, range(shards))
        try:
            for damage in tqdm(found, str(directory), shards, unit="shard", disable=None):
                if damage is not None:
                    damaged += 1
                    tqdm.write(damage)
        except BrokenProcessPool:
            raise UserError(f"{directory}: a process that read shards was killed (--jobs {jobs}: memory?)") from None
        except BaseException:
            workers.shutdown(cancel_futures=True)  # what is left need not be read
            raise
    found = f"{damaged} of them damaged" if damaged else "all as they were written"
    print(f"{directory}: {dataset.samples} samples in {shards} shards, {found}")
    return damaged


def open_in_worker(directory: Path) -> None:
    global _dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; one of them tells it
    _dataset = open_dataset(directory, check_sizes=False)


def first_damage(shard: int) -> str | None:
    try:
        _dataset.check_shard(shard)
    except ShardError as error:
        return str(error)
    return None


if __name__ == "__main__":
    cli.run(main)
