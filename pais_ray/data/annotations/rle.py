"""TODO docstring."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools import mask as mask_utils

from pais_ray.data.validation import values
from pais_ray.data.validation.rules import DataError

if TYPE_CHECKING:  # scoring is tasks of its own, whose processes need no torch: 4 s and 700 MB each
    pass


def decode_rle(rles: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """Masks (N, H, W) uint8 {0, 1} of compressed run lengths, which go down the columns.

    Not pycocotools': only the columns between an instance's first and last are unpacked and transposed, which
    is several times faster for the small ones, and runs that do not fill the mask are a DataError.
    """
    masks = np.zeros((len(rles), height, width), dtype=np.uint8)
    for mask, counts in zip(masks, rles, strict=True):
        runs = values.parse_counts(counts, "rle")
        total = int(runs.sum())
        if total != height * width:
            raise DataError("rle-sum", "rle", f"the runs cover {total} of {height * width} pixels")
        if len(runs) < 2:
            continue
        stop = total - int(runs[-1]) if len(runs) % 2 else total
        left, right = int(runs[0]) // height, -(-stop // height)
        runs[0] -= left * height
        if len(runs) % 2:
            runs[-1] = right * height - stop
        columns = np.repeat((np.arange(len(runs)) & 1).astype(np.uint8), runs)
        mask[:, left:right] = columns.reshape(right - left, height).T
    return masks


def encode_masks(masks: np.ndarray) -> list[bytes]:
    """Compressed COCO run lengths of masks (N, H, W) bool."""
    if masks.ndim != 3:
        raise ValueError(f"encode_masks: expected masks (N, H, W), got shape {masks.shape}; add the axis of instances")
    if len(masks) == 0:
        return []
    columns = np.asfortranarray(masks.transpose(1, 2, 0).astype(bool).view(np.uint8))  # (H, W, N)
    return [rle["counts"] for rle in coco_mask.encode(columns)]


def to_rles(segmentations: Sequence[Any], height: int, width: int) -> list[dict[str, Any]]:
    """One compressed RLE per validated segmentation, the polygons of an image through C in one go."""
    polygons = [polygon for item in segmentations if isinstance(item, list) for polygon in item]
    parts = iter(coco_mask.frPyObjects(polygons, height, width) if polygons else [])
    rles: list[dict[str, Any]] = []
    for item in segmentations:
        if isinstance(item, list) and item:
            rles.append(merge([next(parts) for _ in item]))
            continue
        counts = [height * width] if isinstance(item, list) else item["counts"]  # no polygon: all background
        if isinstance(counts, list):
            rles.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
        else:
            data = counts.encode("ascii") if isinstance(counts, str) else counts
            rles.append({"size": [height, width], "counts": data})
    return rles


def merge(rles: list[dict[str, Any]]) -> dict[str, Any]:
    """The union of at least one RLE. In groups: merging one by one takes quadratic time."""
    while len(rles) > 1:
        rles = [coco_mask.merge(rles[i : i + 8]) for i in range(0, len(rles), 8)]
    return rles[0]


def measure(rles: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Areas (N,) and boxes (N, 4) XYWH, px, of compressed RLEs."""
    areas, boxes = [np.zeros(0)], [np.zeros((0, 4))]
    for i in range(0, len(rles), 255):  # with NumPy 2, pycocotools 2.0.11 fails on more at a time
        areas.append(np.asarray(coco_mask.area(list(rles[i : i + 255])), dtype=np.float64))
        boxes.append(np.asarray(coco_mask.toBbox(list(rles[i : i + 255])), dtype=np.float64))
    return np.concatenate(areas), np.concatenate(boxes)


Json = dict[str, Any]


def _compressed(rle: Json) -> Json:
    return mask_utils.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle
