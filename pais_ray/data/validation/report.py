"""What is wrong with a data set: every finding over annotations and images of all its parts. Torch-free."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pais_ray.data.annotations import splits
from pais_ray.data.annotations.folders import list_folder, list_prefix, look_up
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.images import upright_size
from pais_ray.data.images.reader import name_of
from pais_ray.data.shards import dataset
from pais_ray.data.sources.scored_masks import ImageInfo, inspect_scored
from pais_ray.data.validation.entries import check_same_categories
from pais_ray.data.validation.findings import Finding, Report
from pais_ray.data.validation.inspect import Content, absent_categories, inspect_coco
from pais_ray.data.validation.pictures import Job, look_at_all
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage

__all__ = ["Finding", "Part", "Report", "examine"]

# (pictures, label) -> the same pictures, as they are taken
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a data set: a COCO file, its images, or both."""

    name: str  # train, val, unlabeled
    annotations: str | None  # or shards
    images: str | None  # the folder; None: files are not looked at, and of a URL only their names
    labels: bool = True  # whether annotations and categories count
    labeled: float = 1.0  # the share of images that keep their labels, and which draw of it
    fold: int = 1
    holdout: float | None = None  # the share of images that is held out first
    split: splits.Split | None = None  # or what a manifest says instead of all three


class Look(NamedTuple):
    """A picture to look at."""

    job: Job
    evaluated: bool  # of the validation part, or held out for it


def examine(
    parts: Sequence[Part],
    limits: Limits = LIMITS,
    progress: Progress = lambda pictures, count: pictures,
    scored: str | None = None,
) -> Report:
    """All findings of ``parts``; ``progress(pictures, count)`` wraps the loop over image files. ``scored`` is a file
    of scored masks for the unlabeled part, or for what the labels of train leave."""
    report = Report()
    looks: list[Look] = []
    files: dict[str, Content] = {}
    known: dict[int, ImageInfo] = {}  # images that scored masks may be of
    classes: Collection[int] | None = None  # and their categories
    for part in parts:
        if dataset.is_shards(part.annotations):
            _shards(part, report, progress)
            if scored is not None and part.name != "val":
                held = report.check(dataset.read_shards, part.annotations, "train", limits)
                if held is not None:
                    known = _known(held.records if held.unlabeled is None else held.unlabeled, limits, report)
                    classes = {category.id for category in held.categories}
            continue
        if part.annotations is None and storage.is_url(part.images or ""):
            listed = report.check(list_prefix, part.images) or ()
            report.images += len(listed)
            if scored is not None:
                known = _known(listed, limits, report)
            continue
        if part.annotations is None:
            paths = report.check(list_folder, part.images) or []
            jobs = [Job(path, path, None) for path in paths]
            if scored is not None:
                known = {i: ImageInfo(_size_of(path, limits), os.path.basename(path)) for i, path in enumerate(paths)}
        else:
            content = inspect_coco(part.annotations, part.images, limits, report, labels=part.labels)
            jobs = [
                Job(image.file, f"{part.annotations}: image {key} ({image.file})", image.size, key)
                for key, image in content.images.items()
                if image.file is not None
            ]
            if part.name != "val":
                known = {i: ImageInfo(image.size, _name(image.file)) for i, image in content.images.items()}
            if part.labels:
                files[part.name] = content
        mine = _looks(part, jobs, files, report, {look.job.path for look in looks})
        report.images += len(mine) if part.annotations is None else 0
        looks += mine
    if "train" in files and "val" in files:
        train, val = files["train"], files["val"]
        report.check(check_same_categories, val.names, val.path, train.names, train.path)
    if "train" in files:
        classes = files["train"].names
    if scored is not None and classes is not None:
        # ids of labeled images are known too: reading leaves their masks out
        inspect_scored(scored, known, classes, limits, report)
    _pictures(looks, limits, report, progress)
    return report


def _looks(part: Part, jobs: list[Job], files: dict[str, Content], report: Report, seen: set[str]) -> list[Look]:
    """What is to be looked at of a part, and whether it is evaluated on. Warns of classes without a label."""
    if not part.labels:  # pictures that are labeled or evaluated on are not taken for unlabeled
        taken = {splits.file_key(path) for path in seen}
        return [Look(job, False) for job in jobs if splits.file_key(job.path) not in taken]
    content = files[part.name]
    held_out: frozenset[int] = frozenset()
    if part.name != "val" and content.images and content.names:
        split = part.split or splits.split(list(content.images), part.labeled, part.fold, None, part.holdout)
        absent_categories(content, split.labeled_ids, report)
        held_out = frozenset(split.held_out_ids)
    return [Look(job, part.name == "val" or job.image_id in held_out) for job in jobs]


def _known(records: Sequence[Record], limits: Limits, report: Report) -> dict[int, ImageInfo]:
    """What scored masks of these images are checked against. Adds what is wrong with their headers."""
    known = {}
    for record, size in zip(records, look_up(records, limits), strict=True):
        if isinstance(size, DataError):
            report.add(size)
        known[record.image_id] = ImageInfo(None if isinstance(size, DataError) else size, name_of(record.path))
    return known


def _shards(part: Part, report: Report, progress: Progress) -> None:
    """Every file of shards against their manifest. What they hold was checked when they were written."""
    manifest = report.check(dataset.read_manifest, part.annotations)
    if manifest is not None:
        report.images += sum(manifest.parts.values())
        for file in progress(manifest.files, len(manifest.files)):
            report.check(dataset.verify, part.annotations, file)


def _pictures(looks: Sequence[Look], limits: Limits, report: Report, progress: Progress) -> None:
    """Decodes every file, and compares what is evaluated on with what is learned from, by content."""
    seen: dict[str, tuple[bool, str]] = {}  # hash -> (evaluated on, where)
    found = look_at_all((look.job for look in looks), limits.max_pixels)
    for look, (job, seen_now) in zip(looks, progress(found, len(looks)), strict=True):
        report.pictures += 1
        if seen_now.error is not None:
            report.add(seen_now.error)
            if job.image_id is not None:
                report.broken[job.image_id] = seen_now.error.rule
        if seen_now.sha256 is None or (seen_now.error is not None and seen_now.error.rule == "image-empty"):
            continue
        other_evaluated, other = seen.setdefault(seen_now.sha256, (look.evaluated, job.where))
        if other_evaluated != look.evaluated:
            report.add(DataError("image-leak", job.where, f"is the same picture as {other}, of another part"))


def _name(path: str | None) -> str | None:
    return None if path is None else os.path.basename(path)


def _size_of(path: str, limits: Limits) -> tuple[int, int] | None:
    """(height, width) of a picture, where it has a sound header; what is wrong with it is told with the pictures."""
    try:
        return upright_size(path, max_pixels=limits.max_pixels)
    except DataError:
        return None
