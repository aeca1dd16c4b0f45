"""Averages of the weights of any length, made after training from those that a run has stored (arXiv 2312.02696).

    run_dir/averages/step_00001000/length_0.safetensors   float32 parameters; length_1 likewise
                                   averages.json          lengths, sizes and checksums

The average with exponent gamma after step s has weight (t^(gamma + 1) - (t - 1)^(gamma + 1)) / s^(gamma + 1) for the
weights after step t: the closed form of what `mdit.train.ema` does step by step. Another one is the combination of
stored ones whose weights are nearest to its own, in the sense of least squares.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mdit.checkpoint.training_state import step_in
from mdit.config import UserError
from mdit.documents import plain_name, read_json
from mdit.files import measure, replacing_directory, save_tensors, write_json

AVERAGES = "averages"  # in a run's directory
CONTENT = "averages.json"
STEPS_AT_ONCE = 2**14


@dataclass(frozen=True)
class StoredAverage:
    """One of the two averages after `step`; `file` holds it."""

    length: float
    step: int
    file: Path


def exponent(length: float) -> float:
    """gamma of a profile t^gamma on [0, 1] whose standard deviation is `length` (equation 125 of the paper)."""
    roots = np.roots([1, 7, 16 - length**-2, 12 - length**-2])
    return float(roots.real[np.isreal(roots)].max())


def profile(length: float, step: int, begin: int = 0, end: int | None = None) -> np.ndarray:
    """(end - begin,) float64: the weight, in the average after `step`, of the weights after step begin + 1 .. end."""
    power = exponent(length) + 1
    edges = np.arange(begin, (step if end is None else end) + 1, dtype=np.float64)
    return np.diff((np.minimum(edges, step) / step) ** power)


def combination(stored: Sequence[tuple[float, int]], length: float, step: int) -> np.ndarray:
    """(len(stored),) coefficients of averages of (length, step) whose sum is nearest to the average asked for."""
    products, wanted = np.zeros((len(stored), len(stored))), np.zeros(len(stored))
    for begin in range(0, step, STEPS_AT_ONCE):
        end = min(begin + STEPS_AT_ONCE, step)
        rows = np.stack([profile(*each, begin, end) for each in stored])
        products, wanted = products + rows @ rows.T, wanted + rows @ profile(length, step, begin, end)
    return np.linalg.lstsq(products, wanted, rcond=None)[0]


def save_averages(directory: Path, lengths: Sequence[float], averages: Sequence[dict[str, Tensor]]) -> None:
    """Write the averages after a step, all of them or nothing. One process only."""
    with replacing_directory(directory) as partial:
        for number, weights in enumerate(averages):
            save_tensors(weights, partial / f"length_{number}.safetensors")
        files = {path.name: measure(path) for path in sorted(partial.iterdir())}
        write_json(partial / CONTENT, {"lengths": list(lengths), "files": files})


def stored_averages(run_dir: Path, until: int) -> list[StoredAverage]:
    """The averages of a run up to a step. Raises UserError where there are none, or one is not as it was written."""
    folder = run_dir / AVERAGES
    found = []
    for path in sorted(folder.glob("step_*")):
        step = step_in(path.name)
        if step is None or step > until:
            continue
        content = read_json(path / CONTENT)
        try:
            listed = [
                (float(length), plain_name(name), written)
                for length, (name, written) in zip(content["lengths"], content["files"].items(), strict=True)
            ]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"{path / CONTENT}: is not as it was written: {error}") from None
        for length, name, written in listed:
            if not (path / name).is_file() or measure(path / name) != written:
                raise UserError(f"{path / name}: damaged or missing: not as {CONTENT} says")
            found.append(StoredAverage(length, step, path / name))
    if not found:
        raise UserError(f"{folder}: has no averages up to step {until}; a recipe's table [averages] stores them")
    return found


def reconstruct(stored: Sequence[StoredAverage], length: float, step: int) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of every parameter's average of any length after `step`, summed in float64."""
    factors = combination([(each.length, each.step) for each in stored], length, step)
    try:
        files = [safe_open(each.file, "pt") for each in stored]
        for name in files[0].keys():  # noqa: SIM118  (no dict)
            total = torch.zeros_like(files[0].get_tensor(name), dtype=torch.float64)
            for factor, file in zip(factors.tolist(), files, strict=True):
                total.add_(file.get_tensor(name).double(), alpha=factor)
            yield name, total.float()
    except (SafetensorError, RuntimeError) as error:  # RuntimeError: of another shape
        raise UserError(f"{stored[0].file.parent}: averages are not as they were written: {error}") from None
