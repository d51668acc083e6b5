"""Masks: warping, cropping and pasting."""

import pytest
import torch

from pais_ray.structures import geometry
from pais_ray.structures.masks import Masks

SIZE = (96, 128)


def discs(size=SIZE):
    """Three large discs, bool (3, H, W), and their tight boxes."""
    ys, xs = torch.arange(size[0])[:, None] + 0.5, torch.arange(size[1])[None] + 0.5
    spots = [(40.0, 40.0, 25.0), (80.0, 50.0, 30.0), (64.0, 48.0, 40.0)]
    masks = torch.stack([(xs - x) ** 2 + (ys - y) ** 2 <= r * r for x, y, r in spots])
    boxes = torch.tensor([[x - r, y - r, x + r, y + r] for x, y, r in spots])
    return masks, boxes


def iou(a, b):
    return ((a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2))).mean().item()


def test_pasting_full_masks_returns_them_unchanged():
    masks, _ = discs()
    assert torch.equal(Masks.full(masks).paste(SIZE), masks)


def test_pasted_low_resolution_masks_overlap_the_full_ones():
    masks, boxes = discs()
    full = Masks.full(masks)
    assert iou(Masks.in_boxes(full.crop_resize(boxes, 28), boxes).paste(SIZE), masks) > 0.95
    assert iou(Masks.strided(full.to_grid(4, SIZE), 4).paste(SIZE), masks) > 0.95


def test_pasting_clips_at_the_border():
    masks, _ = discs()
    moved = Masks.full(masks).warp(geometry.translate(60, 0)).paste(SIZE)
    assert torch.equal(moved[:, :, 60:], masks[:, :, :-60])
    assert not moved[:, :, :60].any()
    assert not Masks.full(masks).warp(geometry.translate(500, 500)).paste(SIZE).any()


def test_two_warps_equal_one_warp_by_the_product():
    masks, _ = discs()
    a, b = geometry.rotate(20, (64, 48)), geometry.scale(1.3, 0.9)
    torch.testing.assert_close(Masks.full(masks).warp(a).warp(b).affine, Masks.full(masks).warp(b @ a).affine)


def test_warping_by_the_inverse_restores_the_masks():
    masks, _ = discs()
    matrix = geometry.rotate(25, (64, 48)) @ geometry.shear(0.2, 0.1, (64, 48))
    warped = Masks.full(masks).warp(matrix)
    assert torch.equal(warped.warp(geometry.invert(matrix)).paste(SIZE), masks)


def test_warping_by_a_flip_matrix_equals_flipping_the_grid():
    masks, _ = discs()
    assert torch.equal(Masks.full(masks).warp(geometry.flip_horizontal(SIZE[1])).paste(SIZE), masks.flip(-1))


@pytest.mark.parametrize("upright", [True, False])
def test_a_crop_averages_the_pixels_of_its_window(upright):
    masks, _ = discs()
    full = Masks.full(masks) if upright else Masks.full(masks).warp(geometry.identity())
    window = torch.tensor([[10.0, 20.0, 66.0, 76.0]]).expand(3, 4)  # 56 px: each of 28 cells is 2 x 2 px
    expected = masks[:, 20:76, 10:66].float().reshape(3, 28, 2, 28, 2).mean(dim=(2, 4))
    torch.testing.assert_close(full.crop_resize(window, 28), expected, atol=0.3, rtol=0)
    assert (full.crop_resize(window, 28) - expected).abs().mean() < 0.01


def test_crops_of_upright_and_warped_masks_agree():
    masks, boxes = discs()
    scaled = geometry.scale(1.5, 0.8).float()
    boxes = geometry.transform_boxes(boxes, scaled)
    warped = Masks.full(masks).warp(scaled)
    upright = Masks(grids=masks, affine=scaled.expand(3, 3, 3))
    assert (warped.crop_resize(boxes, 28) - upright.crop_resize(boxes, 28)).abs().mean() < 0.02


def test_several_boxes_can_crop_the_same_mask():
    masks, boxes = discs()
    full = Masks.full(masks)
    index, boxes = torch.tensor([2, 0, 2, 1]), boxes[[0, 0, 1, 2]]
    many = full.crop_resize(boxes, 14, index)
    one_by_one = [full[i : i + 1].crop_resize(b[None], 14)[0] for i, b in zip(index, boxes, strict=True)]
    torch.testing.assert_close(many, torch.stack(one_by_one))


def test_to_grid_averages_the_pixels_of_a_cell():
    masks, _ = discs()
    cells = masks.float().reshape(3, 24, 4, 32, 4).mean(dim=(2, 4))
    torch.testing.assert_close(Masks.full(masks).to_grid(4, SIZE), cells, atol=1e-5, rtol=0)


def test_to_grid_covers_the_last_pixels():
    assert Masks.full(torch.ones(1, 10, 13)).to_grid(4, (10, 13)).shape == (1, 3, 4)


def test_all_operations_accept_zero_masks():
    none = Masks.full(torch.zeros(0, *SIZE))
    assert len(none) == 0
    assert none.warp(geometry.identity()).paste(SIZE).shape == (0, *SIZE)
    assert none.crop_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
    assert none.to_grid(4, SIZE).shape == (0, 24, 32)


def test_two_dimensional_masks_are_refused():
    with pytest.raises(ValueError, match=r"expected a \(N, H, W\) tensor, got shape \(4, 4\)"):
        Masks.full(torch.zeros(4, 4))
