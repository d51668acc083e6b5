"""What the layers say to each other: views in, predictions out, targets back, weights inside the targets.

Legend: B images, N instances, P boxes asked of the masks, C classes, H x W pixels of *this* view.
Labels are contiguous, 0..C-1, without background. Boxes are (N, 4) XYXY px of the view they belong to;
pixel coordinates are continuous (see geometry.py).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor

from pais_ray.structures import geometry
from pais_ray.structures.masks import Masks

Normalizer = Literal["mean", "pos", "pos_neg", "weight_sum"]

T = TypeVar("T", "Predictions", "Targets", "Views")


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """What a segmentor sees in one image, best first."""

    boxes: Tensor  # (N, 4)
    labels: Tensor  # (N,) int64 in 0..C-1
    scores: Tensor  # (N,) in [0, 1]: c^h, the probability of the predicted class
    ious: Tensor  # (N,) in [0, 1]: s, the predicted IoU of the mask; ones without a mask-IoU branch
    masks: Masks
    # () bool: whether all was finite that the network computed for this image and those beside it. A threshold drops
    # what is not, and nobody would see why nothing is left. None: no network was asked.
    finite: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> "Predictions":
        return _select(self, index)

    def to(self, device: torch.device | str) -> "Predictions":
        return _move(self, device)

    def warp(self, matrix: Tensor, size: Tensor) -> "Predictions":
        """Carried by ``matrix`` (3, 3) to a view of ``size`` = (h, w) px; nothing is dropped."""
        boxes = geometry.clip_boxes(geometry.transform_boxes(self.boxes, matrix), size)
        return dataclasses.replace(self, boxes=boxes, masks=self.masks.warp(matrix))


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """What a segmentor shall learn from one image. Ground truth is a target whose weights are one."""

    boxes: Tensor  # (N, 4)
    labels: Tensor  # (N,) int64 in 0..C-1
    masks: Masks
    class_weight: Tensor = None  # type: ignore[assignment]  # (N,) defaults to ones, as the next three
    box_weight: Tensor = None  # type: ignore[assignment]  # (N,)
    mask_weight: Tensor = None  # type: ignore[assignment]  # (N,)
    proposal_weight: Tensor = None  # type: ignore[assignment]  # (N,) 0 keeps a box out of the RPN's loss
    negative_weight: float = 1.0  # of every background sample in the class loss
    normalizer: Normalizer = "mean"  # what the weighted sums are divided by, see losses.py

    def __post_init__(self) -> None:
        num = len(self.boxes)
        for name in ("class_weight", "box_weight", "mask_weight", "proposal_weight"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.ones(num, device=self.boxes.device))
            elif len(getattr(self, name)) != num:
                raise ValueError(f"Targets.{name}: expected {num} weights, one a box, got {len(getattr(self, name))}")
        if not (len(self.labels) == len(self.masks) == num):
            raise ValueError(
                f"Targets: {num} boxes, {len(self.labels)} labels and {len(self.masks)} masks; expected as many of each"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> "Targets":
        return _select(self, index)

    def to(self, device: torch.device | str) -> "Targets":
        return _move(self, device)

    def warp(self, matrix: Tensor, size: Tensor, min_size: float = 1.0) -> "Targets":
        """Carried by ``matrix`` (3, 3) to a view of ``size`` = (h, w) px. Boxes are the envelopes of the old
        ones, clipped; instances left with a side below ``min_size`` px are dropped."""
        boxes = geometry.clip_boxes(geometry.transform_boxes(self.boxes, matrix), size)
        sides = boxes[:, 2:] - boxes[:, :2]
        moved = dataclasses.replace(self, boxes=boxes, masks=self.masks.warp(matrix))
        return moved[(sides >= min_size).all(dim=1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """B images of one kind (labeled, weak or strong), padded bottom and right to a multiple of 32 px."""

    images: Tensor  # (B, 3, H, W) float in [0, 1], RGB
    sizes: Tensor  # (B, 2) int64: the valid (h, w) of each
    matrix: Tensor  # (B, 3, 3) float32: px of the decoded, upright original -> px of this view
    image_ids: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64: the global row g that each came from

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> "Views":
        """On ``device``, but for the ids, which stay where they are: nothing on the device needs them."""
        return dataclasses.replace(_move(self, device), image_ids=self.image_ids, rows=self.rows)

    @classmethod
    def of(cls, images: Tensor) -> Self:
        """Plain images (B, 3, H, W) as views of themselves: no padding, no transform."""
        num, _, height, width = images.shape
        index = torch.arange(num, device=images.device)
        sizes = torch.tensor([[height, width]], device=images.device).expand(num, 2)
        matrix = torch.eye(3, device=images.device).expand(num, 3, 3)
        return cls(images=images, sizes=sizes, matrix=matrix, image_ids=index, rows=index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rank's images for one step. ``weak`` and ``strong`` show the same images in the same order."""

    labeled: Views
    targets: list[Targets]
    weak: Views | None = None
    strong: Views | None = None
    scored: list[Predictions] | None = None  # masks from elsewhere in the weak frame: the teacher is not asked

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            labeled=self.labeled.to(device),
            targets=[t.to(device) for t in self.targets],
            weak=None if self.weak is None else self.weak.to(device),
            strong=None if self.strong is None else self.strong.to(device),
            scored=None if self.scored is None else [p.to(device) for p in self.scored],
        )


def _select(item: T, index: Tensor | slice) -> T:
    return _map(item, lambda value: value if isinstance(value, Tensor) and value.ndim == 0 else value[index])


def _move(item: T, device: torch.device | str) -> T:
    return _map(item, lambda v: v.to(device) if isinstance(v, Masks) else _to(v, device))


def _to(tensor: Tensor, device: torch.device | str) -> Tensor:
    # Towards the host a copy that does not wait could be read before it has arrived.
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")


def _map(item: T, function: Callable[[Any], Any]) -> T:
    fields = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    return dataclasses.replace(item, **{k: function(v) for k, v in fields.items() if isinstance(v, Tensor | Masks)})
