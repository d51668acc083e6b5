"""COCO files, plain folders and prefixes -> records: paths, sizes and run lengths, no pixels. Torch-free.

Legend: N instances of an image, crowds left out; boxes are (N, 4) XYXY px of the upright image.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pais_ray.data.annotations.folders import list_prefix, read_folder
from pais_ray.data.annotations.records import Category, CocoDataset, LabeledRecord, Record
from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.validation import entries, values
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage


def read_coco(annotations: str, images: str | None, limits: Limits = LIMITS) -> CocoDataset:
    """The data set of a COCO annotation file whose images lie under the folder ``images``.

    Images without annotations are kept (N = 0). Polygons and both kinds of RLE become one compressed RLE an
    instance; boxes are the file's own, clipped to the image. Without ``images`` nobody looks for the images, and
    their paths are the names in the file. Raises DataError on the first broken rule.
    """
    tree, sha256 = entries.read_tree(annotations, limits)
    return build_dataset(tree, annotations, images, sha256, truth=annotations, limits=limits)


def build_dataset(
    tree: Mapping[str, Any],
    annotations: str,
    images: str | None,
    sha256: str,
    truth: str | dict[str, Any],
    limits: Limits = LIMITS,
) -> CocoDataset:
    """The data set of COCO annotations in memory, which came from ``annotations``. Raises DataError."""
    categories = _categories(entries.check_list(tree, "categories", annotations), annotations)
    plain = _image_records(entries.check_list(tree, "images", annotations), annotations, images, limits)
    by_image: dict[int, list[Mapping[str, Any]]] = {record.image_id: [] for record in plain}
    index = {category.id: category.index for category in categories}
    seen: set[int] = set()
    used: set[int] = set()
    for entry in entries.check_list(tree, "annotations", annotations):
        annotation_id = entries.check_id(entry, "annotation", annotations, seen)
        seen.add(annotation_id)
        where = f"{annotations}: annotation {annotation_id}"
        image_id = entries.check_reference(entry, "image", by_image, where)
        used.add(entries.check_reference(entry, "category", index, where))
        by_image[image_id].append(entry)
    entries.check_category_names({c.id: c.name for c in categories}, used, annotations)
    records, num_crowd, num_dropped = [], 0, 0
    for record in plain:
        labeled, crowd, dropped = _label(record, by_image[record.image_id], index, annotations, limits)
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


def read_unlabeled(
    source: str, images: str | None, limits: Limits = LIMITS, *, look: bool = True
) -> tuple[Record, ...]:
    """Images of a COCO file, of which only the list of images is looked at, of a plain folder, or of a URL's prefix.

    ``images`` is the folder the file's names are relative to; a plain folder needs none. Without ``look`` nobody
    looks for the images of a COCO file, and their paths are the names in it.
    """
    if storage.is_url(source):
        return list_prefix(source)
    if os.path.isdir(source):
        return read_folder(source, limits)
    if images is None and look:
        raise DataError("file-missing", source, "its images need a folder", "give data.unlabeled_images or data.images")
    tree, _ = entries.read_tree(source, limits)
    return _image_records(entries.check_list(tree, "images", source), source, images if look else None, limits)


def _categories(listed: list[Any], path: str) -> tuple[Category, ...]:
    names: dict[int, str] = {}
    for entry in listed:
        category_id = entries.check_id(entry, "category", path, names)
        names[category_id] = entries.check_text(entry, "name", f"{path}: category {category_id}")
    entries.check_some_categories(names, path)
    return tuple(Category(id=key, name=names[key], index=i) for i, key in enumerate(sorted(names)))


def _image_records(listed: list[Any], path: str, images: str | None, limits: Limits) -> tuple[Record, ...]:
    folder = None if images is None else entries.check_folder(images, path)
    entries.check_some_images(listed, path)
    seen: set[int] = set()
    records = []
    for entry in listed:
        image_id = entries.check_id(entry, "image", path, seen)
        seen.add(image_id)
        where = f"{path}: image {image_id}"
        height, width = entries.check_value(entry, "height", where), entries.check_value(entry, "width", where)
        height, width = values.check_size(height, width, where, limits)
        name = entries.check_text(entry, "file_name", where)
        file = name if folder is None else entries.find_image(folder, name, where)
        records.append(Record(image_id=image_id, path=file, height=height, width=width))
    return tuple(records)


def _label(
    record: Record, own: list[Mapping[str, Any]], index: Mapping[int, int], path: str, limits: Limits
) -> tuple[LabeledRecord, int, int]:
    """The image with its instances, and how many annotations were crowds and how many were empty."""
    size = (record.height, record.width)
    values.check_count(len(own), f"{path}: image {record.image_id}", limits)
    boxes, labels, segmentations, crowds, places = [], [], [], [], []
    for entry in own:
        where = f"{path}: annotation {entry['id']} (image {record.image_id})"
        crowds.append(values.check_crowd(entry.get("iscrowd", 0), where))
        segmentation = entries.check_value(entry, "segmentation", where)
        values.check_segmentation(segmentation, *size, where)
        box = values.check_box(entries.check_value(entry, "bbox", where), where)
        values.check_area(entry.get("area"), where)
        boxes.append(box)
        labels.append(index[entry["category_id"]])
        segmentations.append(segmentation)
        places.append(where)
    rles = to_rles(segmentations, *size)
    instances = zip(boxes, *(array.tolist() for array in measure(rles)[::-1]), places, strict=True)
    keep = np.array([values.check_instance(b, m, a, *size, where) for b, m, a, where in instances], dtype=bool)
    xyxy = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    xyxy[:, 2:] += xyxy[:, :2]
    xyxy = np.clip(xyxy, 0, [record.width, record.height] * 2).astype(np.float32)
    keep &= (xyxy[:, 2:] > xyxy[:, :2]).all(axis=1)
    learned = ~np.array(crowds, dtype=bool)
    num_dropped = int((learned & ~keep).sum())
    keep &= learned
    labeled = LabeledRecord(
        image_id=record.image_id,
        path=record.path,
        height=record.height,
        width=record.width,
        boxes=xyxy[keep],
        labels=np.array(labels, dtype=np.int64)[keep],
        rles=tuple(rle["counts"] for rle, kept in zip(rles, keep, strict=True) if kept),
    )
    return labeled, int((~learned).sum()), num_dropped
