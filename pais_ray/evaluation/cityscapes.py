"""Instance AP as Cityscapes defines it, from the data set's and the benchmark's description.

It differs from COCO's: instances below 100 px and groups are ignore regions, as the void labels are; one prediction
an object is right, the best scored one; every detection counts; precision is not made monotone, and the area under
the curve takes the precision of each distinct score times half the recall between its neighbors.
Law: the figures of the official evaluation to 1e-4.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from pais_ray.data.annotations.rle import compress_rle
from pais_ray.data.validation.values import check_rle

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  # an overlap must be larger than these
MIN_AREA = 100  # px of an instance that has to be found

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """D predictions and G objects (groups among them) of one class in one image."""

    scores: np.ndarray  # (D,)
    iou: np.ndarray  # (D, G)
    ignored: np.ndarray  # (D,) share of the prediction that lies in ignore regions
    counted: np.ndarray  # (G,) bool, objects to find


def has_void(truth: Json) -> bool:
    """Whether COCO ground truth comes from Cityscapes (``data.cityscapes.to_coco``) and so can be scored here."""
    return bool(truth["images"]) and all("void" in image for image in truth["images"])


def instance_ap(truth: Json, results: Sequence[Json]) -> Json:
    """{"AP", "AP50", "per_class": {name: AP}} of COCO results with masks, unrounded, against ``to_coco``'s truth.

    The entries have been checked. None stands for a class without an object to find. Raises DataError where
    ``void`` is not an RLE.
    """
    of_image: dict[int, dict[int, list[Json]]] = defaultdict(lambda: defaultdict(list))
    found: dict[int, dict[int, list[Json]]] = defaultdict(lambda: defaultdict(list))
    for entries, groups in ((truth["annotations"], of_image), (results, found)):
        for entry in entries:
            groups[entry["image_id"]][entry["category_id"]].append(entry)
    meetings: dict[int, list[_Meeting]] = {category["id"]: [] for category in truth["categories"]}
    for image in truth["images"]:
        check_rle(image["void"], image["height"], image["width"], f"ground truth: image {image['id']}: void")
        for category, here in meetings.items():
            objects, predictions = of_image[image["id"]][category], found[image["id"]][category]
            if objects or predictions:
                here.append(_meet(objects, predictions, image["void"]))
    names = {category["id"]: category["name"] for category in truth["categories"]}
    table = {names[category]: np.array([_ap(here, t) for t in THRESHOLDS]) for category, here in meetings.items()}
    known = np.array([values for values in table.values() if not np.isnan(values).any()]).reshape(-1, len(THRESHOLDS))
    return {
        "AP": float(known.mean()) if len(known) else None,
        "AP50": float(known[:, 0].mean()) if len(known) else None,
        "per_class": {name: None if np.isnan(values).any() else float(values.mean()) for name, values in table.items()},
    }


def _meet(objects: Sequence[Json], predictions: Sequence[Json], void: Json) -> _Meeting:
    masks = [compress_rle(p["segmentation"]) for p in predictions]
    solid = [i for i, mask in enumerate(masks) if mask_utils.area(mask) > 0]
    masks = [masks[i] for i in solid]
    regions = [compress_rle(o["segmentation"]) for o in objects]
    areas = np.array([mask_utils.area(mask) for mask in masks], dtype=np.int64)
    region_areas = np.array([mask_utils.area(region) for region in regions], dtype=np.int64)
    group = np.array([bool(o["iscrowd"]) for o in objects], dtype=bool)
    small = region_areas < MIN_AREA
    common = _intersections(masks, areas, regions)
    # As in the official evaluation, a small group counts twice: as a group and as a small object.
    ignored = _intersections(masks, areas, [void])[:, 0] + common @ (group.astype(np.int64) + small)
    return _Meeting(
        scores=np.array([predictions[i]["score"] for i in solid], dtype=np.float64),
        iou=common / (areas[:, None] + region_areas - common),
        ignored=ignored / areas,
        counted=~group & ~small,
    )


def _intersections(masks: list[Json], areas: np.ndarray, regions: list[Json]) -> np.ndarray:
    """Common pixels (D, G) int64. Against a "crowd", pycocotools' overlap is their share of the prediction."""
    if not masks or not regions:
        return np.zeros((len(masks), len(regions)), dtype=np.int64)
    shares = mask_utils.iou(masks, regions, [1] * len(regions))
    return np.rint(np.asarray(shares) * areas[:, None]).astype(np.int64)


def _ap(meetings: list[_Meeting], threshold: float) -> float:
    """AP of a class at one overlap; NaN without an object to find. Objects are disjoint and the overlap is at
    least a half, so a prediction meets one object at most."""
    right: list[float] = []
    wrong: list[float] = []
    missed = 0
    for meeting in meetings:
        hits = meeting.iou > threshold
        for g in np.flatnonzero(meeting.counted):
            scores = np.sort(meeting.scores[hits[:, g]])
            right += scores[-1:].tolist()
            wrong += scores[:-1].tolist()
            missed += len(scores) == 0
        wrong += meeting.scores[~hits.any(axis=1) & (meeting.ignored <= threshold)].tolist()
    if not right and not missed:
        return math.nan
    return _area(np.sort(right), np.sort(wrong), missed) if right else 0.0


def _area(right: np.ndarray, wrong: np.ndarray, missed: int) -> float:
    """Area under precision over recall, given the ascending scores of right and wrong predictions."""
    levels = np.unique(np.concatenate([right, wrong]))
    true = len(right) - np.searchsorted(right, levels)  # at or above each level
    false = len(wrong) - np.searchsorted(wrong, levels)
    precision, recall = true / (true + false), true / (len(right) + missed)
    around = np.concatenate([recall[:1], recall, [0.0, 0.0]])
    widths = (around[:-2] - around[2:]) / 2
    return float(np.append(precision, precision[-1]) @ widths)
