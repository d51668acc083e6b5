"""A repaired copy of a COCO file, and the list of what it changed. The source is read, never written. Torch-free.

What the masks say is recomputed (area, box), what says nothing is dropped, and the copy breaks no rule that is an
error: the same checks decide.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pais_ray.data.annotations.rle import measure, to_rles
from pais_ray.data.validation import entries, values
from pais_ray.data.validation.rules import LIMITS, DataError, Limits, short
from pais_ray.files import atomic

Json = dict[str, Any]
FLAGS = {"0": 0, "1": 1, "false": 0, "true": 1, "0.0": 0, "1.0": 1}


@dataclass(frozen=True, slots=True)
class Change:
    """What was done about a broken rule."""

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
    """Writes the repaired copy of the COCO file ``path`` to ``out`` and returns what it changed.

    Images whose file is not to be found in ``folder`` are dropped, and those in ``broken`` (image id -> rule).
    Raises DataError where there is nothing to repair: no COCO file, no category, or no image that may stay.
    """
    if os.path.exists(out) and os.path.samefile(path, out):
        raise ValueError(f"--fix: expected another file than the source, got {out}; the source is never changed")
    with entries.no_collection():
        return _repair(path, out, folder, limits, broken or {})


def _repair(path: str, out: str, folder: str | None, limits: Limits, broken: Mapping[int, str]) -> list[Change]:
    tree, _ = entries.read_tree(path, limits)
    copy = _Copy(path, folder, limits, broken)
    listed = {key: entries.check_list(tree, key, path) for key in ("categories", "images", "annotations")}
    categories = copy.categories(listed["categories"])
    entries.check_some_categories(categories, path)
    images = copy.images(listed["images"])
    annotations = copy.annotations(listed["annotations"])
    images = [entry for entry in images if entry["id"] in copy.sizes]  # without those of too many instances
    entries.check_some_images(images, path)
    _write(tree | {"categories": categories, "images": images, "annotations": annotations}, out)
    return copy.changes


class _Copy:
    """The state of one repair: what became of categories and images, and the changes so far."""

    def __init__(self, path: str, folder: str | None, limits: Limits, broken: Mapping[int, str]) -> None:
        self.path, self.limits, self.broken = path, limits, broken
        self.folder = None if folder is None else entries.check_folder(folder, path)
        self.changes: list[Change] = []
        self.category_of: dict[int, int] = {}  # id in the source -> id in the copy
        self.sizes: dict[int, tuple[int, int]] = {}  # of the images that are kept

    def note(self, where: str, rule: str, change: str) -> None:
        self.changes.append(Change(where, rule, change))

    def drop(self, error: DataError) -> None:
        self.note(error.where, error.rule, "removed")

    def categories(self, listed: list[Any]) -> list[Json]:
        kept: list[Json] = []
        owner: dict[str, int] = {}
        for entry in listed:
            try:
                key = entries.check_id(entry, "category", self.path, self.category_of)
            except DataError as error:
                self.drop(error)
                continue
            where = f"{self.path}: category {key}"
            try:
                name = entries.check_text(entry, "name", where)
            except DataError as error:
                name = str(key)
                entry = entry | {"name": name}
                self.note(where, error.rule, "named by its id")
            self.category_of[key] = owner.setdefault(name, key)
            if owner[name] == key:
                kept.append(entry)
            else:
                self.note(where, "category-name", f"merged with category {owner[name]}, also called {short(name)}")
        return kept

    def images(self, listed: list[Any]) -> list[Json]:
        kept: list[Json] = []
        for entry in listed:
            try:
                key = entries.check_id(entry, "image", self.path, self.sizes)
                where = f"{self.path}: image {key}"
                height, width = (entries.check_value(entry, side, where) for side in ("height", "width"))
                size = values.check_size(height, width, where, self.limits)
                name = entries.check_text(entry, "file_name", where)
                if self.folder is None:
                    entries.check_name(name, where)
                else:
                    entries.find_image(self.folder, name, where)
                if key in self.broken:
                    raise DataError(self.broken[key], where, "its file")
            except DataError as error:
                self.drop(error)
                continue
            self.sizes[key] = size
            kept.append(entry)
        return kept

    def annotations(self, listed: list[Any]) -> list[Json]:
        ids = {e["id"] for e in listed if isinstance(e, dict) and type(e.get("id")) is int}
        fresh = max((i for i in ids if 0 <= i < 2**62), default=0) + 1
        seen: set[int] = set()
        by_image: dict[int, list[tuple[int, Json]]] = {}
        for position, entry in enumerate(listed):
            try:
                seen.add(entries.check_id(entry, "annotation", self.path, seen))
            except DataError as error:
                if not isinstance(entry, dict):
                    self.drop(error)
                    continue
                entry, fresh = entry | {"id": fresh}, fresh + 1
                self.note(error.where, error.rule, f"numbered {entry['id']}")
            where = f"{self.path}: annotation {entry['id']}"
            try:
                image_id = entries.check_reference(entry, "image", self.sizes, where)
                category_id = entries.check_reference(entry, "category", self.category_of, where)
            except DataError as error:
                self.drop(error)
                continue
            if self.category_of[category_id] != category_id:
                entry = entry | {"category_id": self.category_of[category_id]}
            by_image.setdefault(image_id, []).append((position, entry))
        repaired: dict[int, Json] = {}
        for image_id, own in by_image.items():
            repaired.update(self.of_image(image_id, own))
        return [repaired[position] for position in sorted(repaired)]

    def of_image(self, image_id: int, own: list[tuple[int, Json]]) -> Iterable[tuple[int, Json]]:
        """(position, annotation) of those that are kept."""
        size = self.sizes[image_id]
        try:
            values.check_count(len(own), f"{self.path}: image {image_id}", self.limits)
        except DataError as error:
            self.drop(error)
            del self.sizes[image_id]
            return []
        sound = []
        for position, entry in own:
            where = f"{self.path}: annotation {entry['id']} (image {image_id})"
            try:
                sound.append((position, self.mask(self.flag(entry, where), size, where), where))
            except DataError as error:
                self.drop(error)
        rles = to_rles([entry["segmentation"] for _, entry, _ in sound], *size)
        areas, boxes = measure(rles)
        kept = []
        for (position, entry, where), rle, area, box in zip(sound, rles, areas.tolist(), boxes.tolist(), strict=True):
            if area == 0:
                self.note(where, "mask-empty", "removed")
                continue
            if entry.get("iscrowd") and isinstance(entry["segmentation"], list):
                entry = entry | {"segmentation": {"size": list(size), "counts": rle["counts"].decode("ascii")}}
                self.note(where, "crowd-rle", "polygons encoded as RLE")
            kept.append((position, self.measures(entry, area, box, size, where)))
        return kept

    def flag(self, entry: Json, where: str) -> Json:
        try:
            values.check_crowd(entry.get("iscrowd", 0), where)
            return entry
        except DataError as error:
            value = FLAGS.get(str(entry["iscrowd"]).lower()) if isinstance(entry["iscrowd"], str | float) else None
            if value is None:
                raise
            self.note(where, error.rule, f"iscrowd written as {value}")
            return entry | {"iscrowd": value}

    def mask(self, entry: Json, size: tuple[int, int], where: str) -> Json:
        """The annotation without the polygons that break a rule, unless all do."""
        segmentation = entries.check_value(entry, "segmentation", where)
        try:
            values.check_segmentation(segmentation, *size, where)
            return entry
        except DataError as error:
            if not isinstance(segmentation, list) or error.rule == "polygon-count":
                raise
            sound = []
            for polygon in segmentation:
                try:
                    values.check_polygon(polygon, *size, where)
                    sound.append(polygon)
                except DataError:
                    pass
            if not sound:
                raise
            values.check_segmentation(sound, *size, where)  # each is sound, and together they may be too long
            self.note(where, error.rule, f"{len(segmentation) - len(sound)} of {len(segmentation)} polygons removed")
            return entry | {"segmentation": sound}

    def measures(self, entry: Json, area: float, box: list[float], size: tuple[int, int], where: str) -> Json:
        """The annotation with a box and an area that its mask bears out."""
        try:
            given = values.check_box(entries.check_value(entry, "bbox", where), where)
            if not values.check_instance(given, box, area, *size, where):
                raise DataError("instance-empty", where, "the box")
            values.check_box_mask(given, box, where)
        except DataError as error:
            clipped = self.clipped(entry["bbox"], box, size, where) if error.rule == "box-outside" else None
            entry = entry | {"bbox": box if clipped is None else clipped}
            self.note(where, error.rule, "bbox recomputed from the mask" if clipped is None else "bbox clipped")
        try:
            values.check_area_mask(values.check_area(entry.get("area"), where), box, area, where)
        except DataError as error:
            entry = entry | {"area": area}
            self.note(where, error.rule, "area recomputed from the mask")
        return entry

    def clipped(self, given: list[float], box: list[float], size: tuple[int, int], where: str) -> list[float] | None:
        """The part of the given box that lies in the image, if the mask bears it out."""
        x, y, w, h = given
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, size[1]), min(y + h, size[0])
        if right <= left or bottom <= top:
            return None
        inside = [left, top, right - left, bottom - top]
        try:
            values.check_box_mask(inside, box, where)
        except DataError:
            return None
        return inside


def _write(tree: Json, out: str) -> None:
    """One entry a line, aside and renamed."""
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
        raise DataError("file-json", out, "an entry is nested too deeply to be written") from error
