"""Ground truth for COCO evaluation: checked annotations with every key that pycocotools needs. Torch-free."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pycocotools import mask as coco_mask

from pais_ray.data.annotations.rle import Json, compress_rle, merge
from pais_ray.data.validation import walk
from pais_ray.data.validation.entries import check_list, read_json
from pais_ray.data.validation.rules import MAX_PIXELS, DataError, Limits
from pais_ray.data.validation.values import check_area, check_box, check_segmentation, check_size
from pais_ray.data.validation.walk import Entry

# The limits of a run were applied when its data was read; these only protect the machine from an unrelated file.
LOOSEST = Limits(max_pixels=2 * MAX_PIXELS)


def load_ground_truth(source: Json | str | Path, image_ids: Collection[int] | None = None) -> Json:
    """Loads the COCO object to score against, including crowds: all of it, or only its images ``image_ids``.

    Missing ``iscrowd``, ``area`` and ``bbox`` are filled in. Annotations are renumbered from one, because COCOeval
    reads id 0 as "not matched". Raises DataError naming the annotation.
    """
    path, data = read_source(source, "ground truth")
    if not isinstance(data, dict):
        raise DataError("file-json", path, "expected COCO annotations with 'images' and 'categories'")
    images: dict[int, Json] = {}
    for entry in walk.walk(check_list(data, "images", path), "image", path):
        check_size(entry.value.get("height"), entry.value.get("width"), entry.place, LOOSEST)
        images[entry.id] = entry.value
    categories = {entry.id for entry in walk.walk(check_list(data, "categories", path), "category", path)}
    wanted = set(images) if image_ids is None else set(image_ids)
    if unknown := sorted(wanted - set(images)):
        message = f"expected ids of images in this file, got {unknown[0]}"
        raise DataError("id-unknown", path, message, "request images of this file")
    annotations: list[Json] = []
    listed = check_list({"annotations": [], **data}, "annotations", path)
    for entry in walk.walk(listed, "annotation", path, walk.keep_annotation):
        image_id = walk.image_id(entry, images)
        walk.category_id(entry, categories)
        if image_id in wanted:
            annotations.append(_complete(entry, images[image_id]) | {"id": len(annotations) + 1})
    kept = [image for image in data["images"] if image["id"] in wanted]
    return {"images": kept, "categories": data["categories"], "annotations": annotations}


def read_source(source: Any, name: str) -> tuple[str, Any]:
    """Returns the place for messages and the content of ``source``, a JSON file or its content; ``name`` is the place
    of content in memory. Raises DataError."""
    if not isinstance(source, str | Path):
        return name, source
    return str(source), read_json(str(source), LOOSEST)[0]


def _complete(entry: Entry, image: Json) -> Json:
    """Checks an annotation and returns it with ``iscrowd``, ``area`` and ``bbox``."""
    complete = {"iscrowd": 0, **entry.value}
    size = (image["height"], image["width"])
    shape = complete.get("segmentation") or None
    if shape is None:
        complete.pop("segmentation", None)
    else:
        check_segmentation(shape, *size, entry.place)
    if "bbox" in complete:
        check_box(complete["bbox"], entry.place)
    elif shape is None:
        raise DataError("key-missing", entry.place, "expected 'segmentation' or 'bbox', got neither")
    if shape is not None and not ("area" in complete and "bbox" in complete):
        rle = compress_rle(shape) if isinstance(shape, dict) else merge(coco_mask.frPyObjects(shape, *size))
        complete = {"area": float(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist()} | complete
    complete.setdefault("area", complete["bbox"][2] * complete["bbox"][3])
    check_area(complete["area"], entry.place)
    return complete
