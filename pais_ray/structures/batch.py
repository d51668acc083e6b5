"""The records that the layers exchange: views go in, predictions come out, targets go back with the weights inside.

Legend: B images, N instances of one image, C classes, H x W pixels of *this* view.
Labels are contiguous, 0..C-1, without background. Boxes are (N, 4) XYXY in px of the view they belong to;
pixel coordinates are continuous (see geometry.py).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from pais_ray.structures import geometry
from pais_ray.structures.masks import Masks, move

Normalizer = Literal["mean", "pos", "pos_neg", "weight_sum"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Instances:
    """N instances of one image. Every field has one entry per instance, and indexing filters all of them."""

    boxes: Tensor  # (N, 4)
    labels: Tensor  # (N,) int64 in 0..C-1
    masks: Masks

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return self._map(lambda value: value if value.ndim == 0 else value[index], lambda masks: masks[index])

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda value: move(value, device), lambda masks: masks.to(device))

    def warp(self, matrix: Tensor, size: Tensor) -> Self:
        """The instances in another view of ``size`` = (h, w) px: ``matrix`` (3, 3) maps px of this view to px of that
        one. Boxes become the envelopes of the transformed ones, clipped to the view. Nothing is dropped."""
        boxes = geometry.clip_boxes(geometry.transform_boxes(self.boxes, matrix), size)
        return dataclasses.replace(self, boxes=boxes, masks=self.masks.warp(matrix))

    def _map(self, of_tensor: Callable[[Tensor], Tensor], of_masks: Callable[[Masks], Masks]) -> Self:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: of_tensor(value) for name, value in fields.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors, masks=of_masks(self.masks))


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions(Instances):
    """The instances that a segmentor finds in one image, best first."""

    scores: Tensor  # (N,) in [0, 1]: c^h, the probability of the predicted class
    ious: Tensor  # (N,) in [0, 1]: s, the predicted IoU of the mask; ones without a mask-IoU branch
    # () bool: whether all network outputs for this image and the others of its batch are finite. A score threshold
    # drops values that are not, so the failure would go unnoticed. None if no network was run.
    finite: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets(Instances):
    """The instances that a segmentor learns from in one image, with the weight of each in every loss."""

    class_weight: Tensor  # (N,)
    box_weight: Tensor  # (N,)
    mask_weight: Tensor  # (N,)
    proposal_weight: Tensor  # (N,) 0 excludes a box from the losses of the RPN
    negative_weight: float = 1.0  # of every background sample in the class loss
    normalizer: Normalizer = "mean"  # the divisor of the weighted sums, see losses.py

    @classmethod
    def ground_truth(cls, *, boxes: Tensor, labels: Tensor, masks: Masks) -> Self:
        """Annotated instances: targets with all weights equal to one."""
        ones = torch.ones(len(boxes), device=boxes.device)
        return cls(
            boxes=boxes,
            labels=labels,
            masks=masks,
            class_weight=ones,
            box_weight=ones,
            mask_weight=ones,
            proposal_weight=ones,
        )

    def __post_init__(self) -> None:
        num = len(self.boxes)
        if not (len(self.labels) == len(self.masks) == num):
            raise ValueError(
                f"Targets: expected as many labels and masks as boxes, got {num} boxes, {len(self.labels)} labels and "
                f"{len(self.masks)} masks"
            )
        for name in ("class_weight", "box_weight", "mask_weight", "proposal_weight"):
            if len(getattr(self, name)) != num:
                raise ValueError(f"Targets.{name}: expected {num} weights, one per box, got {len(getattr(self, name))}")

    def warp(self, matrix: Tensor, size: Tensor, min_size: float = 1.0) -> Self:
        """As ``Instances.warp``, without the instances that are left with a side below ``min_size`` px."""
        moved = super().warp(matrix, size)
        sides = moved.boxes[:, 2:] - moved.boxes[:, :2]
        return moved[(sides >= min_size).all(dim=1)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Views:
    """B images of one kind (labeled, weak or strong), padded at the bottom and right to a multiple of 32 px."""

    images: Tensor  # (B, 3, H, W) float in [0, 1], RGB
    sizes: Tensor  # (B, 2) int64: (h, w) of each image without padding
    matrix: Tensor  # (B, 3, 3) float32: px of the decoded, upright original -> px of this view
    image_ids: Tensor  # (B,) int64
    rows: Tensor  # (B,) int64: the global row g of each image

    @classmethod
    def of(cls, images: Tensor) -> Self:
        """Plain images (B, 3, H, W) as views without padding and transform."""
        num, _, height, width = images.shape
        index = torch.arange(num, device=images.device)
        sizes = torch.tensor([[height, width]], device=images.device).expand(num, 2)
        matrix = torch.eye(3, device=images.device).expand(num, 3, 3)
        return cls(images=images, sizes=sizes, matrix=matrix, image_ids=index, rows=index)

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> Self:
        """The views on ``device``, except for ``image_ids`` and ``rows``: nothing on the device uses them."""
        return dataclasses.replace(
            self,
            images=move(self.images, device),
            sizes=move(self.sizes, device),
            matrix=move(self.matrix, device),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The images of one rank and micro-batch. ``weak`` and ``strong`` show the same images in the same order."""

    labeled: Views
    targets: list[Targets]
    weak: Views | None = None
    strong: Views | None = None
    scored: list[Predictions] | None = None  # given masks in the weak frame, used instead of the teacher's

    def to(self, device: torch.device | str) -> Self:
        return dataclasses.replace(
            self,
            labeled=self.labeled.to(device),
            targets=[t.to(device) for t in self.targets],
            weak=None if self.weak is None else self.weak.to(device),
            strong=None if self.strong is None else self.strong.to(device),
            scored=None if self.scored is None else [p.to(device) for p in self.scored],
        )
