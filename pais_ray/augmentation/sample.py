"""TODO docstring."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pais_ray.structures.batch import Predictions


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One decoded image, as the collate threads deliver it (CPU). Unlabeled ones have no truth."""

    image: Tensor  # (3, H, W) uint8 RGB, upright
    image_id: int
    row: int  # the global row g it came from
    slot: int  # its position in that row
    boxes: Tensor | None = None  # (N, 4) float XYXY px
    labels: Tensor | None = None  # (N,) int64 in 0..C-1
    masks: Tensor | None = None  # (N, H, W) uint8 {0, 1}
    scored: Predictions | None = None  # of an unlabeled image: masks from elsewhere, in its frame

    @classmethod
    def of(
        cls,
        image: np.ndarray,
        *,
        image_id: int,
        row: int = 0,
        slot: int = 0,
        boxes: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        masks: np.ndarray | None = None,
    ) -> Self:
        """From a decoded picture (H, W, 3) uint8 RGB and, for labeled ones, its truth as numpy arrays."""
        return cls(
            image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            image_id=image_id,
            row=row,
            slot=slot,
            boxes=None if boxes is None else torch.from_numpy(boxes),
            labels=None if labels is None else torch.from_numpy(labels),
            masks=None if masks is None else torch.from_numpy(masks),
        )
