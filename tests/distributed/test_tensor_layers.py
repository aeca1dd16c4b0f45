"""Models cut over tensor ranks against whole ones: values and gradients, the norm over parts, steps under DeepSpeed."""

import copy
from importlib.util import find_spec

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor

from mdit.config import ModelConfig
from mdit.diffusion.edm import edm_loss, sample_noise
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from mdit.parallel.fuse import fuse
from mdit.parallel.shard import gather_whole, shard_of
from tests.recipes import LEVERS, tiny_config, tiny_model
from tests.training import run_in_processes

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)

EVEN = {"mixer_dim": 16, "depth": 2}  # two heads in the mixer; every kind of block is still there
STEPS = 10
# With the recipe's eps of 1e-8 Adam divides rounding by rounding where gradients are near zero: weights to 2e-5 only.
CONFIG = tiny_config(model=EVEN, training={"global_batch_size": 4}, optim={"eps": 1e-5})


def open_model(config: ModelConfig) -> MicroDiT:
    """Drawn, also where a model starts from zeros: gates, biases and an output that would hide what is behind them."""
    torch.manual_seed(0)
    model = fuse(MicroDiT(config))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def replicas_apart(model: MicroDiT, get=lambda parameter: parameter.detach()) -> float:
    """The largest difference over all ranks in what every one of them holds whole."""
    ours = torch.cat([get(p).flatten() for p in model.parameters() if shard_of(p).count == 1])
    everyones = [torch.empty_like(ours) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(everyones, ours)
    return max(float((other - ours).abs().max()) for other in everyones)


def cut_and_compare(world) -> list[dict]:
    from mdit.parallel import tensor

    group, _ = tensor.start(world.size)
    return [compare(tensor, group, **changes) for changes in ({}, {"use_bias": True, **LEVERS})]


def compare(tensor, group, **changes) -> dict:
    whole = open_model(tiny_model(**EVEN, **changes)).double()
    cut = copy.deepcopy(whole)
    tensor.shard_blocks(cut, group)
    shapes = (3, 4, 8, 8), (3,), (3, 5, 12), (3, 4, 8, 8)
    x, c_noise, captions, cotangent = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    mask = sample_mask(torch.rand(3, 16), 0.5)
    outputs = [model(x, c_noise, captions, mask=mask) for model in (whole, cut)]
    for output in outputs:
        output.backward(cotangent)
    ours, theirs = (dict(model.named_parameters()) for model in (cut, whole))
    return {
        "names": list(ours) == list(theirs),
        "cut": {name for name, p in ours.items() if p.shape != theirs[name].shape},
        "weights": all(gather_whole(p.detach(), p).equal(theirs[name]) for name, p in ours.items()),
        "output": difference(outputs[1], outputs[0]),
        "gradients": {name: difference(gather_whole(p.grad, p), theirs[name].grad) for name, p in ours.items()},
        "replicas": replicas_apart(cut, lambda parameter: parameter.grad),
    }


def test_a_cut_model_computes_what_the_whole_one_does():
    for by_rank in run_in_processes(cut_and_compare, 2):
        for found in by_rank:
            assert found["names"] and found["weights"]
            assert found["output"] < 1e-13
            assert {name: value for name, value in found["gradients"].items() if value > 1e-11} == {}
            assert found["replicas"] == 0
        without_bias, with_bias = (found["cut"] for found in by_rank)
        assert "blocks.1.mlp.w3.weight" in without_bias and "patch_mixer.1.mlp.w1" not in without_bias
        assert {"y_emb_preprocess.attn.qkv.bias", "blocks.0.cross_attn.kv_linear.bias"} <= with_bias - without_bias
        assert "blocks.0.attn.proj.bias" not in with_bias


def norm_of_parts(world, x_NTA: Tensor, cotangent_NTA: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from mdit.parallel import tensor

    group, _ = tensor.start(world.size)
    x = x_NTA.chunk(world.size, -1)[world.rank].requires_grad_()
    y = tensor.FullWidthNorm.apply(x, eps, group)
    (gradient,) = torch.autograd.grad(y, x, cotangent_NTA.chunk(world.size, -1)[world.rank])
    return y.detach(), gradient


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_the_norm_of_parts_is_as_exact_as_that_of_the_whole(offset):
    """Parts of unlike means and sizes, an offset that would ruin E[x^2] - E[x]^2: against PyTorch in float64."""
    x = torch.randn(3, 5, 32) * torch.linspace(0.1, 3, 32) + torch.linspace(-2, 2, 32) + offset
    cotangent, eps = torch.randn(3, 5, 32), 1e-6
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        y = F.layer_norm(leaf, (32,), eps=eps)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, cotangent.to(dtype))))
    exact, pytorch = results
    parts = run_in_processes(norm_of_parts, 2, x, cotangent, eps)
    for truth, theirs, ours in zip(exact, pytorch, map(torch.cat, zip(*parts), (-1, -1))):
        assert difference(ours, truth) < 2 * difference(theirs, truth) + 1e-7


def batch(step: int) -> tuple[Tensor, Tensor]:
    """A step's latents and captions."""
    generator, model = torch.Generator().manual_seed(step), CONFIG.model
    n, side = CONFIG.training.global_batch_size, model.latent_size
    latents = torch.randn(n, model.latent_channels, side, side, generator=generator)
    return latents, torch.randn(n, model.caption_length, model.caption_channels, generator=generator)


def train_plain() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """-> loss and gradient norm of every step, the last weights."""
    model, optim = open_model(CONFIG.model), CONFIG.optim
    adamw = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    losses, norms = [], []
    for step in range(STEPS):
        loss = edm_loss(model, *batch(step), sample_noise(CONFIG, step, slice(None)), CONFIG.noise)
        adamw.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)))
        adamw.step()
        losses.append(loss.item())
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


def train_cut(world, layouts: list[dict]) -> list[tuple]:
    """`train_plain` by groups of two ranks, once for each layout -> the same, and how far replicas came apart."""
    from mdit.parallel import tensor
    from mdit.parallel.plan import ParallelPlan

    group, mpu = tensor.start(2)
    plan = ParallelPlan(world, tensor_parallel=2, tensor_group=group, mpu=mpu)
    return [train_layout(plan, **layout) for layout in layouts]


def train_layout(plan, stage: int, bf16: bool = False, recompute: str = "none") -> tuple:
    from mdit.parallel.apply import parallelize
    from mdit.parallel.settings import Execution, RunSettings
    from mdit.train.engine import Engine

    share = CONFIG.training.global_batch_size // plan.data_size
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": share // 2,
        "gradient_clipping": CONFIG.optim.max_grad_norm,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = open_model(CONFIG.model)
    execution = Execution(RunSettings(tensor_parallel=2, activation_checkpointing=recompute), ds_config)
    parallelize(model, execution.settings, plan)
    engine = Engine(model, CONFIG, execution, plan)
    losses, norms, ours = torch.zeros(STEPS), [], slice(plan.data_rank * share, (plan.data_rank + 1) * share)
    for step in range(STEPS):
        latents, captions = (values[ours] for values in batch(step))
        noise = sample_noise(CONFIG, step, ours)
        for rows in engine.micro_batches(share):
            loss = edm_loss(engine, latents[rows], captions[rows], noise[rows], CONFIG.noise)
            engine.backward(loss)
            losses[step] += loss.detach() / (share // 2)
        engine.step()
        norms.append(engine.gradient_norm())
    torch.distributed.all_reduce(losses)
    weights = {name: p.detach().clone() for name, p in engine.full_weights()}
    return (losses / plan.world.size).tolist(), norms, weights, replicas_apart(model)


@pytest.fixture(scope="module")
def plain():
    losses, norms, weights = train_plain()
    assert min(norms) > CONFIG.optim.max_grad_norm, "clipping must be at work"
    return losses, norms, weights


LAYOUTS = {
    2: [dict(stage=1), dict(stage=2, recompute="block"), dict(stage=1, bf16=True)],
    4: [dict(stage=1, recompute="selective"), dict(stage=2)],
}


@pytest.mark.parametrize("processes", LAYOUTS)
def test_ten_clipped_steps_are_those_of_one_process(plain, processes):
    (losses, norms, weights), layouts = plain, LAYOUTS[processes]
    for by_rank in run_in_processes(train_cut, processes, layouts):
        for layout, (our_losses, our_norms, our_weights, apart) in zip(layouts, by_rank):
            within = 2e-2 if "bf16" in layout else 1e-6
            assert our_losses == pytest.approx(losses, rel=within), layout
            assert our_norms == pytest.approx(norms, rel=within), layout
            far = {name: difference(our_weights[name], value) for name, value in weights.items()}
            assert {name: value for name, value in far.items() if value > within} == {}, layout
            assert apart == 0, layout
