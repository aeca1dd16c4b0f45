"""Several captions a picture: their kinds, the weights of the kinds, and the one that a training step takes."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, NamedTuple

from pydantic import AfterValidator


class Caption(NamedTuple):
    """`kind` says who wrote it ("original", "enhanced"), or names the field that it stood in."""

    kind: str
    text: str


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """The weights above 0, in the order of the kinds' names. Raises ValueError for weights that are negative, not
    finite or sum to 0."""
    for kind, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {kind} is {weight}; expected a number of at least 0")
    if not sum(weights.values()):
        raise ValueError(f"the weights of {', '.join(weights) or 'no kind of captions'} sum to 0")
    return {kind: weights[kind] for kind in sorted(weights) if weights[kind]}


def parse_weights(text: str) -> dict[str, float]:
    """ "alt=1,recaption=3" -> {"alt": 1.0, "recaption": 3.0}. Raises ValueError."""
    weights: dict[str, float] = {}
    for clause in text.split(","):
        kind, separator, weight = clause.strip().rpartition("=")
        if not separator or not kind or kind in weights:
            raise ValueError(f"{clause!r} in {text!r}: expected KIND=WEIGHT, each kind once")
        weights[kind] = float(weight)
    return check_weights(weights)


CaptionWeights = Annotated[dict[str, float], AfterValidator(check_weights)]


def caption_draw(seed: int, step: int, sample: int) -> float:
    """A number in [0, 1) for each sample of each step: a function of its arguments, on any machine."""
    digest = hashlib.blake2b(f"caption {seed} {step} {sample}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def choose(kinds: Sequence[str], weights: Mapping[str, float], draw: float) -> int:
    """The number of the caption that `draw` takes of a sample, whose captions are of these kinds: a kind by its weight
    among those that are there, one of several captions of a kind evenly; any of them where none has a weight."""
    shares = [weights.get(kind, 0.0) / kinds.count(kind) for kind in kinds]
    if not sum(shares):
        shares = [1.0] * len(kinds)
    ends = list(accumulate(shares))
    last = max(number for number, share in enumerate(shares) if share)
    return next((number for number, end in enumerate(ends) if draw * ends[-1] < end), last)
