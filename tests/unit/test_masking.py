import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mdit.config import UserError
from mdit.diffusion.edm import sample_noise
from mdit.masking import Mask, constant_parts, drop_tokens, mask_ratio, restore_tokens, sample_mask
from tests.recipes import tiny_config


@st.composite
def masks(draw):
    n, num_patches = draw(st.integers(1, 4)), draw(st.integers(1, 25))
    kept = draw(st.integers(1, num_patches))
    rows = [draw(st.permutations(range(num_patches)))[:kept] for _ in range(n)]
    return Mask(torch.tensor(rows), num_patches)


@given(masks())
def test_drop_takes_the_kept_tokens_in_the_masks_order(mask):
    x_NTD = torch.randn(len(mask.keep_NK), mask.num_patches, 3)
    dropped = drop_tokens(x_NTD, mask)
    for n, row in enumerate(mask.keep_NK.tolist()):
        for k, patch in enumerate(row):
            assert torch.equal(dropped[n, k], x_NTD[n, patch])


@given(masks())
def test_restore_inverts_drop_at_kept_patches_and_is_zero_elsewhere(mask):
    x_NTD = torch.randn(len(mask.keep_NK), mask.num_patches, 3)
    restored = restore_tokens(drop_tokens(x_NTD, mask), mask)
    kept = torch.zeros(x_NTD.shape[:2], dtype=torch.bool)
    for n, row in enumerate(mask.keep_NK.tolist()):
        kept[n, row] = True
    assert torch.equal(restored[kept], x_NTD[kept])
    assert not restored[~kept].any()


def test_mask_image_marks_the_pixels_of_kept_patches_row_by_row():
    mask = Mask(torch.tensor([[1, 3], [2, 0]]), num_patches=4)
    first = [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]
    second = [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert mask.image(4, 4).tolist() == [[first], [second]]


def test_mask_image_agrees_with_the_models_patches():
    from mdit.models import MicroDiT
    from tests.recipes import tiny_model

    model = MicroDiT(tiny_model())
    mask = Mask(torch.tensor([[3, 8, 13]]), num_patches=16)
    ones = restore_tokens(torch.ones(1, 3, 16), mask)  # p * p * C = 16 outputs a token
    assert torch.equal(model.unpatchify(ones), mask.image(8, 8).expand(1, 4, 8, 8))


@pytest.mark.parametrize("num_patches", [7, 16, 256, 1024])
@pytest.mark.parametrize("mask_ratio", [0.1, 1 / 3, 0.5, 0.75, 0.9])
def test_sample_mask_keeps_the_rounded_down_share_of_distinct_patches(num_patches, mask_ratio):
    mask = sample_mask(torch.rand(3, num_patches), mask_ratio)
    kept = int(num_patches * (1 - mask_ratio))
    assert mask.num_patches == num_patches
    assert mask.keep_NK.shape == (3, kept) and mask.keep_NK.dtype == torch.int64
    assert all(len(set(row)) == kept for row in mask.keep_NK.tolist())


def test_sample_mask_keeps_the_patches_with_the_smallest_numbers():
    mask = sample_mask(torch.tensor([[0.9, 0.1, 0.5, 0.3]]), 0.5)
    assert sorted(mask.keep_NK[0].tolist()) == [1, 3]


def test_sample_mask_keeps_every_patch_equally_often():
    keep_NK = sample_mask(torch.rand(4000, 16), 0.75).keep_NK
    share = keep_NK.flatten().bincount(minlength=16) / 4000
    assert (share - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_there_is_no_mask_at_ratio_zero():
    assert sample_mask(torch.rand(2, 16), 0.0) is None


def test_rows_of_a_mask_are_a_mask():
    mask = sample_mask(torch.rand(6, 16), 0.75)
    part = mask[2:5]
    assert part.num_patches == 16 and torch.equal(part.keep_NK, mask.keep_NK[2:5])
    assert torch.equal(part.image(8, 8), mask.image(8, 8)[2:5])


def scheduled(num_steps=20, **mask):
    return tiny_config(training={"num_steps": num_steps, "mask_ratio": mask})


LINEAR = dict(schedule="linear", start=0.75, final=0.0, share=0.5, levels=2)


def test_a_linear_schedule_takes_its_levels_in_the_last_share_of_the_run():
    ratios = [mask_ratio(scheduled(**LINEAR), step) for step in range(22)]
    assert ratios == [0.75] * 10 + [0.375] * 5 + [0.0] * 7  # 20 steps, and two beyond
    at_once = scheduled(**{**LINEAR, "share": 0.25, "levels": 1, "final": 0.25})
    assert [mask_ratio(at_once, step) for step in range(20)] == [0.75] * 15 + [0.25] * 5


@pytest.mark.parametrize("num_steps", [1, 7, 1000])
@pytest.mark.parametrize("levels, share", [(1, 0.3), (4, 0.5), (15, 1.0)])
def test_the_parts_of_a_linear_schedule_are_its_steps(levels, share, num_steps):
    config = scheduled(num_steps, **{**LINEAR, "levels": levels, "share": share})
    ratios = [mask_ratio(config, step) for step in range(num_steps)]
    parts = {part.training.fixed_mask_ratio: share for share, part in constant_parts(config)}
    assert parts == pytest.approx({ratio: ratios.count(ratio) / num_steps for ratio in ratios})


def test_a_step_masks_by_its_own_ratio_and_draws_the_same_noise_as_at_any_other():
    config, constant = scheduled(**LINEAR), tiny_config()
    kept = [sample_noise(config, step, slice(0, 8)).mask for step in (9, 10, 15)]
    assert [mask and mask.keep_NK.shape for mask in kept] == [(8, 4), (8, 10), None]
    found, expected = (sample_noise(c, 10, slice(0, 8)) for c in (config, constant))
    assert torch.equal(found.noise_NCHW, expected.noise_NCHW) and torch.equal(found.sigma_N, expected.sigma_N)


def test_a_schedule_is_refused_where_one_number_is_wanted():
    with pytest.raises(UserError, match="training.mask_ratio is a schedule of 0.75, 0.375, 0; expected a number"):
        scheduled(**LINEAR).training.fixed_mask_ratio  # noqa: B018
