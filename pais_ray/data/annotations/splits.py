"""Which images are labeled: drawn from fraction and fold, or read from a manifest that says so. Torch-free.

Where there is no validation set, a share of the annotated images is held out for it before anything is drawn.
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
from pais_ray.data.images.reader import name_of
from pais_ray.data.validation.rules import DataError

Sampling = Literal["random", "covering", "published"]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Splits that a paper reports: each share of the images, in each fold."""

    shares: tuple[float, ...]
    folds: tuple[int, ...]


PROTOCOLS = {
    # Paper 4.1 has 1, 5 and 10 %, other work 2 %; five folds since STAC. 100 % takes unlabeled2017 beside.
    "coco": Protocol(shares=(0.01, 0.02, 0.05, 0.1), folds=(1, 2, 3, 4, 5)),
    # Paper 4.1; the released code draws one fold.
    "cityscapes": Protocol(shares=(0.05, 0.1, 0.2, 0.3), folds=(1,)),
}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Two sets of images; ids ascending. Disjoint where both are of one source."""

    labeled_ids: tuple[int, ...]
    unlabeled_ids: tuple[int, ...]
    labeled: float  # the fraction asked for
    fold: int
    unlabeled_sha256: str | None = None  # of ids and names of a source of their own; None: the labeled ones' source
    holdout: float | None = None  # the share held out, and its images; they are in neither part
    held_out_ids: tuple[int, ...] = ()
    sha256: str  # of the ids of both parts, of unlabeled_sha256 and of held_out_ids


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
    source_sha256: str  # of the annotations
    sampling: Sampling = "random"
    scored_sha256: str | None = None  # of the run's data.pseudo_labels; None: its teacher labels

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes without an instance in the labeled part."""
        return tuple(c.name for c in self.classes if c.instances == 0)

    def to_json(self) -> str:
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
        """Raises ValueError when keys are missing or the ids are not those that were hashed."""
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
            raise ValueError(f"{where}: the ids do not have the hash {sha256}; restore the file")
        return cls(split=found, classes=classes, source_sha256=source, sampling=sampling, scored_sha256=scored)


def read_manifest(path: str | Path) -> SplitManifest:
    """The manifest in a file. Raises ValueError (DataError where there is none)."""
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
    """The split of these ids, whatever their order. Raises ValueError where they are none, or in two parts."""
    chosen, rest, held = sorted(labeled_ids), sorted(unlabeled_ids), sorted(held_out_ids)
    if not chosen:
        raise ValueError("a split needs a labeled image")
    if any(len(set(part)) != len(part) for part in (chosen, rest, held)):
        raise ValueError("image ids occur twice")
    own = chosen if unlabeled_sha256 is not None else [*chosen, *rest]  # of the annotated images' source
    if unlabeled_sha256 is None and (both := set(chosen) & set(rest)):
        raise ValueError(f"image {min(both)} is labeled and unlabeled")
    if both := set(own) & set(held):
        raise ValueError(f"image {min(both)} is held out for validation and learned from")
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
    """A random part of the images as labeled, plain, without replacement; ``labeled=1`` labels all of them.

    int(labeled * N) images, but at least one. The draw depends on (fold, ids) only: images are taken in the
    order of sha256("fold:id"), so neither the order given nor a library's random stream matters, and of one
    fold the smaller fraction is a subset of the larger. ``cover`` (image id -> its classes) asks that each class
    be seen: first, from the rarest class on, the first image of that order with a class not seen yet. All are
    covered where there are as many labeled images as classes, and the mixture of classes is no longer the plain one.

    ``holdout`` is the share of the images that is set aside first, see ``hold_out``; ``labeled`` is of the others.
    """
    if not (0 < labeled <= 1 and math.isfinite(labeled)):
        raise ValueError(f"data.labeled: expected a fraction in (0, 1], got {labeled}; 0.1 labels 10 % of the images")
    if fold < 0:
        raise ValueError(f"data.fold: expected a whole number from 0 on, got {fold}")
    if not image_ids:
        raise ValueError("data.labeled: there are no images to split; give a data set with images")
    if len(set(image_ids)) != len(image_ids):
        raise ValueError("data.labeled: image ids occur twice; give each image its own id")
    held_out = () if holdout is None else hold_out(image_ids, holdout)
    aside = set(held_out)
    drawn = _shuffled((i for i in image_ids if i not in aside), str(fold))
    if cover is not None:
        drawn = _covering(drawn, cover)
    num_labeled = max(1, int(labeled * len(drawn)))
    return assemble(drawn[:num_labeled], drawn[num_labeled:], labeled, fold, None, holdout, held_out)


def hold_out(image_ids: Sequence[int], share: float) -> tuple[int, ...]:
    """The images set aside for validation: int(share * N), but at least one, and the same in every fold, so that
    folds and shares of labels compare."""
    if not (0 < share < 1):
        raise ValueError(f"data.holdout: expected a share between 0 and 1, got {share}; 0.2 holds out 20 %")
    if len(image_ids) < 2:
        raise ValueError("data.holdout: expected at least two images to hold one out; label more, or set data.val")
    return tuple(_shuffled(image_ids, "holdout")[: max(1, int(share * len(image_ids)))])


def _shuffled(image_ids: Iterable[int], salt: str) -> list[int]:
    """An order that depends on salt and ids alone."""
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
    """The manifests of a protocol of ``PROTOCOLS`` or of the ``shares`` and ``folds`` given, which come first.

    With ``unlabeled``, images of another source, also the one that labels all of ``dataset``. Raises ValueError.
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
    if unlabeled is not None:  # nothing is drawn: one fold
        made.append(manifest(with_unlabeled(split(ids, 1.0, 0, None, holdout), unlabeled), dataset))
    return made


def with_unlabeled(split: Split, records: Sequence[Record]) -> Split:
    """The split with images of another source as its unlabeled part, instead of what it leaves of its own."""
    names = sorted(f"{r.image_id} {name_of(r.path)}" for r in records)
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


def with_left(split: Split, dataset: CocoDataset, unlabeled: Sequence[Record], evaluated: Sequence[Record]) -> Split:
    """``with_unlabeled`` of the images whose file is neither labeled, nor held out, nor ``evaluated`` on (data.val): a
    folder of unlabeled images may hold all of them."""
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
    """The manifest a run works with: the one at ``path``, which must be of this data, or a new draw.

    ``unlabeled`` are the images of data.unlabeled, where that is set, and ``evaluated`` those of data.val, see
    ``with_left``. Raises ValueError.
    """
    if path is None:
        drawn = split([r.image_id for r in dataset.records], labeled, fold, None, holdout)
        if unlabeled is not None:
            drawn = with_left(drawn, dataset, unlabeled, evaluated)
        return manifest(drawn, dataset)
    given = read_manifest(path)
    if given.source_sha256 != dataset.sha256:
        raise ValueError(
            f"data.split: {path} was made of other annotations than {dataset.path}; "
            "give those, or make a manifest of these with `pais-ray split`"
        )
    found = given.split
    ids = {r.image_id for r in dataset.records}
    own = found.labeled_ids if found.unlabeled_sha256 is not None else (*found.labeled_ids, *found.unlabeled_ids)
    if unknown := {*own, *found.held_out_ids} - ids:
        raise ValueError(f"data.split: {path} names image {min(unknown)}, which {dataset.path} does not have")
    if found.unlabeled_sha256 is None and unlabeled is not None:
        raise ValueError(
            f"data.split: {path} takes its unlabeled images from {dataset.path}, and data.unlabeled is set; "
            "unset it, or make a manifest with `pais-ray split --unlabeled`"
        )
    if found.unlabeled_sha256 is not None and unlabeled is None:
        raise ValueError(f"data.split: {path} has unlabeled images of another source; set data.unlabeled to it")
    if unlabeled is not None and with_left(found, dataset, unlabeled, evaluated).sha256 != found.sha256:
        raise ValueError(f"data.split: {path} was made with other unlabeled images than those of data.unlabeled")
    return manifest(found, dataset, given.sampling)


def manifest(split: Split, dataset: CocoDataset, sampling: Sampling = "random") -> SplitManifest:
    """The manifest of a split of ``dataset``, with the instances of each class in the labeled part."""
    chosen = set(split.labeled_ids)
    counts = np.zeros(len(dataset.categories), dtype=np.int64)
    for record in dataset.records:
        if record.image_id in chosen:
            counts += np.bincount(record.labels, minlength=len(counts))
    classes = tuple(ClassCount(id=c.id, name=c.name, instances=int(counts[c.index])) for c in dataset.categories)
    return SplitManifest(split=split, classes=classes, source_sha256=dataset.sha256, sampling=sampling)


def classes_of(dataset: CocoDataset) -> dict[int, frozenset[int]]:
    """Image id -> indices of the classes that have an instance in it, without crowds."""
    return {record.image_id: frozenset(record.labels.tolist()) for record in dataset.records}


def difference(a: SplitManifest, b: SplitManifest) -> dict[str, Any]:
    """What two manifests have in common and what not: hashes, ids of each part, instances of each class."""
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
    """What tells files apart, whatever links lead to their folders."""
    folder, name = os.path.split(os.path.abspath(path))
    return _real(folder), name


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _covering(drawn: list[int], cover: Mapping[int, Collection[int]]) -> list[int]:
    """The same images with one of each class in front, from the class with the fewest images on."""
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
