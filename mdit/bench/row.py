"""One measurement of training as a typed row, and the rates, prices and table cells that follow from it."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch

from mdit.config import PositiveFloat, Section, TrainConfig
from mdit.costs.machines import Machine, machine_named
from mdit.parallel.settings import Checkpointing

Kind = Literal["stage", "ladder", "baseline", "profile"]
Phase = Literal["data", "forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = get_args(Phase)
FORMULA = (
    "model TFLOP/s of a GPU = images/s x FLOPs of an image / GPUs / 10^12\n"
    "MFU = model TFLOP/s / the GPU's peak in dense bfloat16; none in float8 and float32\n"
    "FLOPs of an image: 2 a multiply-add of matmuls and attention, backward twice the forward; kept tokens only,\n"
    "experts at capacity, no recomputation, no dispatch (mdit/costs/trace.py)"
)
PRICES = (3.75, 2.0)  # dollars of a GPU-hour
PIXELS_OF_A_LATENT = 8
MADE_UP = "made up"
NOT_MEASURED = "not measured"  # begins the problem of a row that another run may still measure
OUT_OF_MEMORY = "out of memory"


class Setting(Section):
    """Execution of a run. `kernels`: the ops in Triton. `weights`: their precision, where it is not mdit's own."""

    gpus: int
    micro_batch: int
    global_batch: int
    precision: Literal["bf16", "fp32"]
    fp8: bool = False
    kernels: tuple[str, ...] = ()
    compile: bool = False
    activation_checkpointing: Checkpointing = "none"
    zero_stage: int
    weights: str | None = None


class StepTime(Section):
    """Milliseconds of the median optimizer step (of an even number the shorter of two) and its phases, which add up to
    it: waiting for the batch, forward, backward, optimizer with EMA. Of the slowest rank; on a GPU by its own clock.
    `communication`: in how much of a step a collective ran, beside or within these; None with one process."""

    step: float
    data: float
    forward: float
    backward: float
    optimizer: float
    communication: float | None = None


class Parity(Section):
    """Relative differences of losses from those of the ladder's first step, over `steps` optimizer steps.

    `largest`: of a step's loss; `mean_first`, `mean_last`: of the mean over the first tenth, the last quarter."""

    steps: int
    largest: float
    mean_first: float
    mean_last: float

    def __str__(self) -> str:
        return f"{self.largest:.1e} in {self.steps}"


class Measured(Section):
    """Figures of `steps` optimizer steps. `images_per_second`: the global batch over the median step, of all GPUs.
    `fastest_ms`: the shortest step. `peak_gib`: the most that torch took of a GPU; on a CPU, of the process since it
    started, or None. `losses`: of the first steps, warm-up included. `memory_gib`: by part, or empty."""

    steps: int
    images_per_second: PositiveFloat
    milliseconds: StepTime
    fastest_ms: float
    peak_gib: float | None = None
    losses: tuple[float, ...] = ()
    memory_gib: dict[str, float] = {}
    parity: Parity | None = None


class KernelTime(Section):
    """One kernel or operator: calls and milliseconds of a step."""

    name: str
    category: str
    calls: float
    ms: float


class HostTime(Section):
    """The host's side of a step: ms in operators and launches, launches, ms of waiting for the GPU."""

    busy_ms: float
    launches: float
    waiting_ms: float


class Work(Section):
    """FLOPs, and the least bytes that must be moved."""

    flops: float
    bytes: float


class Profile(Section):
    """Time of a profiled step. `categories`: ms of device time. `idle_ms`: the device did nothing. `host`: None on a
    CPU. `trace`: name of a file beside the report. `work`: of a step on one GPU, by category, for the roofline."""

    categories: dict[str, float]
    step_ms: float
    idle_ms: float
    kernels: tuple[KernelTime, ...]
    host: HostTime | None = None
    trace: str | None = None
    work: dict[str, Work] = {}


class BenchmarkRow(Section):
    """One measurement: what was run, and either its figures or the `problem` why there are none.

    `name`: of a stage "256 px, mask 0.75", else of the ladder's step or the contender. `recipe`: its name; `images`:
    those of the whole stage, whatever global batch was measured. `data`: "made up", or the directories. `peak_tflops`:
    of the GPU in dense bfloat16; None where that is unknown, or the run is in float8 or float32. `contender` and
    `pairing`: of kind "baseline" alone.
    """

    kind: Kind
    name: str
    recipe: str
    images: int
    parameters: int
    latent_size: int
    mask_ratio: float
    setting: Setting
    data: str
    flops_per_image: float
    peak_tflops: float | None = None
    contender: str | None = None
    pairing: str | None = None
    measured: Measured | None = None
    profile: Profile | None = None
    problem: str | None = None

    def with_(self, **changes: Any) -> "BenchmarkRow":
        """The same row with other fields."""
        return self.model_copy(update=changes)

    @property
    def shape(self) -> tuple[int, int, float]:
        """Facts that a stage's speed depends on: parameters, latent size and mask ratio."""
        return self.parameters, self.latent_size, self.mask_ratio

    @property
    def key(self) -> tuple:
        """Equal in rows of the same measurement. A ladder's step and a profile go by their names: what runs in Triton
        may differ where something failed."""
        common = (self.kind, self.name, self.recipe, self.data, self.parameters)
        if self.kind in ("ladder", "profile"):
            return (*common, self.setting.global_batch)
        return (*common, self.latent_size, self.mask_ratio, self.setting, self.contender, self.pairing)

    @property
    def is_open(self) -> bool:
        """Whether time was too short, so that another run may still measure it."""
        return (self.problem or "").startswith(NOT_MEASURED)

    @property
    def ran_out_of_memory(self) -> bool:
        return (self.problem or "").startswith(OUT_OF_MEMORY)

    @property
    def batch(self) -> str:
        """Micro-batch x micro-batches of a step, as "256 x 8"."""
        setting = self.setting
        return f"{setting.micro_batch} x {setting.global_batch // setting.micro_batch // setting.gpus}"

    @property
    def figures(self) -> Measured:
        """`measured` of a row that has no problem."""
        assert self.measured is not None, f"{self.name}: {self.problem}"
        return self.measured

    @property
    def tflops(self) -> float:
        """Model TFLOP/s per GPU."""
        return self.figures.images_per_second * self.flops_per_image / self.setting.gpus / 1e12

    @property
    def mfu(self) -> float | None:
        """Share of the GPU's peak."""
        return None if self.peak_tflops is None else self.tflops / self.peak_tflops

    def dollars_per_million(self, dollars_per_gpu_hour: float) -> float:
        """Dollars of a million images."""
        return 1e6 / self.figures.images_per_second / 3600 * self.setting.gpus * dollars_per_gpu_hour

    def stage_dollars(self, dollars_per_gpu_hour: float) -> float:
        """Dollars of all images of the row's stage."""
        return self.images / 1e6 * self.dollars_per_million(dollars_per_gpu_hour)


@cache
def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


def machine_of(device: torch.device | str) -> Machine | None:
    """The data sheet of a GPU, or of that with a name as torch gives it."""
    name = device if isinstance(device, str) else device_name(device)
    return machine_named(name)


def stage_name(config: TrainConfig) -> str:
    return f"{PIXELS_OF_A_LATENT * config.model.latent_size} px, mask {config.training.fixed_mask_ratio:g}"


def one_line(row: BenchmarkRow) -> str:
    """A row as it is printed when it has been measured."""
    which = f"{row.name}, micro-batch {row.setting.micro_batch} of {row.setting.global_batch}"
    if row.problem:
        return f"{which}: {row.problem}"
    mfu = "" if row.mfu is None else f", MFU {row.mfu:.1%}"
    rate, ms = row.figures.images_per_second, row.figures.milliseconds.step
    return f"{which}: {_number(rate)} images/s, {ms:,.1f} ms a step{mfu}"


# Cells of tables: column -> text of a row with figures, dollars at each of some prices of a GPU-hour.


def _number(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _rate(row: BenchmarkRow, prices: Sequence[float]) -> str:
    rate, gpus = row.figures.images_per_second, row.setting.gpus
    return _number(rate) + (f", {_number(rate / gpus)} a GPU" if gpus > 1 else "")


def _step(row: BenchmarkRow, prices: Sequence[float]) -> str:
    ms = row.figures.milliseconds
    return f"{ms.step:,.1f} = " + " + ".join(f"{getattr(ms, phase):,.1f}" for phase in PHASES)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[BenchmarkRow, Sequence[float]], str]] = {
    "": lambda row, prices: f"{row.pairing}: {row.name}" if row.pairing else row.name,
    "batch": lambda row, prices: row.batch,
    "images/s": _rate,
    "ms a step = data + forw. + backw. + optim.": _step,
    "coll.": lambda row, prices: _or_nothing(row.figures.milliseconds.communication, ",.1f"),
    "TFLOP/s": lambda row, prices: f"{row.tflops:.3g}",
    "MFU": lambda row, prices: _or_nothing(row.mfu, ".1%"),
    "GiB": lambda row, prices: _or_nothing(row.figures.peak_gib, ".1f"),
    "$ a million": lambda row, prices: " / ".join(f"{row.dollars_per_million(p):,.2f}" for p in prices),
    "$ the stage": lambda row, prices: " / ".join(
        f"{row.stage_dollars(p):,.0f}" for p in prices if row.kind == "stage"
    ),
    "loss parity": lambda row, prices: str(row.figures.parity or ""),
}
