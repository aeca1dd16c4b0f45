"""Pictures that drawn ones are compared with: every form of them gives the same squares."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mdit.config import UserError
from mdit.dist import World
from mdit.eval import picture_sets
from mdit.eval.picture_sets import draw_set, open_drawn, open_pictures, read_batches, side_of
from mdit.eval.samples import to_images
from tests.picture_sets import SIZE, make, pictures, png

COUNT = 11


def squares(place, size=SIZE):
    batches = [*read_batches(open_pictures(str(place), "cpu"), size)]
    return torch.cat([images for images, _ in batches]), [text for _, texts in batches for text in texts]


def write_tar(path, names, contents):
    with tarfile.open(path, "w") as archive:
        for name, content in zip(names, contents, strict=True):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """The same pictures as files of two folders and in a tar."""
    names = [f"{'ab'[i % 2]}/{i:02d}.png" for i in range(COUNT)]
    contents = [png(i) for i in range(COUNT)]
    for name, content in zip(names, contents, strict=True):
        (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / name).write_bytes(content)
    (tmp_path / "tars").mkdir()
    in_order = sorted(range(COUNT), key=lambda i: names[i])
    write_tar(tmp_path / "tars/0.tar", [f"{i}.png" for i in in_order], [contents[i] for i in in_order])
    return tmp_path


def test_folders_and_tars_give_the_same_squares(folder, monkeypatch):
    monkeypatch.setattr(picture_sets, "PER_PART", 2)
    monkeypatch.setattr(picture_sets, "BATCH_SIZE", 4)
    assert len(open_pictures(str(folder / "files"), "cpu")) == 3 + 3
    images, captions = squares(folder / "files")
    assert torch.equal(images, squares(folder / "tars")[0]) and captions == [""] * COUNT
    assert torch.equal(images, squares(folder / "tars/0.tar")[0])
    first = Image.open(folder / "files/a/00.png").resize((13, SIZE), Image.BICUBIC).crop((2, 0, 2 + SIZE, SIZE))
    assert np.array_equal(images[0], np.asarray(first))


def test_a_set_of_latents_gives_what_it_decodes_to(tmp_path):
    (directory,) = make(pictures(COUNT), tmp_path)
    images, captions = squares(directory)
    from mdit.data.shards import open_dataset, read_samples
    from mdit.encoders import build_image_encoder

    dataset = open_dataset(directory)
    latents, _, texts = read_samples(dataset, range(COUNT))
    assert torch.equal(images, to_images(build_image_encoder(dataset.encoders["image"]), latents)) and captions == texts


def test_a_public_set_is_read_as_it_was_downloaded(folder):
    """COCO's layout, in the order of its files."""
    (folder / "annotations").mkdir()
    (folder / "files/a").rename(folder / "val2017")
    files = sorted(path.name for path in (folder / "val2017").iterdir())
    images = [{"id": i, "file_name": name} for i, name in enumerate(files)]
    notes = [{"image_id": i, "caption": f"caption {i}"} for i in range(len(files))]
    (folder / "annotations/captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))
    found, captions = squares(f"coco:{folder}")
    assert captions == [f"caption {i}" for i in range(len(files))]
    assert torch.equal(found, squares(folder / "val2017")[0])


@pytest.mark.parametrize(
    "what, message",
    [
        ("nothing", "nothing: there is no such file or directory"),
        ("empty", "empty: has neither manifest.json nor pictures in tars or folders"),
        ("damaged", "damaged/1.png: is no picture"),
        ("cut.tar", "cut.tar: "),
        ("both", "both: has pictures in {folder}/both/0.tar and in {folder}/both; name one of both"),
    ],
)
def test_what_cannot_be_compared_with_is_one_line(folder, what, message):
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged/1.png").write_bytes(png(1)[:100])
    (folder / "cut.tar").write_bytes((folder / "tars/0.tar").read_bytes()[:3000])
    (folder / "both").mkdir()
    (folder / "both/1.png").write_bytes(png(1))
    (folder / "both/0.tar").write_bytes((folder / "tars/0.tar").read_bytes())
    with pytest.raises(UserError) as error:
        squares(folder / what)
    assert message.format(folder=folder) in str(error.value) and "\n" not in str(error.value)


class Colours:
    """Draws a colour that a picture's number and its prompt decide."""

    def __init__(self):
        self.drawn = []

    def draw(self, prompts, *, numbers, batch_size, seed):
        for prompt, number in zip(prompts, numbers, strict=True):
            self.drawn.append(number)
            yield Image.new("RGB", (6, 6), (number, len(prompt), seed))


def test_any_processes_draw_one_set_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_sets, "SHARD", 4)
    prompts = [f"{'a' * (1 + i % 3)} {i}" for i in range(COUNT)]
    painters = [Colours() for _ in range(3)]
    for rank in range(2):
        draw_set(painters[rank], prompts, tmp_path, World(rank, 2, rank, torch.device("cpu")), batch_size=2, seed=7)
    assert [painter.drawn for painter in painters[:2]] == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7]]
    (tmp_path / "00001.tar").unlink()
    draw_set(painters[2], prompts, tmp_path, World(0, 1, 0, torch.device("cpu")), batch_size=2, seed=7)
    assert painters[2].drawn == [4, 5, 6, 7]
    parts = open_drawn(tmp_path)
    assert side_of(parts) == 6
    ((images, captions),) = read_batches(parts, 6)
    assert captions == prompts
    assert [tuple(image[0, 0].tolist()) for image in images] == [(i, len(prompts[i]), 7) for i in range(COUNT)]


def test_a_shard_is_there_whole_or_not_at_all(tmp_path):
    def draw(prompts, **settings):
        yield Image.new("RGB", (6, 6))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_set(SimpleNamespace(draw=draw), ["a", "b"], tmp_path, World(0, 1, 0, torch.device("cpu")))
    assert not [*tmp_path.glob("*.tar")]
