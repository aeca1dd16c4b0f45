"""Places of a parameter's elements in a rank's flat partitions, so that a state can move to another layout."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import TypeAdapter
from torch import Tensor

from mdit.parallel.shard import Shard

# One flat tensor a partition; None where a partition has nothing of that kind: Muon keeps no second moment.
Partitions: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True)
class Fragment:
    """Elements start .. start + numel of a parameter's part on this rank, row by row.

    `shape` is the part's, `shard` how it is cut from the whole; the fragment lies at `offset` of partition `partition`.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard
    start: int
    numel: int
    partition: int
    offset: int

    @property
    def address(self) -> tuple[int, int, int, int]:
        """(partition, start, numel, offset)"""
        return self.partition, self.start, self.numel, self.offset

    @property
    def size(self) -> int:
        """Elements of the part that this is a fragment of."""
        return math.prod(self.shape)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        if self.shard.count == 1:
            return self.shape
        return tuple(n * (self.shard.count if i == self.shard.dim else 1) for i, n in enumerate(self.shape))

    @property
    def first(self) -> int | None:
        """Offset in the whole tensor, row by row, of the fragment; None if it lies there in several runs."""
        one_run = self.shard.count == 1 or (self.shard.dim, self.shard.blocks) == (0, 1)
        return self.shard.index * self.size + self.start if one_run else None

    def of(self, partitions: Partitions) -> Tensor:
        """A view of this fragment in partitions laid out as this rank's masters are."""
        partition = partitions[self.partition]
        assert partition is not None, f"nothing of this kind of {self.name}"
        return partition.narrow(0, self.offset, self.numel)

    def kinds(self, tensors: dict[str, Partitions]) -> Iterator[tuple[str, Tensor]]:
        """(kind, view of this fragment) of all that there is of its parameter."""
        for kind, partitions in tensors.items():
            if partitions[self.partition] is not None:
                yield kind, self.of(partitions)


FRAGMENTS = TypeAdapter(list[Fragment])  # to JSON and back
