"""The paper plan's formulas against what torch keeps, allocates and sends: activations, engines of two processes."""

import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdit.config import UserError, load_config
from mdit.costs.activations import Setting, kept_bytes, parts, peak_bytes
from mdit.costs.estimate import fitted, host_bytes, memory_moments, predict, predict_memory, predict_traffic
from mdit.costs.flops import training_flops
from mdit.costs.layouts import Layout, ZeroOptions, candidates, count_weights, layout_of
from mdit.costs.machines import HOOK_OF_A_PARAMETER, MACHINES, MEMORY_SHARE, TORCH_OP
from mdit.costs.time import PARTS, device_parts, forward_parts, host_seconds, product_seconds, step_parts
from mdit.costs.trace import Product
from mdit.diffusion.edm import draw, edm_loss
from mdit.kernels import dispatch
from mdit.models import MicroDiT, meta_model
from mdit.models.presets import tiny_2, xl_2
from mdit.parallel.recompute import recompute
from mdit.parallel.settings import RunSettings, load_ds_json, load_run_settings, resolve_ds_config
from tests.recipes import tiny_config
from tests.training import run_in_processes

H100 = MACHINES["h100"]
KINDS = [{}, {"use_patch_mixer": False}, {"mixer_dim": 32}, {"experts_every_n": 0}, {"capacity_factor": 1.5}]


class Watch(TorchDispatchMode):
    """Bytes of all storages that came up while it watched and are still there, their maximum, and what was sent."""

    def __init__(self, not_counting=()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.sent = 0.0
        self.known = {tensor.untyped_storage()._cdata for tensor in not_counting}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in RING:
            self.sent += ring_bytes(function.overloadpacket.__name__, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self.count(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def count(self, storage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
            weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


RING = {  # what each of n ranks sends for every byte of a collective's largest tensor
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
    "allgather_": lambda n: n - 1,  # its tensors are one rank's
}


def ring_bytes(op: str, arguments) -> float:
    leaves = tree_leaves(arguments)
    size = max(leaf.numel() * leaf.itemsize for leaf in leaves if isinstance(leaf, torch.Tensor))
    name = next((leaf for leaf in leaves if isinstance(leaf, str)), None)
    if name is not None:
        group = _resolve_process_group(name)
    else:
        group = next(ProcessGroup.unbox(leaf) for leaf in leaves if isinstance(leaf, torch.ScriptObject))
    return size * RING[op](group.size())


def one_pass(config, model, n=8, device="cpu", dtype=torch.float32):
    """The loss of n images, which holds all that its backward pass needs."""
    shape = config.model
    latents = torch.randn(n, shape.latent_channels, shape.latent_size, shape.latent_size, device=device)
    captions = torch.randn(n, shape.caption_length, shape.caption_channels, device=device, dtype=dtype)
    return edm_loss(model, latents, captions, draw(config, 0, slice(0, n), device), config.noise.sigma_data)


def saved_by_autograd(config, model, n=8) -> int:
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = one_pass(config, model, n)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_what_autograd_saves(changes, mask_ratio):
    config = tiny_config(model=changes, training={"mask_ratio": mask_ratio})
    found = saved_by_autograd(config, MicroDiT(config.model))
    assert kept_bytes(config.model, mask_ratio, Setting(8, itemsize=4)) == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("mode, mask_ratio", [("none", 0.0), ("none", 0.75), ("selective", 0.75), ("block", 0.0)])
def test_what_is_alive_between_forward_and_backward_and_at_most(mode, mask_ratio):
    config = tiny_config(training={"mask_ratio": mask_ratio, "global_batch_size": 32})
    model = MicroDiT(config.model)
    for block in (*model.patch_mixer, *model.blocks):
        recompute(block, mode)
    with Watch([*model.parameters(), *model.buffers()]) as watch:
        loss = one_pass(config, model, n=32)
        kept = watch.bytes
        loss.backward()
    setting = Setting(32, itemsize=4, checkpointing=mode)
    assert kept_bytes(config.model, mask_ratio, setting) == pytest.approx(kept, rel=0.03)
    assert peak_bytes(config.model, mask_ratio, setting) == pytest.approx(watch.peak, rel=0.1)


@pytest.mark.skipif(find_spec("triton") is None or not dispatch.interpreted(), reason="needs Triton's interpreter")
def test_what_autograd_saves_for_the_kernels():
    config = tiny_config(model={"head_dim": 16, "mixer_dim": 16, "depth": 2}, training={"global_batch_size": 1})
    model = MicroDiT(config.model)
    with dispatch.using(*dispatch.OPS, off_gpu=True):
        found = saved_by_autograd(config, model, n=1)
    assert kept_bytes(config.model, 0.75, Setting(1, itemsize=4, triton=True)) == pytest.approx(found, rel=0.03)


def test_recomputation_and_tensor_parallelism_need_less():
    sizes = [peak_bytes(xl_2(), 0.75, Setting(8, checkpointing=mode)) for mode in ("none", "selective", "block")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] / 4
    assert peak_bytes(tiny_2(), 0.75, Setting(8, tp=2)) < peak_bytes(tiny_2(), 0.75, Setting(8))
    assert all(part.kept >= 0 and part.work >= 0 for part in parts(xl_2(), 0.75, Setting(8, checkpointing="selective")))


# ---------------------------------------------------------------- engines of two processes

SHAPE = {"dim": 64, "mixer_dim": 32, "depth": 2, "mixer_depth": 2}
OPTIONS = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 1_000}
# (ZeRO stage, bfloat16?, is the optimizer in host memory?): each in two processes, which keep their groups.
CASES = {
    (1, 1): [(1, True), (2, True), (3, True), (1, False), (2, False), (3, False), (2, True, True), (2, False, True)],
    (2, 1): [(1, True), (2, True)],
    (1, 2): [(2, True)],
}


def layout_for(ep, tp, stage, bf16, offload=False) -> Layout:
    return Layout(2, stage, 8, 2, ep=ep, tp=tp, bf16=bf16, offload=offload, options=ZeroOptions(**OPTIONS))


def config_for(layout):
    return tiny_config(model=SHAPE, training={"global_batch_size": 16 * layout.data_size})


def measure_all(world, ep, tp) -> list[dict]:
    from mdit.parallel.plan import ParallelPlan

    plan = ParallelPlan.build(RunSettings(expert_parallel=ep, tensor_parallel=tp), world)
    return [measure(plan, layout_for(ep, tp, *case)) for case in CASES[ep, tp]]


def measure(plan, layout) -> dict:
    """Bytes of this rank in its second step of two micro-batches: held after the first, at most, sent."""
    from mdit.parallel.apply import parallelize
    from mdit.train.ema import EMA
    from mdit.train.engine import Engine

    config = config_for(layout)
    zero = {"stage": layout.stage, **OPTIONS}
    zero |= {"offload_optimizer": {"device": "cpu"}} if layout.offload else {}
    ds_json = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero, "bf16": {"enabled": layout.bf16}}
    ds_config = resolve_ds_config(ds_json, config, data_size=plan.data_size, bf16_works=True, path="test")
    with Watch() as watch:
        model = MicroDiT(config.model)
        parallelize(model, RunSettings(), plan)
        engine = Engine(model, config, ds_config, plan)
        del model
        ema = EMA(config.ema, engine.masters)
        for step in (1, 2):
            watch.peak = watch.sent = 0
            engine.backward_and_step(one_pass(config, engine))
            held = watch.bytes
            engine.backward_and_step(one_pass(config, engine))
            ema.update(step)
    return {"held": held, "peak": watch.peak, "sent": watch.sent}


@pytest.mark.parametrize("ep, tp", CASES)
def test_memory_and_traffic_of_engines(ep, tp):
    if tp > 1 and find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    measured, _ = run_in_processes(measure_all, 2, ep, tp)
    for case, found in zip(CASES[ep, tp], measured, strict=True):
        layout = layout_for(ep, tp, *case)
        config = config_for(layout)
        host = host_bytes(config, layout)  # a CPU is both
        assert host + sum(memory_moments(config, layout)["held"]) == pytest.approx(found["held"], rel=0.02), layout
        assert host + predict_memory(config, layout).peak == pytest.approx(found["peak"], rel=0.1), layout
        sent = sum(traffic.bytes for traffic in predict_traffic(config, layout))
        assert sent == pytest.approx(found["sent"], rel=0.001), layout


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """What torch reports of the second step of a small model, in bfloat16 under ZeRO-2."""
    from mdit import dist
    from mdit.parallel.plan import ParallelPlan
    from mdit.train.ema import EMA
    from mdit.train.engine import Engine

    n, bucket = 64, 20_000_000
    config = tiny_config(model=tiny_2().model_dump(), training={"global_batch_size": 2 * n})
    zero = {"stage": 2, "reduce_bucket_size": bucket}
    ds_json = {"train_micro_batch_size_per_gpu": n, "zero_optimization": zero}
    ds_config = resolve_ds_config(ds_json, config, data_size=1, bf16_works=True, path="test")
    world = dist.World(0, 1, 0, torch.device("cuda", 0))
    dist.start(world)
    try:
        before = torch.cuda.memory_allocated()
        engine = Engine(MicroDiT(config.model), config, ds_config, ParallelPlan(world))
        ema = EMA(config.ema, engine.masters)
        with dispatch.using():
            for step in (1, 2):
                torch.cuda.reset_peak_memory_stats()
                for _ in range(2):
                    engine.backward_and_step(one_pass(config, engine, n, "cuda", torch.bfloat16))
                ema.update(step)
        found = torch.cuda.max_memory_allocated() - before
    finally:
        torch.distributed.destroy_process_group()
    layout = Layout(1, 2, n, 2, options=ZeroOptions(reduce_bucket_size=bucket))
    assert predict_memory(config, layout).peak == pytest.approx(found, rel=0.1)


# ---------------------------------------------------------------- by hand

XL = tiny_config(model=xl_2().model_dump(), training={"global_batch_size": 2048}, ema=None)
P, E = 1.1653e9, 0.6040e9  # parameters, and those of experts


def test_weights_are_counted_by_what_cuts_them():
    weights = count_weights(XL.model)
    assert weights.experts == pytest.approx(E, rel=1e-3)
    assert sum((weights.experts, weights.matrices, weights.others)) == pytest.approx(P, rel=1e-3)
    one, (numbers, ranks, stride) = weights.groups(Layout(64, 2, 32, 1, ep=8))
    assert (numbers, ranks, stride) == (weights.experts // 8, 8, 8) and one[1:] == (64, 1)
    ((numbers, ranks, stride),) = weights.groups(Layout(64, 2, 64, 1, tp=2))
    assert numbers == weights.experts + weights.others + weights.matrices // 2 and (ranks, stride) == (32, 2)


@pytest.mark.parametrize(
    "stage, ep, held",  # bytes a parameter, over 8 GPUs, while micro-batches accumulate
    [
        (1, 1, P * (2 + 4) + P * 12 / 8),
        (2, 1, P * 2 + P * (4 + 12) / 8),
        (1, 4, (P - E + E / 4) * 6 + (P - E) * 12 / 8 + E / 4 * 12 / 2),
        (2, 4, (P - E + E / 4) * 2 + (P - E) * 16 / 8 + E / 4 * 16 / 2),
    ],
)
def test_states_of_xl_2(stage, ep, held):
    moments = memory_moments(XL, Layout(8, stage, 64, 4, ep=ep))
    assert sum(moments["held"]) == pytest.approx(held, rel=1e-3)
    with_ema = memory_moments(tiny_config(**{**XL.model_dump(exclude={"ema"})}), Layout(8, stage, 64, 4, ep=ep))
    assert with_ema["held"].optimizer == pytest.approx(moments["held"].optimizer * 16 / 12)


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


PROFILE = Path(__file__).resolve().parents[2] / "configs/zero2_24gb.json"


@pytest.mark.parametrize("stage", ["256_pretrain", "256_finetune", "512_pretrain", "512_finetune"])
def test_xl_2_trains_on_one_gpu_of_24_gb(stage):
    config = load_config(PROFILE.with_name(f"res_{stage}.toml"))
    ds_json, small = load_ds_json(PROFILE), MACHINES["rtx4090"]
    layout = layout_of(ds_json, load_run_settings(ds_json, PROFILE), config, 1, triton=False, path=PROFILE)
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


def test_a_micro_batch_costs_what_was_predicted_by_hand():
    """118 ms of matmuls, 28 of attention and 47 of all else at 256 images, on an H100 (docs/log.md)."""
    layout = Layout(8, 2, 256, 1, triton=True)
    parts = device_parts(XL, layout, H100)
    assert parts.keys() < PARTS.keys() and parts["matmuls"] < 0.125
    assert 0.015 < parts["masked_attention"] < 0.030
    others = ("patch_mixing", "expert_choice", "swiglu", "pytorch")
    assert 0.030 < sum(parts[name] for name in others) < 0.050
    in_pytorch = device_parts(XL, replace(layout, triton=False), H100)
    assert all(in_pytorch[name] > 1.1 * parts[name] for name in ("patch_mixing", "masked_attention", "swiglu"))
    assert in_pytorch["matmuls"] == parts["matmuls"]
    flops = forward_parts(XL.model, 0.75)
    assert 3 * sum(flops) == training_flops(XL.model, 0.75)
    assert parts["matmuls"] > 3 * 256 * (flops.whole + flops.cut) / (0.7 * H100.peak)
    halves = device_parts(XL, replace(layout, tp=2), H100)
    assert halves["matmuls"] == pytest.approx(
        parts["matmuls"] * (flops.whole + flops.cut / 2) / (flops.whole + flops.cut)
    )


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
    plain = device_parts(XL, layout, H100)
    selective, block = (device_parts(XL, replace(layout, checkpointing=mode), H100) for mode in ("selective", "block"))
    assert selective["matmuls"] == plain["matmuls"] and selective["patch_mixing"] > 1.2 * plain["patch_mixing"]
    assert block["matmuls"] == pytest.approx(4 / 3 * plain["matmuls"], rel=0.02)
    fp8 = device_parts(XL, replace(layout, fp8=True), H100)
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


def test_the_host_is_asked_for_launches_operations_and_hooks():
    layout = Layout(8, 1, 256, 1, triton=True)
    weights = sum(1 for p in meta_model(tiny_2()).parameters())
    config = tiny_config(model=tiny_2().model_dump())
    found = [host_seconds(config, replace(layout, stage=stage)) for stage in (1, 2)]
    hooks = HOOK_OF_A_PARAMETER[2] - HOOK_OF_A_PARAMETER[1]
    assert found[1] - found[0] == pytest.approx(weights * hooks)
    assert host_seconds(config, replace(layout, checkpointing="block")) > 1.2 * found[0]
    assert host_seconds(config, replace(layout, micro_batch=2)) == found[0] > 1000 * TORCH_OP


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
        ({"stage": 2}, {"expert_parallel": 16}, "groups of 16 do not divide 8 GPUs"),
        ({"stage": 2}, {"tensor_parallel": 4}, "does not divide the 10 heads of blocks.1.attn"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, {}, "offload_optimizer at stage 2 only"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, {}, "offload_param = .* offload_optimizer at stage 2 only"),
        ({"stage": 5}, {}, "stage = 5: .* less than or equal to 3"),
    ],
)
def test_a_json_that_cannot_be_planned_is_named(zero, settings, message):
    with pytest.raises(UserError, match=message) as raised:
        layout_of({"zero_optimization": zero}, RunSettings(**settings), XL, 8, triton=True, path="ds.json")
    assert str(raised.value).startswith("ds.json: ") and "\n" not in str(raised.value)


def test_a_json_decides_what_memory_depends_on():
    ds_json = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True}}
    ds_json["train_micro_batch_size_per_gpu"] = 64
    settings = RunSettings(expert_parallel=4, activation_checkpointing="block")
    layout = layout_of(ds_json, settings, XL, 16, triton=True, path="ds.json")
    expected = Layout(16, 2, 64, 2, ep=4, checkpointing="block", triton=True)
    assert layout == replace(expected, options=ZeroOptions(overlap_comm=True, reduce_bucket_size=50_000_000))
