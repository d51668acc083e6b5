"""Overlays show masks, boxes and tags where they are, and leave the rest of the image unchanged."""

import numpy as np
import pytest

from pais_ray.figures import overlay

GRAY = np.full((96, 128, 3), 128, dtype=np.uint8)


def instances(*boxes, size=(96, 128)):
    """Boxes (N, 4) and masks (N, H, W) that fill them."""
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    return np.array(boxes, dtype=np.float32).reshape(-1, 4), masks


def draw(boxes, masks, image=GRAY, readable=0):
    num = len(boxes)
    return overlay.draw_instances(
        image, boxes, np.zeros(num, int), np.linspace(0.9, 0.5, num), masks, ["cat"], readable
    )


def tinted(background, index):
    return (np.array(background) * 0.6 + np.array(overlay.instance_color(index)) * 0.4).astype(np.uint8)


def test_masks_are_tinted_in_their_color_and_the_rest_is_unchanged():
    boxes, masks = instances((20, 40, 60, 80), (80, 50, 120, 90))
    before = GRAY.copy()
    image = draw(boxes, masks)
    assert (before == GRAY).all()
    assert image.shape == GRAY.shape
    assert image.dtype == np.uint8
    for i, (x, y) in enumerate([(40, 60), (100, 70)]):
        assert (image[y, x] == tinted((128, 128, 128), i)).all()
    assert (image[92:, :70] == 128).all()
    assert (image[:25] == 128).all()


def test_the_outline_of_a_mask_is_opaque():
    boxes, masks = instances((20, 40, 60, 80))
    masks[0, :, :30] = False  # away from the box, whose border has the same color
    image = draw(boxes, masks)
    assert (image[60, 30] == overlay.instance_color(0)).all()
    assert (image[60, 28] == 128).all()
    assert (image[60, 32] == tinted((128, 128, 128), 0)).all()


def test_small_masks_stay_visible_on_large_ones_whatever_their_score():
    boxes, masks = instances((50, 50, 60, 60), (10, 10, 120, 90))
    image = draw(boxes, masks)
    large = tinted((128, 128, 128), 1)
    assert (image[80, 100] == large).all()
    assert (image[55, 55] == tinted(large, 0)).all()
    swapped = draw(boxes[::-1], masks[::-1])
    large = tinted((128, 128, 128), 0)
    assert (swapped[55, 55] == tinted(large, 1)).all()


@pytest.mark.parametrize(("readable", "factor"), [(0, 1), (128, 1), (129, 2), (500, 4), (512, 4)])
def test_small_images_are_enlarged_with_their_instances(readable, factor):
    boxes, masks = instances((20, 40, 60, 80))
    masks[0, :, :30] = masks[0, 70:] = False  # smaller than the box, whose border has the same color
    image = np.zeros((96, 128, 3), np.uint8)
    image[:, 64:] = 200  # the border between the halves must stay in the middle
    drawn = draw(boxes, masks, image, readable)
    assert drawn.shape == (96 * factor, 128 * factor, 3)
    half = 64 * factor
    assert (drawn[90 * factor, : half - 2 * factor] == 0).all()
    assert (drawn[90 * factor, half + 2 * factor :] == 200).all()
    assert (drawn[60 * factor, 40 * factor] == tinted((0, 0, 0), 0)).all()
    color = overlay.instance_color(0)
    rows, columns = np.nonzero((drawn[41 * factor :] == color).all(axis=2))
    assert (columns.min(), columns.max()) == (20 * factor, 60 * factor - 1)
    assert rows.max() + 41 * factor == 80 * factor - 1


@pytest.mark.parametrize(
    ("box", "visible"),  # and pixels (x, y) of its border or tag that are inside the image
    [
        ((0, 0, 128, 96), [(0, 95), (127, 95), (127, 50), (64, 95)]),
        ((-5, -5, 10, 10), [(0, 0)]),
        ((120, 90, 140, 120), [(120, 91), (120, 95), (127, 90)]),
        ((30, 30, 30, 30), [(30, 30)]),
        ((200, 200, 220, 220), [(127, 95)]),
    ],
)
def test_boxes_across_outside_and_empty_are_drawn_as_far_as_they_are_visible(box, visible):
    image = draw(np.array([box], dtype=np.float32), np.zeros((1, 96, 128), dtype=bool))
    assert image.shape == GRAY.shape
    color = overlay.instance_color(0)
    for x, y in visible:
        assert (image[y, x] == color).all(), (x, y)
    plate = (image == color).all(axis=2).sum()
    assert plate > 200, "the tag is inside the image"
    unchanged = (image == 128).all(axis=2).sum()
    assert unchanged > 0.7 * 96 * 128
    assert 96 * 128 - plate - unchanged > 40, "the tag has text"


def test_an_image_without_instances_is_unchanged():
    boxes, masks = instances()
    assert (draw(boxes, masks) == GRAY).all()


def test_ground_truth_has_tags_without_scores():
    boxes, masks = instances((20, 40, 60, 80))
    labels = np.zeros(1, int)
    without = overlay.draw_instances(GRAY, boxes, labels, None, masks, ["cat"], 0)
    score = overlay.draw_instances(GRAY, boxes, labels, np.array([0.9]), masks, ["cat"], 0)
    longer = overlay.draw_instances(GRAY, boxes, labels, None, masks, ["cat 0.90"], 0)
    assert (score == longer).all()
    assert (without != score).any()


def test_colors_of_instances_differ():
    colors = np.array([overlay.instance_color(i) for i in range(30)]).astype(int)
    distance = np.abs(colors[:, None] - colors[None]).sum(-1) + 1000 * np.eye(30, dtype=int)
    assert distance.min() > 20
    near = [np.abs(colors[i] - colors[j]).sum() for i in range(30) for j in range(i + 1, min(i + 4, 30))]
    assert min(near) > 100
