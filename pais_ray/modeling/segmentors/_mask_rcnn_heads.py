"""torchvision's proposal network and RoI heads, with weights per instance and a mask-IoU branch.

Both subclasses keep torchvision's parameter names, anchors, matching, sampling and post-processing. Instead of
``forward`` they have methods for training and for prediction, which do not depend on the mode of the module.

Legend: A anchors of all images, R sampled RoIs of all images, P positive RoIs, C classes without background.
In this file class 0 is background, as in torchvision.
"""

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, box_iou

from pais_ray.modeling import losses
from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

# torchvision samples masks with pixel centers at integers, this code has them at halves (see geometry.py): a RoI at
# ``box`` there is a RoI at ``box + HALF_PIXEL`` here, for mask targets and predicted masks alike.
HALF_PIXEL = 0.5


class WeightedRPN(RegionProposalNetwork):
    """Region proposals and, given targets, the losses `objectness` and `proposal_box`.

    A matched anchor has the ``proposal_weight`` of its target, background has weight one. Targets of weight zero are
    ignored: anchors on them are background unless they match another target (as in the released code, where boxes
    below the threshold of the RPN are dropped). Both losses are divided by the number of sampled anchors, whatever the
    normalizer, as in torchvision.
    """

    smooth_l1_beta: float

    def propose(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Targets] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image, (n, 4) boxes, and the losses, which are empty without targets."""
        levels = list(features.values())
        per_level, delta_levels = self.head(levels)
        # Anchors have the precision of the tensor given here. The features' under autocast would cost several pixels.
        anchors = self.anchor_generator(images, [images.tensors.new_empty(v.shape[-2:]) for v in levels])
        counts = [scores[0].numel() for scores in per_level]
        objectness, deltas = concat_box_prediction_layers(per_level, delta_levels)
        objectness, deltas = objectness.float(), deltas.float()  # boxes have the precision of the deltas
        boxes = self.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
        proposals, _ = self.filter_proposals(boxes, objectness, images.image_sizes, counts)
        if targets is None:
            return proposals, {}
        return proposals, self._losses(objectness.flatten(), deltas, anchors, targets)

    def _losses(
        self, objectness: Tensor, deltas: Tensor, anchors: list[Tensor], targets: list[Targets]
    ) -> dict[str, Tensor]:
        """``objectness`` (A,) logits and ``deltas`` (A, 4)."""
        assigned = [self._assign(a, t) for a, t in zip(anchors, targets, strict=True)]
        labels, boxes, weights = zip(*assigned, strict=True)
        label, weight = torch.cat(labels), torch.cat(weights)
        delta_targets = torch.cat(self.box_coder.encode(list(boxes), anchors))
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(list(labels)))
        sampled = torch.cat([positive, negative])
        return {
            "objectness": losses.binary_cross_entropy(
                objectness[sampled], label[sampled], weight[sampled], len(sampled)
            ),
            "proposal_box": losses.box_regression(
                deltas[positive], delta_targets[positive], weight[positive], len(sampled), self.smooth_l1_beta
            ),
        }

    def _assign(self, anchors: Tensor, target: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """The label (1, 0, or -1 for ignored), the target box (a, 4) and the weight of each anchor of one image."""
        used = target.proposal_weight > 0
        boxes, weight = target.boxes[used].to(anchors), target.proposal_weight[used].to(anchors)
        if len(boxes) == 0:
            return anchors.new_zeros(len(anchors)), torch.zeros_like(anchors), anchors.new_ones(len(anchors))
        matched = self.proposal_matcher(box_iou(boxes, anchors))
        index = matched.clamp(min=0)
        label = (matched >= 0).to(anchors)
        label[matched == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1.0
        return label, boxes[index], torch.where(matched >= 0, weight[index], 1.0)


class MaskIoUHead(nn.Module):
    """Logit (P,) of the IoU of a predicted mask with the true one, from the output of the last mask convolution.

    As in the released code: flatten, FC, ReLU, FC, one logit for all classes. ``pool`` above 1 averages the features
    first, which the released branch does not.
    """

    def __init__(self, channels: int, resolution: int, dim: int, pool: int) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(pool) if pool > 1 else nn.Identity()
        self.fc1 = nn.Linear(channels * (resolution // pool) ** 2, dim)
        self.fc2 = nn.Linear(dim, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.pool(features).flatten(1)).relu())[:, 0]


class WeightedRoIHeads(RoIHeads):
    """The class, box, mask and mask-IoU heads: ``losses`` for training, ``detect`` for prediction."""

    mask_roi_pool: MultiScaleRoIAlign
    mask_head: nn.Module
    mask_predictor: nn.Module
    mask_iou_head: MaskIoUHead
    smooth_l1_beta: float
    max_mask_rois: int | None  # per image

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """The losses `class`, `box`, `mask` and `mask_iou` (unscaled) of RoIs sampled from ``proposals``.

        The normalizer acts on `class` only. `mask` is always divided by P. `box` is always divided by R, as in
        torchvision and the released code: Eq. 5 has 1/N_pos there too, but Mask R-CNN's box targets are scaled for
        1/R. Divided by the much smaller P, the box term was two thirds of the total loss.
        """
        normalizer = targets[0].normalizer
        # select_training_samples requires masks but never reads them.
        plain = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks} for t in targets]
        rois, matched, labels, deltas_of_rois = self.select_training_samples(proposals, plain)
        label, delta_targets = torch.cat(labels), torch.cat(deltas_of_rois)
        positive = label > 0
        class_weight = torch.cat(
            [
                torch.where(at > 0, _gather(t.class_weight, m), t.negative_weight)
                for t, m, at in zip(targets, matched, labels, strict=True)
            ]
        )
        box_weight = torch.cat([_gather(t.box_weight, m) for t, m in zip(targets, matched, strict=True)])

        logits, deltas = self.classify(features, rois)
        index = torch.where(positive)[0]
        chosen = deltas.reshape(-1, deltas.shape[1] // 4, 4)[index, label[index]]
        return {
            "class": losses.cross_entropy(logits, label, class_weight, positive, normalizer),
            "box": losses.box_regression(
                chosen, delta_targets[index], box_weight[index], len(label), self.smooth_l1_beta
            ),
            **self._mask_losses(features, rois, matched, labels, targets),
        }

    def _mask_losses(
        self,
        features: dict[str, Tensor],
        rois: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[Targets],
    ) -> dict[str, Tensor]:
        picked = [self._mask_rois(at) for at in labels]
        boxes = [roi[p] for roi, p in zip(rois, picked, strict=True)]
        owners = [m[p] for m, p in zip(matched, picked, strict=True)]
        label = torch.cat([at[p] for at, p in zip(labels, picked, strict=True)])
        logits, iou_logits = self.segment(features, boxes, label)
        weight = torch.cat([_gather(t.mask_weight, m) for t, m in zip(targets, owners, strict=True)])
        mask_targets = torch.cat(
            [
                t.masks.crop_resize(b + HALF_PIXEL, logits.shape[-1], m)
                for t, b, m in zip(targets, boxes, owners, strict=True)
            ]
        )
        return {
            "mask": losses.binary_cross_entropy(logits, mask_targets, weight, len(label)),
            "mask_iou": losses.mask_iou(iou_logits, logits, mask_targets),
        }

    def _mask_rois(self, labels: Tensor) -> Tensor:
        """Indices of the positive RoIs of one image: all, or ``max_mask_rois`` of them drawn at random."""
        positive = torch.where(labels > 0)[0]
        if self.max_mask_rois is None or len(positive) <= self.max_mask_rois:
            return positive
        return positive[torch.randperm(len(positive), device=positive.device)[: self.max_mask_rois]]

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        minimum: float,
    ) -> list[Predictions]:
        """Detections of each image, best first. Those with a score below ``minimum`` are dropped before the mask heads,
        which are most of the cost."""
        logits, deltas = self.classify(features, proposals)
        # One value that is not finite makes its sum not finite.
        sums = [*(f.sum(dtype=torch.float32) for f in features.values()), logits.sum()]
        finite = torch.stack(sums).isfinite().all()
        found = zip(*self.postprocess_detections(logits, deltas, proposals, sizes), strict=True)
        kept = [tuple(v[scores >= minimum] for v in (boxes, scores, at)) for boxes, scores, at in found]
        boxes = [k[0] for k in kept]
        mask_logits, iou_logits = self.segment(features, boxes, torch.cat([k[2] for k in kept]))
        counts = [len(b) for b in boxes]
        parts = zip(kept, mask_logits.sigmoid().split(counts), iou_logits.sigmoid().split(counts), strict=True)
        return [
            Predictions(
                boxes=box,
                labels=at - 1,
                scores=scores,
                ious=ious,
                masks=Masks.in_boxes(soft, box + HALF_PIXEL),
                finite=finite,
            )
            for (box, scores, at), soft, ious in parts
        ]

    def classify(self, features: dict[str, Tensor], rois: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, 1 + C) and box deltas (R, 4 * (1 + C)), in float32 as in WeightedRPN."""
        return self.classify_pooled(self.box_roi_pool(features, rois, _padded_size(features)))

    def classify_pooled(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """``classify`` for RoI features (R, D, 7, 7)."""
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return logits.float(), deltas.float()

    def segment(self, features: dict[str, Tensor], rois: list[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (P, 28, 28) of each RoI's class and mask-IoU logits (P,), in float32; ``label`` (P,) is 1..C."""
        return self.segment_pooled(self.mask_roi_pool(features, rois, _padded_size(features)), label)

    def segment_pooled(self, pooled: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """``segment`` for RoI features (P, D, 14, 14)."""
        shared = self.mask_head(pooled)
        logits = self.mask_predictor(shared)
        own = logits[torch.arange(label.shape[0], device=label.device), label]  # len() cannot be exported
        return own.float(), self.mask_iou_head(shared).float()


def _padded_size(features: dict[str, Tensor]) -> list[tuple[int, int]]:
    """The image size for MultiScaleRoIAlign, which derives the strides of the levels from the first size that it gets.
    Sizes without padding can be much smaller and would give it wrong strides permanently."""
    height, width = features["0"].shape[-2:]
    return [(4 * height, 4 * width)]


def _gather(weight: Tensor, index: Tensor) -> Tensor:
    """``weight[index]``, or zeros for an image without targets, whose RoIs all have index 0."""
    return torch.cat([weight, weight.new_zeros(1)])[index]
