"""Which implementation runs: what the JSON and the environment say, what the machine can, what a self-check finds."""

import pytest
import torch

from mdit.config import UserError
from mdit.kernels import dispatch, patch_mixing, selection
from mdit.kernels.dispatch import OPS, use_triton, using

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """What a test settles ends with it; TRITON_INTERPRET, set for all tests, counts only where a test says so."""
    monkeypatch.setattr(dispatch, "_in_triton", {})
    monkeypatch.setattr(dispatch, "_dtypes", ())
    monkeypatch.setattr(dispatch, "_off_gpu", False)
    monkeypatch.delenv("MDIT_KERNELS", raising=False)


def choose_kernels(wanted, device, head_dim=64, fp8=True, dtype=FLOAT):
    return selection.choose_kernels(wanted, device, dtype, head_dim, "ds.json", fp8)


def pretend_gpu(monkeypatch, capability=(9, 0)) -> torch.device:
    monkeypatch.setattr(selection, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return torch.device("cuda", 0)


def test_auto_is_pytorch_on_a_cpu_even_when_kernels_could_be_interpreted(monkeypatch):
    monkeypatch.setattr(selection, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_off_gpu", True)
    assert choose_kernels("auto", CPU) == (frozenset(), "there is no GPU")
    assert not use_triton("swiglu", torch.ones(1))


def test_auto_without_triton(monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(selection, "_installed", lambda: False)
    assert choose_kernels("auto", torch.device("cuda")) == (frozenset(), "the package triton is not installed")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9)])
def test_auto_on_a_gpu_that_the_kernels_are_not_shaped_for(monkeypatch, capability):
    chosen, reason = choose_kernels("auto", pretend_gpu(monkeypatch, capability))
    assert not chosen and reason == "some GPU is older than compute capability 9.0"


def test_triton_is_obeyed_down_to_ampere(monkeypatch):
    assert choose_kernels("triton", pretend_gpu(monkeypatch, (8, 0)))[0] == {*OPS}
    with pytest.raises(UserError, match="but some GPU is older than compute capability 8.0$"):
        choose_kernels("triton", pretend_gpu(monkeypatch, (7, 5)))


def test_auto_on_a_gpu_takes_the_ops_that_agree(monkeypatch):
    device = pretend_gpu(monkeypatch)
    monkeypatch.setattr(
        "mdit.kernels.selection.compare_with_reference", lambda op, *_: "no compiler" if op == "swiglu" else None
    )
    chosen, reason = choose_kernels("auto", device)
    assert chosen == {*OPS} - {"swiglu"}
    assert reason == "they agree with PyTorch on some GPU; swiglu does not: no compiler"
    assert not use_triton("swiglu", torch.ones(1))


def test_head_dims_without_kernels_leave_attention_to_pytorch(monkeypatch):
    device = pretend_gpu(monkeypatch)
    monkeypatch.setattr("mdit.kernels.selection.compare_with_reference", lambda *_: None)
    chosen, reason = choose_kernels("auto", device, head_dim=24)
    why = "masked_attention has kernels for head_dim 16, 32, 64, 128, and model.head_dim is 24"
    assert chosen == {*OPS} - {"masked_attention"} and reason.endswith("; " + why)
    with pytest.raises(UserError, match=f"^ds.json: mdit.kernels = 'triton', but {why}$"):
        choose_kernels("triton", device, head_dim=24)


def test_reference_is_obeyed_on_a_gpu(monkeypatch):
    assert choose_kernels("reference", pretend_gpu(monkeypatch)) == (frozenset(), "asked for")


def test_triton_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(selection, "_installed", lambda: True)
    with pytest.raises(UserError, match="^ds.json: mdit.kernels = 'triton', but there is no GPU$"):
        choose_kernels("triton", CPU)
    monkeypatch.setattr(selection, "_installed", lambda: False)
    with pytest.raises(UserError, match="^ds.json: mdit.kernels = 'triton', but the package triton is not installed$"):
        choose_kernels("triton", CPU)


def test_triton_on_a_cpu_is_possible_interpreted(monkeypatch):
    monkeypatch.setattr(selection, "_installed", lambda: True)
    monkeypatch.setattr(dispatch, "_off_gpu", True)
    assert choose_kernels("triton", CPU) == (frozenset(OPS), "asked for")
    assert use_triton("swiglu", torch.ones(1)) and not use_triton("swiglu", torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("wanted", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [*dispatch.DTYPES, torch.float64], ids=str)
def test_kernels_run_in_the_dtype_that_was_checked_and_in_no_other(monkeypatch, wanted, dtype):
    device, checked = pretend_gpu(monkeypatch), set()
    monkeypatch.setattr(selection, "compare_with_reference", lambda op, device, dtype, head_dim: checked.add(dtype))
    monkeypatch.setattr(dispatch, "_off_gpu", True)
    assert choose_kernels(wanted, device, dtype=dtype)[0] == {*OPS}
    assert checked == ({dtype} if wanted == "auto" else set())
    for other in (*dispatch.DTYPES, torch.float64):
        runs = other == dtype and other != torch.float64
        assert {use_triton(op, torch.ones(1, dtype=other)) for op in OPS} == {runs}


def test_float8_is_left_alone_unless_it_is_wanted(monkeypatch):
    device, looked_at = pretend_gpu(monkeypatch), []
    monkeypatch.setattr(selection, "compare_with_reference", lambda op, *_: looked_at.append(op) or "")
    for wanted in ("auto", "triton"):
        assert choose_kernels(wanted, device, fp8=False)[0] == {*OPS} - {"fp8_linear"}
    assert sorted(looked_at) == sorted({*OPS} - {"fp8_linear"})


def test_the_environment_speaks_where_the_json_does_not(monkeypatch):
    device = pretend_gpu(monkeypatch)
    monkeypatch.setenv("MDIT_KERNELS", "triton")
    assert choose_kernels("auto", device)[0] == {*OPS}
    with pytest.raises(UserError, match="^MDIT_KERNELS=triton, but there is no GPU$"):
        choose_kernels("auto", CPU)
    monkeypatch.setenv("MDIT_KERNELS", "reference")
    assert choose_kernels("auto", device)[0] == frozenset()
    with pytest.raises(UserError, match="^ds.json: mdit.kernels = 'triton' contradicts MDIT_KERNELS=reference"):
        choose_kernels("triton", device)
    monkeypatch.setenv("MDIT_KERNELS", "fast")
    with pytest.raises(UserError, match='^MDIT_KERNELS=fast: expected "auto", "reference" or "triton"$'):
        choose_kernels("auto", device)


def test_using_ends_with_its_block():
    with using("patch_mixing", off_gpu=True):
        assert use_triton("patch_mixing", torch.ones(1)) and not use_triton("swiglu", torch.ones(1))
    assert not use_triton("patch_mixing", torch.ones(1))
    x = torch.randn(1, 2, 8)
    patch_mixing.add_norm_modulate(x, None, None, torch.ones(8), None, None, 1e-6)  # in PyTorch again
