"""Steps whose loss or gradient is not finite: skipped, counted, named, and the end of a run when they do not stop.

DeepSpeed leaves the weights, the moments and Adam's count as they are where the gradient's norm is not finite
(`Engine.step_applied`), on all ranks alike. The rest is here: the loop leaves the EMA and the mean loss alone too, a
line names the samples, and weights that are not finite are never saved.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdit.checkpoint.fragments import Fragment, Partitions
from mdit.checkpoint.training_state import complete_checkpoints
from mdit.data.loader import Batch
from mdit.dist import World, enumerated, gather, logger, shared
from mdit.train.run_directory import CHECKPOINTS

NAMED = 8  # ranks that a line names


class SkippedSteps:
    """Count of skipped steps: in all (`total`), and up to now without one between that was not. `reason`
    says of the last one what was not finite."""

    def __init__(self, limit: int, run_dir: Path, world: World) -> None:
        self.limit, self.run_dir, self.world = limit, run_dir, world
        self.total, self.in_a_row, self.reason = 0, 0, ""

    @property
    def too_many(self) -> bool:
        return self.in_a_row >= self.limit

    def add(self, step: int, batch: Batch, losses_N: Tensor) -> None:
        """Count the step that ended in `step`, with one line in the log. A collective."""
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        mine = batch.samples[~losses_N.isfinite().cpu().numpy()].tolist()
        self.reason = name_samples(gather(mine, self.world))
        if self.world.is_rank_zero:
            logger.warning(f"step {step} skipped, {self.in_a_row} in a row of at most {self.limit}: {self.reason}")

    def error(self, step: int) -> Exception:
        """The error that all ranks end with at `step`, when too many were skipped in a row."""
        return shared(
            f"{self.run_dir}: stopped at step {step}: {self.in_a_row} steps in a row were skipped "
            f"(training.max_skipped_in_a_row = {self.limit}); in this one {self.reason}; "
            f"{last_checkpoint(self.run_dir / CHECKPOINTS)}"
        )

    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": self.total, "skipped_in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = int(state["skipped_steps"]), int(state["skipped_in_a_row"])


def name_samples(by_rank: list[list[int]]) -> str:
    """ "the loss is not finite of sample 5 on rank 0, of samples 3, 9 on rank 1"."""
    clauses = [f"of {enumerated('sample', samples)} on rank {rank}" for rank, samples in enumerate(by_rank) if samples]
    if not clauses:
        return "the gradient is not finite, though every loss is"
    more = f", and on {len(clauses) - NAMED} more ranks" if len(clauses) > NAMED else ""
    return f"the loss is not finite {', '.join(clauses[:NAMED])}{more}"


def require_finite(
    step: int, tensors: dict[str, Partitions], fragments: list[Fragment], checkpoints: Path, world: World
) -> None:
    """Raise UserError, on all ranks alike, when a rank's state at `step` holds NaN or infinities. A collective."""
    found = gather(non_finite(tensors, fragments), world)
    for rank, name in enumerate(found):
        if name is not None:
            raise shared(
                f"{checkpoints.parent}: step {step}: {name} on rank {rank} is not finite: nothing is saved; "
                f"{last_checkpoint(checkpoints)}"
            )


def non_finite(tensors: dict[str, Partitions], fragments: list[Fragment]) -> str | None:
    """KIND/PARAMETER of a fragment with a NaN or an infinity. Waits for the device once a partition."""
    for kind, flats in tensors.items():
        for partition in {fragment.partition for fragment in fragments if flats[fragment.partition] is not None}:
            inside = [fragment for fragment in fragments if fragment.partition == partition]
            # NaN where there is one; allocates nothing of the fragment's size.
            extremes = torch.stack([torch.stack(torch.aminmax(fragment.of(flats))) for fragment in inside])
            for fragment, finite in zip(inside, extremes.isfinite().all(1).tolist(), strict=True):
                if not finite:
                    return f"{kind}/{fragment.name}"
    return None


def last_checkpoint(checkpoints: Path) -> str:
    newest = next(iter(complete_checkpoints(checkpoints)), None)
    return f"the last good checkpoint is {newest}" if newest else "there is no checkpoint yet"
