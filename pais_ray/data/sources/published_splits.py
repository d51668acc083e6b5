"""Imports published splits as manifests: lists of indices, and pairs of annotation files. Torch-free.

Unbiased Teacher's COCO_supervision.txt is JSON {percent: {seed: [index, ...]}}. An index is a position among the images
with at least one annotation that is not a crowd, by ascending id, the order of Detectron2; the other images are in
neither part. SoftTeacher, like STAC, writes the COCO files NAME.SEED@PERCENT.json and NAME.SEED@PERCENT-unlabeled.json,
whose image ids define the split.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pais_ray.data.annotations.records import CocoDataset
from pais_ray.data.annotations.splits import Split, SplitManifest, assemble, manifest
from pais_ray.data.sources.readers import read_truth
from pais_ray.data.validation.rules import DataError

REMEDY = "give COCO_supervision.txt, or the labeled file of a pair NAME.SEED@PERCENT.json"


def import_splits(
    path: str, dataset: CocoDataset, shares: Sequence[float] = (), folds: Sequence[int] = ()
) -> list[SplitManifest]:
    """Returns the manifests of a published file for the images of ``dataset``: all, or only ``shares`` and ``folds``.

    Raises DataError.
    """
    tree = _read(path)
    splits = [_pair(path, tree)] if "images" in tree else _lists(path, tree, dataset)
    if shares:
        splits = [s for s in splits if any(math.isclose(s.labeled, share) for share in shares)]
    if folds:
        splits = [s for s in splits if s.fold in folds]
    if not splits:
        have = ", ".join(f"{percent} %" for percent in tree) or "none"
        raise DataError(
            "key-missing", path, f"expected a split with the requested fractions and folds, got only {have}", REMEDY
        )
    known = {record.image_id for record in dataset.records}
    for split in splits:
        if unknown := {*split.labeled_ids, *split.unlabeled_ids} - known:
            message = f"expected ids of images in {dataset.path}, got {min(unknown)}"
            raise DataError("id-unknown", path, message, "give the annotations that the list was created for")
    return [manifest(split, dataset, "published") for split in splits]


def _lists(path: str, tree: dict[str, Any], dataset: CocoDataset) -> list[Split]:
    truth = dataset.truth if isinstance(dataset.truth, dict) else _read(str(read_truth(dataset.path)))
    usable = sorted({a["image_id"] for a in truth["annotations"] if not a.get("iscrowd", 0)})
    splits = []
    for percent, folds in tree.items():
        if not isinstance(folds, dict) or not re.fullmatch(r"\d+(\.\d+)?", percent):
            raise DataError("key-type", path, f"expected {{percent: {{seed: [indices]}}}}, got {percent!r:.40}", REMEDY)
        for seed, indices in folds.items():
            where = f"{path}: {percent} %, seed {seed}"
            if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
                raise DataError("key-type", where, f"expected a list of indices, got {indices!r:.40}", REMEDY)
            expected = int(float(percent) / 100 * len(usable))
            if len(indices) != expected or max(indices, default=0) >= len(usable):
                message = f"expected {expected} indices of the {len(usable)} images with instances in {dataset.path}, "
                message += f"got {len(indices)} indices up to {max(indices, default=0)}"
                raise DataError("id-unknown", where, message, "give the annotations that the list was created for")
            chosen = {usable[i] for i in indices}
            if len(chosen) != len(indices):
                raise DataError("id-duplicate", where, "expected unique indices, got one that occurs twice", REMEDY)
            splits.append(_assembled(where, chosen, set(usable) - chosen, float(percent) / 100, _fold(seed, where)))
    return splits


def _pair(path: str, tree: dict[str, Any]) -> Split:
    other = path.removesuffix(".json") + "-unlabeled.json"
    labeled, unlabeled = _image_ids(path, tree), _image_ids(other, _read(other))
    name = re.search(r"\.(\d+)@(\d+(?:\.\d+)?)\.json$", path)
    if name is None:
        return _assembled(path, labeled, unlabeled, len(labeled) / max(1, len(labeled) + len(unlabeled)), 0)
    return _assembled(path, labeled, unlabeled, float(name[2]) / 100, int(name[1]))


def _assembled(where: str, labeled: set[int], unlabeled: set[int], share: float, fold: int) -> Split:
    try:
        return assemble(labeled, unlabeled, share, fold)
    except ValueError as error:
        raise DataError("id-duplicate", where, str(error), REMEDY) from error


def _image_ids(path: str, tree: dict[str, Any]) -> set[int]:
    images = tree.get("images")
    if not isinstance(images, list) or not all(isinstance(i, dict) and type(i.get("id")) is int for i in images):
        raise DataError("key-type", path, "expected images with integers as ids, got others", REMEDY)
    return {image["id"] for image in images}


def _fold(seed: str, where: str) -> int:
    if not seed.isdecimal():
        raise DataError("key-type", where, f"expected an integer as seed, got {seed!r:.40}", REMEDY)
    return int(seed)


def _read(path: str) -> dict[str, Any]:
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError("file-missing", path, f"expected a readable file, got {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError("file-json", path, f"expected JSON, got an error: {error}", REMEDY) from error
    if not isinstance(tree, dict):
        raise DataError("file-json", path, f"expected a JSON object, got a {type(tree).__name__}", REMEDY)
    return tree
