"""Laws of Masks and of the records that flow between the layers."""

import pytest
import torch

from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions, Targets, Views
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


def test_pasting_full_masks_gives_them_back():
    masks, _ = discs()
    assert torch.equal(Masks.full(masks).paste(SIZE), masks)


def test_masks_at_low_resolution_paste_to_nearly_the_full_ones():
    masks, boxes = discs()
    full = Masks.full(masks)
    assert iou(Masks.in_boxes(full.crop_resize(boxes, 28), boxes).paste(SIZE), masks) > 0.95
    assert iou(Masks.strided(full.to_grid(4, SIZE), 4).paste(SIZE), masks) > 0.95


def test_pasting_cuts_at_the_border_and_leaves_what_is_outside_empty():
    masks, _ = discs()
    moved = Masks.full(masks).warp(geometry.translate(60, 0)).paste(SIZE)
    assert torch.equal(moved[:, :, 60:], masks[:, :, :-60])
    assert not moved[:, :, :60].any()
    assert not Masks.full(masks).warp(geometry.translate(500, 500)).paste(SIZE).any()


def test_warping_twice_is_warping_by_the_product():
    masks, _ = discs()
    a, b = geometry.rotate(20, (64, 48)), geometry.scale(1.3, 0.9)
    torch.testing.assert_close(Masks.full(masks).warp(a).warp(b).affine, Masks.full(masks).warp(b @ a).affine)


def test_warping_there_and_back_keeps_the_masks():
    masks, _ = discs()
    matrix = geometry.rotate(25, (64, 48)) @ geometry.shear(0.2, 0.1, (64, 48))
    there = Masks.full(masks).warp(matrix)
    assert torch.equal(there.warp(geometry.invert(matrix)).paste(SIZE), masks)


def test_a_flip_by_matrix_is_a_flip_of_the_grid():
    masks, _ = discs()
    assert torch.equal(Masks.full(masks).warp(geometry.flip_horizontal(SIZE[1])).paste(SIZE), masks.flip(-1))


@pytest.mark.parametrize("upright", [True, False])
def test_a_crop_shows_the_window_it_was_asked_for(upright):
    masks, _ = discs()
    full = Masks.full(masks) if upright else Masks.full(masks).warp(geometry.identity())
    window = torch.tensor([[10.0, 20.0, 66.0, 76.0]]).expand(3, 4)  # 56 px: each of 28 cells is 2 x 2 px
    expected = masks[:, 20:76, 10:66].float().reshape(3, 28, 2, 28, 2).mean(dim=(2, 4))
    torch.testing.assert_close(full.crop_resize(window, 28), expected, atol=0.3, rtol=0)
    assert (full.crop_resize(window, 28) - expected).abs().mean() < 0.01


def test_a_crop_is_the_same_from_upright_and_from_warped_masks():
    masks, boxes = discs()
    scaled = geometry.scale(1.5, 0.8).float()
    boxes = geometry.transform_boxes(boxes, scaled)
    warped = Masks.full(masks).warp(scaled)
    upright = Masks(grids=masks, affine=scaled.expand(3, 3, 3))
    assert (warped.crop_resize(boxes, 28) - upright.crop_resize(boxes, 28)).abs().mean() < 0.02


def test_a_crop_can_ask_one_mask_for_many_boxes():
    masks, boxes = discs()
    full = Masks.full(masks)
    index, boxes = torch.tensor([2, 0, 2, 1]), boxes[[0, 0, 1, 2]]
    many = full.crop_resize(boxes, 14, index)
    one_by_one = [full[i : i + 1].crop_resize(b[None], 14)[0] for i, b in zip(index, boxes, strict=True)]
    torch.testing.assert_close(many, torch.stack(one_by_one))


def test_a_stride_grid_averages_the_pixels_of_a_cell():
    masks, _ = discs()
    cells = masks.float().reshape(3, 24, 4, 32, 4).mean(dim=(2, 4))
    torch.testing.assert_close(Masks.full(masks).to_grid(4, SIZE), cells, atol=1e-5, rtol=0)


def test_a_stride_grid_covers_the_last_pixels():
    assert Masks.full(torch.ones(1, 10, 13)).to_grid(4, (10, 13)).shape == (1, 3, 4)


def test_no_masks_are_masks_too():
    none = Masks.full(torch.zeros(0, *SIZE))
    assert len(none) == 0
    assert none.warp(geometry.identity()).paste(SIZE).shape == (0, *SIZE)
    assert none.crop_resize(torch.zeros(0, 4), 28).shape == (0, 28, 28)
    assert none.to_grid(4, SIZE).shape == (0, 24, 32)


def test_masks_of_two_dimensions_are_refused():
    with pytest.raises(ValueError, match=r"expected a \(N, H, W\) tensor, got shape \(4, 4\)"):
        Masks.full(torch.zeros(4, 4))


def targets():
    masks, boxes = discs()
    return Targets(boxes=boxes, labels=torch.tensor([3, 1, 2]), masks=Masks.full(masks))


def test_truth_is_a_target_whose_weights_are_one():
    truth = targets()
    for name in ("class_weight", "box_weight", "mask_weight", "proposal_weight"):
        assert torch.equal(getattr(truth, name), torch.ones(3))
    assert truth.negative_weight == 1.0


def test_indexing_filters_every_field():
    kept = targets()[torch.tensor([True, False, True])]
    assert len(kept) == len(kept.masks) == len(kept.class_weight) == 2
    assert kept.labels.tolist() == [3, 2]


def test_fields_of_different_length_are_refused():
    masks, boxes = discs()
    with pytest.raises(ValueError, match="3 boxes, 2 labels and 3 masks"):
        Targets(boxes=boxes, labels=torch.tensor([1, 2]), masks=Masks.full(masks))
    with pytest.raises(ValueError, match=r"Targets\.mask_weight: expected 3 weights"):
        Targets(boxes=boxes, labels=torch.zeros(3), masks=Masks.full(masks), mask_weight=torch.ones(2))


def test_targets_that_leave_the_view_are_dropped_with_their_weights():
    truth = targets()
    moved = truth.warp(geometry.translate(-66, 0), torch.tensor(SIZE))  # the first disc ends at x = 65
    assert moved.labels.tolist() == [1, 2]
    assert len(moved.class_weight) == len(moved.masks) == 2
    assert (moved.boxes[:, 0] == 0).all()


def test_predictions_are_carried_and_none_is_dropped():
    masks, boxes = discs()
    seen = Predictions(
        boxes=boxes, labels=torch.zeros(3), scores=torch.ones(3), ious=torch.ones(3), masks=Masks.full(masks)
    )
    gone = seen.warp(geometry.translate(-66, 0), torch.tensor(SIZE))
    assert len(gone) == 3
    assert gone[0:1].boxes[:, 2].item() == 0
    assert torch.equal(gone.masks.paste(SIZE)[1, :, :-66], masks[1, :, 66:])


def test_plain_images_are_views_of_themselves():
    views = Views.of(torch.rand(2, 3, 40, 50))
    assert len(views) == 2
    assert views.sizes.tolist() == [[40, 50]] * 2
    assert torch.equal(views.matrix[1], torch.eye(3))


def test_a_batch_moves_whole():
    batch = Batch(labeled=Views.of(torch.rand(1, 3, 96, 128)), targets=[targets()])
    moved = batch.to("meta")
    assert moved.labeled.images.is_meta
    assert moved.targets[0].masks.affine.is_meta
    assert moved.targets[0].class_weight.is_meta
    assert moved.weak is None


def test_autocast_does_not_cost_geometry_its_precision():
    boxes = torch.tensor([[10.3, 20.7, 300.1, 400.9]])
    targets = Targets(boxes=boxes, labels=torch.tensor([0]), masks=Masks.in_boxes(torch.rand(1, 28, 28), boxes))
    matrix = geometry.translate(701.3, 503.7) @ geometry.rotate(20, (100, 100))
    size = torch.tensor([1200, 1200])
    plain = targets.warp(matrix, size)
    with torch.autocast("cpu", torch.bfloat16):
        cast = targets.warp(matrix, size)
        crops = cast.masks.crop_resize(cast.boxes, 28)
        composed = geometry.compose(matrix.float(), matrix.float())
    assert cast.boxes.dtype == cast.masks.affine.dtype == composed.dtype == torch.float32
    torch.testing.assert_close(cast.boxes, plain.boxes)
    torch.testing.assert_close(crops, plain.masks.crop_resize(plain.boxes, 28))
