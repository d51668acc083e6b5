"""COCO files and plain folders -> records: paths, sizes and run lengths, no pixels. Torch-free.

Legend: N instances of an image, crowds left out; boxes are (N, 4) XYXY px of the upright image.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pais_ray.data import validate
from pais_ray.data.images import upright_size
from pais_ray.data.validate import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True, kw_only=True)
class Category:
    id: int  # as in the JSON
    name: str
    index: int  # contiguous 0..C-1, by ascending id


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One image on disk. It has no field for labels, so labels cannot leak through it."""

    image_id: int
    path: str
    height: int  # px of the upright image
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledRecord(Record):
    """One image with the instances to learn."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px, inside the image
    labels: np.ndarray  # (N,) int64, Category.index
    rles: tuple[bytes, ...]  # N compressed COCO run lengths of size (height, width)


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoDataset:
    path: str  # of the annotations
    categories: tuple[Category, ...]
    records: tuple[LabeledRecord, ...]  # in the order of the file
    sha256: str  # of the annotations' content
    truth: str | dict[str, Any]  # to score against, with crowds: the COCO file, or its content where there is none
    num_crowd: int  # annotations left out because they are crowds
    num_dropped: int  # annotations left out because box or mask is empty within the image


def read_coco(annotations: str, images: str | None) -> CocoDataset:
    """The data set of a COCO annotation file whose images lie under the folder ``images``.

    Images without annotations are kept (N = 0). Polygons and both kinds of RLE become one compressed RLE an
    instance; boxes are the file's own, clipped to the image. Without ``images`` nobody looks for the images, and
    their paths are the names in the file. Raises DataError on the first broken rule.
    """
    tree, sha256 = _read_json(annotations)
    return build_dataset(tree, annotations, images, sha256, truth=annotations)


def build_dataset(
    tree: Mapping[str, Any], annotations: str, images: str | None, sha256: str, truth: str | dict[str, Any]
) -> CocoDataset:
    """The data set of COCO annotations in memory, which came from ``annotations``. Raises DataError."""
    categories = _categories(_list(tree, "categories", annotations), annotations)
    plain = _image_records(_list(tree, "images", annotations), annotations, images)
    by_image: dict[int, list[Mapping[str, Any]]] = {record.image_id: [] for record in plain}
    index = {category.id: category.index for category in categories}
    seen: set[int] = set()
    for entry in _list(tree, "annotations", annotations):
        annotation_id = _new_id(entry, "annotation", annotations, seen)
        where = f"{annotations}: annotation {annotation_id}"
        image_id, category_id = _value(entry, "image_id", where), _value(entry, "category_id", where)
        if type(image_id) is not int or image_id not in by_image:
            raise DataError("id-unknown", where, f"there is no image {image_id!r}")
        if type(category_id) is not int or category_id not in index:
            known = ", ".join(str(c.id) for c in categories[:20]) + (" ..." if len(categories) > 20 else "")
            raise DataError("id-unknown", where, f"there is no category {category_id!r}, only {known}")
        by_image[image_id].append(entry)
    records, num_crowd, num_dropped = [], 0, 0
    for record in plain:
        labeled, crowd, dropped = _label(record, by_image[record.image_id], index, annotations)
        records.append(labeled)
        num_crowd, num_dropped = num_crowd + crowd, num_dropped + dropped
    return CocoDataset(
        path=annotations,
        categories=categories,
        records=tuple(records),
        sha256=sha256,
        truth=truth,
        num_crowd=num_crowd,
        num_dropped=num_dropped,
    )


def read_folder(folder: str) -> tuple[Record, ...]:
    """Every image under ``folder``, by relative path; the image id is the position in this order.

    Hidden files and folders are skipped. Sizes come from the headers; broken files raise DataError.
    """
    if not os.path.isdir(folder):
        raise DataError("file-missing", folder, "expected a folder of images, got no folder")
    folder = os.path.abspath(folder)
    names: list[str] = []
    for base, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        names.extend(os.path.relpath(os.path.join(base, name), folder) for name in shown)
    if not names:
        raise DataError("image-missing", folder, f"expected images ({' '.join(SUFFIXES)}), got none")
    names.sort(key=lambda name: name.split(os.sep))
    records = []
    for position, name in enumerate(names):
        path = os.path.join(folder, name)
        height, width = upright_size(path)
        records.append(Record(image_id=position, path=path, height=height, width=width))
    return tuple(records)


def read_unlabeled(source: str, images: str | None, *, look: bool = True) -> tuple[Record, ...]:
    """Images of a COCO file, of which only the list of images is looked at, or of a plain folder.

    ``images`` is the folder the file's names are relative to; a plain folder needs none. Without ``look`` nobody
    looks for the images of a COCO file, and their paths are the names in it.
    """
    if os.path.isdir(source):
        return read_folder(source)
    if images is None and look:
        raise DataError("file-missing", source, "its images need a folder", "give data.unlabeled_images or data.images")
    tree, _ = _read_json(source)
    return _image_records(_list(tree, "images", source), source, images if look else None)


def unlabel(record: Record) -> Record:
    """The image alone: a new record without the annotations."""
    return Record(image_id=record.image_id, path=record.path, height=record.height, width=record.width)


def decode_rle(rles: Sequence[bytes], height: int, width: int) -> np.ndarray:
    """Masks (N, H, W) uint8 {0, 1} of compressed run lengths, which go down the columns.

    Not pycocotools': only the columns between an instance's first and last are unpacked and transposed, which
    is several times faster for the small ones, and runs that do not fill the mask are a DataError.
    """
    masks = np.zeros((len(rles), height, width), dtype=np.uint8)
    for mask, counts in zip(masks, rles, strict=True):
        runs = validate.parse_counts(counts, "rle")
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


def _read_json(path: str) -> tuple[Mapping[str, Any], str]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise DataError("file-missing", path, f"expected a COCO annotation file, got {error.strerror}") from error
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError("file-json", path, f"expected JSON, got {error}") from error
    if not isinstance(tree, dict):
        hint = " (a results file?)" if isinstance(tree, list) else ""
        raise DataError("file-json", path, f"expected a JSON object, got a {type(tree).__name__}{hint}")
    return tree, hashlib.sha256(data).hexdigest()


def _list(tree: Mapping[str, Any], key: str, path: str) -> list[Any]:
    if key not in tree:
        raise DataError("key-missing", path, f"expected the key {key!r}, got {', '.join(map(repr, tree)) or 'none'}")
    if not isinstance(tree[key], list):
        raise DataError("key-type", path, f"expected {key!r} to be a list, got a {type(tree[key]).__name__}")
    return tree[key]


def _value(entry: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise DataError("key-missing", where, f"expected the key {key!r}, got {', '.join(map(repr, entry))}")
    return entry[key]


def _new_id(entry: object, kind: str, path: str, seen: set[int]) -> int:
    """The id of an entry, added to ``seen``; 0 is an id like any other."""
    if not isinstance(entry, dict):
        raise DataError("key-type", f"{path}: {kind}", f"expected an object, got a {type(entry).__name__}")
    value = _value(entry, "id", f"{path}: {kind} {str(entry)[:60]}")
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise DataError("id-type", f"{path}: {kind} {value!r}", f"expected a whole number, got {type(value).__name__}")
    if value in seen:
        raise DataError("id-duplicate", f"{path}: {kind} {value}", "this id occurs twice")
    seen.add(value)
    return value


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = _value(entry, key, where)
    if not isinstance(value, str) or not value:
        raise DataError("key-type", where, f"expected {key!r} to be a text, got {value!r}")
    return value


def _categories(entries: list[Any], path: str) -> tuple[Category, ...]:
    seen: set[int] = set()
    names = {}
    for entry in entries:
        category_id = _new_id(entry, "category", path, seen)
        names[category_id] = _text(entry, "name", f"{path}: category {category_id}")
    if not names:
        raise DataError("key-type", path, "expected at least one category, got none")
    return tuple(Category(id=key, name=names[key], index=i) for i, key in enumerate(sorted(names)))


def _image_records(entries: list[Any], path: str, images: str | None) -> tuple[Record, ...]:
    if images is not None and not os.path.isdir(images):
        raise DataError("file-missing", images, f"expected the folder of the images of {path}, got no folder")
    folder = None if images is None else os.path.abspath(images)  # another process may run in another folder
    seen: set[int] = set()
    records = []
    for entry in entries:
        image_id = _new_id(entry, "image", path, seen)
        where = f"{path}: image {image_id}"
        height, width = _value(entry, "height", where), _value(entry, "width", where)
        height, width = validate.check_size(height, width, where)
        name = _text(entry, "file_name", where)
        file = name if folder is None else _file(folder, name, where)
        records.append(Record(image_id=image_id, path=file, height=height, width=width))
    return tuple(records)


def _file(folder: str, name: str, where: str) -> str:
    """The path of an existing file that lies inside ``folder``, links followed; not itself resolved, because
    another machine may mount the folder elsewhere."""
    if "\0" in name or os.path.isabs(name) or "://" in name:
        raise DataError("image-path", where, f"expected a file name relative to {folder}, got {name!r}")
    path = os.path.join(folder, name)
    if os.path.basename(name) != name or os.path.islink(path):  # else it cannot lead elsewhere
        root = os.path.realpath(folder)
        if os.path.commonpath([root, os.path.realpath(path)]) != root:
            raise DataError("image-path", where, f"expected a file inside {folder}, got {name!r}, which is not")
    if not os.path.isfile(path):
        raise DataError("image-missing", where, f"there is no file {name!r} in {folder}")
    return path


def _label(
    record: Record, entries: list[Mapping[str, Any]], index: Mapping[int, int], path: str
) -> tuple[LabeledRecord, int, int]:
    """The image with its instances, and how many annotations were crowds and how many were empty."""
    size = (record.height, record.width)
    boxes, labels, segmentations, num_crowd = [], [], [], 0
    for entry in entries:
        where = f"{path}: annotation {entry['id']} (image {record.image_id})"
        crowd = validate.check_crowd(entry.get("iscrowd", 0), where)
        segmentation = _value(entry, "segmentation", where)
        validate.check_segmentation(segmentation, *size, where)
        box = validate.check_box(_value(entry, "bbox", where), where)
        if crowd:
            num_crowd += 1
            continue
        boxes.append(box)
        labels.append(index[entry["category_id"]])
        segmentations.append(segmentation)
    xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    xyxy = np.clip(xyxy, 0, [record.width, record.height] * 2).astype(np.float32)
    rles = _to_rles(segmentations, *size)
    keep = np.logical_and(*(xyxy[:, 2:] > xyxy[:, :2]).T)
    if rles:
        keep = keep & (np.asarray(coco_mask.area(rles)) > 0)
    labeled = LabeledRecord(
        image_id=record.image_id,
        path=record.path,
        height=record.height,
        width=record.width,
        boxes=xyxy[keep],
        labels=np.array(labels, dtype=np.int64)[keep],
        rles=tuple(rle["counts"] for rle, kept in zip(rles, keep, strict=True) if kept),
    )
    return labeled, num_crowd, int((~keep).sum())


def _to_rles(segmentations: list[Any], height: int, width: int) -> list[dict[str, Any]]:
    """One compressed RLE per validated segmentation, the polygons of an image through C in one go."""
    polygons = [polygon for item in segmentations if isinstance(item, list) for polygon in item]
    parts = iter(coco_mask.frPyObjects(polygons, height, width) if polygons else [])
    rles: list[dict[str, Any]] = []
    for item in segmentations:
        if isinstance(item, list) and item:
            own = [next(parts) for _ in item]
            rles.append(own[0] if len(own) == 1 else coco_mask.merge(own))
            continue
        counts = [height * width] if isinstance(item, list) else item["counts"]  # no polygon: all background
        if isinstance(counts, list):
            rles.append(coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width))
        else:
            data = counts.encode("ascii") if isinstance(counts, str) else counts
            rles.append({"size": [height, width], "counts": data})
    return rles
