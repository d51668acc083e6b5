"""COCO results: made of predictions, and checked before they are scored.

pycocotools' C code trusts sizes and run lengths; a wrong one reads foreign memory, never returns or ends the process.
So everything that reaches it is checked first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as mask_utils

from pais_ray.data.annotations.ground_truth import read_source
from pais_ray.data.annotations.rle import Json
from pais_ray.data.validation.rules import DataError, short_repr
from pais_ray.data.validation.values import check_box, check_rle

if TYPE_CHECKING:  # scoring runs in separate processes; importing torch would cost each of them 4 s and 700 MB
    from pais_ray.structures.batch import Predictions


def to_results(
    predictions: "Predictions", image_id: int, size: tuple[int, int], category_ids: Sequence[int]
) -> list[Json]:
    """COCO results, best first, of one image of ``size`` = (h, w) px from predictions in the frame of that image.

    Call it for one image at a time: full-size masks are large. ``category_ids`` maps labels to the ids of the
    annotation file. Each entry has image_id, category_id, bbox (XYWH px), score, segmentation (compressed RLE with
    ``counts`` as str) and mask_iou, the predicted IoU of the mask.
    """
    predictions = predictions.to("cpu")
    if len(predictions) == 0:
        return []
    masks = predictions.masks.paste(size).numpy()  # (N, H, W)
    rles = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    x1, y1, x2, y2 = predictions.boxes.double().unbind(dim=1)
    boxes = zip(x1.tolist(), y1.tolist(), (x2 - x1).tolist(), (y2 - y1).tolist(), strict=True)
    columns = (predictions.labels.tolist(), predictions.scores.tolist(), predictions.ious.tolist())
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[label]),
            "bbox": list(box),
            "score": score,
            "mask_iou": iou,
            "segmentation": {"size": [int(size[0]), int(size[1])], "counts": rle["counts"].decode("ascii")},
        }
        for box, label, score, iou, rle in zip(boxes, *columns, rles, strict=True)
    ]


def read_results(results: list[Json] | str | Path) -> tuple[list[Any], str]:
    """COCO results from a file or their content, not yet checked, and a name for error messages. Raises DataError."""
    place, entries = read_source(results, "results")
    if not isinstance(entries, list):
        remedy = "write image_id, category_id, score and segmentation of each detection"
        raise DataError("file-json", place, f"expected a list of COCO results, got {short_repr(entries)}", remedy)
    return entries, place


def has_boxes_only(entries: Sequence[Any]) -> bool:
    """Whether there are results, and none of them has a mask."""
    return bool(entries) and not any(isinstance(entry, dict) and "segmentation" in entry for entry in entries)


def check_results(entries: Iterable[Any], place: str, truth: Json, needs_masks: bool) -> None:
    """Raises DataError, which names the entry and the rule, if an entry is not a valid result for ``truth``."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for index, entry in enumerate(entries):
        entry_place = f"{place}: entry {index}"
        if not isinstance(entry, dict):
            raise DataError("key-type", entry_place, f"expected an object, got {short_repr(entry)}")
        entry_place = f"{entry_place} (image {short_repr(entry.get('image_id'))})"
        if missing := {"image_id", "category_id", "score"} - set(entry):
            raise DataError("key-missing", entry_place, f"expected a value {sorted(missing)[0]!r}, got none")
        if type(entry["image_id"]) is not int or entry["image_id"] not in sizes:
            remedy = "use the annotations that the predictions were made for"
            raise DataError("id-unknown", entry_place, "the ground truth has no such image", remedy)
        if type(entry["category_id"]) is not int or entry["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:10])) + ", ..." * (len(categories) > 10)
            message = (
                f"expected one of the category ids of the ground truth {known}, got {short_repr(entry['category_id'])}"
            )
            raise DataError("id-unknown", entry_place, message, "use the ids of that file, not labels 0..C-1")
        if type(entry["score"]) not in (int, float) or not math.isfinite(entry["score"]):
            raise DataError(
                "key-type", entry_place, f"expected a finite score, got {short_repr(entry['score'])}", "drop it"
            )
        if "bbox" in entry:
            check_box(entry["bbox"], entry_place)
        if "segmentation" in entry:
            if not isinstance(entry["segmentation"], Mapping):
                message = f"expected RLE as segmentation of a result, got {short_repr(entry['segmentation'])}"
                raise DataError("segmentation-type", entry_place, message, "write an object with size and counts")
            check_rle(entry["segmentation"], *sizes[entry["image_id"]], entry_place)
        elif needs_masks or "bbox" not in entry:
            remedy = "add the mask" if needs_masks else "add a box or a mask"
            raise DataError("key-missing", entry_place, "expected a value 'segmentation', got none", remedy)
