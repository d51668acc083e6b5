"""TODO docstring."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from pais_ray.structures import geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """N soft masks of one image, each on its own grid with its own affine to the view's pixels.

    One type serves 28x28-in-box, stride-4 and full-size masks. Carrying masks to another view multiplies
    matrices and touches no pixel; pixels are read once, at the resolution that is asked for.
    """

    grids: Tensor  # (N, h, w) in [0, 1]; bool and uint8 {0, 1} are accepted and read as float
    affine: Tensor  # (N, 3, 3) float32: grid px -> view px
    upright: bool = True  # no flip, rotation or shear in ``affine``: known without a look at the device

    @classmethod
    def full(cls, masks: Tensor) -> Self:
        """Full-size masks (N, H, W): the grid is the view."""
        return cls.strided(masks, 1)

    @classmethod
    def strided(cls, masks: Tensor, stride: float) -> Self:
        """Masks (N, H / stride, W / stride) whose cells are ``stride`` px of the view wide."""
        if masks.ndim != 3:
            raise ValueError(f"Masks: expected a (N, H, W) tensor, got shape {tuple(masks.shape)}")
        one = torch.diag(torch.tensor([stride, stride, 1.0], device=masks.device))
        return cls(grids=masks, affine=one.expand(masks.shape[0], 3, 3))

    @classmethod
    def in_boxes(cls, masks: Tensor, boxes: Tensor) -> Self:
        """Masks (N, h, w), each stretched over its own box (N, 4)."""
        affine = boxes.new_zeros(len(boxes), 3, 3)
        affine[:, 0, 0] = (boxes[:, 2] - boxes[:, 0]) / masks.shape[2]
        affine[:, 1, 1] = (boxes[:, 3] - boxes[:, 1]) / masks.shape[1]
        affine[:, 0, 2], affine[:, 1, 2], affine[:, 2, 2] = boxes[:, 0], boxes[:, 1], 1.0
        return cls(grids=masks, affine=affine)

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return dataclasses.replace(self, grids=self.grids[index], affine=self.affine[index])

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(
            self,
            grids=self.grids.to(device, non_blocking=True),
            affine=self.affine.to(device, non_blocking=True),
        )

    def warp(self, matrix: Tensor) -> Self:
        """The same masks in another view: ``matrix`` (3, 3) takes this view's px to that one's."""
        affine = geometry.compose(matrix.to(self.affine), self.affine)
        return dataclasses.replace(self, affine=affine, upright=False)

    def crop_resize(self, boxes: Tensor, size: int, index: Tensor | None = None) -> Tensor:
        """Soft masks (P, size, size) inside ``boxes`` (P, 4); ``index`` (P,) says whose mask each box wants.

        Upright masks go through RoIAlign, which averages every pixel under a cell and copies no grid; warped
        ones are sampled at up to 4x4 points a cell.
        """
        if index is None:
            index = torch.arange(len(boxes), device=boxes.device)
        return self._crop(boxes, (size, size), index)

    def to_grid(self, stride: int, size: tuple[int, int]) -> Tensor:
        """Soft masks (N, ceil(H / stride), ceil(W / stride)) of a view of ``size`` = (H, W) px."""
        rows, cols = -(-size[0] // stride), -(-size[1] // stride)
        whole = self.affine.new_tensor([0.0, 0.0, cols * stride, rows * stride])
        every = torch.arange(len(self), device=whole.device)
        return self._crop(whole.expand(len(self), 4), (rows, cols), every)

    def _crop(self, boxes: Tensor, shape: tuple[int, int], index: Tensor) -> Tensor:
        if len(boxes) == 0 or len(self) == 0:
            return boxes.new_zeros(len(boxes), *shape)
        if self.upright:
            shift, step = self.affine[index, :2, 2], self.affine[index][:, [0, 1], [0, 1]]
            in_grid = (boxes - shift.repeat(1, 2)) / step.repeat(1, 2)
            rois = torch.cat([index[:, None].to(in_grid), in_grid], dim=1)
            return roi_align(self.grids[:, None].to(in_grid), rois, shape, aligned=True)[:, 0]
        cells = Masks.in_boxes(boxes.new_zeros(len(boxes), *shape), boxes).affine
        return self._sample(cells, shape, index)

    def paste(self, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
        """Full-size bool masks (N, H, W). For evaluation and pictures, one image at a time, on the CPU:
        each mask is sampled in its own window only, and the loop over instances waits for the device."""
        height, width = size
        out = torch.zeros(len(self), height, width, dtype=torch.bool, device=self.grids.device)
        if len(self) == 0:
            return out
        rows, cols = self.grids.shape[1:]
        corners = self.affine.new_tensor([[0, 0], [cols, 0], [cols, rows], [0, rows]])
        spots = geometry.transform_points(corners[None], self.affine[:, None])  # (N, 4, 2)
        low, high = spots.amin(dim=1).floor().long().tolist(), spots.amax(dim=1).ceil().long().tolist()
        for i, ((x1, y1), (x2, y2)) in enumerate(zip(low, high, strict=True)):
            x1, y1, x2, y2 = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
            if x2 <= x1 or y2 <= y1:
                continue
            window = geometry.translate(x1, y1).to(self.affine)[None]
            soft = self[i : i + 1]._sample(window, (y2 - y1, x2 - x1), torch.zeros(1, dtype=torch.long), dense=True)
            out[i, y1:y2, x1:x2] = soft[0] > threshold
        return out

    def _sample(self, cells: Tensor, shape: tuple[int, int], index: Tensor, dense: bool = False) -> Tensor:
        """Soft values (P, *shape) at cells whose affine (P, 3, 3) leads to view px; zero outside the grids."""
        rows, cols = self.grids.shape[1:]
        # How many points a cell is averaged over: from shapes alone, because scales live on the device.
        points = 1 if dense else min(4, max(1, round(max(rows / shape[0], cols / shape[1]))))
        height, width = shape[0] * points, shape[1] * points
        to_grid = geometry.compose(geometry.invert(self.affine)[index], cells)
        ys = (torch.arange(height, device=cells.device, dtype=cells.dtype) + 0.5) / points
        xs = (torch.arange(width, device=cells.device, dtype=cells.dtype) + 0.5) / points
        x = (
            to_grid[:, 0, 0, None, None] * xs
            + to_grid[:, 0, 1, None, None] * ys[:, None]
            + to_grid[:, 0, 2, None, None]
        )
        y = (
            to_grid[:, 1, 0, None, None] * xs
            + to_grid[:, 1, 1, None, None] * ys[:, None]
            + to_grid[:, 1, 2, None, None]
        )
        where = torch.stack([2 * x / cols - 1, 2 * y / rows - 1], dim=-1)  # (P, height, width, 2)
        source = self.grids[index][:, None].to(where)
        soft = F.grid_sample(source, where, mode="bilinear", padding_mode="zeros", align_corners=False)
        return F.avg_pool2d(soft, points)[:, 0] if points > 1 else soft[:, 0]
