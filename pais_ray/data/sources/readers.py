"""Which reader is for which annotations: COCO JSON, Cityscapes' gtFine/PART, or shards. Torch-free."""

import os
from typing import Any, Literal

from pais_ray.data.annotations import cityscapes
from pais_ray.data.annotations.coco import build_dataset, read_coco
from pais_ray.data.annotations.records import CocoDataset
from pais_ray.data.shards import dataset
from pais_ray.data.validation import entries
from pais_ray.data.validation.rules import LIMITS, DataError, Limits


def is_folder(annotations: str) -> bool:
    """Whether annotations at this path are a folder's, be it there or not."""
    return (
        dataset.is_shards(annotations)
        or os.path.isdir(annotations)
        or cityscapes.images_beside(annotations) is not None
    )


def read_labeled(
    annotations: str, images: str | None, limits: Limits = LIMITS, part: Literal["train", "val"] = "train"
) -> CocoDataset:
    """The data set of ``annotations`` with its images under ``images``; Cityscapes knows its own by default. Shards
    hold images and both parts, of which ``part`` is read.

    Raises DataError.
    """
    if dataset.is_shards(annotations):
        return dataset.read_shards(annotations, part, limits)
    if not is_folder(annotations):
        if images is None:
            raise DataError("file-missing", annotations, "its images need a folder", "give the folder of the images")
        return read_coco(annotations, images, limits)
    images = images or cityscapes.images_beside(annotations)
    if images is None:
        raise DataError("cityscapes-layout", annotations, "expected a COCO file or a folder gtFine/PART, got a folder")
    return cityscapes.read_cityscapes(annotations, images, limits)


def read_annotations(annotations: str) -> CocoDataset:
    """The data set without its images, whose paths are names that nobody looked for. Raises DataError."""
    if dataset.is_shards(annotations):
        return dataset.read_shards(annotations, "train")
    if not is_folder(annotations):
        return read_coco(annotations, None)
    tree, sha256 = cityscapes.to_coco(annotations)
    return build_dataset(tree, annotations, None, sha256, truth=tree)


def read_tree(annotations: str, limits: Limits = LIMITS) -> tuple[dict[str, Any], str]:
    """The content of ``annotations`` as COCO's, and its hash. Raises DataError."""
    return cityscapes.to_coco(annotations) if is_folder(annotations) else entries.read_tree(annotations, limits)


def images_of(annotations: str, images: str | None) -> str | None:
    """The folder given, or the one that Cityscapes' layout implies."""
    return images or cityscapes.images_beside(annotations)


def read_truth(annotations: str) -> str | dict[str, Any]:
    """What ``evaluate.score`` takes as ground truth: the COCO file itself, or the content made of Cityscapes or kept
    in shards."""
    if dataset.is_shards(annotations):
        return dataset.read_truth(annotations)
    return cityscapes.to_coco(annotations)[0] if is_folder(annotations) else annotations
