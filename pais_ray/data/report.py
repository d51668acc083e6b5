"""What is wrong with a data set: every finding over annotations and images of all its parts. Torch-free."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pais_ray.data import shards, splits, storage
from pais_ray.data._findings import Finding, Report
from pais_ray.data._inspect import Content, absent_categories, inspect_coco
from pais_ray.data._pictures import Job, look_at_all
from pais_ray.data.entries import check_same_categories
from pais_ray.data.sources import list_folder, list_prefix
from pais_ray.data.validate import LIMITS, DataError, Limits

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


def examine(
    parts: Sequence[Part],
    limits: Limits = LIMITS,
    progress: Progress = lambda pictures, count: pictures,
) -> Report:
    """All findings of ``parts``; ``progress(pictures, count)`` wraps the loop over image files."""
    report = Report()
    jobs: list[tuple[Part, Job]] = []
    files: dict[str, Content] = {}
    for part in parts:
        if shards.is_shards(part.annotations):
            _shards(part, report, progress)
            continue
        if part.annotations is None and storage.is_url(part.images or ""):
            report.images += len(report.check(list_prefix, part.images) or ())
            continue
        if part.annotations is None:
            paths = report.check(list_folder, part.images) or []
            report.images += len(paths)
            jobs += [(part, Job(path, path, None)) for path in paths]
            continue
        content = inspect_coco(part.annotations, part.images, limits, report, labels=part.labels)
        jobs += [
            (part, Job(image.file, f"{part.annotations}: image {key} ({image.file})", image.size, key))
            for key, image in content.images.items()
            if image.file is not None
        ]
        if part.labels:
            files[part.name] = content
            if content.images and content.names:
                chosen = splits.split(list(content.images), part.labeled, part.fold).labeled_ids
                if part.name != "val":
                    absent_categories(content, chosen, report)
    if "train" in files and "val" in files:
        train, val = files["train"], files["val"]
        report.check(check_same_categories, val.names, val.path, train.names, train.path)
    _pictures(jobs, limits, report, progress)
    return report


def _shards(part: Part, report: Report, progress: Progress) -> None:
    """Every file of shards against their manifest. What they hold was checked when they were written."""
    manifest = report.check(shards.read_manifest, part.annotations)
    if manifest is not None:
        report.images += sum(manifest.parts.values())
        for file in progress(manifest.files, len(manifest.files)):
            report.check(shards.verify, part.annotations, file)


def _pictures(jobs: Sequence[tuple[Part, Job]], limits: Limits, report: Report, progress: Progress) -> None:
    """Decodes every file, and compares what is evaluated on with what is learned from, by content."""
    seen: dict[str, tuple[bool, str]] = {}  # hash -> (of val, where)
    looks = look_at_all((job for _, job in jobs), limits.max_pixels)
    for (part, job), (_, seen_now) in zip(jobs, progress(looks, len(jobs)), strict=True):
        report.pictures += 1
        if seen_now.error is not None:
            report.add(seen_now.error)
            if job.image_id is not None:
                report.broken[job.image_id] = seen_now.error.rule
        if seen_now.sha256 is None or (seen_now.error is not None and seen_now.error.rule == "image-empty"):
            continue
        of_val = part.name == "val"
        other_of_val, other = seen.setdefault(seen_now.sha256, (of_val, job.where))
        if other_of_val != of_val:
            report.add(DataError("image-leak", job.where, f"is the same picture as {other}, of another part"))
