"""Predictions to COCO results, and COCO results to average precision, with pycocotools as the reference.

Everything that reaches pycocotools' C code is checked first: it trusts sizes and run lengths, and a wrong one
there reads foreign memory, never returns or ends the process (landscape E.5).
"""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pais_ray.data.validation.rules import DataError, short_repr
from pais_ray.data.validation.values import check_box, check_rle
from pais_ray.evaluation import cityscapes

if TYPE_CHECKING:  # scoring is tasks of its own, whose processes need no torch: 4 s and 700 MB each
    from pais_ray.structures.batch import Predictions
from pais_ray.data.annotations.ground_truth import load_ground_truth, read_source
from pais_ray.data.annotations.rle import Json, compress_rle

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")

IOU_TYPES = ("segm", "bbox")


def to_results(
    predictions: "Predictions", image_id: int, size: tuple[int, int], category_ids: Sequence[int]
) -> list[Json]:
    """COCO results of one image of ``size`` = (h, w) px, best first, from predictions in that image's frame.

    Call it image by image: full-size masks are large. ``category_ids`` leads from labels to the ids of the
    annotation file. Each entry holds image_id, category_id, bbox (XYWH px), score, segmentation (compressed
    RLE, ``counts`` a str) and mask_iou, the predicted IoU of the mask.
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


def score(
    ground_truth: Json | str | Path,
    results: list[Json] | str | Path,
    iou_types: Sequence[str] | None = None,
) -> dict[str, Json]:
    """COCO figures, unrounded: {"segm": {"AP": ..., "AP50": ..., "per_class": {name: AP}}, "bbox": {...}}.

    Both arguments are files or their content. None stands for a figure without any object to find
    (pycocotools' -1). ``iou_types`` defaults to both, or ``bbox`` alone where the results hold no masks;
    boxes that are missing are taken from the masks. Small, medium and large are areas of masks for ``segm``
    also where the results name boxes. Equal scores keep the order of the file, as in pycocotools.
    Ground truth made of Cityscapes adds {"cityscapes": {"AP", "AP50", "per_class"}}, its own instance AP, where
    masks are scored. Raises DataError (a ValueError) naming file, entry, rule and remedy.
    """
    truth = load_ground_truth(ground_truth)
    where, entries = read_source(results, "results")
    if not isinstance(entries, list):
        remedy = "write image_id, category_id, score and segmentation of each detection"
        raise DataError("file-json", where, f"expected a list of COCO results, got {short_repr(entries)}", remedy)
    if iou_types is None:
        boxes_only = bool(entries) and not any(isinstance(e, dict) and "segmentation" in e for e in entries)
        iou_types = ("bbox",) if boxes_only else IOU_TYPES
    for iou_type in iou_types:
        if iou_type not in IOU_TYPES:
            raise ValueError(f"iou_types: expected some of {', '.join(IOU_TYPES)}, got {iou_type!r}")
    _check_results(entries, where, truth, needs_mask="segm" in iou_types)
    scores = {iou_type: _score(truth, entries, iou_type) for iou_type in iou_types}
    if "segm" in iou_types and cityscapes.has_void(truth):
        scores["cityscapes"] = cityscapes.instance_ap(truth, entries)
    return scores


def table(scores: Mapping[str, Json]) -> str:
    """Scores as text: one line a kind of IoU, then the AP of each class; "-" where there is none."""

    def cell(value: float | None, width: int = 7) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>{width}}"

    head = max(map(len, [*scores, "segm "])) + 1
    lines = [" " * head + "".join(f"{name:>7}" for name in FIGURES)]
    lines += [f"{kind:<{head}}" + "".join(cell(f.get(name)) for name in FIGURES) for kind, f in scores.items()]
    names = list(dict.fromkeys(name for figures in scores.values() for name in figures["per_class"]))
    widest = max(map(len, [*names, "class"]))
    columns = [(max(10, len(kind) + 5), kind, figures["per_class"]) for kind, figures in scores.items()]
    lines += ["", f"{'class':<{widest}}" + "".join(f"{f'{kind} AP':>{width}}" for width, kind, _ in columns)]
    for name in names:
        lines.append(f"{name:<{widest}}" + "".join(cell(aps.get(name), width) for width, _, aps in columns))
    return "\n".join(lines)


def _score(truth: Json, entries: list[Json], iou_type: str) -> Json:
    key = "segmentation" if iou_type == "segm" else "bbox"
    missing = next((a for a in truth["annotations"] if key not in a), None)
    if missing is not None:
        here = f"ground truth: image {missing['image_id']}"
        raise DataError("key-missing", here, f"an annotation without {key!r}, which {iou_type} AP needs")
    detections = _detections(entries, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(truth), _coco({**truth, "annotations": detections}), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    figures: Json = {name: _figure(value) for name, value in zip(FIGURES, evaluation.stats, strict=True)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (IoU thresholds, recalls, classes)
    names = _names(truth["categories"])
    figures["per_class"] = {
        names[category]: _figure(_mean(precision[:, :, i])) for i, category in enumerate(evaluation.params.catIds)
    }
    return figures


def _detections(entries: list[Json], iou_type: str) -> list[Json]:
    """What COCO.loadRes makes of results, with only the geometry that is scored: it would measure a mask by
    its box where both are given, and it fails on an empty list."""
    detections = []
    for i, entry in enumerate(entries):
        common = {
            "id": i + 1,
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "score": float(entry["score"]),
            "iscrowd": 0,
        }
        # One mask a call: on a list, pycocotools 2.0.11 with NumPy 2 fails from the 256th mask on.
        if iou_type == "segm":
            rle = compress_rle(entry["segmentation"])
            detections.append(common | {"segmentation": rle, "area": float(mask_utils.area(rle))})
        else:
            given = entry["bbox"] if "bbox" in entry else mask_utils.toBbox(compress_rle(entry["segmentation"]))
            box = [float(value) for value in given]
            detections.append(common | {"bbox": box, "area": box[2] * box[3]})
    return detections


def _check_results(entries: Iterable[Any], where: str, truth: Json, needs_mask: bool) -> None:
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for index, entry in enumerate(entries):
        here = f"{where}: entry {index}"
        if not isinstance(entry, dict):
            raise DataError("key-type", here, f"expected an object, got {short_repr(entry)}")
        here = f"{here} (image {short_repr(entry.get('image_id'))})"
        if missing := {"image_id", "category_id", "score"} - set(entry):
            raise DataError("key-missing", here, f"no {sorted(missing)[0]!r}")
        if type(entry["image_id"]) is not int or entry["image_id"] not in sizes:
            remedy = "score against the annotations that the predictions were made for"
            raise DataError("id-unknown", here, "the ground truth has no such image", remedy)
        if type(entry["category_id"]) is not int or entry["category_id"] not in categories:
            known = ", ".join(map(str, sorted(categories)[:10])) + ", ..." * (len(categories) > 10)
            message = f"expected one of the ground truth's category_id {known}, got {short_repr(entry['category_id'])}"
            raise DataError("id-unknown", here, message, "use the ids of that file, not labels 0..C-1")
        if type(entry["score"]) not in (int, float) or not math.isfinite(entry["score"]):
            raise DataError("key-type", here, f"expected a finite score, got {short_repr(entry['score'])}", "drop it")
        if "bbox" in entry:
            check_box(entry["bbox"], here)
        if "segmentation" in entry:
            if not isinstance(entry["segmentation"], Mapping):
                message = f"expected RLE as segmentation of a result, got {short_repr(entry['segmentation'])}"
                raise DataError("segmentation-type", here, message, "write an object with size and counts")
            check_rle(entry["segmentation"], *sizes[entry["image_id"]], here)
        elif needs_mask or "bbox" not in entry:
            remedy = "add the mask" if needs_mask else "add a box or a mask"
            raise DataError("key-missing", here, "no 'segmentation'", remedy)


def _coco(dataset: Json) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _names(categories: list[Json]) -> dict[int, str]:
    """Category id -> name; a name that two categories share is told apart by the id."""
    names = [category.get("name", str(category["id"])) for category in categories]
    return {
        category["id"]: name if names.count(name) == 1 else f"{name} ({category['id']})"
        for category, name in zip(categories, names, strict=True)
    }


def _mean(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0


def _figure(value: float) -> float | None:
    return float(value) if value > -1 else None
