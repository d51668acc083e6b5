"""Converts the Cityscapes layout to COCO annotations and records: 8 classes, groups become crowds. Torch-free.

The layout, for a part such as ``train`` and cities of any name:

    ROOT/gtFine/PART/CITY/NAME_gtFine_instanceIds.png    16 bits: label * 1000 + n, or only the label for a group
    ROOT/gtFine/PART/CITY/NAME_gtFine_polygons.json      used if there is no instanceIds.png
    ROOT/leftImg8bit/PART/CITY/NAME_leftImg8bit.png
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from pais_ray.data.annotations.coco import build_dataset
from pais_ray.data.annotations.records import CocoDataset
from pais_ray.data.annotations.rle import encode_masks
from pais_ray.data.images.images import decode_values, upright_size
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.data.validation.values import check_polygon, check_size

# The label definitions of the Cityscapes data set. All are needed, because any object can hide an instance.
LABELS: dict[str, int] = {
    "unlabeled": 0,
    "ego vehicle": 1,
    "rectification border": 2,
    "out of roi": 3,
    "static": 4,
    "dynamic": 5,
    "ground": 6,
    "road": 7,
    "sidewalk": 8,
    "parking": 9,
    "rail track": 10,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "guard rail": 14,
    "bridge": 15,
    "tunnel": 16,
    "pole": 17,
    "polegroup": 18,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "caravan": 29,
    "trailer": 30,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
    "license plate": -1,  # never painted
}
CLASSES = ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")
WITH_INSTANCES = (*CLASSES, "caravan", "trailer")
# Labels that the evaluation ignores ("void"): predictions there are neither correct nor wrong.
VOID = (0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30)
PER_LABEL = 1000  # the pixel value of an instance is label * PER_LABEL + n
IDS, POLYGONS, PHOTOGRAPH = "_gtFine_instanceIds.png", "_gtFine_polygons.json", "_leftImg8bit.png"
MAX_THREADS = 8  # for reading; only decoding PNG releases the GIL

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """One annotated image: its pixel values as run lengths along the columns."""

    name: str  # CITY/NAME
    height: int  # px
    width: int
    digest: str  # SHA-256 of the annotation file
    instances: tuple[tuple[int, Json], ...]  # (pixel value, compressed RLE), ascending
    void: Json  # compressed RLE


def read_cityscapes(annotations: str, images: str, limits: Limits = LIMITS) -> CocoDataset:
    """Reads the data set of ROOT/gtFine/PART with the images of ROOT/leftImg8bit/PART.

    Images without instances are kept (N = 0). Image ids are positions in the order of CITY/NAME, category ids are the
    official labels. ``truth`` is the content returned by ``to_coco``. Raises DataError.
    """
    tree, sha256 = to_coco(annotations)
    if not os.path.isdir(images):
        raise DataError("cityscapes-layout", images, f"expected the images of {annotations}, got no folder")
    paths = [os.path.join(images, image["file_name"]) for image in tree["images"]]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        more = f" (and {len(missing) - 1} more of {len(paths)})" if len(missing) > 1 else ""
        raise DataError(
            "cityscapes-layout",
            missing[0],
            f"expected the image of an annotation in {annotations}, got no such file{more}",
        )
    for path, image in zip(paths, tree["images"], strict=True):
        size = upright_size(path, max_pixels=limits.max_pixels)
        if size != (image["height"], image["width"]):
            message = f"expected {image['height']} x {image['width']} px as annotated, got {size[0]} x {size[1]} px"
            raise DataError("image-size", path, message, "download the image and its annotation from the same release")
    return build_dataset(tree, annotations, images, sha256, truth=tree, limits=limits)


def to_coco(annotations: str) -> tuple[Json, str]:
    """Converts ROOT/gtFine/PART and returns (COCO annotations, SHA-256 of the names and contents of the files).

    Each pixel belongs to the object that was painted last, so masks do not overlap; hidden objects have no annotation.
    A group becomes a crowd. In addition to COCO, each image has ``void``: an RLE of the pixels that the Cityscapes
    evaluation ignores. Raises DataError.
    """
    files = _files(annotations)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        scenes = list(pool.map(lambda item: _read_scene(*item), files.items()))
    hashed = hashlib.sha256("".join(f"{scene.name} {scene.digest}\n" for scene in scenes).encode())
    images: list[Json] = []
    entries: list[Json] = []
    for image_id, scene in enumerate(scenes):
        size = {"height": scene.height, "width": scene.width}
        images.append({"id": image_id, "file_name": scene.name + PHOTOGRAPH, **size, "void": scene.void})
        for value, rle in scene.instances:
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": image_id,
                    "category_id": value // PER_LABEL or value,
                    "iscrowd": int(value < PER_LABEL),
                    "area": int(coco_mask.area(rle)),
                    "bbox": coco_mask.toBbox(rle).tolist(),
                    "segmentation": rle,
                }
            )
    categories = [{"id": LABELS[name], "name": name} for name in CLASSES]
    return {"images": images, "annotations": entries, "categories": categories}, hashed.hexdigest()


def images_beside(annotations: str) -> str | None:
    """Returns ROOT/leftImg8bit/PART for ROOT/gtFine/PART, and None for any other path."""
    head, part = os.path.split(os.path.normpath(annotations))
    root, folder = os.path.split(head)
    return os.path.join(root, "leftImg8bit", part) if folder == "gtFine" else None


def paint(tree: Any, where: str) -> np.ndarray:
    """Paints the objects of a polygons.json, later ones over earlier ones, and returns pixel values (H, W) int32.

    The n of an instance counts the earlier instances of its label in the file. Raises DataError.
    """
    if not isinstance(tree, dict) or not isinstance(tree.get("objects"), list):
        raise DataError("key-missing", where, "expected an object with imgHeight, imgWidth and a list of objects")
    height, width = check_size(tree.get("imgHeight"), tree.get("imgWidth"), where)
    canvas = Image.new("I", (width, height), LABELS["unlabeled"])
    brush = ImageDraw.Draw(canvas)
    seen = dict.fromkeys(WITH_INSTANCES, 0)
    for index, item in enumerate(tree["objects"]):
        here = f"{where}: object {index}"
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), str):
            raise DataError("key-missing", here, "expected an object with label and polygon")
        if item.get("deleted"):
            continue
        label = item["label"]
        group = label not in LABELS and label.endswith("group")
        label = label.removesuffix("group") if group else label
        if label not in LABELS:
            raise DataError("cityscapes-label", here, f"expected a Cityscapes label, got {item['label']!r:.60}")
        value = LABELS[label]
        if label in seen and not group:
            value = value * PER_LABEL + seen[label]
            seen[label] += 1
        if value >= 0:
            brush.polygon(_points(item.get("polygon"), height, width, here), fill=value)
    return np.asarray(canvas)


def read_results(folder: str, truth: Json) -> list[Json]:
    """Converts predictions in the format of the Cityscapes server to COCO results; ``truth`` is ``to_coco``'s content.

    There is one NAME*.txt per image with lines ``mask.png label score``; the nonzero pixels of the mask are the
    instance. Labels other than the 8 classes and empty masks are left out, as the server does. Raises DataError.
    """
    lists: dict[str, str] = {}
    for base, _, names in os.walk(folder):
        for name in (n for n in names if n.endswith(".txt")):
            key = "_".join(name.removesuffix(".txt").split("_")[:3])
            if key in lists:
                raise DataError(
                    "cityscapes-results",
                    os.path.join(base, name),
                    f"expected one list per image, got a second one for {key}",
                )
            lists[key] = os.path.join(base, name)
    results: list[Json] = []
    for image in truth["images"]:
        key = os.path.basename(image["file_name"]).removesuffix(PHOTOGRAPH)
        if key not in lists:
            raise DataError("cityscapes-results", folder, f"expected a list {key}*.txt, got none")
        results += _read_result_list(lists[key], os.path.realpath(folder), image)
    return results


def _read_result_list(path: str, root: str, image: Json) -> Iterator[Json]:
    size = (image["height"], image["width"])
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            name, label, score = line.rsplit(" ", 2)
            category, confidence = int(float(label)), float(score)
        except (ValueError, OverflowError):
            raise DataError("cityscapes-results", where, f"expected `mask.png label score`, got {line!r:.80}") from None
        mask_path = os.path.realpath(os.path.join(os.path.dirname(path), name))
        if os.path.commonpath([root, mask_path]) != root:
            raise DataError("cityscapes-results", where, f"expected a mask inside {root}, got {name!r}")
        if not math.isfinite(confidence):
            raise DataError("cityscapes-results", where, f"expected a finite score, got {score!r:.60}")
        if category not in [LABELS[name] for name in CLASSES]:
            continue
        mask = decode_values(_bytes(mask_path, "cityscapes-results"), mask_path) != 0
        if mask.shape != size:
            message = f"expected a mask of {size[0]} x {size[1]} px, got {mask.shape[0]} x {mask.shape[1]}"
            raise DataError("cityscapes-results", mask_path, message)
        if mask.any():
            rle = {"size": list(size), "counts": encode_masks(mask[None])[0].decode("ascii")}
            yield {"image_id": image["id"], "category_id": category, "score": confidence, "segmentation": rle}


def _files(annotations: str) -> dict[str, str]:
    """Returns the annotation file of each CITY/NAME, in the order of the names."""
    if not os.path.isdir(annotations):
        raise DataError("cityscapes-layout", annotations, "expected a folder gtFine/PART, got no folder")
    found: dict[str, str] = {}
    for city in os.scandir(annotations):
        names = os.listdir(city.path) if city.is_dir() and not city.name.startswith(".") else []
        for suffix in (POLYGONS, IDS):  # the second one wins
            for name in (n for n in names if n.endswith(suffix) and not n.startswith(".")):
                found[f"{city.name}/{name.removesuffix(suffix)}"] = os.path.join(city.path, name)
    if not found:
        raise DataError("cityscapes-layout", annotations, f"expected CITY/NAME{IDS} or CITY/NAME{POLYGONS}, got none")
    return dict(sorted(found.items(), key=lambda item: item[0].split("/")))


def _read_scene(name: str, path: str) -> _Scene:
    data = _bytes(path, "cityscapes-layout")
    values = decode_values(data, path) if path.endswith(IDS) else paint(_parse(data, path), path)
    if values.dtype.itemsize == 1:
        raise DataError("cityscapes-ids", path, "expected 16 bits per pixel, got 8 bits, which have no instance ids")
    height, width = values.shape
    flat = values.T.ravel()  # along the columns, the order of COCO run lengths
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    painted = flat[starts].astype(np.int64)  # the value of each run
    known = [LABELS[label] for label in WITH_INSTANCES]
    present = np.unique(painted)
    of_group = present < PER_LABEL
    wrong = present[np.where(of_group, present > max(LABELS.values()), ~np.isin(present // PER_LABEL, known))]
    if len(wrong):
        message = f"expected labels 0 to 33 and instances label * {PER_LABEL} + n, got a pixel value of {wrong[0]}"
        raise DataError("cityscapes-ids", path, message)
    wanted = [LABELS[label] for label in CLASSES]
    instances = present[np.isin(np.where(of_group, present, present // PER_LABEL), wanted)]
    return _Scene(
        name=name,
        height=height,
        width=width,
        digest=hashlib.sha256(data).hexdigest(),
        instances=tuple((int(v), _rle(painted == v, starts, height, width)) for v in instances),
        void=_rle(np.isin(painted, VOID), starts, height, width),
    )


def _rle(chosen: np.ndarray, starts: np.ndarray, height: int, width: int) -> Json:
    """Returns the compressed COCO RLE of the ``chosen`` (R,) bool among the runs that begin at ``starts`` (R,)."""
    turns = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    bounds = np.concatenate([[0], np.append(starts, height * width)[turns], [height * width]])
    counts = np.diff(bounds).tolist()
    rle = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def _points(polygon: Any, height: int, width: int, where: str) -> list[tuple[float, float]]:
    if not isinstance(polygon, list) or not all(isinstance(p, list) and len(p) == 2 for p in polygon):
        raise DataError("polygon-type", where, f"expected a polygon as a list of [x, y], got {polygon!r:.60}")
    check_polygon([value for point in polygon for value in point], height, width, where)
    return [(x, y) for x, y in polygon]


def _parse(data: bytes, path: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(
            "file-json", path, f"expected JSON, got an error: {error}", "download the file again"
        ) from error


def _bytes(path: str, rule: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise DataError(rule, path, f"expected a readable file, got {error.strerror}") from error
