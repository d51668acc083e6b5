"""Reads COCO files, plain folders and URL prefixes as records: paths, sizes and run lengths, no pixels. Torch-free.

Legend: N instances per image, crowds left out; boxes are (N, 4) XYXY px of the upright image.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from pais_ray.data.annotations.folders import list_prefix, read_folder
from pais_ray.data.annotations.records import Category, CocoDataset, LabeledRecord, Record
from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.validation import entries, values, walk
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.data.validation.walk import Entry
from pais_ray.files import storage


def read_coco(annotations: str, images: str | None, limits: Limits = LIMITS) -> CocoDataset:
    """Reads a COCO annotation file whose images lie in the folder ``images``.

    Images without annotations are kept (N = 0). Polygons and both kinds of RLE become one compressed RLE per
    instance; boxes are those of the file, clipped to the image. If ``images`` is None, the existence of the images is
    not checked and their paths are the names in the file. Raises DataError for the first broken rule.
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
    """Builds the data set of a parsed COCO file; ``annotations`` is its path for messages. Raises DataError."""
    categories = _categories(entries.check_list(tree, "categories", annotations), annotations)
    plain = _image_records(entries.check_list(tree, "images", annotations), annotations, images, limits)
    by_image: dict[int, list[Entry]] = {record.image_id: [] for record in plain}
    index = {category.id: category.index for category in categories}
    used: set[int] = set()
    for entry in walk.walk(entries.check_list(tree, "annotations", annotations), "annotation", annotations):
        image_id = walk.image_id(entry, by_image)
        used.add(walk.category_id(entry, index))
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
    source: str, images: str | None, limits: Limits = LIMITS, *, check_files: bool = True
) -> tuple[Record, ...]:
    """Reads the images of a COCO file (only its list of images), of a plain folder, or of a URL prefix.

    ``images`` is the folder that the names in a COCO file are relative to; a plain folder needs none. If
    ``check_files`` is false, the existence of the images of a COCO file is not checked and their paths are the names
    in the file. Raises DataError.
    """
    if storage.is_url(source):
        return list_prefix(source)
    if os.path.isdir(source):
        return read_folder(source, limits)
    if images is None and check_files:
        message = "expected the folder of its images, got none"
        raise DataError("file-missing", source, message, "set data.unlabeled_images or data.images")
    tree, _ = entries.read_tree(source, limits)
    return _image_records(entries.check_list(tree, "images", source), source, images if check_files else None, limits)


def _categories(listed: list[Any], path: str) -> tuple[Category, ...]:
    names = {entry.id: walk.category_name(entry) for entry in walk.walk(listed, "category", path)}
    entries.check_some_categories(names, path)
    return tuple(Category(id=key, name=names[key], index=i) for i, key in enumerate(sorted(names)))


def _image_records(listed: list[Any], path: str, images: str | None, limits: Limits) -> tuple[Record, ...]:
    folder = None if images is None else entries.check_folder(images, path)
    entries.check_some_images(listed, path)
    records = []
    for entry in walk.walk(listed, "image", path):
        height, width = walk.image_size(entry, limits)
        if folder is None:
            file = entries.check_text(entry.value, "file_name", entry.place)
        else:
            file = walk.image_file(entry, folder)
        records.append(Record(image_id=entry.id, path=file, height=height, width=width))
    return tuple(records)


def _label(
    record: Record, own: list[Entry], index: Mapping[int, int], path: str, limits: Limits
) -> tuple[LabeledRecord, int, int]:
    """Returns the image with its instances, the number of crowds and the number of empty annotations left out."""
    size = (record.height, record.width)
    values.check_count(len(own), f"{path}: image {record.image_id}", limits)
    boxes, labels, segmentations, crowds, places = [], [], [], [], []
    for entry in (entry.in_image(record.image_id) for entry in own):
        crowds.append(walk.is_crowd(entry))
        segmentations.append(walk.segmentation(entry, size))
        boxes.append(walk.box(entry))
        walk.area(entry)
        labels.append(index[entry.value["category_id"]])
        places.append(entry.place)
    rles = to_rles(segmentations, *size)
    instances = zip(boxes, *(array.tolist() for array in measure(rles)[::-1]), places, strict=True)
    keep = np.array([values.check_instance(b, m, a, *size, place) for b, m, a, place in instances], dtype=bool)
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
