"""Metrics of the pseudo-labels: sums per micro-batch, which add up over micro-batches and ranks, and their means."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pais_ray.structures.batch import Predictions, Targets

Metrics = dict[str, Tensor | float]

MAX_PER_IMAGE = "pseudo/max_per_image"  # not a sum: for the error that reports a lack of memory


def pseudo_label_sums(
    predictions: Sequence[Predictions], weak: Sequence[Targets], strong: Sequence[Targets]
) -> Metrics:
    """Counts and sums over the images of one micro-batch.

    ``predictions`` are the teacher's, one per image; ``weak`` and ``strong`` are the pseudo-labels made of them, in
    the frame of either view.
    """
    zero = predictions[0].scores.new_zeros(())
    return {
        "pseudo/images": float(len(predictions)),
        "pseudo/predictions": float(sum(len(p) for p in predictions)),
        "pseudo/kept": float(sum(len(t) for t in weak)),
        MAX_PER_IMAGE: float(max(len(t) for t in weak)),
        "pseudo/in_strong": float(sum(len(t) for t in strong)),
        "pseudo/empty_images": float(sum(len(t) == 0 for t in weak)),
        "pseudo/score_sum": sum((_score_sum(p) for p in predictions), start=zero),
        "pseudo/iou_sum": sum((p.ious.sum() for p in predictions), start=zero),
        "pseudo/class_weight_sum": sum((t.class_weight.sum() for t in weak), start=zero),
        "pseudo/mask_weight_sum": sum((t.mask_weight.sum() for t in weak), start=zero),
    }


def with_pseudo_label_means(values: dict[str, float]) -> dict[str, float]:
    """``values`` with the sums of ``pseudo_label_sums`` replaced by means per image and per prediction."""
    means = dict(values)
    images = means.pop("pseudo/images", 0.0)
    if images:
        predictions, kept = means.pop("pseudo/predictions"), means.pop("pseudo/kept")
        means["pseudo/over_tau_cls_per_image"] = predictions / images  # the name in metrics.jsonl
        means["pseudo/kept_per_image"] = kept / images
        means["pseudo/in_strong_per_image"] = means.pop("pseudo/in_strong") / images
        means["pseudo/empty_image_rate"] = means.pop("pseudo/empty_images") / images
        means["pseudo/score_mean"] = means.pop("pseudo/score_sum") / predictions if predictions else math.nan
        means["pseudo/iou_mean"] = means.pop("pseudo/iou_sum") / predictions if predictions else math.nan
    return means


def _score_sum(predictions: Predictions) -> Tensor:
    """NaN if the output of the network was not finite: a threshold may have dropped what was not."""
    total = predictions.scores.sum()
    return total if predictions.finite is None else torch.where(predictions.finite, total, torch.nan)
