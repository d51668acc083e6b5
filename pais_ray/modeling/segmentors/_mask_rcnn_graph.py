"""Mask R-CNN's prediction for one image as a graph that an exporter can trace, for any image size.

torchvision's post-processing branches in Python on the number of boxes: it chooses between two implementations of NMS
and pools level by level. The functions below compute the same with tensors only. `MaskRCNN.predict` keeps torchvision's
code, because the two may round differently; tests and every export compare them.

Legend: A anchors of all levels, R proposals, N detections, C classes without background, H x W px of the padded view.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, nms, roi_align

from pais_ray.modeling.backbones import LEVELS, NormalizePixels
from pais_ray.modeling.protocols import ExportGraph
from pais_ray.modeling.segmentors._mask_rcnn_heads import HALF_PIXEL, WeightedRoIHeads, WeightedRPN
from pais_ray.structures.batch import Views

FINEST, CANONICAL = 2, 4  # the level of P2; the level for boxes of the canonical size (FPN paper, Eq. 1)
LEVEL_MARGIN = 1e-6  # in levels: boxes on the border between two levels use the coarser one (torchvision)
SMALLEST_BOX = 1e-2  # px, smallest side of a detection (torchvision)


class MaskRCNNGraph(ExportGraph):
    """The graph over the layers of a Mask R-CNN. Masks are 28x28 and stretched over their windows."""

    def __init__(
        self, normalize: NormalizePixels, backbone: nn.Module, rpn: WeightedRPN, roi_heads: WeightedRoIHeads
    ) -> None:
        super().__init__()
        self.normalize, self.backbone, self.rpn, self.roi_heads = normalize, backbone, rpn, roi_heads

    def forward(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        features = self._features(images, size)
        objectness, deltas = self._anchor_outputs(features)
        proposals = decode_proposals(self.rpn, images, features, objectness, deltas, size)
        pooled = pool(self.roi_heads.box_roi_pool, features, proposals)
        class_logits, box_deltas = self.roi_heads.classify_pooled(pooled)
        boxes, labels, scores = decode_detections(self.roi_heads, class_logits, box_deltas, proposals, size)
        pooled = pool(self.roi_heads.mask_roi_pool, features, boxes)
        mask_logits, iou_logits = self.roi_heads.segment_pooled(pooled, labels)
        return {
            "boxes": boxes,
            "labels": labels - 1,
            "scores": scores,
            "ious": iou_logits.sigmoid(),
            "masks": mask_logits.sigmoid(),
            "windows": boxes + HALF_PIXEL,
            "proposals": proposals,
            "objectness": objectness,
            "deltas": deltas,
            "class_logits": class_logits,
            "box_deltas": box_deltas,
            "mask_logits": mask_logits,
            "iou_logits": iou_logits,
        }

    @torch.no_grad()
    def heads(self, images: Tensor, size: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The raw outputs, those after the proposals for the proposals and boxes of ``found``: a difference in the last
        bit may swap two proposals, and their rows could not be compared."""
        features = self._features(images, size)
        objectness, deltas = self._anchor_outputs(features)
        class_logits, box_deltas = self.roi_heads.classify(features, [found["proposals"]])
        mask_logits, iou_logits = self.roi_heads.segment(features, [found["boxes"]], found["labels"] + 1)
        return {
            "objectness": objectness,
            "deltas": deltas,
            "class_logits": class_logits,
            "box_deltas": box_deltas,
            "mask_logits": mask_logits,
            "iou_logits": iou_logits,
        }

    def _features(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.backbone(self.normalize(dataclasses.replace(Views.of(images), sizes=size)))
        return features

    def _anchor_outputs(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Objectness (A,) and deltas (A, 4) of all anchors."""
        objectness, deltas = concat_box_prediction_layers(*self.rpn.head(list(features.values())))
        return objectness.flatten(), deltas


def decode_proposals(
    rpn: WeightedRPN, images: Tensor, features: dict[str, Tensor], objectness: Tensor, deltas: Tensor, size: Tensor
) -> Tensor:
    """Proposals (R, 4), best first, from ``objectness`` (A,) and ``deltas`` (A, 4); ``size`` (1, 2) px."""
    levels = list(features.values())
    anchors_per_cell = rpn.anchor_generator.num_anchors_per_location()
    counts = [level.shape[-2] * level.shape[-1] * num for level, num in zip(levels, anchors_per_cell, strict=True)]
    anchors = rpn.anchor_generator(ImageList(images, [(0, 0)]), levels)[0]
    picked, level_of, start = [], [], 0
    for i, (scores, count) in enumerate(zip(objectness.split(counts), counts, strict=True)):
        best = scores.topk(torch.sym_min(count, rpn.pre_nms_top_n())).indices
        picked.append(best + start)
        level_of.append(torch.full_like(best, i))
        start += count
    index = torch.cat(picked)
    boxes = _clip(rpn.box_coder.decode_single(deltas[index], anchors[index]), size)
    large = _is_larger(boxes, rpn.min_size)
    boxes, scores, group = boxes[large], objectness[index][large].sigmoid(), torch.cat(level_of)[large]
    kept = _nms_by_group(group, boxes, scores, rpn.nms_thresh, size)[: rpn.post_nms_top_n()]
    return boxes[kept]


def decode_detections(
    heads: WeightedRoIHeads, logits: Tensor, deltas: Tensor, proposals: Tensor, size: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), labels (N,) in 1..C and scores (N,) of the detections, best first, from class ``logits``
    (R, 1 + C), box ``deltas`` (R, 4 * (1 + C)) and ``proposals`` (R, 4); ``size`` (1, 2) px."""
    classes = logits.shape[1]
    decoded = _clip(heads.box_coder.decode_single(deltas, proposals).reshape(-1, 4), size)
    boxes = decoded.reshape(-1, classes, 4)[:, 1:].reshape(-1, 4)
    scores = logits.softmax(dim=1)[:, 1:]
    labels = torch.arange(1, classes, device=logits.device).expand_as(scores).reshape(-1)
    scores = scores.reshape(-1)
    chosen = torch.where((scores > heads.score_thresh) & _is_larger(boxes, SMALLEST_BOX))[0]
    boxes, labels, scores = boxes[chosen], labels[chosen], scores[chosen]
    kept = _nms_by_group(labels, boxes, scores, heads.nms_thresh, size)[: heads.detections_per_img]
    return boxes[kept], labels[kept], scores[kept]


def pool(pooler: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """MultiScaleRoIAlign with tensors only: each of ``boxes`` (n, 4) is read from the level that fits its area."""
    sides = boxes[:, 2:] - boxes[:, :2]
    level = CANONICAL + torch.log2(sides.prod(dim=1).sqrt() / pooler.canonical_scale) + LEVEL_MARGIN
    level = level.floor().clamp(FINEST, FINEST + len(LEVELS) - 1)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    index = [torch.where(level == FINEST + i)[0] for i in range(len(LEVELS))]
    pooled = [
        roi_align(features[name], rois[members], pooler.output_size, 0.5 ** (FINEST + i), pooler.sampling_ratio)
        for i, (name, members) in enumerate(zip(LEVELS, index, strict=True))
    ]
    return torch.cat(pooled)[torch.cat(index).argsort()]


def _clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (n, 4) within ``size`` (1, 2) px."""
    return torch.minimum(boxes.clamp(min=0), size.flip(1).repeat(1, 2).to(boxes))


def _is_larger(boxes: Tensor, side: float) -> Tensor:
    """Mask (n,) of the ``boxes`` (n, 4) with no side below ``side`` px."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(dim=1)


def _nms_by_group(group: Tensor, boxes: Tensor, scores: Tensor, threshold: float, size: Tensor) -> Tensor:
    """Indices of the ``boxes`` (n, 4) left after NMS within each group, best first. The groups are shifted so that
    boxes of different groups do not overlap, as torchvision does for few boxes; all are within ``size`` (1, 2)."""
    shift = (group * (size.max() + 1)).to(boxes)
    return nms(boxes + shift[:, None], scores, threshold)
