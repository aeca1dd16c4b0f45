"""Muon's matrices: which parameters they are in, their orthogonalisation, and the ranks that do it.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) steps a matrix by its momentum with all singular values
brought near 1. That needs whole matrices, of which ZeRO's ranks hold pieces of flat partitions. Every matrix is
therefore made whole on one rank, its owner, orthogonalised there, and sent back in the pieces it came in: two
all-to-alls for a partition. An owner is one of the holders. Under ZeRO 1 and 2 that is mostly the only one, and only
matrices on the border between two ranks are sent; under ZeRO 3 everybody holds a piece of each, and all are.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ProcessGroup

from mdit.parallel.settings import Execution

BLOCKS = ("blocks", "patch_mixer")  # backbone and mixer
BY_ADAMW = {"adaLN_modulation", "gate"}  # in a block: modulation of all its layers, and the router
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's quintic: its slope at 0 is the largest, values end in 0.7 to 1.2
NEXT_TO_NOTHING = 1e-6
BATCH_NUMBERS = 2**26  # that are orthogonalised at once, at most: 16 of the largest matrices of xl_2


def takes_muon(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon steps this parameter of a MicroDiT: the matrices of attention and feed-forward layers in the blocks
    of backbone and mixer, and the tensors (E, D, F) of their experts. AdamW steps all others: embeddings, norms,
    biases, adaLN, routers, the maps between mixer and backbone, and the final layer."""
    part, *path = name.split(".")
    return part in BLOCKS and len(shape) > 1 and BY_ADAMW.isdisjoint(path)


def misfit(execution: Execution) -> str:
    """Why Muon cannot run in a layout; "" where it can."""
    if (tp := execution.settings.tensor_parallel) > 1:
        return f'"mdit": {{"tensor_parallel": {tp}}} leaves no rank with a whole matrix; expected 1'
    if execution.offloads_optimizer:
        return "zero_optimization.offload_optimizer would leave Newton-Schulz to the host's CPU; expected none"
    return ""


@dataclass(frozen=True)
class Matrix:
    """Elements `first` .. `first` + rows * columns of parameter number `parameter`, row by row."""

    parameter: int
    first: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    @property
    def products(self) -> list[tuple[int, int, int]]:
        """(rows, inner, columns) of the matmuls of one iteration of `newton_schulz`."""
        short, long = sorted((self.rows, self.columns))
        return [(short, long, short), (short, short, short), (short, short, long)]

    @property
    def flops(self) -> int:
        """FLOPs of one iteration."""
        return sum(2 * rows * inner * columns for rows, inner, columns in self.products)


def matrices_of(shapes: Sequence[Sequence[int]]) -> list[Matrix]:
    """The matrices in parameters of these shapes: (rows, columns), or one for each expert of (E, rows, columns)."""
    return [
        Matrix(number, index * shape[-2] * shape[-1], shape[-2], shape[-1])
        for number, shape in enumerate(shapes)
        for index in range(shape[0] if len(shape) == 3 else 1)
    ]


def newton_schulz(x_NRC: Tensor, steps: int, eps: float) -> Tensor:
    """U V^T of each matrix U S V^T of a batch, roughly: singular values of at least 1/500 of its norm come to 0.7 to
    1.2 in 5 steps. A matrix whose norm is next to nothing beside `eps` gives zeros."""
    a, b, c = COEFFICIENTS
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC
    norm_N11 = torch.linalg.vector_norm(
        x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    # Its powers would be denormal numbers, with which a CPU is 70 times slower; gates that begin at zero make such.
    x = x / torch.where(norm_N11 < NEXT_TO_NOTHING * eps, torch.inf, norm_N11 + eps).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def step_scale(rows: int, columns: int) -> float:
    """Factor of an orthogonalised matrix, by which one learning rate suits all shapes."""
    return max(1.0, rows / columns) ** 0.5


def held_elements(matrices: list[Matrix], begin_RP: np.ndarray, end_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First element, in the matrix, and number of elements that each rank holds of each matrix: both (M, R).

    Rank r holds elements begin .. end of every parameter.
    """
    parameter_M, first_M, numel_M = np.array([(m.parameter, m.first, m.numel) for m in matrices]).T
    low_MR, high_MR = (
        np.clip(bound_RP[:, parameter_M].T - first_M[:, None], 0, numel_M[:, None]) for bound_RP in (begin_RP, end_RP)
    )
    return low_MR, high_MR - low_MR


def choose_owners(matrices: list[Matrix], held_MR: np.ndarray) -> np.ndarray:
    """(M,) the rank that orthogonalises each matrix: of its holders the one that has least to do so far. Those with a
    choice come last, the largest of them first."""
    flops_M = np.array([matrix.flops for matrix in matrices], dtype=np.float64)
    load_R, owner_M = np.zeros(held_MR.shape[1]), np.zeros(len(matrices), dtype=np.int64)
    for m in np.lexsort((-flops_M, (held_MR > 0).sum(1))):
        owner_M[m] = np.where(held_MR[m] > 0, load_R, np.inf).argmin()
        load_R[owner_M[m]] += flops_M[m]
    return owner_M


@dataclass(frozen=True)
class Piece:
    """`numel` elements at `place` of this rank's partition (`local`) or of what it receives, and at `position` of a
    batch of matrices."""

    local: bool
    place: int
    position: int
    numel: int

    @property
    def ends(self) -> tuple[int, int]:
        return self.place + self.numel, self.position + self.numel


class EqualMatrices(NamedTuple):
    """`matrices` of one shape, which are orthogonalised at once."""

    shape: tuple[int, int]
    matrices: int
    pieces: list[Piece]


class Exchange:
    """The matrices of a flat partition and how `rank`, of the ranks of `group` that share it, deals with them.

    `begin_RP`, `end_RP`: elements of each parameter on each rank; `offset_P`: where this rank's lie in its partition.
    """

    def __init__(
        self,
        matrices: list[Matrix],
        begin_RP: np.ndarray,
        end_RP: np.ndarray,
        offset_P: np.ndarray,
        rank: int,
        group: ProcessGroup | None = None,
    ) -> None:
        self.group = group
        low_MR, held_MR = held_elements(matrices, begin_RP, end_RP)
        owner_M = choose_owners(matrices, held_MR)
        self.sends = bool(((held_MR > 0).sum(1) > 1).any())  # all ranks alike
        self.sent: list[tuple[int, int]] = []  # (place, numel) in the partition: by receiver, then by matrix
        self.sent_sizes, self.received_sizes = [0] * held_MR.shape[1], [0] * held_MR.shape[1]
        pieces: dict[int, list[Piece]] = defaultdict(list)  # of this rank's matrices

        def place_of(m: int) -> int:
            parameter = matrices[m].parameter
            return int(offset_P[parameter] + matrices[m].first + low_MR[m, rank] - begin_RP[rank, parameter])

        for other, owned_M in enumerate(owner_M == np.arange(held_MR.shape[1])[:, None]):
            for m in map(int, np.flatnonzero(owned_M & (held_MR[:, rank] > 0) & (other != rank))):
                self.sent.append((place_of(m), int(held_MR[m, rank])))
                self.sent_sizes[other] += int(held_MR[m, rank])
            for m in map(int, np.flatnonzero((owner_M == rank) & (held_MR[:, other] > 0))):
                place = place_of(m) if other == rank else sum(self.received_sizes)
                pieces[m].append(Piece(other == rank, place, int(low_MR[m, other]), int(held_MR[m, other])))
                self.received_sizes[other] += int(held_MR[m, other]) if other != rank else 0
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for m in sorted(pieces):
            by_shape[matrices[m].rows, matrices[m].columns].append(m)
        self.batches = [
            EqualMatrices(shape, len(some), joined(shape, [pieces[m] for m in some]))
            for shape, owned in by_shape.items()
            for some in in_batches(owned, shape)
        ]

    def orthogonalise(self, update: Tensor, steps: int, eps: float) -> None:
        """Replace, in a flat partition, every matrix by its orthogonalised and scaled form. A collective of the group.

        Computed, and sent, in bfloat16 on GPUs and in float32 on CPUs.
        """
        message = update.new_empty(sum(self.sent_sizes), dtype=compute_dtype(update.device))
        sent = [update.narrow(0, place, numel) for place, numel in self.sent]
        copy_all(list(message.split([numel for _, numel in self.sent])), sent)
        received = self._all_to_all(message, self.sent_sizes, self.received_sizes)
        for batch in self.batches:
            x = message.new_empty(batch.matrices, *batch.shape)
            parts = [x.view(-1).narrow(0, piece.position, piece.numel) for piece in batch.pieces]
            wholes = (update if piece.local else received for piece in batch.pieces)
            places = [whole.narrow(0, piece.place, piece.numel) for whole, piece in zip(wholes, batch.pieces)]
            copy_all(parts, places)
            x.copy_(newton_schulz(x, steps, eps)).mul_(step_scale(*batch.shape))
            copy_all(places, parts)
        message = self._all_to_all(received, self.received_sizes, self.sent_sizes)
        copy_all(sent, list(message.split([numel for _, numel in self.sent])))

    def _all_to_all(self, message: Tensor, sizes: list[int], arriving: list[int]) -> Tensor:
        if not self.sends:
            return message
        received = message.new_empty(sum(arriving))
        torch.distributed.all_to_all_single(received, message, arriving, sizes, group=self.group)
        return received


def copy_all(into: list[Tensor], of: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, of)


def in_batches(matrices: list[int], shape: tuple[int, int]) -> Iterator[list[int]]:
    """Runs of equal matrices that are orthogonalised at once."""
    size = max(1, BATCH_NUMBERS // math.prod(shape))
    for first in range(0, len(matrices), size):
        yield matrices[first : first + size]


def joined(shape: tuple[int, int], matrices: list[list[Piece]]) -> list[Piece]:
    """The pieces of a batch of matrices at their positions in it; neighbours on both sides, as are a layer's experts
    that lie on one rank, are one piece."""
    found: list[Piece] = []
    for number, pieces in enumerate(matrices):
        for piece in pieces:
            piece = replace(piece, position=number * math.prod(shape) + piece.position)
            last = found[-1] if found else None
            if last and last.local == piece.local and last.ends == (piece.place, piece.position):
                found[-1] = replace(last, numel=last.numel + piece.numel)
            else:
                found.append(piece)
    return found


def compute_dtype(device: torch.device) -> torch.dtype:
    """Newton-Schulz's number format."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
