"""Collects every finding of one COCO file with the checks that reading uses. Decodes no image."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.sources import readers
from pais_ray.data.validation import entries, rules, values, walk
from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.rules import MAX_DETS, DataError, Limits, short_repr
from pais_ray.data.validation.walk import Entry


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """The valid values of an image entry; None for a value that breaks a rule."""

    size: tuple[int, int] | None  # (height, width) of the upright image, px
    file: str | None  # path; None also if no folder was given


@dataclass(kw_only=True)
class Content:
    """The valid content of a COCO file."""

    path: str
    names: dict[int, str] = field(default_factory=dict)  # category id -> name
    images: dict[int, ImageEntry] = field(default_factory=dict)  # by image id
    used: set[int] = field(default_factory=set)  # ids of the categories that have annotations
    learned: dict[int, set[int]] = field(default_factory=dict)  # image id -> category ids, crowds left out


def inspect_coco(path: str, folder: str | None, limits: Limits, report: Report, *, labels: bool = True) -> Content:
    """Adds every finding of the COCO file ``path`` to ``report`` and returns its valid content.

    ``folder`` holds the images; if it is None, file names are checked and files are not. If ``labels`` is false, only
    the list of images is inspected.
    """
    content = Content(path=path)
    with entries.no_collection():
        read = report.check(readers.read_tree, path, limits)
        if read is not None:
            _inspect_tree(read[0], content, folder, limits, report, labels)
    return content


def _inspect_tree(
    tree: Mapping[str, Any], content: Content, folder: str | None, limits: Limits, report: Report, labels: bool
) -> None:
    if folder is not None:
        folder = report.check(entries.check_folder, folder, content.path)
    has_images = _inspect_images(tree, folder, content, limits, report)
    if labels:
        has_categories = _inspect_categories(tree, content, report)
        listed = report.check(entries.check_list, tree, "annotations", content.path)
        if listed is not None and has_images and has_categories:
            _inspect_annotations(listed, content, limits, report)
            _inspect_category_names(content, report)


def add_absent_categories(content: Content, image_ids: Collection[int], report: Report) -> None:
    """Adds a warning for each category without an instance to learn from in the images ``image_ids``."""
    present = set().union(*(content.learned.get(image_id, ()) for image_id in image_ids))
    for key in sorted(content.names.keys() - present):
        place = f"{content.path}: category {key}"
        message = f"{short_repr(content.names[key])} has no instance in the {len(image_ids)} labeled images"
        report.add(DataError("category-absent", place, message))


def _inspect_images(
    tree: Mapping[str, Any], folder: str | None, content: Content, limits: Limits, report: Report
) -> bool:
    """Returns whether the file has a list of images."""
    listed = report.check(entries.check_list, tree, "images", content.path)
    if listed is None:
        return False
    report.check(entries.check_some_images, listed, content.path)
    report.images += len(listed)
    for entry in walk.walk(listed, "image", content.path, report.add_and_skip):
        size = report.check(walk.image_size, entry, limits)
        if folder is None:
            report.check(walk.image_name, entry)
        file = None if folder is None else report.check(walk.image_file, entry, folder)
        content.images[entry.id] = ImageEntry(size, file)
    return True


def _inspect_categories(tree: Mapping[str, Any], content: Content, report: Report) -> bool:
    """Returns whether the file has a list of categories."""
    listed = report.check(entries.check_list, tree, "categories", content.path)
    if listed is None:
        return False
    for entry in walk.walk(listed, "category", content.path, report.add_and_skip):
        name = report.check(walk.category_name, entry)
        content.names[entry.id] = str(entry.id) if name is None else name
    report.check(entries.check_some_categories, content.names, content.path)
    return True


def _inspect_category_names(content: Content, report: Report) -> None:
    """Adds the categories that share a name: an error if two of them have annotations, otherwise a warning."""
    same: dict[str, set[int]] = {}
    for key, name in content.names.items():
        same.setdefault(name, set()).add(key)
    for name, keys in same.items():
        if len(keys) == 1:
            continue
        try:
            entries.check_category_names(content.names, keys & content.used, content.path)
        except DataError as error:
            report.add(error)
        else:
            first, second = sorted(keys)[:2]
            message = f"has the same name as category {first}, {short_repr(name)}"
            report.add(DataError("category-twin", f"{content.path}: category {second}", message))


def _inspect_annotations(listed: list[Any], content: Content, limits: Limits, report: Report) -> None:
    by_image: dict[int, list[Entry]] = {}
    report.annotations += len(listed)
    for entry in walk.walk(listed, "annotation", content.path, report.add_and_keep):
        image_id = report.check(walk.image_id, entry, content.images)
        category_id = report.check(walk.category_id, entry, content.names)
        if image_id is not None:
            by_image.setdefault(image_id, []).append(entry)
        if category_id is not None:
            content.used.add(category_id)
            if image_id is not None and entry.value.get("iscrowd", 0) not in (1,):
                content.learned.setdefault(image_id, set()).add(category_id)
    listed.clear()  # releases the memory of each image's annotations once they have been inspected
    for image_id in content.images:
        if own := by_image.pop(image_id, None):
            _inspect_image(image_id, own, content, limits, report)


def _inspect_image(image_id: int, own: list[Entry], content: Content, limits: Limits, report: Report) -> None:
    """Inspects the annotations of one image."""
    place = f"{content.path}: image {image_id}"
    try:
        values.check_count(len(own), place, limits)
    except DataError as error:
        report.add(error)
        return
    size = content.images[image_id].size
    valid: list[tuple[Entry, bool]] = []  # annotations whose values are valid by themselves, and whether crowds
    num_learned = 0
    for entry in (entry.in_image(image_id) for entry in own):
        before = len(report.findings)
        crowd = report.check(walk.is_crowd, entry)
        num_learned += crowd is False
        segmentation = report.check(walk.segmentation, entry, size)
        report.check(walk.box, entry)
        report.check(walk.area, entry)
        if crowd and type(segmentation) is list:
            report.add(DataError("crowd-rle", entry.place, "expected an RLE mask because iscrowd is 1, got polygons"))
            before += 1  # a warning: the mask is valid
        if len(report.findings) == before and size is not None:
            valid.append((entry, bool(crowd)))
    if num_learned > MAX_DETS:
        report.add(DataError("image-crowded", place, f"{num_learned} instances are more than {MAX_DETS}"))
    if size is not None and valid:
        _inspect_masks(valid, size, report)


def _inspect_masks(valid: list[tuple[Entry, bool]], size: tuple[int, int], report: Report) -> None:
    """Compares box, mask and area of annotations of one image."""
    areas, boxes = measure(to_rles([entry.value["segmentation"] for entry, _ in valid], *size))
    for (entry, crowd), mask_area, mask_box in zip(valid, areas.tolist(), boxes.tolist(), strict=True):
        box = entry.value["bbox"]
        has_instance = report.check(values.check_instance, box, mask_box, mask_area, *size, entry.place)
        if has_instance:
            report.check(values.check_area_mask, entry.value.get("area"), mask_box, mask_area, entry.place)
            report.check(values.check_box_mask, box, mask_box, entry.place)
        elif has_instance is False and not crowd:
            message = f"box or mask is empty, and neither has a side of {rules.STRAY_CLICK:g} px"
            report.add(DataError("instance-empty", entry.place, message))
