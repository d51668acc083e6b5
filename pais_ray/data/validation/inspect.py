"""All findings of one COCO file, by the checks that reading raises one at a time. Looks at no pixel of an image."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.sources import readers
from pais_ray.data.validation import entries, rules, values
from pais_ray.data.validation.findings import Report
from pais_ray.data.validation.rules import MAX_DETS, DataError, Limits, short

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What is sound about an image of the file."""

    size: tuple[int, int] | None  # upright height, width
    file: str | None  # path, where a folder was given and the file is there


@dataclass(kw_only=True)
class Content:
    """What a COCO file holds as far as it is sound."""

    path: str
    names: dict[int, str] = field(default_factory=dict)  # of categories
    images: dict[int, ImageEntry] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)  # categories with annotations
    learned: dict[int, set[int]] = field(default_factory=dict)  # image -> categories, crowds left out


def inspect_coco(path: str, folder: str | None, limits: Limits, report: Report, *, labels: bool = True) -> Content:
    """Adds all findings of the file to ``report``; of the list of images alone where not ``labels``.

    ``folder`` holds the images; None: names are looked at, files are not.
    """
    content = Content(path=path)
    with entries.no_collection():
        _inspect(content, folder, limits, report, labels)
    return content


def _inspect(content: Content, folder: str | None, limits: Limits, report: Report, labels: bool) -> None:
    path = content.path
    read = report.check(readers.read_tree, path, limits)
    if read is None:
        return
    tree = read[0]
    if folder is not None:
        folder = report.check(entries.check_folder, folder, path)
    has_images = _images(tree, folder, content, limits, report)
    if labels:
        has_categories = _categories(tree, content, report)
        listed = report.check(entries.check_list, tree, "annotations", path)
        if listed is not None and has_images and has_categories:
            _annotations(listed, content, limits, report)
            _names(content, report)


def absent_categories(content: Content, image_ids: Collection[int], report: Report) -> None:
    """Warns of each category without an instance to learn in the images ``image_ids``."""
    present = set().union(*(content.learned.get(image_id, ()) for image_id in image_ids))
    for key in sorted(content.names.keys() - present):
        where = f"{content.path}: category {key}"
        message = f"{short(content.names[key])} has no instance in the {len(image_ids)} labeled images"
        report.add(DataError("category-absent", where, message))


def _images(tree: Json, folder: str | None, content: Content, limits: Limits, report: Report) -> bool:
    listed = report.check(entries.check_list, tree, "images", content.path)
    if listed is not None:
        report.check(entries.check_some_images, listed, content.path)
    for entry in listed or ():
        report.images += 1
        image_id = report.check(entries.check_id, entry, "image", content.path, content.images)
        if image_id is None:
            continue
        where = f"{content.path}: image {image_id}"
        size = report.check(_size, entry, where, limits)
        file = report.check(_file, entry, folder, where)
        content.images[image_id] = ImageEntry(size, file)
    return listed is not None


def _size(entry: Json, where: str, limits: Limits) -> tuple[int, int]:
    height, width = entries.check_value(entry, "height", where), entries.check_value(entry, "width", where)
    return values.check_size(height, width, where, limits)


def _file(entry: Json, folder: str | None, where: str) -> str | None:
    name = entries.check_text(entry, "file_name", where)
    if folder is not None:
        return entries.find_image(folder, name, where)
    entries.check_name(name, where)
    return None


def _categories(tree: Json, content: Content, report: Report) -> bool:
    listed = report.check(entries.check_list, tree, "categories", content.path)
    seen: set[int] = set()
    for entry in listed or ():
        category_id = report.check(entries.check_id, entry, "category", content.path, seen)
        if category_id is None:
            continue
        seen.add(category_id)
        name = report.check(entries.check_text, entry, "name", f"{content.path}: category {category_id}")
        content.names[category_id] = str(category_id) if name is None else name
    if listed is not None:
        report.check(entries.check_some_categories, seen, content.path)
    return listed is not None


def _names(content: Content, report: Report) -> None:
    """Categories that share their name: an error where two of them are used."""
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
            message = f"is called {short(name)} like category {first}"
            report.add(DataError("category-twin", f"{content.path}: category {second}", message))


def _annotations(listed: list[Any], content: Content, limits: Limits, report: Report) -> None:
    by_image: dict[int, list[Json]] = {}
    seen: set[int] = set()
    for entry in listed:
        report.annotations += 1
        annotation_id = report.check(entries.check_id, entry, "annotation", content.path, seen)
        if annotation_id is not None:
            seen.add(annotation_id)
        elif not isinstance(entry, dict):
            continue
        where = _where(content.path, entry)
        image_id = report.check(entries.check_reference, entry, "image", content.images, where)
        category_id = report.check(entries.check_reference, entry, "category", content.names, where)
        if image_id is not None:
            by_image.setdefault(image_id, []).append(entry)
        if category_id is not None:
            content.used.add(category_id)
            if image_id is not None and entry.get("iscrowd", 0) not in (1,):
                content.learned.setdefault(image_id, set()).add(category_id)
    listed.clear()  # what has been looked at is let go of below
    for image_id in content.images:
        if own := by_image.pop(image_id, None):
            _image(image_id, own, content, limits, report)


def _where(path: str, entry: Json) -> str:
    annotation_id = entry.get("id")
    return f"{path}: annotation {annotation_id if type(annotation_id) is int else short(annotation_id)}"


def _image(image_id: int, own: list[Json], content: Content, limits: Limits, report: Report) -> None:
    """The annotations of one image."""
    where = f"{content.path}: image {image_id}"
    try:
        values.check_count(len(own), where, limits)
    except DataError as error:
        report.add(error)
        return
    size = content.images[image_id].size
    sound: list[tuple[Json, str, bool]] = []
    num_learned = 0
    for entry in own:
        here = f"{_where(content.path, entry)} (image {image_id})"
        before = len(report.findings)
        crowd = report.check(values.check_crowd, entry.get("iscrowd", 0), here)
        num_learned += crowd is False
        segmentation = report.check(_segmentation, entry, size, here)
        report.check(_box, entry, here)
        report.check(values.check_area, entry.get("area"), here)
        if crowd and type(segmentation) is list:
            report.add(DataError("crowd-rle", here, "iscrowd is 1 and the mask is made of polygons"))
            before += 1
        if len(report.findings) == before and size is not None:
            sound.append((entry, here, bool(crowd)))
    if num_learned > MAX_DETS:
        report.add(DataError("image-crowded", where, f"{num_learned} instances are more than {MAX_DETS}"))
    if size is not None and sound:
        _masks(sound, size, report)


def _segmentation(entry: Json, size: tuple[int, int] | None, where: str) -> Any:
    segmentation = entries.check_value(entry, "segmentation", where)
    if size is not None:
        values.check_segmentation(segmentation, *size, where)
    return segmentation


def _box(entry: Json, where: str) -> tuple[float, float, float, float]:
    return values.check_box(entries.check_value(entry, "bbox", where), where)


def _masks(sound: list[tuple[Json, str, bool]], size: tuple[int, int], report: Report) -> None:
    """Annotations of an image of which each value is sound: do box, mask and area agree?"""
    areas, boxes = measure(to_rles([entry["segmentation"] for entry, _, _ in sound], *size))
    for (entry, where, crowd), mask_area, mask_box in zip(sound, areas.tolist(), boxes.tolist(), strict=True):
        box = entry["bbox"]
        alive = report.check(values.check_instance, box, mask_box, mask_area, *size, where)
        if alive:
            report.check(values.check_area_mask, entry.get("area"), mask_box, mask_area, where)
            report.check(values.check_box_mask, box, mask_box, where)
        elif alive is False and not crowd:
            message = f"box or mask is empty, and neither has a side of {rules.STRAY_CLICK:g} px"
            report.add(DataError("instance-empty", where, message))
