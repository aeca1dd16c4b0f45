"""Cost of reading: a bound, mdit's engines and webdataset, on one machine and the same made-up samples.

    python tools/bench_loader.py
    python tools/bench_loader.py --embeddings i8b64 --device cuda --json loader.json

`memmap` copies samples from a memory map into one buffer that is used again and again, checks nothing and makes
nothing: less cannot be done. `native` and `dali` are the engines of `mdit.data_engine`. `webdataset` is a WebDataset
with a shuffle buffer of 1,000 samples, whose batches are made in 2 workers of a DataLoader. All deliver batches on the
device, from files that were read into the page cache before. CPU time is that of all processes of a contender while
batches are taken as fast as they come. Each runs in a process of its own, one after the other, `--repeats` times;
printed are the least CPU time, the highest rate, the median time to the first batch (loading DALI included) and the
largest memory: the peak resident set over what the process held before, workers included. That of `memmap` counts the
mapped files.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import timeit
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from mdit import cli
from mdit.bench.report import environment, table
from mdit.config import UserError
from mdit.data.loader import build_loader, choose_engine
from mdit.data.manifest import MANIFEST, SampleLayout
from mdit.data.order import GlobalOrder
from mdit.data.quantise import dequantise
from mdit.data.shards import open_dataset
from mdit.data.writer import ShardWriter
from mdit.files import try_to_write, write_json
from mdit.provenance import package_versions

SHARD_BYTES = 64 * 10**6
WORKERS, SHUFFLE = 2, 1000
WARM_UP = 4  # batches
READERS = ("numpy", "xxhash", "webdataset", "nvidia-dali-cuda130")
LARGE_SET = [6000] * 6167  # samples of its shards: 37 million


@dataclass(frozen=True)
class LoaderBenchmark:
    directory: str
    batch_size: int
    seconds: float
    device: str


class LoaderFigures(NamedTuple):
    samples_per_second: float
    cpu_us: float  # for a sample
    first_batch_ms: float
    peak_mib: float


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.json:
        try_to_write(args.json)
    with tempfile.TemporaryDirectory(prefix="mdit_bench_") as temporary:
        directory = args.dir or Path(temporary) / "set"
        make_set(directory, args)
        read_back(directory)
        bench = LoaderBenchmark(str(directory), args.batch_size, args.seconds, args.device)
        report = {
            "environment": environment(torch.device(args.device)).model_dump() | package_versions(READERS),
            "settings": {name: str(value) for name, value in vars(args).items()},
            "contenders": compare(args.contenders, bench, args.repeats),
            "checksum": checksum_cost(directory),
            "order": order_cost(args.batch_size),
        }
    print_report(report)
    if args.json:
        write_json(args.json, report)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--samples", type=cli.whole(1), default=6000)
    add("--batch_size", type=cli.whole(1), default=256)
    add("--seconds", type=cli.positive, default=5.0, help="for each contender and repeat")
    add("--repeats", type=cli.whole(1), default=3)
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    add("--latent", type=int, nargs=3, default=(4, 32, 32), metavar=("C", "H", "W"))
    add("--embedding", type=int, nargs=2, default=(77, 1024), metavar=("L", "C"))
    add("--embeddings", choices=("f16", "i8b64"), default="f16")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dir", type=Path, help="where the samples are, or go; else a temporary directory")
    add("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args(arguments)


def make_set(directory: Path, args: argparse.Namespace) -> None:
    """Random samples, 16 of them again and again; what is in `directory` already is taken as it is."""
    if (directory / MANIFEST).exists():
        return
    rng = np.random.default_rng(0)
    latents = rng.normal(size=(16, *args.latent)).astype(np.float16)
    captions = rng.normal(size=(16, *args.embedding)).astype(np.float16)
    length, channels = args.embedding
    encoders = {"image": {"id": "pixels"}, "text": {"id": "none", "max_tokens": length, "channels": channels}}
    shapes = tuple(args.latent), tuple(args.embedding)
    with ShardWriter(directory, *shapes, encoders, {}, SHARD_BYTES, embeddings=args.embeddings) as writer:
        for i in range(args.samples):
            writer.write(f"{i:08d}", latents[i % 16], captions[i % 16], f"a caption of about fifty letters, number {i}")


def read_back(directory: Path) -> None:
    """Bring the shards into the page cache by reading. As they were written, they would lie there in smaller pieces,
    which take half as long again to read."""
    for path in sorted(directory.glob("*.tar")):
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while file.read(2**20):
                pass


def memmap_batches(bench: LoaderBenchmark) -> Iterator[Tensor]:
    dataset = open_dataset(bench.directory)
    order, row_bytes = GlobalOrder(dataset.shard_sizes, bench.batch_size, seed=0), dataset.layout.row_bytes
    places = dataset.locate(range(dataset.samples))
    maps = [np.memmap(dataset.directory / shard.file, mode="r") for shard in dataset.manifest.shards]
    buffer = torch.empty(bench.batch_size, row_bytes, dtype=torch.uint8, pin_memory=bench.device == "cuda")
    rows = buffer.numpy()
    for step in itertools.count():
        for row, sample in zip(rows, order.batch(step).tolist()):
            place = places[sample]
            row[:] = maps[place.shard][place.offset : place.offset + row_bytes]
        yield buffer.to(bench.device)


def engine_batches(engine: str, bench: LoaderBenchmark) -> Iterator[Tensor]:
    options = dict(global_batch_size=bench.batch_size, seed=0, start_step=0, rank=0, world_size=1)
    with build_loader([bench.directory], device=bench.device, engine=engine, **options) as loader:
        for batch in loader:
            yield batch.captions_NLC


def webdataset_batches(bench: LoaderBenchmark) -> Iterator[Tensor]:
    dataset, on_gpu = open_dataset(bench.directory), bench.device == "cuda"
    urls = [str(dataset.directory / shard.file) for shard in dataset.manifest.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls)).repeat().shuffle(SHUFFLE)
    samples = samples.map(partial(to_tensors, dataset.layout))
    samples = samples.batched(bench.batch_size, collation_fn=default_collate, partial=False)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor does anybody write
    workers = dict(num_workers=WORKERS, multiprocessing_context="fork")
    for latents, captions, _ in DataLoader(samples, batch_size=None, pin_memory=on_gpu, **workers):
        latents.to(bench.device, non_blocking=True)
        captions = captions.to(bench.device, non_blocking=True)
        if dataset.layout.embeddings == "i8b64":
            captions = dequantise(captions, *dataset.layout.embedding_shape)
        yield captions


def to_tensors(layout: SampleLayout, sample: dict) -> tuple[Tensor, Tensor, str]:
    """Views of the bytes; embeddings of 8 bits as they are."""
    latents = torch.from_numpy(np.frombuffer(sample["lat.bin"], np.float16).reshape(layout.latent_shape))
    stored = np.frombuffer(sample["emb.bin"], np.uint8)
    if layout.embeddings == "f16":
        stored = stored.view(np.float16).reshape(layout.embedding_shape)
    return latents, torch.from_numpy(stored), sample["txt"].decode()


CONTENDERS = {
    "memmap": memmap_batches,
    "native": partial(engine_batches, "native"),
    "dali": partial(engine_batches, "dali"),
    "webdataset": webdataset_batches,
}


def compare(names: list[str], bench: LoaderBenchmark, repeats: int) -> dict[str, dict[str, Any]]:
    results: dict[str, list[LoaderFigures]] = {name: [] for name in names}
    try:
        choose_engine("dali", torch.device(bench.device))
    except UserError as error:
        print(f"without dali: {error}", file=sys.stderr)
        results.pop("dali", None)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes:
        for _, name in itertools.product(range(repeats), results):
            results[name].append(processes.submit(measure, name, bench).result())
    report: dict[str, dict[str, Any]] = {}
    for name, found in results.items():
        rates, cpu_us, first_batch_ms, peaks_mib = zip(*found)
        best = LoaderFigures(max(rates), min(cpu_us), statistics.median(first_batch_ms), max(peaks_mib))
        report[name] = best._asdict() | {"cpu_us_of_repeats": cpu_us}
    return report


def measure(name: str, bench: LoaderBenchmark) -> LoaderFigures:
    wait = torch.cuda.synchronize if bench.device == "cuda" else lambda: None
    held, start = peak_kib(), time.perf_counter()
    batches = CONTENDERS[name](bench)
    next(batches)
    wait()
    first_batch = time.perf_counter() - start
    for _ in range(WARM_UP):
        next(batches)
    wait()
    count, cpu, start = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - start < bench.seconds:
        next(batches)
        count += 1
    wait()
    samples = count * bench.batch_size
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    workers = [peak_kib(process.pid) - held for process in multiprocessing.active_children()]
    peak = peak_kib() - held + sum(max(0, kib) for kib in workers)
    batches.close()
    return LoaderFigures(samples / seconds, 1e6 * cpu / samples, 1e3 * first_batch, peak / 1024)


def cpu_seconds() -> float:
    """CPU time of this process and its children, all threads, in user and kernel mode."""
    ticks = 0
    for process in multiprocessing.active_children():
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def peak_kib(pid: int | str = "self") -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def checksum_cost(directory: Path, samples: int = 512) -> dict[str, float]:
    """Microseconds for a sample: read and checked by one thread, and the checksum alone."""
    dataset = open_dataset(directory)
    places = dataset.locate(np.random.default_rng(0).integers(0, dataset.samples, samples))
    row = np.empty(dataset.layout.row_bytes, np.uint8)  # as it is checked: in the CPU's cache, where reading puts it
    reading = timeit.repeat(lambda: [dataset.read_row(place, row) for place in places], number=1)
    checking = timeit.repeat(lambda: xxhash.xxh3_64_intdigest(row), number=samples)
    return {"read_us": 1e6 * min(reading) / samples, "xxh3_us": 1e6 * min(checking) / samples}


def order_cost(batch_size: int) -> dict[str, float]:
    """Milliseconds to build the order of a large set and seek in it, and microseconds for a batch after that."""
    start = time.perf_counter()
    order = GlobalOrder(LARGE_SET, batch_size, seed=0)
    step = 3 * order.steps_per_epoch // 2
    order.batch(step)
    seek = time.perf_counter() - start
    following = range(step + 1, step + 1 + order.samples // len(LARGE_SET) * 64 // batch_size)  # a window of shards
    seconds = timeit.timeit(lambda: [order.batch(step) for step in following], number=1)
    return {"samples": order.samples, "seek_ms": 1e3 * seek, "batch_us": 1e6 * seconds / len(following)}


def print_report(report: dict) -> None:
    print("\n".join(f"{name}: {value}" for name, value in report["environment"].items()) + "\n")
    bound = report["contenders"].get("memmap", {"cpu_us": math.nan})["cpu_us"]
    lines = [["", "samples/s", "CPU us/sample", "x bound", "first batch ms", "peak MiB"]]
    for name, found in report["contenders"].items():
        rate, cpu_us, first_batch_ms, peak_mib, _ = found.values()
        cells = [f"{rate:,.0f}", f"{cpu_us:.1f}", f"{cpu_us / bound:.2f}", f"{first_batch_ms:.0f}", f"{peak_mib:.0f}"]
        lines.append([name, *cells])
    print(table(lines))
    checksum, order = report["checksum"], report["order"]
    share = 100 * checksum["xxh3_us"] / checksum["read_us"]
    print(f"\nchecksums: {checksum['xxh3_us']:.1f} of {checksum['read_us']:.1f} us a sample and thread ({share:.0f} %)")
    print(
        f"order of {order['samples']:,} samples: {order['seek_ms']:.0f} ms to seek to any step, "
        f"{order['batch_us']:.0f} us a batch after that"
    )


if __name__ == "__main__":
    cli.run(main)
