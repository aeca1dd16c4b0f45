"""The paper plan: traffic, time, layouts and whole predictions, against figures by hand."""

from dataclasses import replace
from itertools import accumulate

import pytest

from mdit.config import CONFIGS, UserError, load_config
from mdit.costs.flops import image_flops, run_flops
from mdit.costs.layouts import Layout, candidates, count_weights, layout_of
from mdit.costs.machines import MACHINES, MEMORY_SHARE
from mdit.costs.memory import predict_memory
from mdit.costs.muon import orthogonalisation_flops
from mdit.costs.prediction import fitted, predict
from mdit.costs.time import PARTS, device_parts, host_seconds, product_seconds, step_parts
from mdit.costs.trace import Product, forward_flops, mean_training_flops
from mdit.costs.traffic import predict_traffic
from mdit.masking import mask_ratio
from mdit.models import meta_model
from mdit.models.presets import xl_2
from mdit.parallel.muon import takes_muon
from mdit.parallel.settings import Execution, ZeroOptions, load_ds_json
from tests.recipes import tiny_config

H100 = MACHINES["h100"]

XL = tiny_config(model=xl_2().model_dump(), training={"global_batch_size": 2048}, ema=None)
P, E = 1.1653e9, 0.6040e9  # parameters, and those of experts


def test_weights_are_counted_by_what_cuts_them():
    weights = count_weights(XL)
    assert weights.experts == pytest.approx(E, rel=1e-3)
    assert sum((weights.experts, weights.matrices, weights.others)) == pytest.approx(P, rel=1e-3)
    one, (numbers, ranks, stride) = weights.groups(Layout(64, 2, 32, 1, ep=8))
    assert (numbers, ranks, stride) == (weights.experts // 8, 8, 8) and one[1:] == (64, 1)
    ((numbers, ranks, stride),) = weights.groups(Layout(64, 2, 64, 1, tp=2))
    assert numbers == weights.experts + weights.others + weights.matrices // 2 and (ranks, stride) == (32, 2)


def test_zero_3_gathers_what_is_used_again_soon():
    memory = predict_memory(XL, Layout(64, 3, 32, 1))
    assert memory.weights == pytest.approx(2 * (P / 64 + 0.5e9 + 0.05e9), rel=0.01)
    small = ZeroOptions(stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0)
    assert predict_memory(XL, Layout(64, 3, 32, 1, options=small)).weights == pytest.approx(2 * P / 64, rel=0.04)


def by_purpose(layout):
    sums = {}
    for traffic in predict_traffic(XL, layout):
        sums[traffic.purpose] = sums.get(traffic.purpose, 0) + traffic.bytes
    return sums


def test_traffic_of_xl_2():
    share = 63 / 64
    assert by_purpose(Layout(64, 1, 16, 2)) == pytest.approx(
        {"gradients": 4 * P * share, "weights": 2 * P * share}, 1e-3
    )
    assert by_purpose(Layout(64, 2, 16, 2))["gradients"] == pytest.approx(8 * P * share, 1e-3)  # in every micro-batch
    reduced = ZeroOptions(use_multi_rank_bucket_allreduce=False)
    assert by_purpose(Layout(64, 2, 16, 2, options=reduced))["gradients"] == pytest.approx(4 * P * share, 1e-3)
    cut = by_purpose(Layout(64, 1, 32, 1, ep=8))
    assert cut["gradients"] == pytest.approx(4 * ((P - E) * share + E / 8 * 7 / 8), 1e-3)
    # Three layers of the mixer see 256 tokens of 768, thirteen of the backbone 64 of 1024, each in two experts.
    chosen, numbers = 2 * (3 * 256 + 13 * 64), 2 * (3 * 256 * 768 + 13 * 64 * 1024)
    assert cut["experts"] == pytest.approx(32 * 2 * (2 * 2 * numbers + 4 * chosen) * 7 / 8)
    assert by_purpose(Layout(8, 2, 256, 1, tp=1)).keys() == {"gradients", "weights"}
    assert by_purpose(Layout(1, 2, 256, 8)) == {}
    again = by_purpose(Layout(64, 1, 32, 1, ep=8, checkpointing="block"))
    assert again["experts"] == pytest.approx(1.5 * cut["experts"])


def test_rings_leave_a_node_with_one_step_in_eight():
    inside, across = H100.share_on_network(8), H100.share_on_network(16)
    assert (inside, across) == (0, 1 / 8)
    assert H100.share_on_network(32, stride=2) == 1 / 4 and H100.share_on_network(8, stride=8) == 1
    assert H100.share_on_network(4, stride=2) == 0 and H100.share_on_network(8, stride=2) == 1 / 4


PROFILE = CONFIGS / "zero2_24gb.json"


def layout_in(ds_json: dict, config, gpus: int, *, triton: bool = True) -> Layout:
    execution = Execution.resolve(ds_json, config, processes=gpus, bf16_works=True, path="ds.json")
    return layout_of(execution, config, gpus, triton=triton, path="ds.json")


@pytest.mark.parametrize("stage", ["256_pretrain", "512_finetune"])  # the smallest and the largest
def test_xl_2_trains_on_one_gpu_of_24_gb(stage):
    config = load_config(PROFILE.with_name(f"res_{stage}.toml"))
    small, layout = MACHINES["rtx4090"], layout_in(load_ds_json(PROFILE), config, 1, triton=False)
    assert layout.offload and layout.label == "ZeRO-2 dp1 host"
    found, inside = predict(config, layout, small), predict(config, replace(layout, offload=False), small)
    assert found.fits and found.memory.peak < 14 * 2**30 and not inside.fits
    assert found.memory.optimizer == 0 and inside.host_bytes == 0
    each = 4 + 8 + 4 + 2 + (4 if config.ema else 0)  # masters, moments, gradients, new weights; averages
    assert found.host_bytes == pytest.approx(each * P, rel=0.01)
    # By hand: gradients in float32 and new weights over PCIe; then what the CPU reads and writes for every number.
    waited = P * ((4 + 2) / 12e9 + (4 + 2 + 8 + 28 + 4 + 2 + (12 if config.ema else 0)) / 40e9)
    gpu_time = P * (20 - 46 - (12 if config.ema else 0)) / (small.memory * MEMORY_SHARE)
    assert found.compute_seconds - inside.compute_seconds == pytest.approx(waited + gpu_time, rel=1e-3)


def parts_of(layout):
    return device_parts(XL.model, 0.75, layout.form, layout.micro_batch, H100)


def test_a_micro_batch_costs_what_was_predicted_by_hand():
    """118 ms of matmuls, 28 of attention and 47 of all else at 256 images, on an H100 (docs/log.md)."""
    layout = Layout(8, 2, 256, 1, triton=True)
    parts = parts_of(layout)
    assert parts.keys() < PARTS.keys() and parts["matmuls"] < 0.125
    assert 0.015 < parts["masked_attention"] < 0.030
    others = ("patch_mixing", "expert_choice", "swiglu", "pytorch")
    assert 0.030 < sum(parts[name] for name in others) < 0.050
    in_pytorch = parts_of(replace(layout, triton=False))
    assert in_pytorch.keys() == {"matmuls", "masked_attention", "pytorch"}
    assert in_pytorch["matmuls"] == pytest.approx(parts["matmuls"], rel=0.01)
    assert in_pytorch["pytorch"] > 1.5 * sum(parts[name] for name in others)
    matmuls = 3 * 256 * forward_flops(XL.model, 0.75)["matmuls"]
    assert parts["matmuls"] > matmuls / (0.7 * H100.peak)
    halves = parts_of(replace(layout, tp=2))
    assert 0.5 < halves["matmuls"] / parts["matmuls"] < 0.7  # experts and embeddings are whole on every rank


def test_a_large_product_is_as_fast_as_its_waves_allow():
    def rate(*sizes, itemsize=2):
        product = Product(1, *sizes, itemsize)
        return product.flops / product_seconds(product, H100)

    assert 600e12 < rate(8192, 8192, 8192) < 720e12
    assert rate(8192, 8192, 8192, itemsize=1) > 1.5 * rate(8192, 8192, 8192)
    assert rate(264 * 128, 256, 256) < rate(264 * 128, 256, 1024) < rate(264 * 128, 256, 8192)  # starts and ends
    assert rate(133 * 128, 256, 4096) < 0.85 * rate(132 * 128, 256, 4096)  # one tile more, and a second wave for it
    assert rate(1024, 1024, 65536) > 0.5 * rate(8192, 8192, 8192)  # few tiles: the sum is split
    reading = 2 * 1000 * 100_000 / (H100.memory * MEMORY_SHARE)
    assert product_seconds(Product(1, 1, 1000, 100_000, 2), H100) == pytest.approx(reading, rel=0.1)


def test_recomputation_and_float8_change_what_they_should():
    layout = Layout(8, 2, 256, 1, triton=True)
    plain = parts_of(layout)
    selective, block = (parts_of(replace(layout, checkpointing=mode)) for mode in ("selective", "block"))
    assert selective["matmuls"] == plain["matmuls"] and selective["patch_mixing"] > 1.2 * plain["patch_mixing"]
    assert block["matmuls"] == pytest.approx(4 / 3 * plain["matmuls"], rel=0.02)
    fp8 = parts_of(replace(layout, fp8=True))
    assert fp8["matmuls"] < 0.85 * plain["matmuls"] and fp8["fp8_linear"] > 0
    assert fp8["masked_attention"] == pytest.approx(plain["masked_attention"], rel=0.05)


def test_small_micro_batches_wait_for_the_host_and_for_the_weights():
    small, large = Layout(1024, 2, 2, 1, triton=True), Layout(8, 2, 256, 1, triton=True)
    parts, host = step_parts(XL, small, H100), host_seconds(XL, small)
    assert sum(parts.values()) - parts["optimizer"] == pytest.approx(host) and parts["host"] > 0.5 * host
    assert step_parts(XL, large, H100)["host"] == 0
    reading = 3 * 2 * P / (H100.memory * MEMORY_SHARE)
    assert reading < parts["matmuls"] < 3 * reading  # and a thousand starts
    one, thousand = predict(XL, large, H100), predict(XL, small, H100)
    assert thousand.host_bound and not one.host_bound
    assert thousand.images_per_second / 1024 < 0.1 * one.images_per_second / 8


def test_communication_is_hidden_where_deepspeed_overlaps_it():
    plain = predict(XL, Layout(64, 2, 32, 1, triton=True), H100)
    overlapped = predict(XL, Layout(64, 2, 32, 1, triton=True, options=ZeroOptions(overlap_comm=True)), H100)
    assert 0 <= overlapped.exposed_seconds < plain.exposed_seconds
    assert plain.efficiency == pytest.approx(plain.compute_seconds / plain.step_seconds)
    assert plain.dollars_per_million_images(3.6) == pytest.approx(1e6 * plain.step_seconds / 2048 * 64 * 1e-3)
    assert not Layout(
        64, 1, 32, 1, options=ZeroOptions(overlap_comm=True)
    ).overlapped  # BF16_Optimizer has no such thing
    assert Layout(64, 3, 32, 1).overlapped


def test_a_smaller_gpu_gets_a_smaller_micro_batch():
    small = MACHINES["rtx4090"]
    layout = Layout(8, 2, 256, 1)
    found = fitted(XL, layout, small)
    assert not predict_memory(XL, layout).fits(small) and predict_memory(XL, found).fits(small)
    assert found.micro_batch * found.accumulation == 256 and found.reduced and found.micro_batch < 256
    next_one = replace(found, micro_batch=found.micro_batch * 2, accumulation=found.accumulation // 2)
    assert not predict_memory(XL, next_one).fits(small)
    assert fitted(XL, layout, H100) == layout


def test_candidates_are_the_layouts_that_can_be():
    def labels(gpus, **options):
        asked = {"micro_batch": None, "checkpointing": "none", "triton": False, **options}
        return [layout.label for layout in candidates(XL, gpus, **asked)]

    plain = ["ZeRO-1 dp8", "ZeRO-1 dp8 ep2", "ZeRO-1 dp8 ep4", "ZeRO-1 dp8 ep8", "ZeRO-1 dp4 tp2"]
    assert labels(8) == [*plain, *(label.replace("ZeRO-1", "ZeRO-2") for label in plain), "ZeRO-3 dp8"]
    stages = [[f"ZeRO-{stage} dp2", f"ZeRO-{stage} dp2 ep2", f"ZeRO-{stage} dp1 tp2"] for stage in (1, 2)]
    assert labels(2) == [*stages[0], *stages[1], "ZeRO-3 dp2"]
    with pytest.raises(UserError, match="2048 .* cannot be shared evenly by 24"):
        labels(24)
    with pytest.raises(UserError, match="train_micro_batch_size_per_gpu = 1024 does not divide the 256"):
        labels(8, micro_batch=1024)
    assert labels(4, micro_batch=1024) == ["ZeRO-1 dp2 tp2", "ZeRO-2 dp2 tp2"]


@pytest.mark.parametrize(
    "zero, settings, message",
    [
        ({"stage": 3}, {"expert_parallel": 2}, "zero_optimization.stage = 3: expected stage 1 or 2"),
        ({"stage": 2}, {"expert_parallel": 2, "tensor_parallel": 2}, "one of them has to be 1"),
        ({"stage": 2}, {"expert_parallel": 16}, "expert_parallel = 16 does not divide the 8 processes"),
        ({"stage": 2}, {"tensor_parallel": 4}, "does not divide the 10 heads of blocks.1.attn"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer at stage 2 only"),
        (
            {"stage": 3, "offload_param": {"device": "cpu"}},
            {},
            "offload_param.device = 'cpu': .* offload_optimizer at stage 2 only",
        ),
        ({"stage": 5}, {}, "stage = 5: .* less than or equal to 3"),
    ],
)
def test_a_json_that_cannot_be_planned_is_named(zero, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        layout_in({"zero_optimization": zero, "mdit": settings}, XL, 8)
    assert str(raised.value).startswith("ds.json: ") and "\n" not in str(raised.value)


def test_a_json_decides_what_memory_depends_on():
    ds_json = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True}}
    ds_json |= {"train_micro_batch_size_per_gpu": 64}
    layout = layout_in(ds_json | {"mdit": {"expert_parallel": 4, "activation_checkpointing": "block"}}, XL, 16)
    expected = Layout(16, 2, 64, 2, ep=4, checkpointing="block", triton=True)
    assert layout == replace(expected, options=ZeroOptions(overlap_comm=True, reduce_bucket_size=50_000_000))


def test_a_schedule_of_masks_costs_the_mean_of_its_steps_and_the_memory_of_the_largest():
    mask = {"schedule": "linear", "start": 0.75, "final": 0.0, "share": 0.25, "levels": 1}
    masked, whole, mixed = (tiny_config(training={"mask_ratio": ratio}) for ratio in (0.75, 0.0, mask))
    layout = Layout(2, 1, 4, 1)
    found, *each = (predict(config, layout, H100) for config in (mixed, masked, whole))
    assert found.step_seconds == pytest.approx(0.75 * each[0].step_seconds + 0.25 * each[1].step_seconds)
    assert found.memory == each[1].memory and found.memory.activations > each[0].memory.activations
    counted = [mask_ratio(mixed, step) for step in range(mixed.training.num_steps)]
    expected = [image_flops(mixed.model, ratio) * mixed.training.global_batch_size for ratio in counted]
    assert [run_flops(mixed, steps) for steps in range(len(counted) + 1)] == [*accumulate(expected, initial=0)]
    flops = [mean_training_flops(config) for config in (mixed, masked, whole)]
    assert flops[0] == pytest.approx(0.75 * flops[1] + 0.25 * flops[2])


MUON = tiny_config(
    model=xl_2().model_dump(),
    training={"global_batch_size": 2048},
    optim={"name": "muon", "muon": {"lr": 0.02, "weight_decay": 0.1}},
    ema=None,
)


@pytest.mark.parametrize("layout", [Layout(1, 1, 256, 8), Layout(8, 2, 256, 1), Layout(8, 2, 256, 1, ep=8)], ids=str)
def test_muon_costs_less_than_a_twentieth_of_a_step_of_2_048_images(layout):
    ours, theirs = (predict(config, layout, H100) for config in (MUON, XL))
    assert 0 < ours.muon_seconds < 0.05 * ours.step_seconds and ours.step_seconds < 1.05 * theirs.step_seconds
    moments = (theirs.memory.optimizer - ours.memory.optimizer) / 4 * layout.gpus
    flat = sum(p.numel() for name, p in meta_model(MUON.model).named_parameters() if takes_muon(name, p.shape))
    assert moments == pytest.approx(flat, rel=1e-3)
    # Five iterations of two products of 2 * short FLOPs a number, one of at most half as much; short is up to 1,024.
    most = 5 * flat * (2 * 2 * 1024 + 2 * 1024)
    assert 0.6 * most < layout.gpus * orthogonalisation_flops(MUON, layout) < 1.2 * most


def test_a_plan_leaves_out_what_muon_refuses():
    labels = [layout.label for layout in candidates(MUON, 8, micro_batch=64, checkpointing="none", triton=True)]
    assert "ZeRO-1 dp8" in labels and not any("tp" in label for label in labels)
