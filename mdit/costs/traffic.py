"""Bytes that a GPU sends in an optimizer step, by purpose. docs/planning.md has the formulas with their sources.

Ring algorithms over n ranks send (n - 1) / n of the bytes in an all-gather, a reduce-scatter and an all-to-all, twice
that in an all-reduce.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mdit.config import TrainConfig
from mdit.costs.layouts import ITEMSIZE, Layout, count_weights, gathered_numbers
from mdit.costs.machines import Machine
from mdit.costs.muon import sent_bytes
from mdit.costs.trace import layers
from mdit.models import meta_model
from mdit.models.layers import CrossAttention, SelfAttention
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.align import projection_sizes

MUON = "matrices for Newton-Schulz"


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step for one purpose, in `count` collectives over `ranks` ranks `stride` apart."""

    purpose: str
    bytes: float
    ranks: int
    stride: int = 1
    count: float = 1.0

    def split(self, machine: Machine) -> tuple[float, float]:
        """(over NVLink, over the network)."""
        outside = self.bytes * machine.share_on_network(self.ranks, self.stride)
        return self.bytes - outside, outside


def predict_traffic(config: TrainConfig, layout: Layout) -> list[Traffic]:
    found = [*_weight_traffic(config, layout), _expert_traffic(config, layout), _tensor_traffic(config, layout)]
    found += [Traffic(MUON, *one, count=2) for one in sent_bytes(config, layout)]
    return [one for one in found if one.ranks > 1]


def _weight_traffic(config: TrainConfig, layout: Layout) -> Iterator[Traffic]:
    b, often, options = ITEMSIZE, layout.accumulation, layout.options
    rings: dict[tuple[int, int], int] = {}
    for numbers, *ring in count_weights(config).groups(layout):
        rings[ring[0], ring[1]] = rings.get((ring[0], ring[1]), 0) + numbers
    for (n, stride), numbers in rings.items():
        once = b * numbers * (n - 1) / n
        buckets = max(1.0, numbers / options.reduce_bucket_size)
        if layout.stage == 1:
            yield Traffic("gradients", 2 * once, n, stride)
        elif layout.stage == 2:
            factor = 2 if options.use_multi_rank_bucket_allreduce else 1
            yield Traffic("gradients", factor * often * once, n, stride, often * buckets)
        else:
            yield Traffic("gradients", often * once, n, stride, often * buckets)
        if layout.stage < 3:
            yield Traffic("weights", once, n, stride)
            continue
        always, while_turning, _ = gathered_numbers(config, layout)
        moved = often * (2 * numbers - always - while_turning) + always
        fetches = 2 * sum(1 for p in meta_model(config.model).parameters() if p.ndim > 1)
        fetches += len(projection_sizes(config.model.dim, config.align))  # of which half are matrices
        yield Traffic("weights", b * moved * (n - 1) / n, n, stride, often * fetches)


def exchanged_bytes(config: TrainConfig, layout: Layout) -> tuple[int, int]:
    """(bytes of a micro-batch's forward pass that go to experts and come back, layers of experts): tokens there and
    back, and their weights there in float32."""
    total = count = 0
    for module, (shape, *_), _ in layers(config.model, config.training.fixed_mask_ratio):
        if isinstance(module, ExpertChoiceMoE):
            chosen = module.num_experts * module.tokens_per_expert(shape[1])
            total, count = total + chosen * (2 * ITEMSIZE * shape[2] + 4), count + 1
    return layout.micro_batch * total, count


def _expert_traffic(config: TrainConfig, layout: Layout) -> Traffic:
    """Forward, backward, and forward again where blocks run again."""
    n, passes = layout.ep, layout.accumulation * (3 if layout.checkpointing == "block" else 2)
    moved, count = exchanged_bytes(config, layout)
    return Traffic("experts", passes * moved * (n - 1) / n, n, 1, 3 * passes * count)


def _tensor_traffic(config: TrainConfig, layout: Layout) -> Traffic:
    """A sum over ranks behind every layer's last matrix and, backward, before each of its first ones; for the norms of
    q and k two float32 each, gathered forward and summed backward."""
    n, again = layout.tp, 2 if layout.checkpointing == "block" else 1
    numbers = rows = count = 0
    for module, inputs, output in layers(config.model, config.training.fixed_mask_ratio):
        if isinstance(module, ExpertChoiceMoE):
            continue
        numbers += again * output.numel() + sum(shape.numel() for shape in inputs)
        count += again + len(inputs)
        if isinstance(module, SelfAttention | CrossAttention):
            rows += sum(shape[1] for shape in inputs) * (3 - len(inputs))  # q and k of one input, or of one each
            count += (again + 1) * len(inputs)
    summed = 2 * (n - 1) / n
    each = ITEMSIZE * numbers * summed + 8 * rows * (again * (n - 1) + summed)
    return Traffic("activations", layout.micro_batch * layout.accumulation * each, n, 1, layout.accumulation * count)
