"""tools/verify_shards.py, tools/bench_loader.py and tools/embedding_error.py, on tiny sets."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from mdit import cli
from mdit.data.shards import open_dataset
from mdit.data.writer import ShardWriter
from tests.latent_sets import ENCODERS, LATENT, changed, read_embedding, sample_bytes, write_set
from tools import bench_loader, embedding_error, verify_shards


@pytest.fixture
def directory(tmp_path):
    return Path(write_set(tmp_path / "set", 40))


def verify(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: verify_shards.main([str(argument) for argument in arguments]))
    return ended.value.code


def test_a_whole_set_is_reported_whole(directory, capsys):
    assert verify(directory) == 0
    assert capsys.readouterr().out == f"{directory}: 40 samples in 4 shards, all as they were written\n"


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_first_damaged_sample_of_every_shard(directory, capsys, jobs):
    dataset = open_dataset(directory)
    starts = [sum(dataset.shard_sizes[:shard]) for shard in range(4)]
    for sample in (starts[0] + 3, starts[0] + 5):
        path, start, end = sample_bytes(dataset, sample)
        with open(path, "r+b") as file:
            file.seek((start + end) // 2)
            file.write(b"damage")
    cut, start, _ = sample_bytes(dataset, starts[1] + 2)
    os.truncate(cut, start + 100)
    missing = sample_bytes(dataset, starts[2])[0]
    missing.unlink()
    index = directory / "shard_00000_003.idx"
    index.write_bytes(index.read_bytes()[:-1])
    assert verify(directory, "--jobs", jobs) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: sample {starts[0] + 3} of the set is damaged: xxh3 is")
    assert lines[1].startswith(f"{cut}: sample {starts[1] + 2} of the set is damaged: 100 of ")
    assert lines[2].startswith(f"{missing}: cannot open the shard")
    assert lines[3].startswith(f"{index}: has ")
    assert lines[4:] == [f"{directory}: 40 samples in 4 shards, 4 of them damaged"]


def test_without_a_manifest_or_an_index_nothing_can_be_compared(directory, tmp_path, capsys):
    with changed(directory / "index.npy", (directory / "index.npy").read_bytes()[::-1]):
        assert verify(directory) == 2
    assert "error: " in (printed := capsys.readouterr().err) and "index.npy: xxh3 is" in printed
    assert verify(tmp_path) == 2
    assert "manifest.json: cannot read" in capsys.readouterr().err


@pytest.mark.parametrize("embeddings", ["f16", "i8b64"])
@pytest.mark.parametrize("name", bench_loader.CONTENDERS)
def test_every_contender_delivers_batches(tmp_path, name, embeddings):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    directory = write_set(tmp_path / "set", 64, embeddings=embeddings)
    bench = bench_loader.LoaderBenchmark(directory, batch_size=8, seconds=0.05, device="cpu")
    batches = bench_loader.CONTENDERS[name](bench)
    assert len(next(batches)) == 8
    batches.close()
    if name in ("memmap", "webdataset"):  # without and with worker processes
        result = bench_loader.measure(name, bench)
        assert result.samples_per_second > 0 and result.cpu_us >= 0 and result.first_batch_ms > 0


def test_the_report(tmp_path, capsys):
    asked = ["--samples", "64", "--batch_size", "8", "--seconds", "0.05", "--repeats", "1", "--contenders", "memmap"]
    asked += ["--latent", "2", "4", "4", "--embedding", "3", "64", "--json", str(tmp_path / "report.json")]
    bench_loader.main(asked)
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert report["contenders"]["memmap"]["samples_per_second"] > 0
    assert "| memmap |" in printed and "checksums: " in printed and "37,002,000 samples" in printed
    assert report["environment"]["commit"] in printed


def test_the_error_of_eight_bits(directory, capsys):
    embedding_error.main([str(directory), "--samples", "40"])
    pairs = [(read_embedding(i, "f16"), read_embedding(i, "i8b64")) for i in range(40)]
    values, read = (np.stack(side).astype(np.float64) for side in zip(*pairs))
    relative = np.sqrt(((read - values) ** 2).sum() / (values**2).sum())
    assert f"relative error {100 * relative:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "channels, embeddings, message",
    [(64, "i8b64", "embeddings is 'i8b64', expected 'f16'"), (60, "f16", "do not fit 60 channels")],
)
def test_sets_whose_error_cannot_be_told(tmp_path, capsys, channels, embeddings, message):
    with ShardWriter(tmp_path / "set", LATENT, (2, channels), ENCODERS, {}, embeddings=embeddings) as writer:
        writer.write("0", np.ones(LATENT), np.ones((2, channels)), "one")
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: embedding_error.main([str(tmp_path / "set")]))
    assert ended.value.code == 2 and message in capsys.readouterr().err
