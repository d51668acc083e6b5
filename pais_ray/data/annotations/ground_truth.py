"""Ground truth for COCO evaluation: validated annotations with every key that pycocotools needs. Torch-free."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pycocotools import mask as mask_utils

from pais_ray.data.annotations.rle import Json, compress_rle, merge
from pais_ray.data.validation.entries import check_id, check_list, check_reference, read_json
from pais_ray.data.validation.rules import MAX_PIXELS, DataError, Limits, short
from pais_ray.data.validation.values import check_area, check_box, check_segmentation, check_size

# A run's own caps have been at work before; these keep a stray file from taking the machine.
LOOSEST = Limits(max_pixels=2 * MAX_PIXELS)


def load_ground_truth(source: Json | str | Path, image_ids: Collection[int] | None = None) -> Json:
    """The COCO dict to score against: the file as it is, crowd and all, or only its images ``image_ids``.

    ``iscrowd``, ``area`` and ``bbox`` are filled in where the file has none, and annotations are numbered
    anew from one: COCOeval takes an annotation with id 0 for "not matched". Raises DataError naming the
    annotation.
    """
    where, data = read_source(source, "ground truth")
    if not isinstance(data, dict):
        raise DataError("file-json", where, "expected COCO annotations with 'images' and 'categories'")
    images: dict[int, Json] = {}
    for image in check_list(data, "images", where):
        key = check_id(image, "image", where, images)
        check_size(image.get("height"), image.get("width"), f"{where}: image {key}", LOOSEST)
        images[key] = image
    categories: set[int] = set()
    for category in check_list(data, "categories", where):
        categories.add(check_id(category, "category", where, categories))
    wanted = set(images) if image_ids is None else set(image_ids)
    if unknown := sorted(wanted - set(images)):
        raise DataError("id-unknown", where, f"has no image {unknown[0]}", "ask for images of this file")
    annotations: list[Json] = []
    for position, annotation in enumerate(check_list({"annotations": [], **data}, "annotations", where)):
        if not isinstance(annotation, dict):
            raise DataError("key-type", f"{where}: annotation", f"expected an object, got {short(annotation)}")
        here = f"{where}: annotation {short(annotation.get('id', position))}"
        image_id = check_reference(annotation, "image", images, here)
        check_reference(annotation, "category", categories, here)
        if image_id in wanted:
            whole = _whole_annotation(annotation, images[image_id], here)
            annotations.append(whole | {"id": len(annotations) + 1})
    kept = [image for image in data["images"] if image["id"] in wanted]
    return {"images": kept, "categories": data["categories"], "annotations": annotations}


def _whole_annotation(annotation: Json, image: Json, where: str) -> Json:
    """The annotation, checked, with ``iscrowd``, ``area`` and ``bbox``."""
    whole = {"iscrowd": 0, **annotation}
    size = (image["height"], image["width"])
    shape = whole.get("segmentation") or None
    if shape is None:
        whole.pop("segmentation", None)
    else:
        check_segmentation(shape, *size, where)
    if "bbox" in whole:
        check_box(whole["bbox"], where)
    elif shape is None:
        raise DataError("key-missing", where, "neither 'segmentation' nor 'bbox'")
    if shape is not None and not ("area" in whole and "bbox" in whole):
        rle = compress_rle(shape) if isinstance(shape, dict) else _merged(shape, size)
        whole = {"area": float(mask_utils.area(rle)), "bbox": mask_utils.toBbox(rle).tolist()} | whole
    whole.setdefault("area", whole["bbox"][2] * whole["bbox"][3])
    check_area(whole["area"], where)
    return whole


def _merged(polygons: list[list[float]], size: tuple[int, int]) -> Json:
    return merge(mask_utils.frPyObjects(polygons, *size))


def read_source(source: Any, name: str) -> tuple[str, Any]:
    """Where the data come from, for messages, and the data."""
    if not isinstance(source, str | Path):
        return name, source
    return str(source), read_json(str(source), LOOSEST)[0]
