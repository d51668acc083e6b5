"""Validates all parts of a data set, annotations and images, and collects every finding. Torch-free."""

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pais_ray.data.annotations import splits
from pais_ray.data.annotations.folders import list_folder, list_prefix, read_sizes
from pais_ray.data.annotations.records import Record
from pais_ray.data.images.images import upright_size
from pais_ray.data.images.reader import image_name
from pais_ray.data.shards import dataset
from pais_ray.data.sources.scored_masks import ImageInfo, inspect_scored
from pais_ray.data.validation.entries import check_same_categories
from pais_ray.data.validation.findings import Finding, Report
from pais_ray.data.validation.image_files import ImageFile, check_images
from pais_ray.data.validation.inspect import Content, add_absent_categories, inspect_coco
from pais_ray.data.validation.rules import LIMITS, DataError, Limits
from pais_ray.files import storage

__all__ = ["Finding", "Part", "Report", "examine"]

# (items, count) -> the same items; shows progress as they are taken
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a data set: a COCO file, its images, or both; or shards."""

    name: str  # train, val, unlabeled
    annotations: str | None  # or shards
    images: str | None  # the folder or URL; None: image files are not checked. Of a URL, only the names are checked
    labels: bool = True  # whether annotations and categories are checked
    labeled: float = 1.0  # the fraction of images that keep their labels
    fold: int = 1  # which draw of that fraction
    holdout: float | None = None  # the fraction of images that is held out before
    split: splits.Split | None = None  # the split of a manifest, which replaces labeled, fold and holdout


class _Checked(NamedTuple):
    """An image file to check."""

    file: ImageFile
    evaluated: bool  # whether it is evaluated on: part of the validation set or held out


@dataclass
class _Examination:
    """The state of one validation. Each kind of part has its method."""

    limits: Limits
    progress: Progress
    scored: str | None  # path of the scored masks
    report: Report = field(default_factory=Report)
    files: list[_Checked] = field(default_factory=list)  # image files to decode at the end
    contents: dict[str, Content] = field(default_factory=dict)  # part name -> valid content of its COCO file
    scorable: dict[int, ImageInfo] = field(default_factory=dict)  # id -> image that scored masks may belong to
    categories: Collection[int] | None = None  # ids that scored masks may have

    def shards(self, part: Part) -> None:
        """Compares every file of shards with the manifest. Their content was checked when they were written."""
        manifest = self.report.check(dataset.read_manifest, part.annotations)
        if manifest is not None:
            self.report.images += sum(manifest.parts.values())
            for file in self.progress(manifest.files, len(manifest.files)):
                self.report.check(dataset.verify, part.annotations, file)
        if self.scored is None or part.name == "val":
            return
        read = self.report.check(dataset.read_shards, part.annotations, "train", self.limits)
        if read is not None:
            self.scorable = self.image_infos(read.records if read.unlabeled is None else read.unlabeled)
            self.categories = {category.id for category in read.categories}

    def url(self, part: Part) -> None:
        """Lists the images of a URL; their headers are only read if there are scored masks."""
        records = self.report.check(list_prefix, part.images) or ()
        self.report.images += len(records)
        if self.scored is not None:
            self.scorable = self.image_infos(records)

    def folder(self, part: Part) -> None:
        """Lists the images of a folder of unlabeled images."""
        paths = self.report.check(list_folder, part.images) or []
        if self.scored is not None:
            infos = (ImageInfo(_size_or_none(path, self.limits), os.path.basename(path)) for path in paths)
            self.scorable = dict(enumerate(infos))
        unlabeled = self.without_listed([ImageFile(path, path, None) for path in paths])
        self.report.images += len(unlabeled)
        self.files += unlabeled

    def coco(self, part: Part) -> None:
        """Inspects a COCO file, or only its list of images if the labels of the part do not count."""
        path = part.annotations
        assert path is not None
        content = inspect_coco(path, part.images, self.limits, self.report, labels=part.labels)
        files = [
            ImageFile(image.file, f"{path}: image {key} ({image.file})", image.size, key)
            for key, image in content.images.items()
            if image.file is not None
        ]
        if part.name != "val":
            self.scorable = {
                key: ImageInfo(image.size, _base_name(image.file)) for key, image in content.images.items()
            }
        if not part.labels:
            self.files += self.without_listed(files)
            return
        self.contents[part.name] = content
        held_out = frozenset() if part.name == "val" else self.held_out(part, content)
        self.files += [_Checked(file, part.name == "val" or file.image_id in held_out) for file in files]

    def held_out(self, part: Part, content: Content) -> frozenset[int]:
        """Returns the ids of the images held out for validation. Warns of classes without a labeled instance."""
        if not content.images or not content.names:
            return frozenset()
        split = part.split or splits.split(list(content.images), part.labeled, part.fold, None, part.holdout)
        add_absent_categories(content, split.labeled_ids, self.report)
        return frozenset(split.held_out_ids)

    def without_listed(self, files: list[ImageFile]) -> list[_Checked]:
        """Returns the files that no earlier part has: labeled and validation images are not used as unlabeled ones."""
        listed = {splits.file_key(checked.file.path) for checked in self.files}
        return [_Checked(file, False) for file in files if splits.file_key(file.path) not in listed]

    def image_infos(self, records: Sequence[Record]) -> dict[int, ImageInfo]:
        """Reads the sizes that scored masks are checked against. Adds findings about broken headers."""
        infos = {}
        for record, size in zip(records, read_sizes(records, self.limits), strict=True):
            if isinstance(size, DataError):
                self.report.add(size)
            infos[record.image_id] = ImageInfo(None if isinstance(size, DataError) else size, image_name(record.path))
        return infos

    def across_parts(self) -> None:
        """Compares the categories of train and val and inspects the scored masks."""
        train, val = self.contents.get("train"), self.contents.get("val")
        if train is not None and val is not None:
            self.report.check(check_same_categories, val.names, val.path, train.names, train.path)
        if train is not None:
            self.categories = train.names
        if self.scored is not None and self.categories is not None:
            # masks of labeled images are accepted: reading leaves them out
            inspect_scored(self.scored, self.scorable, self.categories, self.limits, self.report)

    def image_files(self) -> None:
        """Decodes every image file and finds images that are both trained and evaluated on, by content."""
        seen: dict[str, tuple[bool, str]] = {}  # SHA-256 -> (evaluated, place)
        results = check_images((checked.file for checked in self.files), self.limits.max_pixels)
        for checked, (file, found) in zip(self.files, self.progress(results, len(self.files)), strict=True):
            self.report.pictures += 1
            if found.error is not None:
                self.report.add(found.error)
                if file.image_id is not None:
                    self.report.broken[file.image_id] = found.error.rule
            if found.sha256 is None or (found.error is not None and found.error.rule == "image-empty"):
                continue
            other_evaluated, other = seen.setdefault(found.sha256, (checked.evaluated, file.where))
            if other_evaluated != checked.evaluated:
                message = f"expected different images for training and evaluation, got a copy of {other}"
                self.report.add(DataError("image-leak", file.where, message))


def examine(
    parts: Sequence[Part],
    limits: Limits = LIMITS,
    progress: Progress = lambda items, count: items,
    scored: str | None = None,
) -> Report:
    """Returns all findings of ``parts``.

    ``progress(items, count)`` wraps the loops over files. ``scored`` is a file of scored masks for the unlabeled part,
    or for the images that the labeled part of train leaves.
    """
    examination = _Examination(limits, progress, scored)
    for part in parts:
        if dataset.is_shard_folder(part.annotations):
            examination.shards(part)
        elif part.annotations is not None:
            examination.coco(part)
        elif storage.is_url(part.images or ""):
            examination.url(part)
        else:
            examination.folder(part)
    examination.across_parts()
    examination.image_files()
    return examination.report


def _base_name(path: str | None) -> str | None:
    return None if path is None else os.path.basename(path)


def _size_or_none(path: str, limits: Limits) -> tuple[int, int] | None:
    """Returns (height, width), or None if the header is broken: decoding the file adds that finding."""
    try:
        return upright_size(path, max_pixels=limits.max_pixels)
    except DataError:
        return None
