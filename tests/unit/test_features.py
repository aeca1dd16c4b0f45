"""Features of a frozen vision tower: stored beside the latents, read back by both engines."""

import importlib.util
import tarfile

import numpy as np
import pytest

from mdit.config import UserError
from mdit.data.shards import open_dataset, read_samples
from mdit.data.writer import ShardWriter
from tests.latent_sets import EMBEDDING, ENCODERS, LATENT, loader, made_up

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
without_dali = pytest.mark.skipif(not DALI, reason="DALI is not installed")
PATCHES, CHANNELS = 4, 48  # a block of 64 values reaches over two patches


def features_of(i: int) -> np.ndarray:
    return np.random.default_rng(1000 + i).normal(size=(PATCHES, CHANNELS)) * 10.0 ** (i % 3)


def write_features(directory, samples=20, *, tower="tower", shape=(PATCHES, CHANNELS), embeddings="f16") -> str:
    encoders = ENCODERS | {"features": {"id": tower}}
    with ShardWriter(
        directory, LATENT, EMBEDDING, encoders, {}, 30_000, embeddings=embeddings, features_shape=shape
    ) as writer:
        for i in range(samples):
            writer.write(f"{i:05d}", *made_up(i), features_of(i))
    return str(directory)


@pytest.mark.parametrize("embeddings", ["f16", "i8b64"])
@pytest.mark.parametrize("engine", ["native", pytest.param("dali", marks=without_dali)])
def test_engines_hand_on_each_samples_features(tmp_path, engine, embeddings):
    directory = write_features(tmp_path / "set", embeddings=embeddings)
    with loader([directory], engine, batch=8, features=True) as batches:
        for _ in range(3):
            batch = next(batches)
            assert batch.features_NTC.shape == (8, PATCHES, CHANNELS)
            for sample, latents, features in zip(batch.samples, batch.latents_NCHW, batch.features_NTC):
                assert np.array_equal(latents.numpy(), made_up(int(sample))[0])
                expected = features_of(int(sample))
                largest = np.abs(expected.reshape(-1, 64)).max(axis=1)  # of a block; half a step of 127 is lost
                error = np.abs(features.numpy() - expected).reshape(-1, 64).max(axis=1)
                assert (error <= largest * (0.5 / 127 + 2e-3)).all()


def test_features_are_left_alone_where_nobody_asks(tmp_path):
    directory = write_features(tmp_path / "set")
    with loader([directory], batch=8) as batches:
        assert next(batches).features_NTC is None
    latents, _, texts = read_samples(open_dataset(directory), [3])
    assert np.array_equal(latents[0].numpy(), made_up(3)[0]) and texts == [made_up(3)[2]]


def test_other_readers_find_the_same_bytes(tmp_path):
    dataset = open_dataset(write_features(tmp_path / "set"))
    dataset.verify()
    (shard, *_), at = sorted((tmp_path / "set").glob("*.tar")), dataset.layout.features_at
    lines = shard.with_suffix(".idx").read_text().splitlines()[1:]
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        for member in members:
            assert any(f"{member.name.split('.', 1)[1]} {member.offset_data} {member.size}" in line for line in lines)
    assert [member.name for member in members[:4]] == [
        f"00000.{end}" for end in ("emb.bin", "lat.bin", "rep.bin", "txt")
    ]
    assert members[2].offset_data == at and members[3].offset_data == dataset.layout.row_bytes


def test_sets_with_other_features_do_not_train_together(tmp_path):
    one = write_features(tmp_path / "one")
    with ShardWriter(tmp_path / "other", LATENT, EMBEDDING, ENCODERS, {}) as writer:
        writer.write("0", *made_up(0))
    with pytest.raises(UserError, match=r"members\.rep\.shape is \(4, 48\) and None"):
        loader([one, str(tmp_path / "other")], batch=2)


def test_features_that_fill_no_blocks_are_refused(tmp_path):
    with pytest.raises(UserError, match="features of 4 patches in 49 channels are 196 values"):
        write_features(tmp_path / "set", shape=(4, 49))
