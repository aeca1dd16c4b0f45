"""The paper plan of one layout: memory, traffic and time of an optimizer step on one machine."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mdit.config import TrainConfig
from mdit.costs.layouts import Layout
from mdit.costs.machines import OVERLAP_SHARE, Machine
from mdit.costs.memory import Memory, host_bytes, predict_memory
from mdit.costs.time import PARTS, step_parts
from mdit.costs.traffic import MUON, predict_traffic
from mdit.masking import constant_parts


@dataclass(frozen=True)
class Prediction:
    """Memory, traffic and time of one optimizer step on one machine: bytes and seconds a GPU, none of them measured."""

    layout: Layout
    memory: Memory
    fits: bool
    link_bytes: float
    network_bytes: float
    parts: dict[str, float]  # seconds of a step without communication (mdit.costs.time.PARTS)
    exposed_seconds: float
    images: int
    host_bytes: int = 0  # a GPU, of an offloaded optimizer
    muon_seconds: float = 0.0  # of a step, in which matrices are orthogonalised and sent

    @property
    def compute_seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def host_bound(self) -> bool:
        """Does the GPU wait for the host to launch its kernels?"""
        return self.parts["host"] > 0

    @property
    def step_seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds

    @property
    def images_per_second(self) -> float:
        return self.images / self.step_seconds

    @property
    def efficiency(self) -> float:
        """The step without communication, as a share of the step."""
        return self.compute_seconds / self.step_seconds

    def dollars_per_million_images(self, dollars_per_gpu_hour: float) -> float:
        return 1e6 / self.images_per_second / 3600 * self.layout.gpus * dollars_per_gpu_hour


def fitted(config: TrainConfig, layout: Layout, machine: Machine) -> Layout:
    """With the largest micro-batch that fits, not above the layout's own; with its own when none does."""
    share = layout.micro_batch * layout.accumulation
    for size in range(layout.micro_batch, 0, -1):
        smaller = replace(layout, micro_batch=size, accumulation=share // size, reduced=size < layout.micro_batch)
        if share % size == 0 and predict_memory(config, smaller).fits(machine):
            return smaller
    return layout


def predict(config: TrainConfig, layout: Layout, machine: Machine) -> Prediction:
    """The most memory of any step, and the mean step, where the mask ratio is a schedule."""
    shares, configs = zip(*constant_parts(config))
    found = [_predict_step(each, layout, machine) for each in configs]

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values))

    memory, images, host = predict_memory(config, layout), config.training.global_batch_size, host_bytes(config, layout)
    link, network, exposed = (mean(values) for values in zip(*((link, net, wait) for link, net, wait, _ in found)))
    parts = {name: mean(parts[name] for *_, parts in found) for name in PARTS}
    messages = [one for one in predict_traffic(configs[0], layout) if one.purpose == MUON]
    sending = sum(machine.seconds(*one.split(machine), one.ranks, one.count) for one in messages)
    figures = link, network, parts, exposed, images, host, parts["muon"] + sending
    return Prediction(layout, memory, memory.fits(machine), *figures)


def _predict_step(
    config: TrainConfig, layout: Layout, machine: Machine
) -> tuple[float, float, float, dict[str, float]]:
    """Bytes over NVLink and over the network, seconds that are waited for them, seconds of each part. ZeRO's own
    traffic hides behind the computation where DeepSpeed overlaps it; all other is waited for."""
    traffic, parts = predict_traffic(config, layout), step_parts(config, layout, machine)
    hidden = waited = link = network = 0.0
    for one in traffic:
        inside, outside = one.split(machine)
        link, network = link + inside, network + outside
        seconds = machine.seconds(inside, outside, one.ranks, one.count)
        if layout.overlapped and one.purpose in ("gradients", "weights"):
            hidden += seconds
        else:
            waited += seconds
    exposed = waited + max(0.0, hidden - OVERLAP_SHARE * sum(parts.values()))
    return link, network, exposed, parts
