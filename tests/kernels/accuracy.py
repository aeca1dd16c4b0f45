"""How kernels are judged: against their reference in float64, by PyTorch's own error in the same dtype."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mdit.kernels import dispatch

GPU = torch.cuda.is_available()
# The interpreter computes on the CPU; its tl.dot does not know bfloat16. On a GPU the kernels themselves run.
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]


def in_triton(*ops: str):
    """A fixture, inside whose tests these ops run in Triton."""

    @pytest.fixture
    def triton():
        pytest.importorskip("triton")
        with dispatch.using(*ops, off_gpu=True):
            yield

    return triton


def in_dtype(inputs: Sequence[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
    """The same on DEVICE, floating tensors in `dtype`."""
    return [t if t is None else t.to(DEVICE, dtype if t.is_floating_point() else t.dtype) for t in inputs]


def leaves(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same numbers, floating tensors asking for gradients."""
    return [t if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in inputs]


def kept_for_backward(function: Callable, inputs: Sequence[Tensor | None]) -> dict[int, int]:
    """Bytes of the distinct storages that a call keeps for its backward pass, by their addresses."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*leaves(inputs))
    return kept


def gradients(function: Callable, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of `function(*inputs)` and the gradient of each floating input, for fixed cotangents."""
    given = leaves(inputs)
    outputs = function(*given)
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    wanted = [t for t in given if t is not None and t.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, cotangents)]


def assert_as_accurate(kernel: Callable, reference: Callable, inputs: Sequence[Tensor | None], dtype: torch.dtype):
    """Outputs and gradients of `kernel` in `dtype` are within 2x of the reference's own error against float64.

    Errors are root mean squares over a tensor; one rounding of the result (eps / 4) is always allowed. `inputs` are
    float64 on any device; integer tensors and None are handed on as they are. Memory that kernels allocate is filled
    with NaN first, so that an element never written is found.
    """
    low = in_dtype(inputs, dtype)
    exact, plain = gradients(reference, in_dtype(low, torch.float64)), gradients(reference, low)
    with poisoned_memory():
        ours = gradients(kernel, low)
    assert len(ours) == len(exact)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact)):
        assert o.shape == e.shape and o.dtype == p.dtype, (i, o.shape, e.shape, o.dtype, p.dtype)
        allowed = 2 * rms(p.double() - e) + torch.finfo(dtype).eps / 4 * rms(e)
        assert rms(o.double() - e) <= allowed, f"tensor {i}: {rms(o.double() - e):.3g}, allowed {allowed:.3g}"


def assert_same_bits_twice(kernel: Callable, inputs: Sequence[Tensor | None]) -> None:
    """And nothing is written into the inputs: backward works in place, but in memory of its own."""
    before = [t if t is None else t.clone() for t in inputs]
    assert_equal(gradients(kernel, inputs), gradients(kernel, inputs))
    assert_equal(*([t for t in some if t is not None] for some in (inputs, before)))


def assert_compiles(kernel: Callable, inputs: Sequence[Tensor | None]) -> None:
    """Into one graph, which gives the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(compiled, inputs), gradients(kernel, inputs))


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert all(map(torch.equal, found, expected)) and len(found) == len(expected)


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


class poisoned_memory:
    """torch.empty gives NaN (and the largest integers) inside."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True

    def __exit__(self, *_) -> None:
        torch.use_deterministic_algorithms(self.before[0])
        torch.utils.deterministic.fill_uninitialized_memory = self.before[1]
