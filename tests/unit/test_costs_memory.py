"""mdit/costs/memory.py and traffic.py against what torch keeps, allocates and sends, in engines of two processes."""

import weakref
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mdit.costs.layouts import Layout
from mdit.costs.memory import host_bytes, memory_moments, predict_memory
from mdit.costs.trace import Form, trace
from mdit.costs.traffic import predict_traffic
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.dist import World
from mdit.kernels import dispatch
from mdit.models import MicroDiT
from mdit.models.presets import tiny_2
from mdit.parallel import muon
from mdit.parallel.apply import parallelize
from mdit.parallel.plan import ParallelPlan
from mdit.parallel.settings import Execution, RunSettings, ZeroOptions
from tests.recipes import LEVERS, tiny_config
from tests.training import run_in_processes

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="counts the launches of Triton kernels")


class Storages(TorchDispatchMode):
    """Bytes of all storages that came up while it watched and are still there, their maximum, and what was sent."""

    def __init__(self, not_counting=()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.sent = 0.0
        self.known = {tensor.untyped_storage()._cdata for tensor in not_counting}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in (*RING, "alltoall_base_"):
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
    if op == "alltoall_base_":  # to others alone
        return arguments[1].numel() * arguments[1].itemsize
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
    return edm_loss(model, latents, captions, sample_noise(config, 0, slice(0, n), device), config.noise)


def model_of(config, mode="none"):
    model = MicroDiT(config.model)
    alone = ParallelPlan(World(0, 1, 0, torch.device("cpu")))
    parallelize(model, RunSettings(activation_checkpointing=mode), alone)
    return model


@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_patch_mixer": False}, {"mixer_dim": 32}, {"experts_every_n": 0}, {"capacity_factor": 1.5}, LEVERS],
    ids=str,
)
def test_what_autograd_keeps(changes, mask_ratio):
    config = tiny_config(model=changes, training={"mask_ratio": mask_ratio, "global_batch_size": 8})
    assert kept(config, Form(triton=False, dtype=torch.float32)) == pytest.approx(saved(config), rel=0.03)


@with_triton
@pytest.mark.skipif(not dispatch.interpreted(), reason="needs Triton's interpreter")
def test_what_autograd_keeps_for_the_kernels():
    changes = {"head_dim": 16, "mixer_dim": 16, "depth": 2}
    config = tiny_config(model=changes, training={"global_batch_size": 1})
    with dispatch.using(*(op for op in dispatch.OPS if op != dispatch.FP8), off_gpu=True):
        found = saved(config)
    assert kept(config, Form(dtype=torch.float32)) == pytest.approx(found, rel=0.03)


def kept(config, form):
    return trace(config.model, config.training.mask_ratio, form).kept.of(config.training.global_batch_size)


def saved(config) -> int:
    model = model_of(config)
    known = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = one_pass(config, model, config.training.global_batch_size)
    assert loss.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("mode, mask_ratio", [("none", 0.0), ("none", 0.75), ("selective", 0.75), ("block", 0.0)])
def test_what_is_alive_between_forward_and_backward_and_at_most(mode, mask_ratio):
    config = tiny_config(training={"mask_ratio": mask_ratio, "global_batch_size": 32})
    model = model_of(config, mode)
    with Storages([*model.parameters(), *model.buffers()]) as alive:
        loss = one_pass(config, model, n=32)
        between = alive.bytes
        loss.backward()
    form = Form(triton=False, checkpointing=mode, dtype=torch.float32)
    assert kept(config, form) == pytest.approx(between, rel=0.03)
    assert trace(config.model, mask_ratio, form).peak.of(32) == pytest.approx(alive.peak, rel=0.1)


@with_triton
def test_recomputation_and_tensor_parallelism_need_less():
    sizes = [trace(tiny_2(), 0.75, Form(checkpointing=mode)).peak.of(8) for mode in ("none", "selective", "block")]
    assert sizes == sorted(sizes, reverse=True) and sizes[2] < sizes[0] / 3
    whole, part = (trace(tiny_2(), 0.75, Form(tp=tp)) for tp in (1, 2))
    assert part.peak.of(8) < whole.peak.of(8)
    flops = [sum(count * k.product.flops for k, count in t.at(8).items() if k.product) for t in (whole, part)]
    assert 0.5 * flops[0] < flops[1] < 0.7 * flops[0]  # experts and embeddings are whole on every rank


# ---------------------------------------------------------------- engines of two processes

SHAPE = {"dim": 64, "mixer_dim": 32, "depth": 2, "mixer_depth": 2}
OPTIONS = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 1_000}
# (ZeRO stage, "host": optimizer in host memory, "muon"): each in two processes, which keep their groups.
CASES = {
    (1, 1): [(1, ""), (2, ""), (3, ""), (2, "host"), (1, "muon"), (3, "muon")],
    (2, 1): [(1, ""), (2, ""), (2, "muon")],
    (1, 2): [(2, "")],
}


def layout_for(ep, tp, stage, how) -> Layout:
    return Layout(2, stage, 8, 2, ep=ep, tp=tp, offload=how == "host", options=ZeroOptions(**OPTIONS))


def config_for(layout, how):
    optim = {"name": "muon", "muon": {"lr": 0.02, "weight_decay": 0.1}} if how == "muon" else {}
    averages = {"every": 1} if how == "muon" else None
    return tiny_config(
        model=SHAPE, training={"global_batch_size": 16 * layout.data_size}, optim=optim, averages=averages
    )


def measure_all(world, ep, tp) -> list[dict]:
    from mdit.parallel.plan import ParallelPlan

    plan = ParallelPlan.build(RunSettings(expert_parallel=ep, tensor_parallel=tp), world)
    with mock.patch.object(muon, "compute_dtype", lambda device: torch.bfloat16):  # as on GPUs
        return [measure(plan, layout_for(ep, tp, *case), case[1]) for case in CASES[ep, tp]]


def measure(plan, layout, how) -> dict:
    """Bytes of this rank in its second step of two micro-batches: held after the first, at most, sent."""
    from mdit.parallel.apply import parallelize
    from mdit.train.ema import EMA
    from mdit.train.engine import Engine

    config = config_for(layout, how)
    zero = {"stage": layout.stage, **OPTIONS}
    zero |= {"offload_optimizer": {"device": "cpu"}} if layout.offload else {}
    ds_json = {"train_micro_batch_size_per_gpu": 8, "zero_optimization": zero, "bf16": {"enabled": True}}
    ds_json |= {"mdit": {"tensor_parallel": plan.tensor_parallel}}
    execution = Execution.resolve(ds_json, config, processes=plan.world.size, bf16_works=True, path="test")
    with Storages() as watch:
        model = MicroDiT(config.model)
        parallelize(model, RunSettings(), plan)
        engine = Engine(model, config, execution, plan)
        del model
        ema = EMA(config.ema, engine.master_weights, config.averages)
        for step in (1, 2):
            watch.peak = watch.sent = 0
            engine.backward(one_pass(config, engine))
            held = watch.bytes
            engine.backward(one_pass(config, engine))
            engine.step()
            ema.update(step)
    return {"held": held, "peak": watch.peak, "sent": watch.sent}


@pytest.mark.parametrize("ep, tp", CASES)
def test_memory_and_traffic_of_engines(ep, tp):
    if tp > 1 and find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    measured, _ = run_in_processes(measure_all, 2, ep, tp)
    for case, found in zip(CASES[ep, tp], measured, strict=True):
        layout = layout_for(ep, tp, *case)
        config = config_for(layout, case[1])
        host = host_bytes(config, layout)  # a CPU is both
        assert host + sum(memory_moments(config, layout)["held"]) == pytest.approx(found["held"], rel=0.02), layout
        assert host + predict_memory(config, layout).peak == pytest.approx(found["peak"], rel=0.1), layout
        sent = sum(traffic.bytes for traffic in predict_traffic(config, layout))
        assert sent == pytest.approx(found["sent"], rel=0.001), layout


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """Peak that torch reports of the second step of a small model, in bfloat16 under ZeRO-2."""
    from mdit import dist, meeting
    from mdit.parallel.plan import ParallelPlan
    from mdit.train.ema import EMA
    from mdit.train.engine import Engine

    n, bucket = 64, 20_000_000
    config = tiny_config(model=tiny_2().model_dump(), training={"global_batch_size": 2 * n})
    zero = {"stage": 2, "reduce_bucket_size": bucket}
    ds_json = {"train_micro_batch_size_per_gpu": n, "zero_optimization": zero}
    execution = Execution.resolve(ds_json, config, processes=1, bf16_works=True, path="test")
    world = dist.World(0, 1, 0, torch.device("cuda", 0))
    meeting.init_distributed(world)
    try:
        before = torch.cuda.memory_allocated()
        engine = Engine(model_of(config), config, execution, ParallelPlan(world))
        ema = EMA(config.ema, engine.master_weights, config.averages)
        with dispatch.using():
            for step in (1, 2):
                torch.cuda.reset_peak_memory_stats()
                for _ in range(2):
                    engine.backward(one_pass(config, engine, n, "cuda", torch.bfloat16))
                engine.step()
                ema.update(step)
        found = torch.cuda.max_memory_allocated() - before
    finally:
        torch.distributed.destroy_process_group()
    layout = Layout(1, 2, n, 2, options=ZeroOptions(reduce_bucket_size=bucket))
    assert predict_memory(config, layout).peak == pytest.approx(found, rel=0.1)
