"""The JSON never changes what is learned: processes, micro-batches, ZeRO stages, expert and tensor parallelism,
recomputation, compilation, the data engine. Ten clipped AdamW steps in float32 against one process, one batch.
"""

import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from mdit.config import FlowNoise
from mdit.parallel import apply
from mdit.parallel.settings import load_ds_json
from tests.recipes import LEVERS
from tests.training import REPOSITORY, launch, read_metrics, train, write_ds_json, write_recipe

STEPS = 10
# Adam divides by sqrt(v) + eps: with the paper's 1e-8, gradients that are themselves rounding (1e-9) move weights.
RECIPE = dict(
    model={"mixer_dim": 16},  # 2 heads, for two tensor ranks
    training={"num_steps": STEPS, "global_batch_size": 16},
    optim={"eps": 1e-5},
    report={"validate_every": 5, "checkpoint_every": STEPS},
)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    """One process, whole batch at once, ZeRO-1."""
    folder = tmp_path_factory.mktemp("baseline")
    recipe = write_recipe(folder, **RECIPE)
    train(recipe, write_ds_json(folder / "ds.json", stage=1), folder / "run")
    assert min(read_metrics(folder / "run", "gradient_norm").values()) > 0.25, "clipping must be at work"
    return recipe, folder / "run"


EXPERTS = {  # every pair of a group's size, a stage and an accumulation once
    f"experts over {ep} of {max(2, ep)}, ZeRO-{stage}, accumulated {times} times": dict(
        processes=max(2, ep), stage=stage, gradient_accumulation_steps=times, mdit={"expert_parallel": ep}
    )
    for ep, stage, times in ((1, 1, 4), (1, 2, 1), (2, 1, 1), (2, 2, 4), (4, 1, 4), (4, 2, 1))
}
TENSORS = {
    f"tensors over 2 of {2 * data_size}, ZeRO-{stage}": dict(
        processes=2 * data_size, stage=stage, mdit={"tensor_parallel": 2}
    )
    for data_size, stage in ((1, 2), (2, 1))
}
CONSUMER_GPU = load_ds_json(REPOSITORY / "configs/zero2_24gb.json")  # offload, recomputation, small buckets
LAYOUTS = {
    "one GPU of 24 GB": {**CONSUMER_GPU, "train_micro_batch_size_per_gpu": 4},
    "micro-batch of 2, accumulated 8 times": dict(processes=1, stage=2, micro_batch=2),
    "2 processes, ZeRO-2, micro-batch of 1": dict(processes=2, stage=2, micro_batch=1),
    "2 processes, ZeRO-3": dict(processes=2, stage=3, micro_batch=2),
    "ZeRO-3 alone": dict(processes=1, stage=3),
    "experts over 2 of 4": dict(processes=4, stage=2, mdit={"expert_parallel": 2}),
    "optimizer in host memory": dict(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "activation checkpointing": dict(processes=1, stage=2, mdit={"activation_checkpointing": "block"}),
    "selective activation checkpointing": dict(processes=1, stage=2, mdit={"activation_checkpointing": "selective"}),
    "checkpointing, experts over 2": dict(
        processes=2, stage=2, mdit={"activation_checkpointing": "selective", "expert_parallel": 2}
    ),
    "checkpointing, tensors over 2": dict(
        processes=2, stage=2, mdit={"activation_checkpointing": "selective", "tensor_parallel": 2}
    ),
    "latents through DALI": dict(processes=2, stage=2, mdit={"data_engine": "dali"}),
    **EXPERTS,
    **TENSORS,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_keeps_losses_and_weights(baseline, tmp_path, name):
    if "DALI" in name:
        pytest.importorskip("nvidia.dali")
    if "tensors" in name:
        pytest.importorskip("megatron.core")
    recipe, expected = baseline
    layout = dict(LAYOUTS[name])
    processes = layout.pop("processes", 1)
    train(recipe, write_ds_json(tmp_path / "ds.json", **layout), tmp_path / "run", processes=processes)
    assert_same_run(tmp_path / "run", expected)


def assert_same_run(run, expected, keys=("loss", "gradient_norm", "validation_loss")):
    for key in keys:
        ours, theirs = read_metrics(run, key), read_metrics(expected, key)
        assert ours.keys() == theirs.keys() and ours
        assert ours == pytest.approx(theirs, rel=1e-6), key
    for kind in ("ema", "raw"):
        ours, theirs = (load_file(r / "snapshots/latest" / f"{kind}.safetensors") for r in (run, expected))
        for parameter, value in theirs.items():
            torch.testing.assert_close(ours[parameter], value, rtol=0, atol=1e-6, msg=f"{kind} {parameter}")


BEYOND_THE_PAPER = dict(
    model=RECIPE["model"] | LEVERS,
    noise=FlowNoise(target="flow", sigma_data=0.9),
    training=RECIPE["training"]
    | {"mask_ratio": {"schedule": "linear", "start": 0.75, "final": 0.0, "share": 0.8, "levels": 2}},
    optim={"eps": 1e-5, "schedule": "wsd", "decay_share": 0.5, "decay_shape": "linear", "name": "muon"}
    | {"muon": {"lr": 4e-3, "weight_decay": 0.1, "eps": 1e-3}},  # cross-attention's q: tokens of a caption are alike
    align={"tower": "tower", "channels": 20, "block": 2, "weight": 0.5, "stop_step": 8, "width": 24},
    report={"checkpoint_every": STEPS // 2},
)
LAYOUTS_BEYOND = {
    "experts over 2": dict(processes=2, stage=2, micro_batch=2, mdit={"expert_parallel": 2}),
    "ZeRO-3, recomputed": dict(processes=2, stage=3, mdit={"activation_checkpointing": "block"}),
    "ZeRO-1 of 4, experts over 2": dict(processes=4, stage=1, mdit={"expert_parallel": 2}),
}


@pytest.fixture(scope="module")
def beyond_the_paper(tmp_path_factory):
    """All levers at once, one process."""
    folder = tmp_path_factory.mktemp("beyond")
    recipe = write_recipe(folder, **BEYOND_THE_PAPER)
    train(recipe, write_ds_json(folder / "ds.json", stage=1), folder / "run")
    assert len(set(read_metrics(folder / "run", "mask_ratio").values())) == 3
    return recipe, folder / "run"


@pytest.mark.parametrize("name", LAYOUTS_BEYOND)
def test_levers_beyond_the_paper_keep_the_curve_too(beyond_the_paper, tmp_path, name):
    """To the end, then the second half again in one process."""
    recipe, expected = beyond_the_paper
    ds_json, layout = tmp_path / "ds.json", dict(LAYOUTS_BEYOND[name])
    processes = layout.pop("processes")
    for _ in range(2):
        output = train(recipe, write_ds_json(ds_json, **layout), tmp_path / "run", processes=processes)
        assert_same_run(tmp_path / "run", expected, keys=("loss", "align_loss", "gradient_norm"))
        shutil.rmtree(tmp_path / f"run/checkpoints/step_{STEPS:08d}")
        processes, layout = 1, {"stage": 1}
    assert f"resuming at step {STEPS // 2} " in output


def test_weights_moved_and_ema_lags_behind(baseline):
    _, run = baseline
    ema, raw = (load_file(run / "snapshots/latest" / f"{kind}.safetensors") for kind in ("ema", "raw"))
    name = "final_layer.linear.weight"  # starts at zero
    assert 0 < ema[name].norm() < raw[name].norm()


def launch_without_cpp(script, arguments):
    """Compiled for autograd, as inductor gets its graphs, but without its C++."""
    apply.compile_each = partial(apply.compile_each, backend="aot_eager_decomp_partition")
    launch(script, arguments)


@pytest.mark.parametrize(
    "settings, model, launched",
    [
        ({}, {"depth": 2, "experts_every_n": 0}, launch),
        ({"activation_checkpointing": "selective", "expert_parallel": 2}, LEVERS | {"depth": 3}, launch_without_cpp),
    ],
    ids=["inductor", "recomputed, experts over 2, levers"],
)
def test_compiled_blocks_keep_the_curve(tmp_path, settings, model, launched):
    """Dense blocks to machine code, which takes long; a dense one, one with experts and the first again to graphs."""
    few = model | {"use_patch_mixer": False, "qkv_ratio": (1.0, 1.0), "ffn_ratio": (2.0, 2.0)}
    recipe = write_recipe(tmp_path, **{**RECIPE, "model": few, "report": {}})
    processes = settings.get("expert_parallel", 1)
    for name, section in (("plain", {}), ("compiled", {**settings, "compile": True})):
        ds_json = write_ds_json(tmp_path / f"{name}.json", mdit=section)
        train(recipe, ds_json, tmp_path / name, processes=processes, launched=launched)
    assert_same_run(tmp_path / "compiled", tmp_path / "plain", keys=("loss", "gradient_norm"))


@pytest.mark.parametrize(
    "stage, settings",
    [(1, {}), (3, {}), (2, {"expert_parallel": 2}), (1, {"tensor_parallel": 2})],
)
def test_bf16_follows_float32(baseline, tmp_path, stage, settings):
    if "tensor_parallel" in settings:
        pytest.importorskip("megatron.core")
    recipe, expected = baseline
    ds_json = write_ds_json(tmp_path / "ds.json", stage=stage, micro_batch=4, bf16={"enabled": True}, mdit=settings)
    train(recipe, ds_json, tmp_path / "run", processes=2)
    for key in ("loss", "gradient_norm"):
        ours, theirs = read_metrics(tmp_path / "run", key), read_metrics(expected, key)
        assert ours == pytest.approx(theirs, rel=1e-2), key
        assert ours != pytest.approx(theirs, rel=1e-7), "bf16 was asked for and not used"
