"""Views, predictions, targets and batches: indexing, moving and warping."""

import pytest
import torch

from pais_ray.structures import geometry
from pais_ray.structures.batch import Batch, Predictions, Targets, Views
from pais_ray.structures.masks import Masks
from tests.structures.test_masks import SIZE, discs

WEIGHTS = ("class_weight", "box_weight", "mask_weight", "proposal_weight")


@pytest.fixture
def targets():
    masks, boxes = discs()
    return Targets.ground_truth(boxes=boxes, labels=torch.tensor([3, 1, 2]), masks=Masks.full(masks))


@pytest.fixture
def predictions():
    masks, boxes = discs()
    ones = torch.ones(3)
    return Predictions(boxes=boxes, labels=torch.zeros(3), scores=ones, ious=ones, masks=Masks.full(masks))


def test_ground_truth_has_unit_weights(targets):
    for name in WEIGHTS:
        assert torch.equal(getattr(targets, name), torch.ones(3))
    assert targets.negative_weight == 1.0


def test_indexing_filters_every_field(targets):
    kept = targets[torch.tensor([True, False, True])]
    assert len(kept) == len(kept.masks) == 2
    assert kept.labels.tolist() == [3, 2]
    assert all(len(getattr(kept, name)) == 2 for name in WEIGHTS)


def test_fields_of_different_length_are_refused(targets):
    with pytest.raises(ValueError, match="3 boxes, 2 labels and 3 masks"):
        Targets.ground_truth(boxes=targets.boxes, labels=torch.tensor([1, 2]), masks=targets.masks)
    for name in WEIGHTS:
        with pytest.raises(ValueError, match=rf"Targets\.{name}: expected 3 weights, one per box, got 2"):
            Targets(**{**vars(targets), name: torch.ones(2)})


def test_targets_outside_the_new_view_are_dropped_with_their_weights(targets):
    moved = targets.warp(geometry.translate(-66, 0), torch.tensor(SIZE))  # the first disc ends at x = 65
    assert moved.labels.tolist() == [1, 2]
    assert len(moved.class_weight) == len(moved.masks) == 2
    assert (moved.boxes[:, 0] == 0).all()


def test_warped_predictions_are_never_dropped(predictions):
    moved = predictions.warp(geometry.translate(-66, 0), torch.tensor(SIZE))
    assert len(moved) == 3
    assert moved[0:1].boxes[:, 2].item() == 0
    assert torch.equal(moved.masks.paste(SIZE)[1, :, :-66], discs()[0][1, :, 66:])


def test_warping_keeps_float32_under_autocast():
    boxes = torch.tensor([[10.3, 20.7, 300.1, 400.9]])
    masks = Masks.in_boxes(torch.rand(1, 28, 28), boxes)
    targets = Targets.ground_truth(boxes=boxes, labels=torch.tensor([0]), masks=masks)
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


def test_plain_images_become_views_without_padding_or_transform():
    views = Views.of(torch.rand(2, 3, 40, 50))
    assert len(views) == 2
    assert views.sizes.tolist() == [[40, 50]] * 2
    assert torch.equal(views.matrix[1], torch.eye(3))


def test_a_batch_moves_to_a_device_without_the_ids(targets, predictions):
    moved = Batch(labeled=Views.of(torch.rand(1, 3, 96, 128)), targets=[targets], scored=[predictions]).to("meta")
    assert moved.labeled.images.is_meta
    assert not moved.labeled.rows.is_meta
    assert not moved.labeled.image_ids.is_meta
    assert moved.targets[0].masks.affine.is_meta
    assert moved.targets[0].class_weight.is_meta
    assert moved.scored is not None
    assert moved.scored[0].masks.grids.is_meta
    assert moved.weak is None
