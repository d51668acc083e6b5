"""One decoded image before augmentation."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pais_ray.structures.batch import Predictions


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One decoded image on the CPU. Unlabeled images have no boxes, labels and masks."""

    image: Tensor  # (3, H, W) uint8 RGB, upright
    image_id: int
    row: int  # global step row
    slot: int  # position in the step row
    boxes: Tensor | None = None  # (N, 4) float XYXY px
    labels: Tensor | None = None  # (N,) int64 in 0..C-1
    masks: Tensor | None = None  # (N, H, W) uint8 {0, 1}
    scored: Predictions | None = None  # of an unlabeled image: masks of data.pseudo_labels, in the frame of the image

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
        scored: Predictions | None = None,
    ) -> Self:
        """Build a sample from a decoded image (H, W, 3) uint8 RGB and, if it is labeled, numpy annotations."""
        return cls(
            image=torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            image_id=image_id,
            row=row,
            slot=slot,
            boxes=None if boxes is None else torch.from_numpy(boxes),
            labels=None if labels is None else torch.from_numpy(labels),
            masks=None if masks is None else torch.from_numpy(masks),
            scored=scored,
        )
