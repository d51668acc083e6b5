"""The quality of pseudo-labels compared with ground truth: tables for figures 1 and 6 of the paper.

IoU is computed for full-size masks. The mask-IoU branch is trained on another quantity, 28x28 cells in a box;
calibration measured on that would look too good.
Legend: N predictions, M ground truth instances, R rows of a table, H x W pixels of the image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pais_ray.structures.batch import Predictions, Targets
from pais_ray.structures.masks import Masks

Row = dict[str, float | int | bool]


def mask_iou(found: Masks, true: Masks, size: tuple[int, int]) -> Tensor:
    """IoU (N, M) of masks pasted at ``size`` = (H, W) px; 0 if both are empty."""
    first, second = (masks.paste(size).flatten(1).float() for masks in (found, true))
    shared = first @ second.T
    union = first.sum(dim=1)[:, None] + second.sum(dim=1)[None] - shared
    return shared / union.clamp(min=1)


def match(iou: Tensor, threshold: float = 0.5, allowed: Tensor | None = None) -> Tensor:
    """Index (N,) of the ground truth instance that each prediction matches; -1 if it matches none.

    Predictions come best first. Matching is greedy: each prediction takes the unmatched instance with the largest
    ``iou`` (N, M), if it is at least ``threshold``. ``allowed`` (N, M) bool restricts the pairs, for example to those
    of the same class.
    """
    iou = iou.detach().cpu() if allowed is None else (iou * allowed).detach().cpu()
    chosen = torch.full((len(iou),), -1, dtype=torch.int64)
    if iou.shape[1] == 0:
        return chosen
    free = torch.ones(iou.shape[1])
    for i in range(len(iou)):
        best, index = (iou[i] * free).max(dim=0)
        if best >= threshold and best > 0:
            chosen[i], free[index] = index, 0.0
    return chosen


def pseudo_label_table(predictions: Predictions, truth: Targets, size: tuple[int, int], image_id: int = 0) -> list[Row]:
    """One row per prediction of an image of ``size`` = (H, W) px, best first.

    Columns: ``class``; ``score`` (c); ``iou_predicted`` (s); ``iou_true``, the largest IoU with a true instance;
    ``class_correct``, whether that instance has the predicted class; ``matched``, whether the prediction matches an
    instance of its class (greedy, IoU of at least 0.5), so that duplicates are not matched.
    """
    predictions, truth = _by_score(predictions).to("cpu"), truth.to("cpu")
    iou = mask_iou(predictions.masks, truth.masks, size)
    same = predictions.labels[:, None] == truth.labels[None]
    if len(truth):
        best, index = iou.max(dim=1)
        correct = same.gather(1, index[:, None])[:, 0] & (best > 0)
    else:
        best, correct = torch.zeros(len(predictions)), torch.zeros(len(predictions), dtype=torch.bool)
    columns = {
        "class": predictions.labels.tolist(),
        "score": predictions.scores.tolist(),
        "iou_predicted": predictions.ious.tolist(),
        "iou_true": best.tolist(),
        "class_correct": correct.tolist(),
        "matched": (match(iou, allowed=same) >= 0).tolist(),
    }
    return [
        {"image_id": image_id, **dict(zip(columns, values, strict=True))}
        for values in zip(*columns.values(), strict=True)
    ]


def precision_recall(
    kept: Sequence[Predictions | Targets],
    truth: Sequence[Targets],
    sizes: Sequence[tuple[int, int]],
    iou: float = 0.5,
    same_class: bool = True,
) -> dict[str, float | int | None]:
    """Precision and recall of pseudo-labels over images, with one item and one size (H, W) px per image.

    The result includes the counts ``kept``, ``truth`` and ``correct``. Precision without pseudo-labels and recall
    without ground truth are None. Targets are matched in their order, predictions by score.
    """
    correct = 0
    for found, true, size in zip(kept, truth, sizes, strict=True):
        found, true = (
            (_by_score(found) if isinstance(found, Predictions) else found).to("cpu"),
            true.to("cpu"),
        )
        allowed = found.labels[:, None] == true.labels[None] if same_class else None
        overlap = mask_iou(found.masks, true.masks, size)
        correct += int((match(overlap, iou, allowed) >= 0).sum())
    num_kept, num_true = sum(map(len, kept)), sum(map(len, truth))
    return {
        "kept": num_kept,
        "truth": num_true,
        "correct": correct,
        "precision": correct / num_kept if num_kept else None,
        "recall": correct / num_true if num_true else None,
    }


def calibration(predicted: Tensor, true: Tensor, bins: int = 10) -> dict[str, float | list[Row] | None]:
    """How well a predicted quality (R,) in [0, 1], mask IoU or class score, agrees with the true quality (R,).

    Returns ``pearson`` (None if one of them is constant); ``ece``, the expected calibration error: the distance between
    the two means of a bin, averaged over bins by count; ``bias``, predicted minus true; and ``bins`` with ``low``,
    ``count`` and the means ``predicted`` and ``true``, without empty bins. Raises ValueError if the lengths differ.
    """
    predicted, true = predicted.double().cpu(), true.double().cpu()
    if len(predicted) != len(true):
        raise ValueError(
            f"calibration: expected as many predicted as true values, got {len(predicted)} and {len(true)}"
        )
    if len(predicted) == 0:
        return {"pearson": None, "ece": None, "bias": None, "bins": []}
    index = (predicted * bins).long().clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins).double()
    mean_predicted = torch.bincount(index, predicted, bins) / count.clamp(min=1)
    mean_true = torch.bincount(index, true, bins) / count.clamp(min=1)
    ece = ((mean_predicted - mean_true).abs() * count).sum() / len(predicted)
    first, second = predicted - predicted.mean(), true - true.mean()
    spread = first.norm() * second.norm()
    rows: list[Row] = [
        {
            "low": i / bins,
            "count": int(count[i]),
            "predicted": float(mean_predicted[i]),
            "true": float(mean_true[i]),
        }
        for i in count.nonzero().flatten().tolist()
    ]
    return {
        "pearson": float(first @ second / spread) if spread > 1e-12 else None,
        "ece": float(ece),
        "bias": float((predicted - true).mean()),
        "bins": rows,
    }


def threshold_grid(
    table: Sequence[Row], taus_cls: Sequence[float], taus_iou: Sequence[float], good_iou: float = 0.7
) -> list[Row]:
    """How many rows of a table each pair of thresholds keeps (score > tau_cls and iou_predicted > tau_iou).

    One row per pair: ``kept``; ``kept_good``, those with a true mask IoU above ``good_iou``; ``lost_good``, good ones
    that are not kept (figure 1c); and ``kept_matched``, those that match an instance of their class.
    """
    score, predicted, true, matched = (column(table, n) for n in ("score", "iou_predicted", "iou_true", "matched"))
    good = true > good_iou
    over_cls = score[None] > torch.tensor(list(taus_cls), dtype=score.dtype)[:, None]  # (taus_cls, R)
    over_iou = predicted[None] > torch.tensor(list(taus_iou), dtype=score.dtype)[:, None]
    kept = over_cls[:, None] & over_iou[None]  # (taus_cls, taus_iou, R)
    counts = torch.stack([kept.sum(-1), (kept & good).sum(-1), (~kept & good).sum(-1), (kept & (matched > 0)).sum(-1)])
    names = ("kept", "kept_good", "lost_good", "kept_matched")
    return [
        {"tau_cls": tau_cls, "tau_iou": tau_iou, **dict(zip(names, counts[:, i, j].tolist(), strict=True))}
        for i, tau_cls in enumerate(taus_cls)
        for j, tau_iou in enumerate(taus_iou)
    ]


def class_counts(instances: Sequence[Predictions | Targets], num_classes: int) -> Tensor:
    """The number of instances (C,) of each class over images (figure 6: ground truth against pseudo-labels)."""
    labels = [item.labels.cpu() for item in instances]
    return torch.bincount(torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64), minlength=num_classes)


def column(table: Sequence[Row], name: str) -> Tensor:
    """A column (R,) of a table as float64."""
    return torch.tensor([float(row[name]) for row in table], dtype=torch.float64)


def _by_score(predictions: Predictions) -> Predictions:
    return predictions[predictions.scores.argsort(descending=True, stable=True)]
