"""Layers and the whole network in float64 against formulas written out by hand (tests/formulas.py)."""

import numpy as np
import pytest
import torch
from torch import nn

from mdit.diffusion.edm import StepNoise, edm_loss
from mdit.masking import Mask
from mdit.models import MicroDiT, dit, layers
from mdit.models.moe import ExpertChoiceMoE
from mdit.parallel.fuse import PendingResidual, fuse
from tests import formulas
from tests.recipes import tiny_config, tiny_model


def randomised(module, std=0.3):
    """In float64, with no weight at zero: the released initialisation would hide most of the network."""
    module = module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=std)
    return module


def weights_of(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_equal_with_gradients(ours, expected, inputs, tolerance=1e-10):
    """Values, and gradients with respect to every input, along one random direction."""
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    cotangent = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, cotangent)
    for gradient, correct in zip(torch.autograd.grad(ours, inputs, cotangent), wanted, strict=True):
        torch.testing.assert_close(gradient, correct, rtol=tolerance, atol=tolerance * (1 + correct.abs().max().item()))


def tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def batch(config, n=2):
    latents = tensor(n, config.latent_channels, config.latent_size, config.latent_size)
    return latents, torch.randn(n), tensor(n, config.caption_length, config.caption_channels)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("use_bias", [False, True])
def test_self_attention_is_softmax_attention_with_q_and_k_normed_over_the_full_width(width, use_bias):
    module, x = randomised(layers.SelfAttention(12, width, 8, formulas.EPS, use_bias)), tensor(2, 5, 12)
    w = weights_of(module)
    assert_equal_with_gradients(module(x), formulas.self_attention(w, x, 8), [x, *w.values()])


@pytest.mark.parametrize("use_bias", [False, True])
def test_cross_attention_attends_to_all_caption_tokens(use_bias):
    module, x, caption = (
        randomised(layers.CrossAttention(16, 8, formulas.EPS, use_bias)),
        tensor(2, 5, 16),
        tensor(2, 3, 16),
    )
    w = weights_of(module)
    assert_equal_with_gradients(
        module(x, caption), formulas.cross_attention(w, x, caption, 8), [x, caption, *w.values()]
    )


@pytest.mark.parametrize("use_bias", [False, True])
def test_swiglu_gates_with_silu(use_bias):
    module, x = randomised(layers.SwiGLU(12, 18, 8, use_bias)), tensor(2, 5, 12)
    w = weights_of(module)
    assert module.w1.out_features == 16  # two thirds of 18, rounded up to 8
    assert_equal_with_gradients(module(x), formulas.swiglu(w, x), [x, *w.values()])


def test_experts_add_up_what_each_makes_of_its_best_tokens():
    module, x = randomised(ExpertChoiceMoE(6, 8, 8, num_experts=3, capacity_factor=1.5)), tensor(2, 8, 6)
    w = weights_of(module)
    assert_equal_with_gradients(module(x), formulas.experts(w, x, 1.5), [x, *w.values()], tolerance=1e-5)


@pytest.mark.parametrize("has_experts", [False, True])
def test_block_modulates_attention_and_feed_forward_but_not_cross_attention(has_experts):
    config = tiny_model()
    module = dit.Block(config, dim=24, qkv_ratio=0.5, ffn_ratio=2.0, has_experts=has_experts, out_std=0.02)
    module = randomised(module)
    x, caption, condition = tensor(2, 16, 24), tensor(2, 5, 24), tensor(2, config.dim)
    w = weights_of(module)
    assert module.attn.qkv.out_features == 3 * 16  # 24 * 0.5 rounded up to 2 heads of 8
    tolerance = 1e-5 if has_experts else 1e-10
    inputs = [x, caption, condition, *w.values()]
    found = module(x, caption, condition)
    assert_equal_with_gradients(found, formulas.block(w, x, caption, condition, config), inputs, tolerance)

    y, gate = tensor(2, 16, 24), tensor(2, 24)  # what the block before has left to be added
    expected = formulas.block(w, x + gate.unsqueeze(1) * y, caption, condition, config)
    found = fuse(module)(PendingResidual(x, y, gate), caption, condition).added()
    assert_equal_with_gradients(found, expected, [*inputs, y, gate], tolerance)


def test_timestep_embedder_has_256_frequencies_cosines_first():
    module, c_noise = randomised(layers.TimestepEmbedder(12), std=0.05), torch.linspace(-1.6, 1.1, 7)
    torch.testing.assert_close(module(c_noise), formulas.timestep(weights_of(module), c_noise), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid, dim, scale", [(4, 8, 1.0), (16, 64, 1.0), (32, 64, 2.0)])
def test_position_embedding_is_dits_table_with_the_columns_half_first(grid, dim, scale):
    table = layers.position_embedding(grid, dim, scale)
    assert table.shape == (1, grid * grid, dim) and table.dtype == torch.float32
    np.testing.assert_allclose(table[0].numpy(), formulas.sincos_table(grid, dim, scale), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all patches", "masked"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_bias": True},
        {"use_patch_mixer": False},
        {"mixer_dim": 32},
        {"experts_every_n": 0, "num_experts": 1, "capacity_factor": 1.0},
        {"mixer_depth": 0},
        {"rotary": True, "pos_interp_scale": 2.0},
    ],
    ids=[
        *("tiny", "biases", "no mixer", "as tiny_2", "dense", "mixer of depth 0"),
        "rotary",
    ],
)
@pytest.mark.parametrize("form", [nn.Module.eval, fuse], ids=["plain", "fused"])
def test_network_equals_the_formula_with_all_gradients(form, changes, masked):
    config = tiny_model(**changes)
    model = form(randomised(MicroDiT(config), std=0.15))
    latents, c_noise, caption = batch(config)
    mask = Mask(torch.rand(2, config.num_patches).argsort(1)[:, :6], config.num_patches) if masked else None
    w = weights_of(model)
    expected = formulas.network(w, config, latents, c_noise, caption, mask.keep_NK if masked else None)
    inputs = [latents, caption, *model.parameters()]
    assert_equal_with_gradients(model(latents, c_noise, caption, mask=mask), expected, inputs, tolerance=1e-5)


@pytest.mark.parametrize("use_patch_mixer", [True, False])
def test_new_model_gives_zeros(use_patch_mixer):
    config = tiny_model(use_patch_mixer=use_patch_mixer)
    assert not MicroDiT(config)(*(t.float() for t in batch(config))).any()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rotary": True, "head_dim": 2}, "head_dim 2 is not a multiple of 4"),
    ],
)
def test_levers_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_model(**changes)


def test_new_blocks_let_only_cross_attention_through():
    """Zero gates: whatever the other weights, a new block adds its cross-attention and nothing else."""
    config = tiny_model()
    for module in MicroDiT(config).blocks:
        x, caption, condition = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
        expected = x + module.cross_attn(module.norm2(x), caption)
        assert torch.equal(module(x, caption, condition), expected)


def test_initial_standard_deviations_are_those_of_the_released_code():
    config = tiny_model(dim=64, mixer_dim=48)
    weights = MicroDiT(config).state_dict()
    expected = {"t_embedder.mlp.2": 0.02, "pooled_y_emb_process.fc1": 0.02, "y_embedder.y_proj.fc2": 0.02}
    expected |= {"y_emb_preprocess.attn.qkv": 0.02, "y_emb_preprocess.mlp.w2": 0.02}
    expected |= {"y_emb_preprocess.attn.proj": 0, "y_emb_preprocess.mlp.w3": 0, "final_layer.linear": 0}
    expected |= {"final_layer.adaLN_modulation.1": 0, "patch_mixer_map_xin.1": (2 / (64 + 48)) ** 0.5}
    out_std = {f"blocks.{i}": 0.02 / (2 * (i + 1)) ** 0.5 for i in range(4)}  # falls with depth
    out_std |= {f"patch_mixer.{i}": 0.02 / (2 * 4) ** 0.5 for i in range(2)}  # the backbone's depth, all alike
    for name, std in out_std.items():
        expected |= {f"{name}.adaLN_modulation.1": 0, f"{name}.attn.qkv": 0.02, f"{name}.attn.proj": std}
        expected |= {f"{name}.cross_attn.q_linear": 0.02, f"{name}.cross_attn.kv_linear": 0.02}
        expected |= {f"{name}.cross_attn.proj": std}
        is_dense = f"{name}.mlp.w3.weight" in weights
        expected |= {f"{name}.mlp.w2": std, f"{name}.mlp.w3": std} if is_dense else {f"{name}.mlp.gate": 0.02}
    for name, std in expected.items():
        assert weights[f"{name}.weight"].std().item() == pytest.approx(std, rel=0.12), name
    assert weights["blocks.1.mlp.w1"].std().item() == pytest.approx(0.02, rel=0.12)
    assert weights["blocks.1.mlp.w2"].std().item() == pytest.approx(out_std["blocks.1"], rel=0.12)
    assert not any(value.any() for name, value in weights.items() if name.endswith("1.bias") and "adaLN" in name)


def test_masked_loss_has_no_gradient_with_respect_to_outputs_at_dropped_patches():
    mask = Mask(torch.tensor([[3, 9, 12], [0, 1, 15]]), 16)
    output = torch.randn(2, 4, 8, 8, requires_grad=True)
    noise = StepNoise(torch.tensor([0.4, 2.0]), torch.randn(2, 4, 8, 8), torch.tensor([True, True]), mask)
    loss = edm_loss(
        lambda *args, mask: output, torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), noise, tiny_config().noise
    )
    (gradient,) = torch.autograd.grad(loss, output)
    dropped = mask.image(8, 8).expand_as(output) == 0
    assert not gradient[dropped].any() and gradient[~dropped].all()


def gradient_at_a_dropped_patch(config):
    """Of the output at the kept patches, with respect to the pixels of patch 5, which the mask drops."""
    model = randomised(MicroDiT(config), std=0.15)
    latents, c_noise, caption = batch(config)
    mask = Mask(torch.tensor([[0, 3, 9, 12]] * 2), config.num_patches)
    (gradient,) = torch.autograd.grad(model(latents, c_noise, caption, mask=mask).sum(), latents)
    return gradient[(slice(None), slice(None), *formulas.pixels_of(5, config))]


def test_patch_mixer_tells_kept_patches_about_dropped_ones():
    assert (gradient_at_a_dropped_patch(tiny_model(use_patch_mixer=True)) != 0).all()


def test_without_the_patch_mixer_dropped_patches_are_never_seen():
    assert not gradient_at_a_dropped_patch(tiny_model(use_patch_mixer=False)).any()


@pytest.mark.parametrize("use_patch_mixer", [True, False])
def test_a_few_steps_lower_the_masked_loss_and_move_every_weight(use_patch_mixer):
    config = tiny_model(use_patch_mixer=use_patch_mixer)
    model = MicroDiT(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    latents, caption = torch.randn(8, 4, 8, 8), torch.randn(8, 5, 12)
    mask = Mask(torch.rand(8, 16).argsort(1)[:, :8], 16)
    noise = StepNoise(torch.linspace(0.3, 2.0, 8), torch.randn(8, 4, 8, 8), torch.ones(8, dtype=torch.bool), mask)
    losses = []
    for _ in range(5):
        loss = edm_loss(model, latents, caption, noise, tiny_config().noise)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0] and losses[-1] < losses[1]
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_output_has_the_weights_dtype():
    config = tiny_model()
    latents, c_noise, caption = batch(config)
    assert MicroDiT(config).bfloat16()(latents.float(), c_noise, caption.half()).dtype == torch.bfloat16
