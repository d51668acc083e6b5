"""Writes a repaired copy of a COCO file and lists the changes. The source is never modified. Torch-free.

Area and box are recomputed from the mask, entries that cannot be repaired are removed, and the copy breaks no rule of
severity "error": repair uses the checks of reading.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.validation import entries, values, walk
from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short_repr
from pais_ray.data.validation.walk import Entry
from pais_ray.files import atomic

Json = dict[str, Any]
Result = TypeVar("Result")

FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}  # spellings of iscrowd that are corrected


@dataclass(frozen=True, slots=True)
class Change:
    """What was changed because of a broken rule."""

    where: str
    rule: str
    change: str


def repair(
    path: str,
    out: str,
    folder: str | None = None,
    limits: Limits = LIMITS,
    broken: Mapping[int, str] | None = None,
) -> list[Change]:
    """Writes the repaired copy of the COCO file ``path`` to ``out`` and returns the changes.

    Images whose file is missing in ``folder`` are removed, and those in ``broken`` (image id -> rule). Raises DataError
    if nothing can be repaired: no COCO file, no category, or no image left. Raises ValueError if ``out`` is the source.
    """
    if os.path.exists(out) and os.path.samefile(path, out):
        raise ValueError(f"--fix: expected a file other than the source, got {out}; choose another path")
    with entries.no_collection():
        tree, _ = entries.read_tree(path, limits)
        listed = {key: entries.check_list(tree, key, path) for key in ("categories", "images", "annotations")}
        work = _Repair(path, None if folder is None else entries.check_folder(folder, path), limits, broken or {})
        categories = work.categories(listed["categories"])
        entries.check_some_categories(categories, path)
        images = work.images(listed["images"])
        annotations = work.annotations(listed["annotations"])
        images = [image for image in images if image["id"] in work.sizes]  # without those with too many annotations
        entries.check_some_images(images, path)
        _write(tree | {"categories": categories, "images": images, "annotations": annotations}, out)
    return work.changes


class _Repair:
    """The state of one repair: the ids of categories and images that are kept, and the changes so far."""

    def __init__(self, path: str, folder: str | None, limits: Limits, broken: Mapping[int, str]) -> None:
        self.path, self.folder, self.limits, self.broken = path, folder, limits, broken
        self.changes: list[Change] = []
        self.category_of: dict[int, int] = {}  # category id in the source -> in the copy
        self.sizes: dict[int, tuple[int, int]] = {}  # id -> (height, width) of the images that are kept

    def note(self, place: str, rule: str, change: str) -> None:
        self.changes.append(Change(place, rule, change))

    def drop(self, error: DataError, value: object = None) -> None:
        """Records that an entry is removed: a policy of ``walk``."""
        self.note(error.where, error.rule, "removed")

    def kept(self, check: Callable[..., Result], *arguments: Any) -> Result | None:
        """Calls a check and returns its result; on DataError records that the entry is removed and returns None."""
        try:
            return check(*arguments)
        except DataError as error:
            self.drop(error)
            return None

    def categories(self, listed: list[Any]) -> list[Json]:
        """Returns the categories that are kept. A missing name becomes the id; categories of one name are merged."""
        kept: list[Json] = []
        owner: dict[str, int] = {}
        for entry in walk.walk(listed, "category", self.path, self.drop):
            category = entry.value
            try:
                name = walk.category_name(entry)
            except DataError as error:
                name = str(entry.id)
                category = category | {"name": name}
                self.note(entry.place, error.rule, "named by its id")
            self.category_of[entry.id] = owner.setdefault(name, entry.id)
            if owner[name] == entry.id:
                kept.append(category)
            else:
                change = f"merged with category {owner[name]}, which has the same name {short_repr(name)}"
                self.note(entry.place, "category-name", change)
        return kept

    def images(self, listed: list[Any]) -> list[Json]:
        """Returns the images that are kept."""
        kept: list[Json] = []
        for entry in walk.walk(listed, "image", self.path, self.drop):
            size = self.kept(self.image, entry)
            if size is not None:
                self.sizes[entry.id] = size
                kept.append(entry.value)
        return kept

    def image(self, entry: Entry) -> tuple[int, int]:
        """Returns the size of a valid image."""
        size = walk.image_size(entry, self.limits)
        if self.folder is None:
            walk.image_name(entry)
        else:
            walk.image_file(entry, self.folder)
        if entry.id in self.broken:
            raise DataError(self.broken[entry.id], entry.place, "expected an image file that can be used")
        return size

    def annotations(self, listed: list[Any]) -> list[Json]:
        """Returns the annotations that are kept, in the order of the file."""
        by_image: dict[int, list[tuple[int, Entry]]] = {}
        renumbered = walk.walk(listed, "annotation", self.path, self.renumber(listed))
        for position, entry in enumerate(renumbered):
            image_id = self.kept(walk.image_id, entry, self.sizes)
            category_id = None if image_id is None else self.kept(walk.category_id, entry, self.category_of)
            if image_id is None or category_id is None:
                continue
            if self.category_of[category_id] != category_id:
                entry = entry._replace(value=entry.value | {"category_id": self.category_of[category_id]})
            by_image.setdefault(image_id, []).append((position, entry.in_image(image_id)))
        repaired: dict[int, Json] = {}
        for image_id, own in by_image.items():
            repaired.update(self.of_image(image_id, own))
        return [repaired[position] for position in sorted(repaired)]

    def renumber(self, listed: list[Any]) -> walk.OnError:
        """Returns the policy for annotations without a valid id: each gets an unused id."""
        ids = {value["id"] for value in listed if isinstance(value, dict) and type(value.get("id")) is int}
        unused = max((i for i in ids if 0 <= i < 2**62), default=0) + 1

        def policy(error: DataError, value: object) -> Json | None:
            nonlocal unused
            if not isinstance(value, dict):
                self.drop(error)
                return None
            value, unused = value | {"id": unused}, unused + 1
            self.note(error.where, error.rule, f"numbered {value['id']}")
            return value

        return policy

    def of_image(self, image_id: int, own: list[tuple[int, Entry]]) -> Iterable[tuple[int, Json]]:
        """Returns (position, annotation) of the annotations of one image that are kept."""
        size = self.sizes[image_id]
        try:
            values.check_count(len(own), f"{self.path}: image {image_id}", self.limits)
        except DataError as error:
            self.drop(error)
            del self.sizes[image_id]
            return []
        valid = []
        for position, entry in own:
            repaired = self.kept(self.flag_and_mask, entry, size)
            if repaired is not None:
                valid.append((position, repaired, entry.place))
        rles = to_rles([annotation["segmentation"] for _, annotation, _ in valid], *size)
        areas, boxes = measure(rles)
        kept = []
        measured = zip(valid, rles, areas.tolist(), boxes.tolist(), strict=True)
        for (position, annotation, place), rle, area, box in measured:
            if area == 0:
                self.note(place, "mask-empty", "removed")
                continue
            if annotation.get("iscrowd") and isinstance(annotation["segmentation"], list):
                encoded = {"size": list(size), "counts": rle["counts"].decode("ascii")}
                annotation = annotation | {"segmentation": encoded}
                self.note(place, "crowd-rle", "polygons encoded as RLE")
            kept.append((position, self.box_and_area(Entry(annotation, place), area, box, size)))
        return kept

    def flag_and_mask(self, entry: Entry, size: tuple[int, int]) -> Json:
        """Returns the annotation with a valid iscrowd flag and without the polygons that break a rule.

        Raises DataError if the flag or every polygon is broken.
        """
        annotation = entry.value
        try:
            walk.is_crowd(entry)
        except DataError as error:
            flag = annotation["iscrowd"]
            value = FLAGS.get(str(flag).lower()) if isinstance(flag, str | float) else None
            if value is None:
                raise
            self.note(entry.place, error.rule, f"iscrowd written as {value}")
            annotation = annotation | {"iscrowd": value}
        try:
            walk.segmentation(entry, size)
        except DataError as error:
            polygons = annotation.get("segmentation")
            if not isinstance(polygons, list) or error.rule == "polygon-count":
                raise
            valid = [polygon for polygon in polygons if _is_valid(polygon, size)]
            if not valid:
                raise
            values.check_segmentation(valid, *size, entry.place)  # together, valid outlines can still be too long
            self.note(entry.place, error.rule, f"{len(polygons) - len(valid)} of {len(polygons)} polygons removed")
            annotation = annotation | {"segmentation": valid}
        return annotation

    def box_and_area(self, entry: Entry, mask_area: float, mask_box: list[float], size: tuple[int, int]) -> Json:
        """Returns the annotation with a box and an area that agree with its mask."""
        annotation = entry.value
        try:
            box = walk.box(entry)
            if not values.check_instance(box, mask_box, mask_area, *size, entry.place):
                raise DataError("instance-empty", entry.place, "expected a box with an area, got an empty one")
            values.check_box_mask(box, mask_box, entry.place)
        except DataError as error:
            clipped = _clip(annotation["bbox"], mask_box, size) if error.rule == "box-outside" else None
            annotation = annotation | {"bbox": mask_box if clipped is None else clipped}
            change = "bbox recomputed from the mask" if clipped is None else "bbox clipped to the image"
            self.note(entry.place, error.rule, change)
        try:
            values.check_area_mask(walk.area(entry), mask_box, mask_area, entry.place)
        except DataError as error:
            annotation = annotation | {"area": mask_area}
            self.note(entry.place, error.rule, "area recomputed from the mask")
        return annotation


def _is_valid(polygon: object, size: tuple[int, int]) -> bool:
    try:
        values.check_polygon(polygon, *size, "")
    except DataError:
        return False
    return True


def _clip(box: list[float], mask_box: list[float], size: tuple[int, int]) -> list[float] | None:
    """Returns the part of a box that lies in the image, or None if it does not agree with the mask."""
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[1]), min(y + h, size[0])
    if right <= left or bottom <= top:
        return None
    inside = [left, top, right - left, bottom - top]
    try:
        values.check_box_mask(inside, mask_box, "")
    except DataError:
        return None
    return inside


def _write(tree: Json, out: str) -> None:
    """Atomically writes a COCO file with one entry per line."""
    try:
        with atomic.create_text(out) as file:
            for i, (key, value) in enumerate(tree.items()):
                file.write(("{" if i == 0 else ",\n") + json.dumps(key) + ": ")
                if isinstance(value, list):
                    file.write("[")
                    file.writelines(("," if j else "") + "\n" + json.dumps(entry) for j, entry in enumerate(value))
                    file.write("\n]")
                else:
                    file.write(json.dumps(value))
            file.write("}\n")
    except RecursionError as error:
        raise DataError(
            "file-json", out, "expected entries that can be written as JSON, got one nested too deeply"
        ) from error
