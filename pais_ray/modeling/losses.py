"""Weighted losses with an explicit normalizer: pure functions, no module, no state.

Weights are constants (teacher outputs or ones), given per sample; a normalizer says what the weighted sum is
divided by. Wherever nothing is left to divide by, the loss is zero and keeps its graph.

Legend: R samples (RoIs, anchors, kernels), P positives among them, C classes.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from pais_ray.structures.batch import Normalizer

# Released code: keeps 0 / 0 out of the IoU of two empty masks, and out of their dice.
IOU_EPSILON = 1e-6
DICE_EPSILON = 1e-3
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0  # released K-Net, and RetinaNet


def weighted_mean(values: Tensor, weight: Tensor, positive: Tensor, normalizer: Normalizer) -> Tensor:
    """Sum of ``weight * values``, each (R,), divided as ``normalizer`` says; ``positive`` (R,) is bool.

    `mean`: by R. `pos`: by the number of positives, without which the loss is zero. `pos_neg`: positives by
    their number plus negatives by theirs (Eq. 5). `weight_sum`: by the sum of the weights.
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

    ``labels`` (R,) are classes, or C for background: there is no such logit, all C are zero then. `mean` and
    `pos` both divide by the number of positives, at least one (K-Net's own, released code); the others as
    in ``weighted_mean``.
    """
    num_classes = logits.shape[1]
    wanted = F.one_hot(labels, num_classes + 1)[:, :num_classes].to(logits)
    values = sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA, reduction="none").sum(dim=1)
    positive = labels < num_classes
    if normalizer in ("mean", "pos"):
        return (values * weight).sum() / positive.sum().clamp(min=1)
    return weighted_mean(values, weight, positive, normalizer)


def dice(logits: Tensor, targets: Tensor, weight: Tensor, count: int) -> Tensor:
    """1 - 2 a.b / (a.a + b.b) of the sigmoid of ``logits`` and soft ``targets`` (P, ...), weighted by ``weight``
    (P,), summed and divided by ``count`` (squared denominator: released K-Net, V-Net)."""
    soft, wanted = logits.sigmoid().flatten(1), targets.flatten(1)
    return ((1 - dice_of(soft, wanted)) * weight).sum() / max(count, 1)


def dice_of(a: Tensor, b: Tensor) -> Tensor:
    """Dice (P,) of soft masks ``a`` and ``b`` (P, X)."""
    squares = a.square().sum(dim=-1) + b.square().sum(dim=-1) + 2 * DICE_EPSILON
    return 2 * (a * b).sum(dim=-1) / squares


def semantic(logits: Tensor, targets: Tensor) -> Tensor:
    """Sigmoid focal loss of a semantic map ``logits`` (B, C, h, w) and ``targets`` (B, C, h, w) in {0, 1}, over the
    number of pixels with a class, at least one (released K-Net)."""
    values = sigmoid_focal_loss(logits, targets, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    return values / (targets > 0).any(dim=1).sum().clamp(min=1)


def binary_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor, count: int) -> Tensor:
    """Sigmoid cross-entropy of ``logits`` and ``targets`` (R, ...), averaged over every axis but the first,
    weighted by ``weight`` (R,), summed and divided by ``count``; zero without samples."""
    values = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    # An explicit length instead of -1, which an empty tensor cannot infer.
    per_sample = values.reshape(len(values), values.shape[1:].numel()).mean(dim=1)
    return (per_sample * weight).sum() / max(count, 1)


def box_regression(deltas: Tensor, targets: Tensor, weight: Tensor, count: int, beta: float) -> Tensor:
    """Smooth L1 of the positives' ``deltas`` and ``targets`` (P, 4), summed over the four, weighted by
    ``weight`` (P,), divided by ``count``. ``beta`` is where L1 begins; zero is plain L1."""
    values = F.smooth_l1_loss(deltas, targets, beta=beta, reduction="none").sum(dim=1)
    return (values * weight).sum() / max(count, 1)


@torch.no_grad()
def mask_iou_target(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU (P,) of the binarised masks that ``logits`` (P, ...) and soft ``targets`` (P, ...) describe.

    It is the IoU at mask resolution, as in the released code: of Mask R-CNN's inside the box, not of the whole
    object.
    """
    predicted, wanted = (logits.sigmoid() >= 0.5).flatten(1), (targets >= 0.5).flatten(1)
    intersection = (predicted & wanted).sum(dim=1)
    union = (predicted | wanted).sum(dim=1)
    return intersection / (union + IOU_EPSILON)


def mask_iou(iou_logits: Tensor, mask_logits: Tensor, mask_targets: Tensor) -> Tensor:
    """Cross-entropy of the predicted mask IoU (P,) against that of the predicted masks (P, ...) with their
    targets, averaged over the positives. Unweighted: the method decides where it counts."""
    target = mask_iou_target(mask_logits, mask_targets)
    return binary_cross_entropy(iou_logits, target, torch.ones_like(target), len(target))


def same_normalizer(normalizers: Iterable[Normalizer]) -> Normalizer:
    """The normalizer all targets of a call share; ValueError where they differ."""
    found = set(normalizers)
    if len(found) != 1:
        raise ValueError(f"Targets.normalizer: expected one for all images of a call, got {sorted(found)}")
    return found.pop()


def _divide(total: Tensor, by: Tensor) -> Tensor:
    """``total / by``; zero, with the graph, where ``by`` is zero. No look at the device."""
    safe = torch.where(by > 0, by, torch.ones_like(by))
    return torch.where(by > 0, total, total * 0) / safe
