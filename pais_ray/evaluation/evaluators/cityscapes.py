"""Instance AP as the Cityscapes benchmark defines it, implemented from the benchmark's description.

It differs from COCO's AP. Instances below 100 px and groups are ignore regions, like the void labels. Of the
predictions that match an object, the one with the highest score is correct and the others are wrong. Every detection
counts. Precision is not made monotonic: the area under the curve is the sum over distinct scores of the precision times
half of the recall between the neighboring scores. The values agree with the official evaluator to 1e-4.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from pais_ray.data.annotations.rle import compress_rle
from pais_ray.data.validation.values import check_rle

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # IoU; a match has an overlap above the threshold
MIN_AREA = 100  # px; smaller instances are ignored

Json = dict[str, Any]


@dataclass(frozen=True)
class CityscapesEvaluator:
    """Instance AP of Cityscapes, for ground truth that ``data.annotations.cityscapes.to_coco`` converted."""

    name: str = "cityscapes"
    needs_masks: bool = True

    def supports(self, truth: Json) -> bool:
        """Whether every image has the void region that the metric needs."""
        return bool(truth["images"]) and all("void" in image for image in truth["images"])

    def evaluate(self, truth: Json, results: Sequence[Json]) -> Iterator[tuple[str, float | None]]:
        """Raises DataError if ``void`` of an image is not a valid RLE."""
        overlaps = _compute_overlaps(truth, results)
        names = {category["id"]: category["name"] for category in truth["categories"]}
        aps = {names[category]: np.array([_ap(own, t) for t in THRESHOLDS]) for category, own in overlaps.items()}
        known = [values for values in aps.values() if not np.isnan(values).any()]
        table = np.array(known).reshape(-1, len(THRESHOLDS))
        yield "AP", float(table.mean()) if len(table) else None
        yield "AP50", float(table[:, 0].mean()) if len(table) else None
        for name, values in aps.items():
            yield f"AP_class/{name}", None if np.isnan(values).any() else float(values.mean())


EVALUATORS = (CityscapesEvaluator(),)


@dataclass(frozen=True, kw_only=True)
class _Overlaps:
    """D predictions and G objects (including groups) of one class in one image."""

    scores: np.ndarray  # (D,)
    iou: np.ndarray  # (D, G)
    ignored: np.ndarray  # (D,) fraction of the prediction that is in ignore regions
    counted: np.ndarray  # (G,) bool, objects to find


def _compute_overlaps(truth: Json, results: Sequence[Json]) -> dict[int, list[_Overlaps]]:
    """Category id -> the overlaps of each image that has objects or predictions of the category."""
    annotated: dict[int, dict[int, list[Json]]] = defaultdict(lambda: defaultdict(list))
    predicted: dict[int, dict[int, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for entries, groups in ((truth["annotations"], annotated), (results, predicted)):
        for entry in entries:
            groups[entry["image_id"]][entry["category_id"]].append(entry)
    overlaps: dict[int, list[_Overlaps]] = {category["id"]: [] for category in truth["categories"]}
    for image in truth["images"]:
        check_rle(image["void"], image["height"], image["width"], f"ground truth: image {image['id']}: void")
        for category, own in overlaps.items():
            objects, predictions = annotated[image["id"]][category], predicted[image["id"]][category]
            if objects or predictions:
                own.append(_overlap(objects, predictions, image["void"]))
    return overlaps


def _overlap(objects: Sequence[Json], predictions: Sequence[Json], void: Json) -> _Overlaps:
    masks = [compress_rle(p["segmentation"]) for p in predictions]
    not_empty = [i for i, mask in enumerate(masks) if mask_utils.area(mask) > 0]
    masks = [masks[i] for i in not_empty]
    regions = [compress_rle(o["segmentation"]) for o in objects]
    areas = np.array([mask_utils.area(mask) for mask in masks], dtype=np.int64)
    region_areas = np.array([mask_utils.area(region) for region in regions], dtype=np.int64)
    group = np.array([bool(o["iscrowd"]) for o in objects], dtype=bool)
    small = region_areas < MIN_AREA
    common = _intersections(masks, areas, regions)
    # As in the official evaluator, a small group counts twice: as a group and as a small object.
    ignored = _intersections(masks, areas, [void])[:, 0] + common @ (group.astype(np.int64) + small)
    return _Overlaps(
        scores=np.array([predictions[i]["score"] for i in not_empty], dtype=np.float64),
        iou=common / (areas[:, None] + region_areas - common),
        ignored=ignored / areas,
        counted=~group & ~small,
    )


def _intersections(masks: list[Json], areas: np.ndarray, regions: list[Json]) -> np.ndarray:
    """Common pixels (D, G) int64. For a "crowd", pycocotools returns the common fraction of the prediction."""
    if not masks or not regions:
        return np.zeros((len(masks), len(regions)), dtype=np.int64)
    fractions = mask_utils.iou(masks, regions, [1] * len(regions))
    return np.rint(np.asarray(fractions) * areas[:, None]).astype(np.int64)


def _ap(overlaps: Sequence[_Overlaps], threshold: float) -> float:
    """AP of a class at one IoU threshold; NaN without an object to find. Objects are disjoint and the threshold is at
    least 0.5, so a prediction matches at most one object."""
    correct: list[float] = []
    wrong: list[float] = []
    missed = 0
    for image in overlaps:
        hits = image.iou > threshold
        for g in np.flatnonzero(image.counted):
            scores = np.sort(image.scores[hits[:, g]])
            correct += scores[-1:].tolist()
            wrong += scores[:-1].tolist()
            missed += len(scores) == 0
        wrong += image.scores[~hits.any(axis=1) & (image.ignored <= threshold)].tolist()
    if not correct and not missed:
        return math.nan
    return _area_under_curve(np.sort(correct), np.sort(wrong), missed) if correct else 0.0


def _area_under_curve(correct: np.ndarray, wrong: np.ndarray, missed: int) -> float:
    """Area under precision over recall, from the ascending scores of correct and wrong predictions."""
    levels = np.unique(np.concatenate([correct, wrong]))
    true = len(correct) - np.searchsorted(correct, levels)  # at or above each level
    false = len(wrong) - np.searchsorted(wrong, levels)
    precision, recall = true / (true + false), true / (len(correct) + missed)
    padded = np.concatenate([recall[:1], recall, [0.0, 0.0]])
    widths = (padded[:-2] - padded[2:]) / 2
    return float(np.append(precision, precision[-1]) @ widths)
