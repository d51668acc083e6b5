"""Mask R-CNN's prediction for one image as one graph of tensors, at any size: what an exporter can follow.

torchvision's post-processing decides in Python, by how many boxes there are; here tensors decide the same.

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

FINEST, CANONICAL = 2, 4  # level of P2; level that a box of the canonical size is read from (FPN's Eq. 1)
LEVEL_MARGIN = 1e-6  # torchvision's, in levels: sizes of exactly a power of two go up
SMALLEST_BOX = 1e-2  # px, a side of a detection (torchvision)


class MaskRCNNGraph(ExportGraph):
    """``forward`` is what is exported, ``heads`` what it is compared with."""

    def __init__(
        self, normalize: NormalizePixels, backbone: nn.Module, rpn: WeightedRPN, roi_heads: WeightedRoIHeads
    ) -> None:
        super().__init__()
        self.normalize, self.backbone, self.rpn, self.roi_heads = normalize, backbone, rpn, roi_heads

    def forward(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Detections, best first, and the raw outputs that ``heads`` has too, with the ``proposals`` (R, 4) between.

        ``images`` (1, 3, H, W) in [0, 1], H and W multiples of 32, of which ``size`` (1, 2) int64 is no padding.
        Detections: ``boxes`` (N, 4) px of the view, ``labels``, ``scores``, ``ious`` (N,), ``masks`` (N, h, w) in
        [0, 1], each stretched over its own of ``windows`` (N, 4) px.
        """
        features = self._features(images, size)
        proposals, dense = self._propose(images, list(features.values()), size)
        boxes, labels, scores, raw = self._detect(features, proposals, size)
        mask_logits, iou_logits = self._segment(features, boxes, labels)
        return {
            "boxes": boxes,
            "labels": labels - 1,
            "scores": scores,
            "ious": iou_logits.sigmoid(),
            "masks": mask_logits.sigmoid(),
            "windows": boxes + HALF_PIXEL,
            "proposals": proposals,
            **dense,
            **raw,
            "mask_logits": mask_logits,
            "iou_logits": iou_logits,
        }

    @torch.no_grad()
    def heads(self, images: Tensor, size: Tensor, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """The raw outputs as the segmentor makes them, the later ones for the proposals and boxes of ``found``: a
        difference in the last bit may swap two proposals, and their rows could not be compared."""
        features = self._features(images, size)
        objectness, deltas = concat_box_prediction_layers(*self.rpn.head(list(features.values())))
        class_logits, box_deltas = self.roi_heads._classify(features, [found["proposals"]])
        mask_logits, iou_logits = self.roi_heads._segment(features, [found["boxes"]], found["labels"] + 1)
        return {
            "objectness": objectness.flatten(),
            "deltas": deltas,
            "class_logits": class_logits,
            "box_deltas": box_deltas,
            "mask_logits": mask_logits,
            "iou_logits": iou_logits,
        }

    def _features(self, images: Tensor, size: Tensor) -> dict[str, Tensor]:
        features: dict[str, Tensor] = self.backbone(self.normalize(dataclasses.replace(Views.of(images), sizes=size)))
        return features

    def _propose(self, images: Tensor, levels: list[Tensor], size: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Proposals (R, 4), and objectness (A,) and deltas (A, 4) of all anchors."""
        per_level, delta_levels = self.rpn.head(levels)
        counts = [scores[0].numel() for scores in per_level]
        objectness, deltas = concat_box_prediction_layers(per_level, delta_levels)
        objectness = objectness.flatten()
        anchors = self.rpn.anchor_generator(ImageList(images, [(0, 0)]), levels)[0]
        picked, level, start = [], [], 0
        for i, (scores, count) in enumerate(zip(objectness.split(counts), counts, strict=True)):
            best = scores.topk(torch.sym_min(count, self.rpn.pre_nms_top_n())).indices
            picked.append(best + start)
            level.append(torch.full_like(best, i))
            start += count
        index = torch.cat(picked)
        boxes = _clip(self.rpn.box_coder.decode_single(deltas[index], anchors[index]), size)
        large = _larger(boxes, self.rpn.min_size)
        boxes, scores, group = boxes[large], objectness[index][large].sigmoid(), torch.cat(level)[large]
        kept = _nms_within(group, boxes, scores, self.rpn.nms_thresh, size)[: self.rpn.post_nms_top_n()]
        return boxes[kept], {"objectness": objectness, "deltas": deltas}

    def _detect(
        self, features: dict[str, Tensor], proposals: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Boxes (N, 4), labels (N,) with background 0, scores (N,), and the raw outputs for the proposals."""
        heads = self.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(_pool(heads.box_roi_pool, features, proposals)))
        classes = logits.shape[1]
        decoded = _clip(heads.box_coder.decode_single(deltas, proposals).reshape(-1, 4), size)
        boxes = decoded.reshape(-1, classes, 4)[:, 1:].reshape(-1, 4)
        scores = logits.softmax(dim=1)[:, 1:]
        labels = torch.arange(1, classes, device=logits.device).expand_as(scores).reshape(-1)
        scores = scores.reshape(-1)
        chosen = torch.where((scores > heads.score_thresh) & _larger(boxes, SMALLEST_BOX))[0]
        boxes, labels, scores = boxes[chosen], labels[chosen], scores[chosen]
        kept = _nms_within(labels, boxes, scores, heads.nms_thresh, size)[: heads.detections_per_img]
        return boxes[kept], labels[kept], scores[kept], {"class_logits": logits, "box_deltas": deltas}

    def _segment(self, features: dict[str, Tensor], boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.roi_heads.mask_head(_pool(self.roi_heads.mask_roi_pool, features, boxes))
        logits = self.roi_heads.mask_predictor(shared)
        own = logits[torch.arange(labels.shape[0], device=labels.device), labels]
        return own, self.roi_heads.mask_iou_head(shared)


def _clip(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (n, 4) within ``size`` (1, 2) px."""
    return torch.minimum(boxes.clamp(min=0), size.flip(1).repeat(1, 2).to(boxes))


def _larger(boxes: Tensor, side: float) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(dim=1)


def _nms_within(group: Tensor, boxes: Tensor, scores: Tensor, threshold: float, size: Tensor) -> Tensor:
    """Indices of what is left of boxes (n, 4), best first; boxes of other groups suppress none: each group is moved to
    a place of its own, as torchvision does for few boxes. ``size`` (1, 2) px holds all of them."""
    apart = (group * (size.max() + 1)).to(boxes)
    return nms(boxes + apart[:, None], scores, threshold)


def _pool(pooler: MultiScaleRoIAlign, features: dict[str, Tensor], boxes: Tensor) -> Tensor:
    """MultiScaleRoIAlign: each of ``boxes`` (n, 4) is read from the level that its area asks for."""
    sides = boxes[:, 2:] - boxes[:, :2]
    level = CANONICAL + torch.log2(sides.prod(dim=1).sqrt() / pooler.canonical_scale) + LEVEL_MARGIN
    level = level.floor().clamp(FINEST, FINEST + len(LEVELS) - 1)
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    index = [torch.where(level == FINEST + i)[0] for i in range(len(LEVELS))]
    pooled = [
        roi_align(features[name], rois[here], pooler.output_size, 0.5 ** (FINEST + i), pooler.sampling_ratio)
        for i, (name, here) in enumerate(zip(LEVELS, index, strict=True))
    ]
    return torch.cat(pooled)[torch.cat(index).argsort()]
