import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mdit.costs.flops import forward_flops, training_flops
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from mdit.models.presets import xl_2
from tests.recipes import tiny_model


@pytest.mark.parametrize(
    "latent_size, mask_ratio, gflops", [(32, 0.75, 282), (32, 0.0, 714), (64, 0.75, 1069), (64, 0.0, 3003)]
)
def test_flops_of_the_four_stages(latent_size, mask_ratio, gflops):
    assert training_flops(xl_2(latent_size), mask_ratio) / 1e9 == pytest.approx(gflops, rel=0.005)


def count(model, latents, caption, mask, backward=False):
    """What torch counts; with the plain attention, whose two matmuls it sees on a CPU too."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(latents, torch.zeros(len(latents)), caption, mask=mask)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 0.75])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_patch_mixer": False}, {"mixer_dim": 32}, {"experts_every_n": 0}, {"capacity_factor": 1.5}],
    ids=str,
)
def test_forward_flops_are_what_torch_counts(changes, mask_ratio):
    config = tiny_model(**changes)
    mask = sample_mask(torch.rand(3, 16), mask_ratio)
    kept = 16 if mask is None else mask.keep_NK.shape[1]
    counted = count(MicroDiT(config), torch.randn(3, 4, 8, 8), torch.randn(3, 5, 12), mask)
    assert counted == 3 * forward_flops(config, kept)


def test_training_flops_are_what_torch_counts_but_for_inputs_that_need_no_gradient():
    config = tiny_model()
    latents, caption = torch.randn(3, 4, 8, 8, requires_grad=True), torch.randn(3, 5, 12, requires_grad=True)
    model = MicroDiT(config)
    counted = count(model, latents, caption, sample_mask(torch.rand(3, 16), 0.75), backward=True)
    sine_features = 2 * 3 * model.t_embedder.mlp[0].weight.numel()  # the gradient that nobody asks for
    assert counted == 3 * training_flops(config, 0.75) - sine_features
