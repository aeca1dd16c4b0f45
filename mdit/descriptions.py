"""Descriptions of the frozen encoders: enough to build each again, the same, and to notice when it is not the same.

They stand under `encoders` in a set's manifest and in encoders.json of a snapshot. `mdit.encoders` makes them and
builds encoders from them; `weights` is its digest of an encoder's weights, which descriptions of latents made elsewhere
lack.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mdit.config import PositiveFloat, PositiveInt, Section, parse_section

Precision = Literal["float32", "bfloat16"]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class ImageDescription(Section):
    """Latents are (mean - shift) * scale; without them the autoencoder's own count."""

    id: str
    scale: PositiveFloat | None = None
    shift: float | None = None
    precision: Precision = "float32"
    weights: Digest | None = None


class TextDescription(Section):
    """`mean` and `std`, one value a channel, are of towers whose states are standardised."""

    id: str
    max_tokens: PositiveInt
    channels: PositiveInt
    precision: Precision = "float32"
    weights: Digest | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None

    @model_validator(mode="after")
    def _a_value_for_each_channel(self):
        for name, values in (("mean", self.mean), ("std", self.std)):
            if (values is None) != (self.mean is None) or (values is not None and len(values) != self.channels):
                raise ValueError(f"{name} has {len(values or ())} values for {self.channels} channels")
        return self


class FeaturesDescription(Section):
    id: str
    weights: Digest | None = None


class Encoders(Section):
    """`features`: the vision tower of sets with patch features."""

    image: ImageDescription
    text: TextDescription
    features: FeaturesDescription | None = None

    def plain(self) -> dict[str, dict[str, Any]]:
        """The descriptions as they are written down."""
        return self.model_dump(mode="json", exclude_unset=True)


def check_descriptions(values: Any, source: object) -> dict[str, dict[str, Any]]:
    """The descriptions of both encoders as they were given. Raises UserError naming `source` and the key for anything
    else."""
    return parse_section(Encoders, values, source).plain()
