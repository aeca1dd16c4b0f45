"""A font for captions in any script, from what the machine has, and spellings for what no font of it can draw."""

import functools
import unicodedata
from collections.abc import Iterator
from typing import cast

from PIL import ImageFont

from mdit.dist import logger
from mdit.provenance import package_folder

# File names, looked for where systems keep their fonts. Pillow's own font, which comes first, is little beyond ASCII.
FONTS = (
    ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "arial.ttf")
    + ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc")
    + ("DroidSansFallbackFull.ttf", "PingFang.ttc", "msyh.ttc", "unifont.otf", "unifont.ttf", "NotoEmoji-Regular.ttf")
)
NO_CHARACTER = "\U0010fffe"  # by definition: what a font draws for it stands for all that it lacks

Font = ImageFont.FreeTypeFont


def lettering(texts: list[str], size: int) -> tuple[Font, list[str]]:
    """The font that has most of the characters, and the texts as it can draw them: a letter without its accent where
    that is all, a symbol by its name, anything else as Python escapes it. A line says what could not be drawn."""
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    font, spellings = _choose(frozenset().union(*texts), size)
    return font, [text.translate(spellings) for text in texts]


@functools.lru_cache(maxsize=16)
def _choose(characters: frozenset[str], size: int) -> tuple[Font, dict[int, str]]:
    beyond = {c for c in characters if not (c.isascii() and c.isprintable() or c.isspace())}
    best, lacking = None, beyond
    for font in _fonts(size):
        lacks = {c for c in beyond if not has(font, c)}
        if best is None or len(lacks) < len(lacking):
            best, lacking = font, lacks
        if not lacking:
            break
    assert best is not None
    if lacking:
        named = " ".join(map(ascii, sorted(lacking)))
        logger.warning(f"no font on this machine can draw {named} of captions; they are spelled out")
    return best, {ord(c): _spelled(best, c) for c in lacking}


def has(font: Font, character: str) -> bool:
    """Whether a font can draw it; none draws control characters and halves of surrogate pairs."""
    return unicodedata.category(character) not in ("Cc", "Cs") and _drawn(font, character) != _drawn(font, NO_CHARACTER)


def _fonts(size: int) -> Iterator[Font]:
    yield cast(Font, ImageFont.load_default(size))  # of FreeType where it is given a size
    package = package_folder("matplotlib")
    brought = [package / "mpl-data/fonts/ttf/DejaVuSans.ttf"] if package else []
    for name in (*FONTS, *brought):
        try:
            yield ImageFont.truetype(str(name), size)
        except OSError:
            continue


def _drawn(font: Font, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)  # pyright: ignore[reportArgumentType]: a sequence, which its stub does not say


def _spelled(font: Font, character: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if plain != character and all(c.isascii() and c.isprintable() or has(font, c) for c in plain):
        return plain
    category = unicodedata.category(character)
    if category in ("Mn", "Me", "Cf"):  # accents without a letter, joiners, choices of an emoji's look
        return ""
    if category.startswith("S") and (name := unicodedata.name(character, "")):
        return f":{name.lower()}:"
    return ascii(character)[1:-1]
