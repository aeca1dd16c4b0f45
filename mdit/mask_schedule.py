"""Mask ratio of a recipe: one number, or a schedule (docs/training.md)."""

from typing import Annotated, Literal

from pydantic import Field, Tag, model_validator

from mdit.sections import MaskRatio, Section, Share, tagged

MAX_MASK_RATIOS = 16  # of a run: each has graphs (torch.compile) and memory of its own


class LinearMask(Section):
    """Mask ratio `start`, and in the last `share` of the run's steps down (or up) to `final`, in `levels` equal stages
    of which the last is at `final`: levels + 1 numbers of kept tokens in all."""

    schedule: Literal["linear"]
    start: MaskRatio
    final: MaskRatio
    share: Share
    levels: Annotated[int, Field(gt=0, lt=MAX_MASK_RATIOS)] = 4

    @model_validator(mode="after")
    def _falls_or_rises(self):
        if self.start == self.final:
            raise ValueError(f"start and final are both {self.start}; a ratio that stays is a number")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        """The ratio of each stage, in order."""
        between = (self.start + (self.final - self.start) * k / self.levels for k in range(1, self.levels))
        return self.start, *between, self.final

    def ends(self, num_steps: int) -> tuple[int, ...]:
        """Step before which each stage ends."""
        left = (self.share * num_steps * (self.levels - k) / self.levels for k in range(self.levels + 1))
        return tuple(num_steps - round(steps) for steps in left)


MaskSchedule = Annotated[
    Annotated[MaskRatio, Tag("")] | Annotated[LinearMask, Tag("linear")], tagged("schedule", "", '"linear"')
]
