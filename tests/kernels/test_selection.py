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


@pytest.fixture
def machine(monkeypatch):
    """A machine's device: what it has, and what MDIT_KERNELS says there."""

    def pretend(capability=(9, 0), installed=True, interpreted=False, variable=None) -> torch.device:
        monkeypatch.setattr(selection, "_installed", lambda: installed)
        monkeypatch.setattr(dispatch, "_off_gpu", interpreted)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        if variable is not None:
            monkeypatch.setenv("MDIT_KERNELS", variable)
        return torch.device("cuda", 0) if capability else CPU

    return pretend


def choose_kernels(wanted, device, head_dim=64, fp8=True, dtype=FLOAT):
    return selection.choose_kernels(wanted, device, dtype, head_dim, "ds.json", fp8)


@pytest.mark.parametrize(
    "wanted, has, chosen, reason",
    [
        ("auto", dict(capability=None, interpreted=True), (), "there is no GPU"),
        ("auto", dict(installed=False), (), "the package triton is not installed"),
        ("auto", dict(capability=(8, 9)), (), "some GPU is older than compute capability 9.0"),
        ("auto", dict(variable="triton"), OPS, "asked for"),
        ("auto", dict(variable="reference"), (), "asked for"),
        ("reference", dict(), (), "asked for"),
        ("triton", dict(capability=(8, 0)), OPS, "asked for"),
        ("triton", dict(capability=None, interpreted=True), OPS, "asked for"),
    ],
)
def test_who_decides_and_why(machine, wanted, has, chosen, reason):
    assert choose_kernels(wanted, machine(**has)) == ({*chosen}, reason)
    # Without a GPU a tensor comes to Triton only where it is interpreted, and where that was settled.
    assert use_triton("swiglu", torch.ones(1)) == (bool(chosen) and "interpreted" in has)


@pytest.mark.parametrize(
    "wanted, has, complaint",
    [
        ("triton", dict(capability=None), "ds.json: mdit.kernels = 'triton', but there is no GPU"),
        ("triton", dict(installed=False), "ds.json: mdit.kernels = 'triton', but the package triton is not installed"),
        ("triton", dict(capability=(7, 5)), ".* = 'triton', but some GPU is older than compute capability 8.0"),
        ("auto", dict(capability=None, variable="triton"), "MDIT_KERNELS=triton, but there is no GPU"),
        ("triton", dict(variable="reference"), "ds.json: .* = 'triton' contradicts MDIT_KERNELS=reference"),
        ("auto", dict(variable="fast"), 'MDIT_KERNELS=fast: expected "auto", "reference" or "triton"'),
    ],
)
def test_what_cannot_be_is_an_error(machine, wanted, has, complaint):
    device = machine(**has)
    with pytest.raises(UserError, match=f"^{complaint}$"):
        choose_kernels(wanted, device)


def test_auto_on_a_gpu_takes_the_ops_that_agree(machine, monkeypatch):
    monkeypatch.setattr(
        "mdit.kernels.selection.compare_with_reference", lambda op, *_: "no compiler" if op == "swiglu" else None
    )
    chosen, reason = choose_kernels("auto", machine())
    assert chosen == {*OPS} - {"swiglu"}
    assert reason == "they agree with PyTorch on some GPU; swiglu does not: no compiler"
    assert not use_triton("swiglu", torch.ones(1))


def test_head_dims_without_kernels_leave_attention_to_pytorch(machine, monkeypatch):
    device = machine()
    monkeypatch.setattr("mdit.kernels.selection.compare_with_reference", lambda *_: None)
    chosen, reason = choose_kernels("auto", device, head_dim=24)
    why = "masked_attention has kernels for head_dim 16, 32, 64, 128, and model.head_dim is 24"
    assert chosen == {*OPS} - {"masked_attention"} and reason.endswith("; " + why)
    with pytest.raises(UserError, match=f"^ds.json: mdit.kernels = 'triton', but {why}$"):
        choose_kernels("triton", device, head_dim=24)


@pytest.mark.parametrize("wanted", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [*dispatch.DTYPES, torch.float64], ids=str)
def test_kernels_run_in_the_dtype_that_was_checked_and_in_no_other(machine, monkeypatch, wanted, dtype):
    device, checked = machine(interpreted=True), set()
    monkeypatch.setattr(selection, "compare_with_reference", lambda op, device, dtype, head_dim: checked.add(dtype))
    assert choose_kernels(wanted, device, dtype=dtype)[0] == {*OPS}
    assert checked == ({dtype} if wanted == "auto" else set())
    for other in (*dispatch.DTYPES, torch.float64):
        runs = other == dtype and other != torch.float64
        assert {use_triton(op, torch.ones(1, dtype=other)) for op in OPS} == {runs}


def test_float8_is_left_alone_unless_it_is_wanted(machine, monkeypatch):
    device, looked_at = machine(), []
    monkeypatch.setattr(selection, "compare_with_reference", lambda op, *_: looked_at.append(op) or "")
    for wanted in ("auto", "triton"):
        assert choose_kernels(wanted, device, fp8=False)[0] == {*OPS} - {"fp8_linear"}
    assert sorted(looked_at) == sorted({*OPS} - {"fp8_linear"})


def test_using_ends_with_its_block():
    with using("patch_mixing", off_gpu=True):
        assert use_triton("patch_mixing", torch.ones(1)) and not use_triton("swiglu", torch.ones(1))
    assert not use_triton("patch_mixing", torch.ones(1))
    x = torch.randn(1, 2, 8)
    patch_mixing.add_norm_modulate(x, None, None, torch.ones(8), None, None, 1e-6)  # in PyTorch again
