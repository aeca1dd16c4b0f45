"""mdit/bench/as_published.py: another formula for the same network, and nothing left behind."""

import pytest
import torch

from mdit.bench.as_published import as_published, blocks_of
from mdit.masking import sample_mask
from mdit.models import MicroDiT
from tests.recipes import tiny_model

CONFIGS = {"mixer of its own width": tiny_model(), "as tiny_2": tiny_model(mixer_dim=32)}


def model_of(config, dtype=torch.float64):
    """With gates and outputs that are not zero, or blocks would do nothing."""
    torch.manual_seed(0)
    model = MicroDiT(config).to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.count_nonzero() < parameter.numel() or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def outputs_and_gradients(model, masked):
    """-> (output, {parameter: gradient}); the same inputs and cotangent every time."""
    generator = torch.Generator().manual_seed(1)
    config, dtype = model.config, model.final_layer.linear.weight.dtype
    shapes = (3, 4, 8, 8), (3,), (3, config.caption_length, config.caption_channels), (3, 4, 8, 8)
    x, c_noise, caption, cotangent = (
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes
    )
    mask = sample_mask(torch.rand(3, config.num_patches, generator=generator), 0.5) if masked else None
    output = model(x, c_noise, caption, mask=mask)
    model.zero_grad()
    output.backward(cotangent)
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_and_every_gradient_are_those_of_the_model(config, masked, dtype, bound):
    model = model_of(config, dtype)
    ours, our_gradients = outputs_and_gradients(model, masked)
    with as_published(model):
        published, gradients = outputs_and_gradients(model, masked)
    assert ours.abs().max() > 0.1 and all(g.abs().max() > 0 for g in gradients.values())
    assert (ours - published).norm() <= bound * published.norm()
    smallest = torch.stack([g.norm() for g in gradients.values()]).median()  # below it rounding of large ones decides
    for name, gradient in gradients.items():
        scale = gradient.norm() if dtype == torch.float64 else max(gradient.norm(), smallest)
        assert (our_gradients[name] - gradient).norm() <= bound * scale, name


def test_a_wrong_step_would_be_seen():
    """The comparison above is sharp: one gate that is off by a thousandth moves the output by more than its bound."""
    model = model_of(tiny_model())
    ours, _ = outputs_and_gradients(model, masked=True)
    model.blocks[1].adaLN_modulation[1].bias.data[2 * 32 : 3 * 32] *= 1.001
    with as_published(model):
        published, _ = outputs_and_gradients(model, masked=True)
    assert (ours - published).norm() > 1e-6 * published.norm()


def test_everything_is_put_back():
    model = model_of(tiny_model())
    model.blocks[0].compile(backend="eager")
    held = model.blocks[1].forward  # as activation checkpointing leaves a forward of the instance
    model.blocks[1].forward = wrapped = lambda *args: held(*args)
    before = [dict(m.__dict__) for m in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ZeroDivisionError), as_published(model, compiled=True, backend="eager"):
        assert model.blocks[1].forward is not wrapped and [name for name, _ in model.named_parameters()] == names
        raise ZeroDivisionError
    assert [dict(m.__dict__) for m in model.modules()] == before


def test_every_block_is_compiled_and_computes_the_same():
    """More blocks than torch compiles of one function."""
    model = model_of(tiny_model(use_patch_mixer=False, depth=9), torch.float32)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with as_published(model):
        expected, gradients = outputs_and_gradients(model, masked=True)
    with as_published(model, compiled=True, backend=backend):
        published, same_gradients = outputs_and_gradients(model, masked=True)
    assert len(graphs) == len(blocks_of(model)) == 9
    torch.testing.assert_close(published, expected)
    torch.testing.assert_close(same_gradients, gradients)
