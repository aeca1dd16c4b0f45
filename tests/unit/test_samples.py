import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFont

from mdit.checkpoint.snapshot import Snapshot
from mdit.config import CONFIGS, UserError, load_config
from mdit.diffusion.edm import denoise, generator_for
from mdit.diffusion.sampler import heun_sample
from mdit.eval import lettering
from mdit.eval.evaluate import evaluate_validation
from mdit.eval.samples import MAX_LINES, draw_pictures, grid, sample_latents, to_images, to_uint8, wrap
from tests.latent_sets import write_set

PAPER_32 = CONFIGS / "paper_32.toml"
CONFIG = load_config(PAPER_32, ["model.latent_size=8", "model.latent_channels=2"])
CAPTIONS = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(0))


def net(x, c_noise, captions, mask=None):
    return torch.tanh(x + captions.mean(dim=(1, 2)).view(-1, 1, 1, 1) + c_noise.view(-1, 1, 1, 1))


def sample(captions=CAPTIONS, indices=range(5), **changes):
    options = dict(config=CONFIG, seed=0, guidance=3.0, num_steps=4, batch_size=2)
    return sample_latents(net, captions, indices=indices, **{**options, **changes})


def test_independent_of_batch_size_and_neighbours():
    whole = sample(batch_size=5)
    torch.testing.assert_close(sample(batch_size=2), whole)
    torch.testing.assert_close(sample(CAPTIONS[[3, 1]], [3, 1]), whole[[3, 1]])
    assert sample(CAPTIONS[:0], []).shape == (0, 2, 8, 8)


def test_seed_and_index_choose_the_noise():
    whole = sample()
    assert torch.equal(sample(), whole)
    assert not torch.allclose(sample(seed=1), whole)  # and so seed 0 is a seed like any other
    assert not torch.allclose(sample(indices=range(5, 10)), whole)


def test_guidance_extrapolates_from_the_empty_caption():
    noise = torch.randn(2, 8, 8, generator=generator_for(0, "sample", 9)).unsqueeze(0)
    target, caption = CONFIG.noise, CAPTIONS[:1]

    def guided(x, sigma):
        with_caption = denoise(net, x, sigma, caption, target)
        without = denoise(net, x, sigma, torch.zeros_like(caption), target)
        return without + 3.0 * (with_caption - without)

    torch.testing.assert_close(sample(caption, [9]), heun_sample(guided, noise, 4))

    def plain(x, sigma):
        return denoise(net, x, sigma, caption, target)

    torch.testing.assert_close(sample(caption, [9], guidance=1.0), heun_sample(plain, noise, 4))


def test_pictures_that_are_not_finite_are_refused():
    def diverging(x, c_noise, captions, mask=None):
        return x * 1e30

    diverging.parameters = lambda: iter([torch.zeros(1)])
    with pytest.raises(UserError, match=r"snapshots/latest: draws NaN or infinities with .*'guidance': 3.0"):
        draw_pictures(snapshot_of(), diverging, CAPTIONS, 0, {"guidance": 3.0, "num_steps": 4})


def snapshot_of(*overrides):
    shapes = ["model.latent_channels=3", "model.caption_length=4", "model.caption_channels=6"]
    config, encoders = load_config(PAPER_32, [*shapes, *overrides]), {"image": {"id": "pixels", "scale": 1.5}}
    return Snapshot(Path("snapshots/latest"), 1, config, encoders, {})


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.latent_channels=4", r"an image encoder of latents of shape \(3,\), .* model takes \(4,\)"),
        ("model.caption_length=5", r"a text encoder of captions of shape \(4, 6\), .* model takes \(5, 6\)"),
        ("model.caption_channels=7", r"a text encoder of captions of shape \(4, 6\), .* model takes \(4, 7\)"),
    ],
)
def test_encoders_that_do_not_fit_the_model_are_named(override, message):
    net.parameters = lambda: iter([torch.zeros(1)])
    with pytest.raises(UserError, match=f"snapshots/latest/encoders.json: {message}"):
        draw_pictures(snapshot_of(override), net, CAPTIONS, 0, {"guidance": 3.0, "num_steps": 4})


def test_a_validation_set_that_does_not_fit_the_model_is_named(tmp_path):
    directory = write_set(tmp_path / "set", 4)
    net.parameters = lambda: iter([torch.zeros(1)])
    snapshot = snapshot_of(f"data.validation={directory}")
    with pytest.raises(UserError, match=r"set/manifest.json: latents of shape .* model takes \(3, 32, 32\)"):
        evaluate_validation(snapshot, net, 2, 0, {"guidance": 3.0, "num_steps": 4})


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-7.0, -1.0, 0.0, 0.5, 1.0, 7.0])
    pixels = to_uint8(values.view(1, 1, 1, 6).expand(1, 3, 1, 6))
    assert pixels.shape == (1, 1, 6, 3) and pixels.dtype == torch.uint8
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_to_images_decodes_one_by_one():
    class Halving:
        batches = []

        def decode(self, latents):
            self.batches.append(len(latents))
            return latents / 2

    images = to_images(Halving(), torch.full((5, 3, 2, 2), 2.0))
    assert Halving.batches == [1] * 5
    assert torch.equal(images, torch.full((5, 2, 2, 3), 255, dtype=torch.uint8))


def test_grid_shows_every_picture_in_its_cell():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255]], dtype=torch.uint8)
    images = colours.view(5, 1, 1, 3).expand(5, 32, 32, 3)
    sheet = grid(images, ["a red apple on a blue background"] * 5, columns=3)
    pixels = np.asarray(sheet)
    cell_width, cell_height = (sheet.width - 6) // 3, (sheet.height - 6) // 2
    assert cell_width >= 96  # enlarged from 32 pixels
    for i, colour in enumerate(colours.tolist()):
        assert pixels[6 + i // 3 * cell_height + 40, 6 + i % 3 * cell_width + 40].tolist() == colour
    caption = pixels[6 + 96 : cell_height, 6 : 6 + 96]
    assert caption.min() < 100 and caption.max() == 255  # there is ink
    assert grid(images, [""] * 5).width > grid(images, [""] * 5, columns=2).width  # near a square: 3 columns


def test_grid_wants_a_caption_for_every_picture():
    with pytest.raises(ValueError):
        grid(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ["one"])


@pytest.mark.parametrize("text", ["a red apple on a blue background", "x" * 60, "word " * 100, ""])
def test_wrapped_lines_fit(text):
    font = ImageFont.load_default(11)
    lines = wrap(text, font, 96)
    assert len(lines) <= MAX_LINES and all(font.getlength(line) <= 99 for line in lines)
    if "…" not in lines[-1]:
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_what_no_font_can_draw_is_spelled_out_with_one_line(monkeypatch, caplog):
    monkeypatch.setattr(lettering, "FONTS", ())
    monkeypatch.setattr(
        lettering, "package_folder", lambda name: None
    )  # a bare machine: Pillow's own font, and that is all
    lettering._choose.cache_clear()
    given = ["Cafe\u0301 au lait, naïve", "漢 \U0001f600\ufe0f Я", "\x1b[0m \ud800", "“quotes”…"]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            font, texts = lettering.lettering(given, 11)
    assert texts == ["Cafe au lait, naive", r"\u6f22 :grinning face: \u042f", r"\x1b[0m \ud800", "“quotes”…"]
    (record,) = caplog.records
    assert r"\u6f22" in record.getMessage() and r"\U0001f600" in record.getMessage()
    assert all(lettering.has(font, letter) for text in texts for letter in text if letter != " ")
    lettering._choose.cache_clear()
