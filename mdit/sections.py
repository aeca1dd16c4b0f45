"""Sections, the parts of every checked document of mdit: a frozen pydantic base, and types of their values."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field


class Section(BaseModel):
    """Base of every part of a recipe and of other documents: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)

PositiveInt = Annotated[int, Field(gt=0, lt=2**63)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, lt=2**64)]  # what torch takes
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Length = Annotated[float, Field(ge=0.005, le=0.28)]  # of an average; the mean of all has 0.289
Size = Annotated[int, Field(gt=0, le=2**16)]  # pixels, channels, tokens
Count = Annotated[int, Field(ge=0, le=2**10)]  # layers, experts
Ratio = Annotated[float, Field(gt=0, le=2**6)]
MaskRatio = Annotated[float, Field(ge=0, lt=1)]
Embeddings = Literal["f16", "i8b64"]  # formats of caption embeddings
Location = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # of a file or directory


def tagged(key: str, default: str, expected: str) -> Discriminator:
    """The branch of a union whose name a table has at `key`; `default` where it has none, or is no table."""

    def branch(values: Any) -> Any:
        return values.get(key, default) if isinstance(values, dict) else getattr(values, key, default)

    return Discriminator(branch, "wrong_branch", f"{key}: expected {expected}")
