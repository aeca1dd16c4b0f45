"""Training with the Triton kernels, interpreted on the CPU where there is no GPU: the same curve as in PyTorch."""

import json

import pytest
import torch

from tests.training import read_metrics, train, write_ds_json, write_recipe

# Every kind of call: experts and SwiGLU, mixer and backbone of different widths (so that the exit gathers and norms),
# heads as narrow as the kernels go.
MODEL = {"dim": 32, "depth": 2, "mixer_depth": 2, "mixer_dim": 48, "head_dim": 16, "ffn_ratio": (1.0, 2.0)}


@pytest.mark.parametrize(
    "mode, steps", [({}, 2), ({"activation_checkpointing": "block"}, 1)], ids=["plain", "checkpointing"]
)
def test_triton_keeps_the_curve_of_the_reference(tmp_path, mode, steps):
    pytest.importorskip("triton")
    recipe = write_recipe(tmp_path, model=MODEL, training={"num_steps": steps, "global_batch_size": 2})
    printed = {}
    for kernels in ("reference", "triton"):
        settings = {"kernels": kernels, **mode}
        ds_json = write_ds_json(tmp_path / f"{kernels}.json", bf16={"enabled": False}, mdit=settings)
        printed[kernels] = train(recipe, ds_json, tmp_path / kernels)
    assert "kernels: none in Triton (asked for)" in printed["reference"]
    assert "expert_choice, masked_attention, patch_mixing, swiglu in Triton (asked for)" in printed["triton"]
    for key in ("loss", "gradient_norm"):
        ours, theirs = read_metrics(tmp_path / "triton", key), read_metrics(tmp_path / "reference", key)
        assert ours == pytest.approx(theirs, rel=1e-5) and len(ours) == steps


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [{}, {"compile": True}], ids=["eager", "compiled"])
def test_triton_keeps_the_curve_on_a_gpu(tmp_path, mode):
    """Of both presets' head widths, in bfloat16: 30 steps within rounding, and the same bits in a second run."""
    for head_dim in (32, 64):
        model = {"dim": 128, "mixer_dim": 192, "head_dim": head_dim, "latent_size": 32}
        recipe = write_recipe(tmp_path / str(head_dim), model=model, training={"num_steps": 30})
        curves = {}
        for name, kernels in (("reference", "reference"), ("triton", "triton"), ("again", "triton")):
            ds_json = write_ds_json(tmp_path / f"{name}.json", mdit={"kernels": kernels, **mode})
            train(recipe, ds_json, tmp_path / str(head_dim) / name)
            curves[name] = read_metrics(tmp_path / str(head_dim) / name)
        assert curves["triton"] == pytest.approx(curves["reference"], rel=2e-2)
        assert curves["again"] == curves["triton"]


def test_auto_says_why_it_is_pytorch_on_a_cpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    recipe = write_recipe(tmp_path, training={"num_steps": 1})
    printed = train(recipe, write_ds_json(tmp_path / "ds.json"), tmp_path / "run")
    assert "kernels: none in Triton (" in printed
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mdit"]["kernels"] == "auto"
