"""COCO files, plain folders and prefixes -> records: paths, sizes and run lengths, no pixels. Torch-free.

Legend: N instances of an image, crowds left out; boxes are (N, 4) XYXY px of the upright image.
"""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from pais_ray.data import entries, storage, validate
from pais_ray.data.images import upright_size
from pais_ray.data.validate import LIMITS, DataError, Limits

HEADER = 64 * 1024  # bytes of a remote image read at a time: sizes stand near the start
THREADS = 16  # remote images looked at together
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True, kw_only=True)
class Category:
    id: int  # as in the JSON
    name: str
    index: int  # contiguous 0..C-1, by ascending id


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One image. It has no field for labels, so labels cannot leak through it."""

    image_id: int
    path: str  # a file, a URL, or a row of a shard (shards.place_of)
    height: int  # px of the upright image; 0 where nobody has looked yet
    width: int


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledRecord(Record):
    """One image with the instances to learn."""

    boxes: np.ndarray  # (N, 4) float32 XYXY px, inside the image
    labels: np.ndarray  # (N,) int64, Category.index
    rles: tuple[bytes, ...]  # N compressed COCO run lengths of size (height, width)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardRecord(Record):
    """One image whose instances lie in its shard, beside its bytes; their classes are known."""

    labels: np.ndarray  # (N,) int64, Category.index


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoDataset:
    path: str  # of the annotations
    categories: tuple[Category, ...]
    records: tuple[LabeledRecord | ShardRecord, ...]  # in the order of the file
    sha256: str  # of the annotations' content
    truth: str | dict[str, Any]  # to score against, with crowds: the COCO file, or its content where there is none
    num_crowd: int  # annotations left out because they are crowds
    num_dropped: int  # annotations left out because box or mask is empty within the image


def annotated(dataset: CocoDataset) -> list[LabeledRecord]:
    """The images whose instances are at hand: all but those that lie in shards."""
    return [record for record in dataset.records if isinstance(record, LabeledRecord)]


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


def read_folder(folder: str, limits: Limits = LIMITS) -> tuple[Record, ...]:
    """Every image under ``folder``, by relative path; the image id is the position in this order.

    Hidden files and folders are skipped. Sizes come from the headers; broken files raise DataError.
    """
    records = []
    for position, path in enumerate(list_folder(folder)):
        height, width = upright_size(path, max_pixels=limits.max_pixels)
        records.append(Record(image_id=position, path=path, height=height, width=width))
    return tuple(records)


def list_folder(folder: str) -> list[str]:
    """The paths of all image files under ``folder``, in the order of their relative paths."""
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
    paths = [os.path.join(folder, name) for name in names]
    for path in paths:
        if not os.path.isfile(path):  # opening a pipe may wait for ever
            message = "expected an image file, got a pipe, a device or a link that leads nowhere"
            raise DataError("image-missing", path, message, "remove it, or put the image there")
    return paths


def list_prefix(url: str) -> tuple[Record, ...]:
    """Every image under the prefix of an object store, in the order of ``list_folder``. Headers are not read: sizes
    are unknown."""
    try:
        files = storage.list_files(url)
    except storage.StorageError as error:
        raise DataError("file-read", url, error.reason, storage.REMEDY) from error
    shown = [name.split("/") for name in files if name.lower().endswith(SUFFIXES)]
    names = ["/".join(parts) for parts in sorted(shown) if not any(part.startswith(".") for part in parts)]
    if not names:
        raise DataError("image-missing", url, f"expected images ({' '.join(SUFFIXES)}), got none")
    paths = (storage.join(url, name) for name in names)
    return tuple(Record(image_id=i, path=path, height=0, width=0) for i, path in enumerate(paths))


def look_up(records: Sequence[Record], limits: Limits = LIMITS) -> Iterator[tuple[int, int] | DataError]:
    """The upright (height, width) of each image, or what is wrong with it, in order: where nobody has looked yet, by
    its header, at a request or two each."""
    if all(record.height for record in records):
        return ((record.height, record.width) for record in records)

    def look(record: Record) -> tuple[int, int] | DataError:
        try:
            with storage.open_file(record.path) as opened, io.BufferedReader(opened, HEADER) as file:  # type: ignore[type-var]
                return upright_size(file, record.path, limits.max_pixels)
        except storage.StorageError as error:
            return DataError("file-read", record.path, error.reason, storage.REMEDY)
        except DataError as error:
            return error

    return storage.in_order(look, records, THREADS, 8 * THREADS)


def sized(records: Sequence[Record], limits: Limits = LIMITS) -> tuple[Record, ...]:
    """The images with their sizes, see ``look_up``. Raises DataError."""
    found = []
    for record, size in zip(records, look_up(records, limits), strict=True):
        if isinstance(size, DataError):
            raise size
        found.append(replace(record, height=size[0], width=size[1]))
    return tuple(found)


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
        height, width = validate.check_size(height, width, where, limits)
        name = entries.check_text(entry, "file_name", where)
        file = name if folder is None else entries.find_image(folder, name, where)
        records.append(Record(image_id=image_id, path=file, height=height, width=width))
    return tuple(records)


def _label(
    record: Record, own: list[Mapping[str, Any]], index: Mapping[int, int], path: str, limits: Limits
) -> tuple[LabeledRecord, int, int]:
    """The image with its instances, and how many annotations were crowds and how many were empty."""
    size = (record.height, record.width)
    validate.check_count(len(own), f"{path}: image {record.image_id}", limits)
    boxes, labels, segmentations, crowds, places = [], [], [], [], []
    for entry in own:
        where = f"{path}: annotation {entry['id']} (image {record.image_id})"
        crowds.append(validate.check_crowd(entry.get("iscrowd", 0), where))
        segmentation = entries.check_value(entry, "segmentation", where)
        validate.check_segmentation(segmentation, *size, where)
        box = validate.check_box(entries.check_value(entry, "bbox", where), where)
        validate.check_area(entry.get("area"), where)
        boxes.append(box)
        labels.append(index[entry["category_id"]])
        segmentations.append(segmentation)
        places.append(where)
    rles = to_rles(segmentations, *size)
    instances = zip(boxes, *(array.tolist() for array in measure(rles)[::-1]), places, strict=True)
    keep = np.array([validate.check_instance(b, m, a, *size, where) for b, m, a, where in instances], dtype=bool)
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
