"""Our layers of experts against the one-hot form, alone: what moving tokens by index spares.

Both form the same products of chosen tokens with the experts' matrices. One-hot adds 8 T / 12 F of their FLOPs to move
the tokens (T tokens of an image, F the experts' width), so narrow layers and large images gain the most.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from mdit.bench.trial import give_back_memory
from mdit.config import ModelConfig
from mdit.costs.kernel_calls import KernelCall, expert_layers
from mdit.kernels.expert_choice.reference import one_hot_expert_choice

HEADER = (
    "| layer of experts | forward, by index ms | one-hot ms | ratio | forward and backward, by index ms | one-hot ms "
    f"| ratio |\n|{'---|' * 7}"
)


def lines(
    config: ModelConfig, micro_batch: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> Iterator[str]:
    """Of the table: one for every width of the model's expert layers, which see all tokens."""
    for call in expert_layers(config, micro_batch, mask_ratio=0.0):
        cells = [f"{call.where} {call.label}"]
        for ours, theirs in zip(*milliseconds(call, device, dtype, repeats)):
            cells += [f"{ours:.3g}", f"{theirs:.3g}", f"{theirs / ours:.2f}"]
        yield f"| {' | '.join(cells)} |"


def milliseconds(call: KernelCall, device: torch.device, dtype: torch.dtype, repeats: int) -> list[list[float]]:
    """-> [forward, forward and backward] of ours and of the one-hot form: medians of `repeats` turns each."""
    inputs = [t.detach().requires_grad_() for t in call.inputs(device, dtype)]
    forms = [call.function, partial(one_hot_expert_choice, tokens_per_expert=call.shape["K"])]
    cotangent = torch.randn_like(call.function(*inputs))
    times: list[list[tuple[float, float]]] = [[], []]
    for number in range(repeats + 1):
        for form, found in zip(forms, times):
            seconds = once(form, inputs, cotangent)
            if number > 0:  # the first is for warming up
                found.append(seconds)
    give_back_memory()
    return [[1e3 * statistics.median(part) for part in zip(*found)] for found in times]


def once(form: Callable[..., Tensor], inputs: list[Tensor], cotangent: Tensor) -> tuple[float, float]:
    """-> seconds of forward, and of forward and backward."""
    wait = torch.cuda.synchronize if cotangent.is_cuda else lambda: None
    wait()
    started = time.perf_counter()
    output = form(*inputs)
    wait()
    forward = time.perf_counter() - started
    torch.autograd.grad(output, inputs, cotangent)
    wait()
    return forward, time.perf_counter() - started
