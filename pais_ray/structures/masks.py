"""Soft masks of any resolution as one type."""

import dataclasses
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pais_ray.structures import _sampling, geometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Masks:
    """N soft masks of one image, each on its own grid with its own affine matrix to the pixels of the view.

    One type serves 28x28-in-box, stride-4 and full-size masks. Warping masks to another view multiplies the matrices
    and touches no pixel. Pixels are read once, at the requested resolution, by ``crop_resize``, ``to_grid`` or
    ``paste``.

    Legend: N masks of h x w cells, P boxes, H x W pixels of the view.
    """

    grids: Tensor  # (N, h, w) in [0, 1]; bool and uint8 {0, 1} are read as float
    affine: Tensor  # (N, 3, 3) float32: px of the grid -> px of the view
    upright: bool = True  # whether ``affine`` only scales and shifts, known without waiting for the device

    @classmethod
    def full(cls, masks: Tensor) -> Self:
        """Full-size masks (N, H, W): the grid is the view."""
        return cls.strided(masks, 1)

    @classmethod
    def strided(cls, masks: Tensor, stride: float) -> Self:
        """Masks (N, H / stride, W / stride) with cells ``stride`` px of the view wide."""
        if masks.ndim != 3:
            raise ValueError(f"Masks: expected a (N, H, W) tensor, got shape {tuple(masks.shape)}")
        one = torch.diag(torch.tensor([stride, stride, 1.0], device=masks.device))
        return cls(grids=masks, affine=one.expand(masks.shape[0], 3, 3))

    @classmethod
    def in_boxes(cls, masks: Tensor, boxes: Tensor) -> Self:
        """Masks (N, h, w), each stretched over its own box (N, 4)."""
        return cls(grids=masks, affine=_sampling.box_affine(boxes, (masks.shape[1], masks.shape[2])))

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return dataclasses.replace(self, grids=self.grids[index], affine=self.affine[index])

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(self, grids=move(self.grids, device), affine=move(self.affine, device))

    def warp(self, matrix: Tensor) -> Self:
        """The same masks in another view: ``matrix`` (3, 3) maps px of this view to px of that one."""
        affine = geometry.compose(matrix.to(self.affine), self.affine)
        return dataclasses.replace(self, affine=affine, upright=False)

    def crop_resize(self, boxes: Tensor, size: int, index: Tensor | None = None) -> Tensor:
        """Soft masks (P, size, size) inside ``boxes`` (P, 4); ``index`` (P,) is the mask that each box is cut from, by
        default the one of the same position."""
        if index is None:
            index = torch.arange(len(boxes), device=boxes.device)
        return self._crop(boxes, (size, size), index)

    def to_grid(self, stride: int, size: tuple[int, int]) -> Tensor:
        """Soft masks (N, ceil(H / stride), ceil(W / stride)) of a view of ``size`` = (H, W) px."""
        rows, cols = -(-size[0] // stride), -(-size[1] // stride)
        whole = self.affine.new_tensor([0.0, 0.0, cols * stride, rows * stride])
        index = torch.arange(len(self), device=whole.device)
        return self._crop(whole.expand(len(self), 4), (rows, cols), index)

    def paste(self, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
        """Full-size bool masks (N, H, W), for evaluation and figures. It loops over the masks and waits for the
        device: call it for one image at a time, on the CPU."""
        out = torch.zeros(len(self), *size, dtype=torch.bool, device=self.grids.device)
        for i, (x1, y1, x2, y2) in enumerate(_sampling.windows(self.grids, self.affine, size)):
            if x1 < x2 and y1 < y2:
                soft = _sampling.read_window(self.grids[i], self.affine[i], (x1, y1, x2, y2))
                out[i, y1:y2, x1:x2] = soft > threshold
        return out

    def _crop(self, boxes: Tensor, shape: tuple[int, int], index: Tensor) -> Tensor:
        if len(boxes) == 0 or len(self) == 0:
            return boxes.new_zeros(len(boxes), *shape)
        if self.upright:
            return _sampling.crop_upright(self.grids, self.affine, boxes, shape, index)
        return _sampling.sample(self.grids, self.affine, _sampling.box_affine(boxes, shape), shape, index)


def move(tensor: Tensor, device: torch.device | str) -> Tensor:
    """``tensor`` on ``device``; the host does not wait, except for copies to the CPU, which it could otherwise read
    before they have arrived."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")
