"""Weighted losses with an explicit normalizer: pure functions, no module, no state.

Weights are constants (teacher outputs or ones), one per sample; the normalizer chooses the divisor of the weighted sum.
If the divisor is zero, the loss is zero and keeps its graph.

Legend: R samples (RoIs, anchors, kernels), P positives among them, C classes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from pais_ray.structures.batch import Normalizer

# Avoid 0 / 0 in the IoU and the dice of two empty masks (released code).
IOU_EPSILON = 1e-6
DICE_EPSILON = 1e-3
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # released K-Net code, RetinaNet


def weighted_mean(values: Tensor, weight: Tensor, positive: Tensor, normalizer: Normalizer) -> Tensor:
    """The sum of ``weight * values``, each (R,), over a divisor; ``positive`` (R,) is bool.

    The normalizer `mean` divides by R, `pos` by the number of positives (without positives the loss is zero), `pos_neg`
    the positives by their number and the negatives by theirs (Eq. 5), `weight_sum` by the sum of the weights.
    """
    terms = values * weight
    if normalizer == "mean":
        return terms.sum() / max(len(terms), 1)
    if normalizer == "pos":
        return _divide(terms.sum(), positive.sum())
    if normalizer == "pos_neg":
        pos, neg = positive.to(terms), (~positive).to(terms)
        return _divide((terms * pos).sum(), pos.sum()) + _divide((terms * neg).sum(), neg.sum())
    if normalizer == "weight_sum":
        return _divide(terms.sum(), weight.sum())
    raise ValueError(f"normalizer: expected mean, pos, pos_neg or weight_sum, got {normalizer!r}")


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor, positive: Tensor, normalizer: Normalizer) -> Tensor:
    """Softmax cross-entropy of ``logits`` (R, C) and ``labels`` (R,), weighted and normalized."""
    return weighted_mean(F.cross_entropy(logits, labels, reduction="none"), weight, positive, normalizer)


def focal(logits: Tensor, labels: Tensor, weight: Tensor, normalizer: Normalizer) -> Tensor:
    """Sigmoid focal loss of ``logits`` (R, C), summed over the classes of a sample, weighted and normalized.

    ``labels`` (R,) are classes, or C for background, whose targets are zero in all C classes. `mean` and `pos` both
    divide by the number of positives, at least one (as in the released K-Net code); the other normalizers are those of
    ``weighted_mean``.
    """
    num_classes = logits.shape[1]
    targets = F.one_hot(labels, num_classes + 1)[:, :num_classes].to(logits)
    values = sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="none").sum(dim=1)
    positive = labels < num_classes
    if normalizer in ("mean", "pos"):
        return (values * weight).sum() / positive.sum().clamp(min=1)
    return weighted_mean(values, weight, positive, normalizer)


def dice(logits: Tensor, targets: Tensor, weight: Tensor, count: int) -> Tensor:
    """The dice loss of the sigmoid of ``logits`` and soft ``targets`` (P, ...), weighted by ``weight`` (P,), summed and
    divided by ``count``."""
    soft, targets = logits.sigmoid().flatten(1), targets.flatten(1)
    return ((1 - dice_coefficient(soft, targets)) * weight).sum() / max(count, 1)


def dice_coefficient(a: Tensor, b: Tensor) -> Tensor:
    """2 a.b / (a.a + b.b), (P,), of soft masks ``a`` and ``b`` (P, X): squared as in released K-Net and V-Net."""
    squares = a.square().sum(dim=-1) + b.square().sum(dim=-1) + 2 * DICE_EPSILON
    return 2 * (a * b).sum(dim=-1) / squares


def semantic(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss of a semantic map ``logits`` (B, C, h, w) with ``targets`` (B, C, h, w) in {0, 1}, divided by
    the number of pixels with a class, at least one (released K-Net code)."""
    values = sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return values / (targets > 0).any(dim=1).sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor, count: int) -> Tensor:
    """Sigmoid cross-entropy of ``logits`` and ``targets`` (R, ...), averaged over every axis but the first,
    weighted by ``weight`` (R,), summed and divided by ``count``; zero without samples."""
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # The length is explicit, because -1 cannot be inferred for an empty tensor.
    per_sample = values.reshape(len(values), values.shape[1:].numel()).mean(dim=1)
    return (per_sample * weight).sum() / max(count, 1)


def box_regression(deltas: Tensor, targets: Tensor, weight: Tensor, count: int, beta: float) -> Tensor:
    """Smooth L1 of the positives' ``deltas`` and ``targets`` (P, 4), summed over the four, weighted by
    ``weight`` (P,), divided by ``count``. Errors above ``beta`` are linear; zero gives plain L1."""
    values = F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none").sum(dim=1)
    return (values * weight).sum() / max(count, 1)


@torch.no_grad()
def mask_iou_target(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU (P,) of the binarized masks of ``logits`` (P, ...) and soft ``targets`` (P, ...).

    It is the IoU at mask resolution, as in the released code; for Mask R-CNN that is the IoU inside the box, not of the
    whole object.
    """
    predicted, true = (logits.sigmoid() >= 0.5).flatten(1), (targets >= 0.5).flatten(1)
    intersection = (predicted & true).sum(dim=1)
    union = (predicted | true).sum(dim=1)
    return intersection / (union + IOU_EPSILON)


def mask_iou(iou_logits: Tensor, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    """Cross-entropy of the predicted mask IoUs (P,) with the actual IoUs of the predicted masks (P, ...) and their
    targets, averaged over the positives. Weights do not apply; a method includes or excludes the whole loss."""
    target = mask_iou_target(mask_logits, mask_targets)
    return binary_cross_entropy(iou_logits, target, torch.ones_like(target), len(target))


def same_normalizer(normalizers: Iterable[Normalizer]) -> Normalizer:
    """The normalizer that all targets of a call share. Raises ValueError if they differ."""
    found = set(normalizers)
    if len(found) != 1:
        raise ValueError(f"Targets.normalizer: expected one for all images of a call, got {sorted(found)}")
    return found.pop()


def _divide(total: Tensor, by: Tensor) -> Tensor:
    """``total / by``, or zero with the graph if ``by`` is zero. It does not wait for the device."""
    safe = torch.where(by > 0, by, torch.ones_like(by))
    return torch.where(by > 0, total, total * 0) / safe
