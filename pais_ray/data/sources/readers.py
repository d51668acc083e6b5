"""Reads annotations of any supported kind: a COCO file, Cityscapes' gtFine/PART, or shards. Torch-free."""

import os
from typing import Any, Literal

from pais_ray.data.annotations import cityscapes
from pais_ray.data.annotations.coco import build_dataset, read_coco
from pais_ray.data.annotations.records import CocoDataset
from pais_ray.data.shards import dataset
from pais_ray.data.validation import entries
from pais_ray.data.validation.rules import LIMITS, DataError, Limits


def is_folder(annotations: str) -> bool:
    """Returns whether a path names a folder of annotations (shards or Cityscapes), whether or not it exists."""
    return (
        dataset.is_shard_folder(annotations)
        or os.path.isdir(annotations)
        or cityscapes.images_beside(annotations) is not None
    )


def read_labeled(
    annotations: str, images: str | None, limits: Limits = LIMITS, part: Literal["train", "val"] = "train"
) -> CocoDataset:
    """Reads the data set of ``annotations`` with the images in the folder ``images``. Raises DataError.

    The images of Cityscapes default to the folder that the layout implies. Shards contain images and both parts, of
    which ``part`` is read.
    """
    if dataset.is_shard_folder(annotations):
        return dataset.read_shards(annotations, part, limits)
    if not is_folder(annotations):
        if images is None:
            raise DataError(
                "file-missing",
                annotations,
                "expected the folder of its images, got none",
                "give the folder of the images",
            )
        return read_coco(annotations, images, limits)
    images = images or cityscapes.images_beside(annotations)
    if images is None:
        raise DataError(
            "cityscapes-layout", annotations, "expected a COCO file or a folder gtFine/PART, got another folder"
        )
    return cityscapes.read_cityscapes(annotations, images, limits)


def read_annotations(annotations: str) -> CocoDataset:
    """Reads the data set without checking that its images exist; their paths are names. Raises DataError."""
    if dataset.is_shard_folder(annotations):
        return dataset.read_shards(annotations, "train")
    if not is_folder(annotations):
        return read_coco(annotations, None)
    tree, sha256 = cityscapes.to_coco(annotations)
    return build_dataset(tree, annotations, None, sha256, truth=tree)


def read_tree(annotations: str, limits: Limits = LIMITS) -> tuple[dict[str, Any], str]:
    """Returns (content of ``annotations`` in the COCO format, its SHA-256). Raises DataError."""
    return cityscapes.to_coco(annotations) if is_folder(annotations) else entries.read_tree(annotations, limits)


def images_of(annotations: str, images: str | None) -> str | None:
    """Returns the given image folder, or the one that the Cityscapes layout implies, or None."""
    return images or cityscapes.images_beside(annotations)


def read_truth(annotations: str) -> str | dict[str, Any]:
    """Returns the ground truth for scoring: the path of a COCO file, or the content converted from Cityscapes or stored
    in shards. Raises DataError."""
    if dataset.is_shard_folder(annotations):
        return dataset.read_truth(annotations)
    return cityscapes.to_coco(annotations)[0] if is_folder(annotations) else annotations
