"""3x3 matrices between pixel frames, and the points and boxes that they transform.

Coordinates are continuous: pixel (row i, column j) covers [j, j+1) x [i, i+1) and its center is
(j + 0.5, i + 0.5), so a flip is x -> W - x. Matrices act on column vectors (x, y, 1) and are named by
direction: ``weak_to_strong``. Boxes are (N, 4) XYXY in pixels.
"""

import math

import torch
from torch import Tensor


def identity() -> Tensor:
    """The 3x3 identity matrix, float64."""
    return torch.eye(3, dtype=torch.float64)


def scale(sx: float, sy: float) -> Tensor:
    """x -> sx * x, y -> sy * y."""
    return torch.diag(torch.tensor([sx, sy, 1.0], dtype=torch.float64))


def translate(tx: float, ty: float) -> Tensor:
    """x -> x + tx, y -> y + ty, in px."""
    matrix = identity()
    matrix[0, 2], matrix[1, 2] = tx, ty
    return matrix


def flip_horizontal(width: float) -> Tensor:
    """x -> width - x. The matrix is its own inverse."""
    matrix = identity()
    matrix[0, 0], matrix[0, 2] = -1.0, width
    return matrix


def rotate(degrees: float, center: tuple[float, float]) -> Tensor:
    """Rotation about ``center`` (x, y); positive is clockwise on the screen, because y points down."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
    return about(turn, center)


def shear(factor_x: float, factor_y: float, center: tuple[float, float]) -> Tensor:
    """Shear along x by ``factor_x`` then along y by ``factor_y``, both about ``center`` (x, y)."""
    along_x = torch.tensor([[1, factor_x, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    along_y = torch.tensor([[1, 0, 0], [factor_y, 1, 0], [0, 0, 1]], dtype=torch.float64)
    return about(along_y @ along_x, center)


def about(matrix: Tensor, center: tuple[float, float]) -> Tensor:
    """``matrix`` applied about ``center`` (x, y) instead of the origin."""
    return translate(*center) @ matrix @ translate(-center[0], -center[1])


def compose(first: Tensor, second: Tensor) -> Tensor:
    """``first @ second`` of matrices (..., 3, 3) in their own precision. Autocast and TF32 would reduce ``@`` to three
    digits, which is an error of several pixels."""
    return (first[..., :, :, None] * second[..., None, :, :]).sum(dim=-2)


def invert(matrix: Tensor) -> Tensor:
    """Inverse of affine matrices (..., 3, 3), in closed form, without a solver call or a wait for the device."""
    a, b, tx = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 0, 2]
    c, d, ty = matrix[..., 1, 0], matrix[..., 1, 1], matrix[..., 1, 2]
    det = a * d - b * c
    rows = torch.stack(
        [d, -b, b * ty - d * tx, -c, a, c * tx - a * ty, torch.zeros_like(a), torch.zeros_like(a), det],
        dim=-1,
    )
    return (rows / det[..., None]).reshape(matrix.shape)


def transform_points(points: Tensor, matrix: Tensor) -> Tensor:
    """Points (..., 2) xy transformed by one matrix (3, 3) or by matrices that broadcast as (..., 3, 3)."""
    matrix = matrix.to(points)
    return (matrix[..., :2, :2] * points[..., None, :]).sum(dim=-1) + matrix[..., :2, 2]


def transform_boxes(boxes: Tensor, matrix: Tensor) -> Tensor:
    """Axis-aligned envelope (N, 4) of the four transformed corners of each box, as in the released code."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    moved = transform_points(corners, matrix)
    return torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)


def clip_boxes(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes clipped to a view of ``size`` = (h, w) px."""
    height, width = size.to(boxes).unbind()
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    zero = boxes.new_zeros(())
    return torch.stack(
        [x1.clamp(zero, width), y1.clamp(zero, height), x2.clamp(zero, width), y2.clamp(zero, height)], dim=1
    )
