"""Splits into labeled and unlabeled images: drawn from fraction and fold, or read from a manifest. Torch-free.

If there is no validation set, a fraction of the annotated images is held out for validation before the draw.
"""

import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pais_ray.data.annotations.records import CocoDataset, Record
from pais_ray.data.images.reader import image_name
from pais_ray.data.validation.rules import DataError

Sampling = Literal["random", "covering", "published"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The splits that papers report: each fraction of labeled images in each fold."""

    shares: tuple[float, ...]
    folds: tuple[int, ...]


PROTOCOLS = {
    # Paper 4.1 has 1, 5 and 10 %, other work 2 %; five folds since STAC. 100 % uses unlabeled2017 in addition.
    "coco": Protocol(shares=(0.01, 0.02, 0.05, 0.1), folds=(1, 2, 3, 4, 5)),
    # Paper 4.1; the released code draws one fold.
    "cityscapes": Protocol(shares=(0.05, 0.1, 0.2, 0.3), folds=(1,)),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two sets of images; ids ascending. Disjoint if both come from one source."""

    labeled_ids: tuple[int, ...]
    unlabeled_ids: tuple[int, ...]
    labeled: float  # the requested fraction
    fold: int
    unlabeled_sha256: str | None = None  # of ids and names of a separate source; None: the source of the labeled images
    holdout: float | None = None  # the fraction held out
    held_out_ids: tuple[int, ...] = ()  # in neither part
    sha256: str  # of the ids of both parts, of unlabeled_sha256 and of held_out_ids


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """The number of labeled instances of a class."""

    id: int  # as in the annotation file
    name: str
    instances: int  # in the labeled part, without crowds


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The content of a run's split.json: the split, its origin, and the instances of each class."""

    split: Split
    classes: tuple[ClassCount, ...]
    source_sha256: str  # of the annotations
    sampling: Sampling = "random"
    scored_sha256: str | None = None  # of the run's data.pseudo_labels; None: the teacher makes the pseudo-labels

    @property
    def absent(self) -> tuple[str, ...]:
        """The names of the classes without an instance in the labeled part."""
        return tuple(c.name for c in self.classes if c.instances == 0)

    def to_json(self) -> str:
        """Returns the text of a manifest file, with one key per line."""
        split = self.split
        tree = {
            "labeled": split.labeled,
            "fold": split.fold,
            "sampling": self.sampling,
            "num_labeled": len(split.labeled_ids),
            "num_unlabeled": len(split.unlabeled_ids),
            "sha256": split.sha256,
            "source_sha256": self.source_sha256,
            "unlabeled_sha256": split.unlabeled_sha256,
            "scored_sha256": self.scored_sha256,
            "holdout": split.holdout,
            "classes": [asdict(c) for c in self.classes],
            "absent": self.absent,
            "labeled_ids": split.labeled_ids,
            "unlabeled_ids": split.unlabeled_ids,
            "held_out_ids": split.held_out_ids,
        }
        lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in tree.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str, where: str = "split.json") -> "SplitManifest":
        """Parses a manifest. Raises ValueError if keys are missing or the ids do not have the stored hash."""
        try:
            tree: dict[str, Any] = json.loads(text)
            found = assemble(
                tree["labeled_ids"],
                tree["unlabeled_ids"],
                tree["labeled"],
                tree["fold"],
                tree.get("unlabeled_sha256"),
                tree.get("holdout"),
                tree.get("held_out_ids", ()),
            )
            classes = tuple(ClassCount(**c) for c in tree["classes"])
            source, sampling, sha256 = tree["source_sha256"], tree.get("sampling", "random"), tree["sha256"]
            scored = tree.get("scored_sha256")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            got = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{where}: expected a split manifest, got {got}; give a file of `pais-ray split` or a run's split.json"
            ) from error
        if sha256 != found.sha256:
            raise ValueError(f"{where}: expected ids with the hash {sha256}, got {found.sha256}; restore the file")
        return cls(split=found, classes=classes, source_sha256=source, sampling=sampling, scored_sha256=scored)


def read_manifest(path: str | Path) -> SplitManifest:
    """Reads a manifest. Raises ValueError, DataError if there is no such file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("file-missing", str(path), f"expected a split manifest, got {error.strerror}") from error
    return SplitManifest.from_json(text, str(path))


def assemble(
    labeled_ids: Iterable[int],
    unlabeled_ids: Iterable[int],
    labeled: float,
    fold: int,
    unlabeled_sha256: str | None = None,
    holdout: float | None = None,
    held_out_ids: Iterable[int] = (),
) -> Split:
    """Returns the split with these ids, in any order.

    Raises ValueError if no image is labeled, or if an image occurs twice or in two parts.
    """
    chosen, rest, held = sorted(labeled_ids), sorted(unlabeled_ids), sorted(held_out_ids)
    if not chosen:
        raise ValueError("expected at least one labeled image, got none")
    if any(len(set(part)) != len(part) for part in (chosen, rest, held)):
        raise ValueError("expected unique image ids, got one that occurs twice")
    own = chosen if unlabeled_sha256 is not None else [*chosen, *rest]  # ids of the source of the annotated images
    if unlabeled_sha256 is None and (both := set(chosen) & set(rest)):
        raise ValueError(f"expected disjoint parts, got image {min(both)} as labeled and unlabeled")
    if both := set(own) & set(held):
        raise ValueError(f"expected disjoint parts, got image {min(both)} as held out and trained on")
    hashed: list[Any] = [chosen, rest, *([unlabeled_sha256] if unlabeled_sha256 is not None else [])]
    text = json.dumps(hashed + ([held] if held else []), separators=(",", ":"))
    return Split(
        labeled_ids=tuple(chosen),
        unlabeled_ids=tuple(rest),
        labeled=labeled,
        fold=fold,
        unlabeled_sha256=unlabeled_sha256,
        holdout=holdout,
        held_out_ids=tuple(held),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def split(
    image_ids: Sequence[int],
    labeled: float,
    fold: int,
    cover: Mapping[int, Collection[int]] | None = None,
    holdout: float | None = None,
) -> Split:
    """Draws int(labeled * N) images, at least one, as labeled, uniformly without replacement.

    The draw depends only on fold and ids: images are taken in the order of sha256("fold:id"). It is therefore
    independent of the order of ``image_ids`` and of any library's random numbers, and in one fold a smaller fraction is
    a subset of a larger one.

    With ``cover`` (image id -> its classes), images that show each class come first: for each class, starting with the
    rarest, the first image in that order with a class that is not covered yet. Every class is covered if there are as
    many labeled images as classes. The class distribution then differs from that of a uniform draw.

    ``holdout`` is the fraction of the images that is held out first, see ``hold_out``; ``labeled`` is a fraction of the
    remaining images. Raises ValueError.
    """
    if not (0 < labeled <= 1 and math.isfinite(labeled)):
        raise ValueError(f"data.labeled: expected a fraction in (0, 1], got {labeled}; 0.1 labels 10 % of the images")
    if fold < 0:
        raise ValueError(f"data.fold: expected an integer >= 0, got {fold}; published folds start at 1")
    if not image_ids:
        raise ValueError("data.labeled: expected at least one image to split, got none; give a data set with images")
    if len(set(image_ids)) != len(image_ids):
        raise ValueError(
            "data.labeled: expected unique image ids, got one that occurs twice; give each image its own id"
        )
    held_out = () if holdout is None else hold_out(image_ids, holdout)
    aside = set(held_out)
    drawn = _shuffled((i for i in image_ids if i not in aside), str(fold))
    if cover is not None:
        drawn = _covering(drawn, cover)
    num_labeled = max(1, int(labeled * len(drawn)))
    return assemble(drawn[:num_labeled], drawn[num_labeled:], labeled, fold, None, holdout, held_out)


def hold_out(image_ids: Sequence[int], share: float) -> tuple[int, ...]:
    """Returns the images held out for validation: int(share * N), at least one.

    They are the same for every fold and labeled fraction, so that results are comparable. Raises ValueError.
    """
    if not (0 < share < 1):
        raise ValueError(f"data.holdout: expected a fraction between 0 and 1, got {share}; 0.2 holds out 20 %")
    if len(image_ids) < 2:
        raise ValueError(
            f"data.holdout: expected at least two images, got {len(image_ids)}; label more images, or set data.val"
        )
    return tuple(_shuffled(image_ids, "holdout")[: max(1, int(share * len(image_ids)))])


def _shuffled(image_ids: Iterable[int], salt: str) -> list[int]:
    """Returns the ids in an order that depends only on ``salt`` and the ids."""
    return sorted(image_ids, key=lambda image_id: hashlib.sha256(f"{salt}:{image_id}".encode()).digest())


def draw(
    dataset: CocoDataset,
    protocol: str | None,
    shares: Sequence[float],
    folds: Sequence[int],
    unlabeled: Sequence[Record] | None = None,
    *,
    cover: bool = False,
    holdout: float | None = None,
) -> list[SplitManifest]:
    """Returns the manifests of a protocol of ``PROTOCOLS``; ``shares`` and ``folds`` replace its own if they are given.

    With ``unlabeled``, images of another source, it adds a manifest in which all of ``dataset`` is labeled. Raises
    ValueError.
    """
    base = PROTOCOLS[protocol] if protocol else Protocol(shares=(), folds=(1,))
    ids = [record.image_id for record in dataset.records]
    classes = classes_of(dataset) if cover else None
    sampling: Sampling = "covering" if cover else "random"
    made = [
        manifest(split(ids, share, fold, classes, holdout), dataset, sampling)
        for share in tuple(shares) or base.shares
        for fold in tuple(folds) or base.folds
    ]
    if unlabeled is not None:  # all images are labeled, so there is only one fold
        made.append(manifest(with_unlabeled(split(ids, 1.0, 0, None, holdout), unlabeled), dataset))
    return made


def with_unlabeled(split: Split, records: Sequence[Record]) -> Split:
    """Returns the split with images of another source as its unlabeled part."""
    names = sorted(f"{r.image_id} {image_name(r.path)}" for r in records)
    source = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()
    return assemble(
        split.labeled_ids,
        (r.image_id for r in records),
        split.labeled,
        split.fold,
        source,
        split.holdout,
        split.held_out_ids,
    )


def with_remaining(
    split: Split, dataset: CocoDataset, unlabeled: Sequence[Record], evaluated: Sequence[Record]
) -> Split:
    """Returns the split with those of the ``unlabeled`` images whose file is not labeled, held out or ``evaluated`` on.

    A folder of unlabeled images may contain labeled images and those of data.val.
    """
    taken = {*split.labeled_ids, *split.held_out_ids}
    files = {file_key(r.path) for r in (*(r for r in dataset.records if r.image_id in taken), *evaluated)}
    return with_unlabeled(split, [record for record in unlabeled if file_key(record.path) not in files])


def for_run(
    dataset: CocoDataset,
    labeled: float,
    fold: int,
    path: str | None,
    unlabeled: Sequence[Record] | None,
    holdout: float | None = None,
    evaluated: Sequence[Record] = (),
) -> SplitManifest:
    """Returns the manifest of a run: the one at ``path``, which must match the data, or a new draw.

    ``unlabeled`` are the images of data.unlabeled if it is set, and ``evaluated`` those of data.val, see
    ``with_remaining``. Raises ValueError.
    """
    if path is None:
        drawn = split([r.image_id for r in dataset.records], labeled, fold, None, holdout)
        if unlabeled is not None:
            drawn = with_remaining(drawn, dataset, unlabeled, evaluated)
        return manifest(drawn, dataset)
    given = read_manifest(path)
    if given.source_sha256 != dataset.sha256:
        raise ValueError(
            f"data.split: expected a manifest of {dataset.path}, got one of other annotations in {path}; "
            "set data.train to those annotations, or create a new manifest with `pais-ray split`"
        )
    found = given.split
    ids = {r.image_id for r in dataset.records}
    own = found.labeled_ids if found.unlabeled_sha256 is not None else (*found.labeled_ids, *found.unlabeled_ids)
    if unknown := {*own, *found.held_out_ids} - ids:
        raise ValueError(
            f"data.split: expected ids of images in {dataset.path}, got {min(unknown)} in {path}; restore the file"
        )
    if found.unlabeled_sha256 is None and unlabeled is not None:
        raise ValueError(
            f"data.split: expected a manifest with the images of data.unlabeled, got those of {dataset.path} in "
            f"{path}; unset data.unlabeled, or create a manifest with `pais-ray split --unlabeled`"
        )
    if found.unlabeled_sha256 is not None and unlabeled is None:
        raise ValueError(
            f"data.split: expected the source of the unlabeled images in {path}, got none; set data.unlabeled to it"
        )
    if unlabeled is not None and with_remaining(found, dataset, unlabeled, evaluated).sha256 != found.sha256:
        raise ValueError(
            f"data.split: expected a manifest with the images of data.unlabeled, got others in {path}; "
            "restore the images, or create a new manifest with `pais-ray split --unlabeled`"
        )
    return manifest(found, dataset, given.sampling)


def manifest(split: Split, dataset: CocoDataset, sampling: Sampling = "random") -> SplitManifest:
    """Returns the manifest of a split of ``dataset``, with the instances of each class in the labeled part."""
    chosen = set(split.labeled_ids)
    counts = np.zeros(len(dataset.categories), dtype=np.int64)
    for record in dataset.records:
        if record.image_id in chosen:
            counts += np.bincount(record.labels, minlength=len(counts))
    classes = tuple(ClassCount(id=c.id, name=c.name, instances=int(counts[c.index])) for c in dataset.categories)
    return SplitManifest(split=split, classes=classes, source_sha256=dataset.sha256, sampling=sampling)


def classes_of(dataset: CocoDataset) -> dict[int, frozenset[int]]:
    """Returns the class indices of the instances of each image, by image id, without crowds."""
    return {record.image_id: frozenset(record.labels.tolist()) for record in dataset.records}


def difference(a: SplitManifest, b: SplitManifest) -> dict[str, Any]:
    """Compares two manifests: hashes, ids of each part, instances of each class."""
    tree: dict[str, Any] = {
        "same": a.split.sha256 == b.split.sha256 and a.source_sha256 == b.source_sha256,
        "same_source": a.source_sha256 == b.source_sha256,
    }
    for part in ("labeled_ids", "unlabeled_ids", "held_out_ids"):
        in_a, in_b = set(getattr(a.split, part)), set(getattr(b.split, part))
        tree[part] = {"both": len(in_a & in_b), "only_a": sorted(in_a - in_b), "only_b": sorted(in_b - in_a)}
    counts = [{c.name: c.instances for c in m.classes} for m in (a, b)]
    names = list(dict.fromkeys([*counts[0], *counts[1]]))
    tree["classes"] = {n: [count.get(n) for count in counts] for n in names}
    return tree


def file_key(path: str) -> tuple[str, str]:
    """Returns a key that is equal for paths of one file, also if links lead to its folder."""
    folder, name = os.path.split(os.path.abspath(path))
    return _real_path(folder), name


@lru_cache(maxsize=4096)
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _covering(drawn: list[int], cover: Mapping[int, Collection[int]]) -> list[int]:
    """Moves one image of each class to the front, starting with the class that has the fewest images."""
    showing: dict[int, list[int]] = defaultdict(list)
    for image_id in drawn:
        for label in cover.get(image_id, ()):
            showing[label].append(image_id)
    seen: set[int] = set()
    front: dict[int, None] = {}
    for label in sorted(showing, key=lambda label: (len(showing[label]), label)):
        if label not in seen:
            front[showing[label][0]] = None
            seen.update(cover[showing[label][0]])
    return [*front, *(i for i in drawn if i not in front)]
