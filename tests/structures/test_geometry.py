"""The 3x3 matrices, and the points and boxes that they transform."""

import math

import pytest
import torch

from pais_ray.structures import geometry


def some_matrix(seed):
    r = torch.rand(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return (
        geometry.translate(float(30 * r[0]), float(30 * r[1]))
        @ geometry.shear(float(r[2] / 2), float(r[3] / 2), (20.0, 10.0))
        @ geometry.rotate(float(180 * r[4]), (5.0, 7.0))
        @ geometry.scale(1.5 + float(r[5]), 0.7)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_matrix_times_its_inverse_is_the_identity(seed):
    matrix = some_matrix(seed)
    for product in (geometry.invert(matrix) @ matrix, matrix @ geometry.invert(matrix)):
        torch.testing.assert_close(product, geometry.identity(), atol=1e-9, rtol=0)


def test_invert_accepts_batches():
    stack = torch.stack([some_matrix(s) for s in range(6)]).reshape(2, 3, 3, 3)
    torch.testing.assert_close(geometry.invert(stack), torch.linalg.inv(stack), atol=1e-9, rtol=1e-9)


def test_a_product_equals_its_factors_one_after_the_other():
    first, second = some_matrix(1), some_matrix(2)
    points = torch.rand(10, 2, dtype=torch.float64) * 50
    one_by_one = geometry.transform_points(geometry.transform_points(points, first), second)
    torch.testing.assert_close(geometry.transform_points(points, second @ first), one_by_one)


def test_flip_is_its_own_inverse_and_mirrors_pixel_centers():
    flip = geometry.flip_horizontal(7)
    assert torch.equal(flip @ flip, geometry.identity())
    image = torch.arange(14).reshape(2, 7)
    for x in range(7):  # the center of column x moves to the column that flip() puts it in
        (there,) = geometry.transform_points(torch.tensor([[x + 0.5, 0.5]]), flip)[:, 0].tolist()
        assert image.flip(1)[0, math.floor(there)] == image[0, x]


def test_rotation_is_clockwise_on_the_screen_about_its_center():
    turn = geometry.rotate(90, (10.0, 20.0))
    points = torch.tensor([[10.0, 20.0], [15.0, 20.0], [10.0, 15.0]])
    there = geometry.transform_points(points, turn)
    torch.testing.assert_close(there, torch.tensor([[10.0, 20.0], [10.0, 25.0], [15.0, 20.0]]))


def test_shear_is_along_x_first_then_along_y():
    sheared = geometry.transform_points(torch.tensor([[0.0, 1.0]]), geometry.shear(0.5, 0.25, (0.0, 0.0)))
    torch.testing.assert_close(sheared, torch.tensor([[0.5, 1.125]]))  # x first: the new x moves y


def test_the_center_of_rotation_and_shear_stays_in_place():
    center = torch.tensor([[3.0, 4.0]])
    for matrix in (geometry.rotate(33, (3.0, 4.0)), geometry.shear(0.3, -0.4, (3.0, 4.0))):
        torch.testing.assert_close(geometry.transform_points(center, matrix), center)


@pytest.mark.parametrize("seed", range(5))
def test_a_transformed_box_is_the_envelope_of_its_corners(seed):
    boxes = torch.tensor([[1.0, 2.0, 11.0, 8.0], [0.0, 0.0, 4.0, 30.0]])
    moved_boxes = geometry.transform_boxes(boxes, some_matrix(seed))
    for box, there in zip(boxes, moved_boxes, strict=True):
        x1, y1, x2, y2 = box.tolist()
        corners = torch.tensor([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
        moved = geometry.transform_points(corners, some_matrix(seed))
        torch.testing.assert_close(there, torch.cat([moved.amin(0), moved.amax(0)]))


def test_zero_boxes_are_accepted():
    none = torch.zeros(0, 4)
    assert geometry.transform_boxes(none, some_matrix(0)).shape == (0, 4)
    assert geometry.clip_boxes(none, torch.tensor([10, 20])).shape == (0, 4)


def test_clip_boxes_takes_the_size_as_height_and_width():
    clipped = geometry.clip_boxes(torch.tensor([[-5.0, -5.0, 500.0, 500.0]]), torch.tensor([10, 20]))
    assert clipped.tolist() == [[0, 0, 20, 10]]
