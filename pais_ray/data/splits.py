"""Fraction + fold -> which images are labeled, and the manifest that says so. Torch-free."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pais_ray.data.sources import CocoDataset


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two disjoint sets of images; ids ascending."""

    labeled_ids: tuple[int, ...]
    unlabeled_ids: tuple[int, ...]
    labeled: float  # the fraction asked for
    fold: int
    sha256: str  # of the ids of both parts


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    id: int  # as in the JSON
    name: str
    instances: int  # in the labeled part, without crowds


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """What a run writes as split.json: enough to repeat the split and to see which classes it covers."""

    split: Split
    classes: tuple[ClassCount, ...]
    source_sha256: str  # of the annotation file

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes without an instance in the labeled part."""
        return tuple(c.name for c in self.classes if c.instances == 0)

    def to_json(self) -> str:
        split = self.split
        tree = {
            "labeled": split.labeled,
            "fold": split.fold,
            "num_labeled": len(split.labeled_ids),
            "num_unlabeled": len(split.unlabeled_ids),
            "sha256": split.sha256,
            "source_sha256": self.source_sha256,
            "classes": [asdict(c) for c in self.classes],
            "absent": self.absent,
            "labeled_ids": split.labeled_ids,
            "unlabeled_ids": split.unlabeled_ids,
        }
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in tree.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "split.json") -> "SplitManifest":
        """Raises ValueError when keys are missing or the ids are not those that were hashed."""
        try:
            tree: dict[str, Any] = json.loads(text)
            labeled, unlabeled = tuple(tree["labeled_ids"]), tuple(tree["unlabeled_ids"])
            classes = tuple(ClassCount(**c) for c in tree["classes"])
            fraction, fold, source = tree["labeled"], tree["fold"], tree["source_sha256"]
            sha256 = tree["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where}: expected a split manifest, got {got}; restore the run's file") from error
        if sha256 != _hash(labeled, unlabeled):
            raise ValueError(f"{where}: the ids do not have the hash {sha256}; restore the run's file")
        split = Split(labeled_ids=labeled, unlabeled_ids=unlabeled, labeled=fraction, fold=fold, sha256=sha256)
        return cls(split=split, classes=classes, source_sha256=source)


def split(image_ids: Sequence[int], labeled: float, fold: int) -> Split:
    """A random part of the images as labeled, plain, without replacement; ``labeled=1`` labels all of them.

    int(labeled * N) images, but at least one. The draw depends on (fold, ids) only: images are taken in the
    order of sha256("fold:id"), so neither the order given nor a library's random stream matters, and of one
    fold the smaller fraction is a subset of the larger.
    """
    if not (0 < labeled <= 1 and math.isfinite(labeled)):
        raise ValueError(f"data.labeled: expected a fraction in (0, 1], got {labeled}; 0.1 labels 10 % of the images")
    if fold < 0:
        raise ValueError(f"data.fold: expected a whole number from 0 on, got {fold}")
    if not image_ids:
        raise ValueError("data.labeled: there are no images to split; give a data set with images")
    if len(set(image_ids)) != len(image_ids):
        raise ValueError("data.labeled: image ids occur twice; give each image its own id")
    drawn = sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{fold}:{image_id}".encode()).digest())
    num_labeled = max(1, int(labeled * len(drawn)))
    chosen, rest = tuple(sorted(drawn[:num_labeled])), tuple(sorted(drawn[num_labeled:]))
    return Split(labeled_ids=chosen, unlabeled_ids=rest, labeled=labeled, fold=fold, sha256=_hash(chosen, rest))


def manifest(split: Split, dataset: CocoDataset) -> SplitManifest:
    """The manifest of a split of ``dataset``, with the instances of each class in the labeled part."""
    chosen = set(split.labeled_ids)
    counts = np.zeros(len(dataset.categories), dtype=np.int64)
    for record in dataset.records:
        if record.image_id in chosen:
            counts += np.bincount(record.labels, minlength=len(counts))
    classes = tuple(ClassCount(id=c.id, name=c.name, instances=int(counts[c.index])) for c in dataset.categories)
    return SplitManifest(split=split, classes=classes, source_sha256=dataset.sha256)


def _hash(labeled: Iterable[int], unlabeled: Iterable[int]) -> str:
    text = json.dumps([list(labeled), list(unlabeled)], separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
