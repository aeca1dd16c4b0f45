"""Several captions a picture: which one a step takes, and sets that hold them."""

import importlib.util
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
import webdataset

from mdit.captions import Caption, caption_draw, check_weights, choose
from mdit.config import UserError
from mdit.data.manifest import ShardError, StoredCaptions
from mdit.data.shards import LatentSet, open_dataset, read_samples
from mdit.data.writer import ShardWriter
from tests.latent_sets import EMBEDDING, ENCODERS, LATENT, changed, loader, make_manifest_match, sample_bytes, write_set

DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
ENGINES = ["native", pytest.param("dali", marks=pytest.mark.skipif(not DALI, reason="DALI is not installed"))]
WEIGHTS = {"alt": 1.0, "recaption": 3.0}
SAMPLES = 30


def captions_of(i: int) -> list[Caption]:
    """One to four captions; of samples 0, 4, 5, 9, ... no recaption."""
    kinds = ["alt", "recaption", "alt", "recaption"][: 1 + i % 5 % 4]
    return [Caption(kind, f"é {i} {kind} {number}") for number, kind in enumerate(kinds)]


def embedding_of(i: int, number: int) -> np.ndarray:
    """Exact in 8 bits too."""
    return np.full(EMBEDDING, 1 + i + number / 4, np.float16)


def write_several(directory, samples=SAMPLES, embeddings="f16", **changes) -> str:
    options = {"shard_bytes": 20_000, "embeddings": embeddings, "captions": WEIGHTS, **changes}
    with ShardWriter(directory, LATENT, EMBEDDING, ENCODERS, {}, **options) as out:
        for i in range(samples):
            captions = captions_of(i)
            embedded = np.stack([embedding_of(i, number) for number in range(len(captions))])
            features = None if out.layout.features_shape is None else np.full(out.layout.features_shape, i)
            out.write(f"{i:05d}", np.full(LATENT, i), embedded, captions, features)
    return str(directory)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Sets of several captions a sample by their kind of embeddings, and behind each one of one caption a sample."""
    folder = tmp_path_factory.mktemp("several")
    return {
        kind: [write_several(folder / kind, embeddings=kind), write_set(folder / f"{kind} one", 10, embeddings=kind)]
        for kind in ("f16", "i8b64")
    }


def shown(batch) -> list[tuple]:
    """Number, text, and mean of latents and embedding of each sample of several captions."""
    means = (batch.latents_NCHW.float().mean((1, 2, 3)), batch.captions_NLC.float().mean((1, 2)))
    rows = zip(batch.samples.tolist(), batch.texts, *(mean.tolist() for mean in means))
    return [row for row in rows if row[0] < SAMPLES]


def test_kinds_are_drawn_by_their_weights_and_captions_of_a_kind_evenly():
    kinds, weights = ["alt", "recaption", "recaption"], {"alt": 1.0, "recaption": 3.0, "not here": 9.0}
    drawn = Counter(choose(kinds, weights, caption_draw(7, 3, sample)) for sample in range(20_000))
    assert [drawn[number] / 20_000 for number in range(3)] == pytest.approx([0.25, 0.375, 0.375], abs=0.015)
    assert {choose(["a", "b"], {"c": 1.0}, draw) for draw in (0.0, 0.6)} == {0, 1}  # none has a weight
    assert choose(["a", "b"], {"a": 1.0, "b": 0.0}, 1 - 2**-53) == 0
    draws = [caption_draw(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len({*draws}) == 4 and draws == [caption_draw(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]


def test_weights_that_cannot_be():
    assert check_weights({"alt": 0.0, "recaption": 2.0}) == {"recaption": 2.0}
    for weights, message in (({"alt": -1.0, "b": 2.0}, "of alt is -1"), ({"alt": 0.0}, "sum to 0"), ({}, "sum to 0")):
        with pytest.raises(ValueError, match=message):
            check_weights(weights)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["f16", "i8b64"])
def test_a_step_takes_the_same_captions_in_any_layout_and_on_resuming(sets, engine, kind):
    def rows(**options):
        with loader(sets[kind], engine, batch=8, seed=5, **options) as batches:
            return [shown(batch) for batch in islice(batches, 6 - options.get("start_step", 0))]

    steps = rows()
    for step, batch in enumerate(steps):
        for sample, text, latent, embedding in batch:
            captions = captions_of(sample)
            number = choose([caption.kind for caption in captions], WEIGHTS, caption_draw(5, step, sample))
            assert (text, latent) == (captions[number].text, sample)
            assert embedding == pytest.approx(float(embedding_of(sample, number)[0, 0]), rel=1e-2)
    assert steps[3:] == rows(start_step=3)
    shares = [rows(rank=rank, world_size=4) for rank in range(4)]
    assert steps == [[row for share in shares for row in share[step]] for step in range(6)]


def test_a_run_may_weigh_the_kinds_anew(sets):
    def texts(weights):
        with loader(sets["f16"][:1], batch=SAMPLES, captions=weights) as batches:
            return {text for batch in islice(batches, 8) for text in batch.texts}

    only = {
        caption.text
        for i in range(SAMPLES)
        for caption in captions_of(i)
        if caption.kind == "recaption" or i % 5 in (0, 4)
    }
    assert texts({"recaption": 1.0}) == only < texts(None)
    with pytest.raises(
        UserError, match=r"data.captions.recption: no set .* \(did you mean recaption\?\); there are alt, rec"
    ):
        texts({"alt": 1.0, "recption": 1.0})
    with pytest.raises(UserError, match="data.captions.alt: no set of data.train .*; they have one a sample"):
        loader(sets["f16"][1:], batch=5, captions={"alt": 1.0})


def test_epochs_and_seeds_take_other_captions_and_evaluation_always_the_same(sets):
    def texts(seed):
        with loader(sets["f16"][:1], batch=SAMPLES, seed=seed) as batches:
            return [dict(zip(batch.samples.tolist(), batch.texts)) for batch in islice(batches, 4)]

    found = [*texts(0), *texts(1)]
    assert len({tuple(sorted(epoch.items())) for epoch in found}) == len(found)
    dataset = open_dataset(sets["f16"][0])
    latents, captions, first = read_samples(dataset, range(SAMPLES))
    assert read_samples(dataset, range(SAMPLES))[2] == first
    assert latents.float().mean((1, 2, 3)).tolist() == [*range(SAMPLES)]
    by_text = {c.text: float(embedding_of(i, n)[0, 0]) for i in range(SAMPLES) for n, c in enumerate(captions_of(i))}
    assert captions.float().mean((1, 2)).tolist() == [by_text[text] for text in first]


def test_all_captions_and_their_number(sets):
    for kind, (directory, one) in sets.items():
        dataset = open_dataset(directory)
        for location in dataset.locate(range(SAMPLES)):
            found = dataset.read_captions(location)
            assert [caption for caption, _ in found] == captions_of(location.sample)
            for number, (_, embedding) in enumerate(found):
                expected = torch.from_numpy(embedding_of(location.sample, number))
                assert torch.allclose(embedding.float(), expected.float(), rtol=0 if kind == "f16" else 1e-2)
        assert dataset.captions() == sum(len(captions_of(i)) for i in range(SAMPLES))
        [(caption, _)] = open_dataset(one).read_captions(open_dataset(one).locate([3])[0])
        assert caption == Caption("", "ééé 3") and open_dataset(one).captions() == 10
    assert {open_dataset(d).manifest.format for d in sets["f16"]} == {"mdit-latents/1", "mdit-latents/2"}


@pytest.mark.parametrize("engine", ENGINES)
def test_features_of_a_vision_tower_beside_several_captions(tmp_path, engine):
    directory = write_several(tmp_path / "set", features_shape=(4, 32))
    open_dataset(directory).verify()
    with loader([directory], engine, batch=SAMPLES, features=True) as batches:
        batch = next(batches)
    assert torch.allclose(batch.features_NTC.float().mean((1, 2)), torch.from_numpy(batch.samples).float(), rtol=1e-2)
    assert [row[:3] for row in shown(batch)] == [(i, text, i) for i, text in zip(batch.samples, batch.texts)]


def test_webdataset_and_dali_find_the_members(sets):
    dataset = open_dataset(sets["f16"][0])
    urls = [str(dataset.directory / shard.file) for shard in dataset.manifest.shards]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(dataset.shard_sizes) > 1 and len(found) == SAMPLES
    for i, sample in enumerate(found):
        stored = StoredCaptions.model_validate_json(sample["texts.json"]).captions
        assert [Caption(caption.kind, caption.text) for caption in stored] == captions_of(i)
        embeddings = np.frombuffer(sample["emb.bin"], "<f2").reshape(-1, *EMBEDDING)
        assert np.array_equal(embeddings, [embedding_of(i, number) for number in range(len(stored))])
    for shard, index in zip(dataset.manifest.shards, dataset.manifest.dali_indexes):
        content = (dataset.directory / shard.file).read_bytes()
        for line in (dataset.directory / index.file).read_text().splitlines()[1:]:
            *_, extension, at, size, _ = line.split()
            assert extension == "texts.json"
            assert StoredCaptions.model_validate_json(content[int(at) : int(at) + int(size)])


@pytest.mark.parametrize("engine", ENGINES)
def test_damage_is_found_where_it_is_read_and_by_verifying(tmp_path, engine):
    directory = tmp_path / "set"
    write_several(directory)
    dataset, (path, start, end) = open_dataset(directory), sample_bytes(open_dataset(directory), 13)
    dataset.verify()
    content, size = path.read_bytes(), dataset.layout.embedding_bytes
    second = start + 512 + size + 7  # in the second of four embeddings
    for at in (second, end - 3, dataset.locate([13])[0].offset + 512 + 4 * size + 600):
        damaged = content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :]
        with changed(path, damaged):
            with pytest.raises(ShardError, match=f"{path}: sample 13 of the set is damaged: xxh3"):
                open_dataset(directory).verify()
            with loader([directory], engine, batch=SAMPLES) as batches, pytest.raises(ShardError, match="sample 13 of"):
                for _ in range(20):  # an epoch each
                    next(batches)
    with changed(path, content[: end - 5]):
        make_manifest_match(directory)
        with pytest.raises(ShardError, match="sample 13 of the set is damaged|cannot be read"):
            open_dataset(directory).verify()


def test_an_index_of_other_captions(tmp_path):
    write_several(tmp_path / "set")
    rows = np.load(index := tmp_path / "set" / "index.npy")
    for captions in (-1, 0, 3, 2**40):
        rows[13]["captions"] = captions
        np.save(index, rows)
        make_manifest_match(tmp_path / "set")
        with pytest.raises(ShardError, match="sample 13 of the set"):
            read_samples(open_dataset(tmp_path / "set"), range(SAMPLES))


def test_what_does_not_fit_is_refused(tmp_path):
    with ShardWriter(tmp_path / "set", LATENT, EMBEDDING, ENCODERS, {}, captions=WEIGHTS) as out:
        with pytest.raises(ValueError, match="captions are 'one'"):
            out.write("a", np.zeros(LATENT), np.zeros((1, *EMBEDDING)), "one")
        with pytest.raises(ValueError, match="argument"):
            out.write("a", np.zeros(LATENT), np.zeros((1, *EMBEDDING)), captions_of(3))
        out.write("a", np.zeros(LATENT), np.zeros((1, *EMBEDDING)), captions_of(0))
    assert isinstance(open_dataset(tmp_path / "set"), LatentSet)
