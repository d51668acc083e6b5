"""Reading the pixels of masks whose grids have affine matrices to the view.

Legend: N masks of rows x cols cells, P windows in the view.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from pais_ray.structures import geometry

MAX_POINTS = 4  # sample points per cell and axis


def box_affine(boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Matrices (P, 3, 3) from px of a grid of ``shape`` = (rows, cols) to px of the view, for the grid stretched over
    each of ``boxes`` (P, 4)."""
    affine = boxes.new_zeros(len(boxes), 3, 3)
    affine[:, 0, 0] = (boxes[:, 2] - boxes[:, 0]) / shape[1]
    affine[:, 1, 1] = (boxes[:, 3] - boxes[:, 1]) / shape[0]
    affine[:, 0, 2], affine[:, 1, 2], affine[:, 2, 2] = boxes[:, 0], boxes[:, 1], 1.0
    return affine


def crop_upright(grids: Tensor, affine: Tensor, boxes: Tensor, shape: tuple[int, int], index: Tensor) -> Tensor:
    """Soft values (P, *shape) inside ``boxes`` (P, 4) of masks that are only scaled and shifted: RoIAlign averages
    every pixel under a cell and copies no grid. ``index`` (P,) is the mask of each box."""
    shift, step = affine[index, :2, 2], affine[index][:, [0, 1], [0, 1]]
    in_grid = (boxes - shift.repeat(1, 2)) / step.repeat(1, 2)
    rois = torch.cat([index[:, None].to(in_grid), in_grid], dim=1)
    return roi_align(grids[:, None].to(in_grid), rois, shape, aligned=True)[:, 0]


def sample(
    grids: Tensor, affine: Tensor, cells: Tensor, shape: tuple[int, int], index: Tensor, points: int | None = None
) -> Tensor:
    """Soft values (P, *shape) of cells whose matrices ``cells`` (P, 3, 3) lead to px of the view, zero outside the
    grids. ``index`` (P,) is the mask of each window. A cell is the mean of ``points`` x ``points`` samples, by default
    as many as it covers cells of the grid, at most 4 x 4."""
    rows, cols = grids.shape[1:]
    if points is None:  # from the shapes alone, because scales are on the device
        points = min(MAX_POINTS, max(1, round(max(rows / shape[0], cols / shape[1]))))
    height, width = shape[0] * points, shape[1] * points
    to_grid = geometry.compose(geometry.invert(affine)[index], cells)[..., None, None]
    ys = (torch.arange(height, device=cells.device, dtype=cells.dtype) + 0.5) / points
    xs = (torch.arange(width, device=cells.device, dtype=cells.dtype) + 0.5) / points
    x = to_grid[:, 0, 0] * xs + to_grid[:, 0, 1] * ys[:, None] + to_grid[:, 0, 2]
    y = to_grid[:, 1, 0] * xs + to_grid[:, 1, 1] * ys[:, None] + to_grid[:, 1, 2]
    where = torch.stack([2 * x / cols - 1, 2 * y / rows - 1], dim=-1)  # (P, height, width, 2)
    source = grids[index][:, None].to(where)
    soft = F.grid_sample(source, where, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(soft, points)[:, 0] if points > 1 else soft[:, 0]


def windows(grids: Tensor, affine: Tensor, size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The pixel window (x1, y1, x2, y2) that each mask covers in a view of ``size`` = (H, W) px; empty if outside."""
    rows, cols = grids.shape[1:]
    corners = affine.new_tensor([[0, 0], [cols, 0], [cols, rows], [0, rows]])
    spots = geometry.transform_points(corners[None], affine[:, None])  # (N, 4, 2)
    low, high = spots.amin(dim=1).floor().long().tolist(), spots.amax(dim=1).ceil().long().tolist()
    return [
        (max(x1, 0), max(y1, 0), min(x2, size[1]), min(y2, size[0]))
        for (x1, y1), (x2, y2) in zip(low, high, strict=True)
    ]


def read_window(grid: Tensor, affine: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    """Soft values (y2 - y1, x2 - x1) of one mask at the centers of all pixels of ``window`` = (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = window
    cells = geometry.translate(x1, y1).to(affine)[None]
    return sample(grid[None], affine[None], cells, (y2 - y1, x2 - x1), torch.zeros(1, dtype=torch.long), points=1)[0]
