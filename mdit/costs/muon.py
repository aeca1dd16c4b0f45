"""Orthogonalisation in a step of Muon: products, buffers and bytes sent, from the model's own matrices and the owners
that `mdit.parallel.muon` gives them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from mdit.config import ModelConfig, TrainConfig
from mdit.costs.layouts import ITEMSIZE, Layout
from mdit.costs.trace import Product
from mdit.models import meta_model
from mdit.parallel.muon import Matrix, choose_owners, held_elements, in_batches, matrices_of, takes_muon

ALIGNMENT = 2  # numbers, of a partition under ZeRO 1 and 2
BATCHES = 5  # of numbers alive at once: a batch, it normalised, its next iterate, two square products


@dataclass(frozen=True)
class Orthogonalisation:
    """One group of ranks, `stride` apart, that share partitions of Muon's. Each figure is of the rank with most of it:
    products of an iteration, numbers of its matrices and how many those are, numbers sent, and received at once."""

    ranks: int
    stride: int
    products: dict[Product, int]
    numbers: int
    matrices: int
    sent: int
    received: int
    batch: int


def orthogonalisations(config: TrainConfig, layout: Layout) -> list[Orthogonalisation]:
    """One of dense layers and, where they are spread, one of experts; empty without Muon."""
    if config.optim.muon is None:
        return []
    return list(_found(config.model, layout.gpus, layout.ep, layout.stage))


@cache
def _found(model: ModelConfig, gpus: int, ep: int, stage: int) -> tuple[Orthogonalisation, ...]:
    shapes = [tuple(p.shape) for name, p in meta_model(model).named_parameters() if takes_muon(name, p.shape)]
    experts = [(shape[0] // ep, *shape[1:]) for shape in shapes if len(shape) == 3 and ep > 1]
    dense = [shape for shape in shapes if len(shape) == 2 or ep == 1]
    groups = (dense, gpus, 1), (experts, gpus // ep, ep)
    return tuple(_of_group(*group, stage) for group in groups if group[0])


def _of_group(shapes: list[tuple[int, ...]], ranks: int, stride: int, stage: int) -> Orthogonalisation:
    matrices, numels = matrices_of(shapes), np.array([np.prod(shape) for shape in shapes], dtype=np.int64)
    rank_R1 = np.arange(ranks)[:, None]
    if stage == 3:  # a slice of each
        size, first = -(-numels // ranks), 0
    else:  # one after the other
        size, first = ALIGNMENT * -(-int(numels.sum()) // (ranks * ALIGNMENT)), np.cumsum(numels) - numels
    begin_RP, end_RP = (np.clip((rank_R1 + more) * size - first, 0, numels) for more in (0, 1))
    _, held_MR = held_elements(matrices, begin_RP, end_RP)
    owner_M = choose_owners(matrices, held_MR)
    owned_MR = owner_M[:, None] == np.arange(ranks)
    numel_M = np.array([matrix.numel for matrix in matrices])
    flops_R = owned_MR.T @ np.array([float(matrix.flops) for matrix in matrices])
    out_R, in_R = (held_MR * ~owned_MR).sum(0), ((numel_M[:, None] - held_MR) * owned_MR).sum(0)
    busiest = [matrices[m] for m in np.flatnonzero(owned_MR[:, flops_R.argmax()])]
    products, batch = _products(busiest)
    numbers = sum(matrix.numel for matrix in busiest)
    sent, received = int((out_R + in_R).max()), int(np.maximum(out_R, in_R).max())
    return Orthogonalisation(ranks, stride, products, numbers, len(busiest), sent, received, batch)


def _products(matrices: list[Matrix]) -> tuple[dict[Product, int], int]:
    """(products of an iteration, numbers of the largest batch)"""
    by_shape: dict[tuple[int, int], list[Matrix]] = {}
    for matrix in matrices:
        by_shape.setdefault((matrix.rows, matrix.columns), []).append(matrix)
    found: dict[Product, int] = {}
    largest = 0
    for shape, equal in by_shape.items():
        for batch in in_batches(list(range(len(equal))), shape):
            largest = max(largest, len(batch) * equal[0].numel)
            for rows, inner, columns in equal[0].products:
                product = Product(len(batch), rows, columns, inner, ITEMSIZE)
                found[product] = found.get(product, 0) + 1
    return found, largest


def orthogonalisation_flops(config: TrainConfig, layout: Layout) -> int:
    """FLOPs of a step on the busiest GPU."""
    steps = config.optim.muon.newton_schulz_steps if config.optim.muon else 0
    every = orthogonalisations(config, layout)
    return steps * sum(product.flops * count for found in every for product, count in found.products.items())


def orthogonalisation_buffers(config: TrainConfig, layout: Layout) -> int:
    """Bytes that come up in the optimizer's step: messages and a batch of matrices."""
    every = orthogonalisations(config, layout)
    return max((ITEMSIZE * (2 * found.received + BATCHES * found.batch) for found in every), default=0)


def sent_bytes(config: TrainConfig, layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(bytes that the GPU with most of it sends, ranks, how far apart they are), there and back."""
    for found in orthogonalisations(config, layout):
        yield ITEMSIZE * found.sent, found.ranks, found.stride
