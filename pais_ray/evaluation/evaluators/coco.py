"""Average precision and recall as COCO defines them, computed by pycocotools."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pais_ray.data.annotations.rle import Json, compress_rle
from pais_ray.data.validation.rules import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoEvaluator:
    """COCO metrics for one kind of IoU: of masks ("segm") or of boxes ("bbox").

    Small, medium and large refer to mask areas for "segm", also if the results have boxes. Equal scores keep the order
    of the results, as in pycocotools.
    """

    name: Literal["segm", "bbox"]

    @property
    def needs_masks(self) -> bool:
        return self.name == "segm"

    def supports(self, truth: Json) -> bool:
        return True

    def evaluate(self, truth: Json, results: Sequence[Json]) -> Iterator[tuple[str, float | None]]:
        key = "segmentation" if self.name == "segm" else "bbox"
        missing = next((a for a in truth["annotations"] if key not in a), None)
        if missing is not None:
            place = f"ground truth: image {missing['image_id']}"
            raise DataError("key-missing", place, f"an annotation without {key!r}, which {self.name} AP needs")
        detections = _to_detections(results, self.name)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(_index(truth), _index({**truth, "annotations": detections}), self.name)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        yield from ((name, _or_none(value)) for name, value in zip(METRICS, evaluation.stats, strict=True))
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes)
        names = _category_names(truth["categories"])
        for i, category in enumerate(evaluation.params.catIds):
            yield f"AP_class/{names[category]}", _mean_precision(precision[:, :, i])


EVALUATORS = (CocoEvaluator("segm"), CocoEvaluator("bbox"))


def _to_detections(results: Sequence[Json], iou_type: Literal["segm", "bbox"]) -> list[Json]:
    """What COCO.loadRes makes of results, with only the geometry that is scored. COCO.loadRes measures a mask by its
    box if both are given, and fails on an empty list."""
    detections = []
    for i, entry in enumerate(results):
        common = {
            "id": i + 1,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": float(entry["score"]),
            "iscrowd": 0,
        }
        # One mask per call: with NumPy 2, pycocotools 2.0.11 fails on a list from the 256th mask on.
        if iou_type == "segm":
            rle = compress_rle(entry["segmentation"])
            detections.append(common | {"segmentation": rle, "area": float(mask_utils.area(rle))})
        else:
            given = entry["bbox"] if "bbox" in entry else mask_utils.toBbox(compress_rle(entry["segmentation"]))
            box = [float(value) for value in given]
            detections.append(common | {"bbox": box, "area": box[2] * box[3]})
    return detections


def _index(dataset: Json) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _category_names(categories: Sequence[Json]) -> dict[int, str]:
    """Category id -> name. The id is appended to a name that several categories share."""
    names = [category.get("name", str(category["id"])) for category in categories]
    return {
        category["id"]: name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }


def _mean_precision(precision: np.ndarray) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _or_none(value: float) -> float | None:
    """A metric of pycocotools, where -1 means that there is no object to find."""
    return float(value) if value > -1 else None
