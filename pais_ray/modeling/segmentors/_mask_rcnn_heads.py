"""torchvision's proposal network and RoI heads, with weights per instance and a mask-IoU branch.

Both subclasses keep torchvision's parameter names, anchors, matching, sampling and post-processing, and
replace the forward pass: what runs does not depend on the module's mode.

Legend: A anchors of all images, R sampled RoIs of all images, P positive RoIs, C classes without background.
Inside this file class 0 is background, as in torchvision.
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

# torchvision reads mask pixels with their centers at integers, ours are at halves (see geometry.py): its RoI
# at ``box`` is ours at ``box + HALF_PIXEL``. It holds for mask targets and predicted masks, so they agree.
HALF_PIXEL = 0.5


class WeightedRPN(RegionProposalNetwork):
    """Region proposals and, given targets, the losses `objectness` and `proposal_box`.

    A matched anchor has its target's ``proposal_weight``, background has weight one. A target of weight zero
    is no target here: anchors on it are background unless another claims them (as in the released code, where
    boxes below the RPN's threshold are dropped). Both losses are divided by the number of sampled anchors,
    whatever the normalizer, as in torchvision.
    """

    smooth_l1_beta: float

    def propose(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Targets] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals, (n, 4) an image, and losses, which are empty without targets."""
        levels = list(features.values())
        per_level, delta_levels = self.head(levels)
        # Anchors take the precision of what they are laid over, which autocast halves: several pixels.
        anchors = self.anchor_generator(images, [images.tensors.new_empty(v.shape[-2:]) for v in levels])
        counts = [scores[0].numel() for scores in per_level]
        objectness, deltas = concat_box_prediction_layers(per_level, delta_levels)
        objectness, deltas = objectness.float(), deltas.float()  # boxes take the deltas' precision
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
        wanted = torch.cat(self.box_coder.encode(list(boxes), anchors))
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(list(labels)))
        sampled = torch.cat([positive, negative])
        return {
            "objectness": losses.binary_cross_entropy(
                objectness[sampled], label[sampled], weight[sampled], len(sampled)
            ),
            "proposal_box": losses.box_regression(
                deltas[positive], wanted[positive], weight[positive], len(sampled), self.smooth_l1_beta
            ),
        }

    def _assign(self, anchors: Tensor, target: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """For each anchor of one image: label 1, 0 or -1 (ignored), box (a, 4) and weight."""
        wanted = target.proposal_weight > 0
        boxes, weight = target.boxes[wanted].to(anchors), target.proposal_weight[wanted].to(anchors)
        if len(boxes) == 0:
            return anchors.new_zeros(len(anchors)), torch.zeros_like(anchors), anchors.new_ones(len(anchors))
        matched = self.proposal_matcher(box_iou(boxes, anchors))
        index = matched.clamp(min=0)
        label = (matched >= 0).to(anchors)
        label[matched == self.proposal_matcher.BETWEEN_THRESHOLDS] = -1.0
        return label, boxes[index], torch.where(matched >= 0, weight[index], 1.0)


class MaskIoUHead(nn.Module):
    """Logit (P,) of the IoU a predicted mask has with the truth, from the last mask convolution's output.

    Released code: flatten, FC, ReLU, FC, one logit for all classes; ``pool`` above 1 averages the features
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
    """Class, box, mask and mask-IoU heads: `losses` for training, `detect` for prediction."""

    mask_roi_pool: MultiScaleRoIAlign
    mask_head: nn.Module
    mask_predictor: nn.Module
    mask_iou_head: MaskIoUHead
    smooth_l1_beta: float
    max_mask_rois: int | None  # of one image

    def losses(self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Targets]) -> dict[str, Tensor]:
        """`class`, `box`, `mask` and `mask_iou` (unscaled) of the RoIs sampled from ``proposals``.

        The normalizer acts on `class`. `mask` is divided by P under all. `box` is divided by R under all, as in
        torchvision and the released code: Eq. 5 writes 1/N_pos there too, but Mask R-CNN's box targets are scaled
        for 1/R, and P is so much smaller that the box term became two thirds of the whole loss.
        """
        normalizer = targets[0].normalizer
        # select_training_samples asks for masks but never reads them.
        plain = [{"boxes": t.boxes, "labels": t.labels + 1, "masks": t.masks} for t in targets]
        rois, matched, labels, wanted = self.select_training_samples(proposals, plain)
        label, deltas_wanted = torch.cat(labels), torch.cat(wanted)
        positive = label > 0
        class_weight = torch.cat(
            [
                torch.where(at > 0, _gather(t.class_weight, m), t.negative_weight)
                for t, m, at in zip(targets, matched, labels, strict=True)
            ]
        )
        box_weight = torch.cat([_gather(t.box_weight, m) for t, m in zip(targets, matched, strict=True)])

        logits, deltas = self._classify(features, rois)
        index = torch.where(positive)[0]
        chosen = deltas.reshape(-1, deltas.shape[1] // 4, 4)[index, label[index]]
        return {
            "class": losses.cross_entropy(logits, label, class_weight, positive, normalizer),
            "box": losses.box_regression(
                chosen, deltas_wanted[index], box_weight[index], len(label), self.smooth_l1_beta
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
        logits, iou_logits = self._segment(features, boxes, label)
        weight = torch.cat([_gather(t.mask_weight, m) for t, m in zip(targets, owners, strict=True)])
        wanted = torch.cat(
            [
                t.masks.crop_resize(b + HALF_PIXEL, logits.shape[-1], m)
                for t, b, m in zip(targets, boxes, owners, strict=True)
            ]
        )
        return {
            "mask": losses.binary_cross_entropy(logits, wanted, weight, len(label)),
            "mask_iou": losses.mask_iou(iou_logits, logits, wanted),
        }

    def _mask_rois(self, labels: Tensor) -> Tensor:
        """Indices of one image's positives, at most ``max_mask_rois`` of them, drawn at random."""
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
        """Detections of each image, best first. Those that score below ``minimum`` are dropped before the
        mask heads, which are most of the cost, see them."""
        logits, deltas = self._classify(features, proposals)
        sums = [*(f.sum(dtype=torch.float32) for f in features.values()), logits.sum()]  # what is not shows there
        finite = torch.stack(sums).isfinite().all()
        found = zip(*self.postprocess_detections(logits, deltas, proposals, sizes), strict=True)
        kept = [tuple(v[scores >= minimum] for v in (boxes, scores, at)) for boxes, scores, at in found]
        boxes = [k[0] for k in kept]
        mask_logits, iou_logits = self._segment(features, boxes, torch.cat([k[2] for k in kept]))
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

    def _classify(self, features: dict[str, Tensor], rois: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class logits (R, 1 + C) and box deltas (R, 4 * (1 + C)) in float32, as in WeightedRPN."""
        pooled = self.box_head(self.box_roi_pool(features, rois, _padded_size(features)))
        logits, deltas = self.box_predictor(pooled)
        return logits.float(), deltas.float()

    def _segment(self, features: dict[str, Tensor], rois: list[Tensor], label: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits (P, 28, 28) of each RoI's own class and mask-IoU logits (P,), in float32."""
        shared = self.mask_head(self.mask_roi_pool(features, rois, _padded_size(features)))
        logits = self.mask_predictor(shared)
        own = logits[torch.arange(len(label), device=label.device), label]
        return own.float(), self.mask_iou_head(shared).float()


def _padded_size(features: dict[str, Tensor]) -> list[tuple[int, int]]:
    """What MultiScaleRoIAlign asks sizes for: it derives the levels' strides from the first it sees, once,
    and valid sizes well below the padded one would give it wrong strides for good."""
    height, width = features["0"].shape[-2:]
    return [(4 * height, 4 * width)]


def _gather(weight: Tensor, index: Tensor) -> Tensor:
    """``weight[index]``, and zeros for an image without targets, whose RoIs all point at a missing first."""
    return torch.cat([weight, weight.new_zeros(1)])[index]
