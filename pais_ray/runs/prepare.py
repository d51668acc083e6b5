"""Prepare the data of a run: read, split, and generate them if none are given. Does not import Ray."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pais_ray.config.data_section import DataConfig
from pais_ray.config.overlays import ConfigError
from pais_ray.config.tree import Config
from pais_ray.data.annotations import coco, folders, ground_truth, splits
from pais_ray.data.annotations.records import CocoDataset, LabeledRecord, Record, ShardRecord, unlabel
from pais_ray.data.shards import dataset
from pais_ray.data.sources import readers, scored_masks
from pais_ray.data.synthetic import generator
from pais_ray.data.validation import entries
from pais_ray.runs import describe


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data of a run, read and split. Records of a part in shards are in the order of the shards."""

    train: CocoDataset
    labeled: tuple[LabeledRecord | ShardRecord, ...]
    unlabeled: tuple[Record, ...]
    labeled_groups: tuple[int, ...] | None  # images per row group; None: not in shards
    unlabeled_groups: tuple[int, ...] | None
    val: tuple[Record, ...]
    truth: str | dict[str, Any]  # annotations of the validation images: path of a COCO file, or its contents
    manifest: splits.SplitManifest
    scored: scored_masks.ScoredFile | None  # replaces the teacher's pseudo-labels
    facts: dict[str, dict[str, Any]]  # the contents of data.json, see describe.facts


def prepare(config: Config) -> tuple[Config, Data]:
    """Read the annotations and make the split; without data.train, use the generated data set.

    Returns the config with the split that was made. Raises ConfigError and DataError.
    """
    if config.data.train is None:
        config = with_generated_data(config)
    threshold = 0.0 if config.data.pseudo_labels is None else config.method.score_threshold
    data = read_data(config.data, threshold)
    split = data.manifest.split
    # The manifest decides, not the settings.
    applied: dict[str, Any] = {"labeled": split.labeled, "fold": split.fold}
    if config.data.holds_out:
        applied["holdout"] = split.holdout
    config = config.model_copy(update={"data": config.data.model_copy(update=applied)})
    if config.method.uses_unlabeled and not data.unlabeled:
        remedy = "set data.unlabeled, or label fewer images with data.labeled or data.split"
        raise ConfigError(f"data: {config.method.name} requires unlabeled images, but there are none; {remedy}")
    return config, data


def read_data(data: DataConfig, threshold: float = 0.0) -> Data:
    """Read the data that the section `data:` describes; it must have a training set. Scored masks below ``threshold``
    are dropped."""
    limits = data.limits()
    train = readers.read_labeled(*data.part("train"), limits, "train")
    val = None
    if not data.holds_out:
        val = readers.read_labeled(*data.part("val"), limits, "val")
        names, val_names = ({c.id: c.name for c in part.categories} for part in (train, val))
        entries.check_same_categories(val_names, val.path, names, train.path)
    others: tuple[Record, ...] | None = None
    if data.unlabeled is not None:
        others = coco.read_unlabeled(data.unlabeled, data.unlabeled_images or data.images, limits)
    elif isinstance(train, dataset.ShardDataset):
        others = train.unlabeled
    manifest = make_manifest(data, train, others, () if val is None else val.records)
    if val is None:
        val = held_out(train, manifest)
    by_id = {r.image_id: r for r in train.records}
    labeled, labeled_groups = dataset.sort_by_group([by_id[i] for i in manifest.split.labeled_ids])
    if others is None:
        left = [unlabel(by_id[i]) for i in manifest.split.unlabeled_ids]
    else:
        ids = set(manifest.split.unlabeled_ids)
        left = [r for r in others if r.image_id in ids]
    unlabeled, unlabeled_groups = dataset.sort_by_group(left)
    masks = None
    if data.pseudo_labels is not None:
        ids = {r.image_id for r in others or train.records} - {r.image_id for r in unlabeled}
        unlabeled = folders.with_sizes(unlabeled, limits)  # masks are checked against the size of their image
        masks = scored_masks.read_scored(data.pseudo_labels, unlabeled, ids, train.categories, threshold, limits)
        manifest = replace(manifest, scored_sha256=masks.sha256)
    return Data(
        train=train,
        labeled=labeled,
        unlabeled=unlabeled,
        labeled_groups=labeled_groups,
        unlabeled_groups=unlabeled_groups,
        val=tuple(unlabel(r) for r in val.records),
        truth=val.truth,
        manifest=manifest,
        scored=masks,
        facts=describe.facts(data, train, val, manifest.split, masks),
    )


def make_manifest(
    data: DataConfig,
    train: CocoDataset,
    others: Sequence[Record] | None,
    evaluated: Sequence[Record],
) -> splits.SplitManifest:
    """The split that the section `data:` describes, or the one that the shards were written with. Raises ConfigError
    and other ValueErrors."""
    if not isinstance(train, dataset.ShardDataset):
        return splits.for_run(train, data.labeled, data.fold, data.split, others, data.holdout, evaluated)
    if data.holdout is not None:
        raise ConfigError(f"data.holdout: {train.path} already has validation images; leave data.holdout unset")
    if train.split is None:
        return splits.for_run(train, data.labeled, data.fold, data.split, others)
    made, split = train.split, train.split.split
    if data.split is not None and splits.read_manifest(data.split).split.sha256 != split.sha256:
        raise ConfigError(f"data.split: {train.path} was written with a different split; leave data.split unset")
    if data.labeled < 1 and (data.labeled, data.fold) != (split.labeled, split.fold):
        raise ConfigError(
            f"data.labeled: {train.path} was written with labeled={split.labeled:g}, fold={split.fold}, got "
            f"{data.labeled:g}, {data.fold}; use those, or write shards with this split or with all labels"
        )
    if data.unlabeled is not None and others is not None:
        made = splits.manifest(splits.with_unlabeled(split, others), train, made.sampling)
    return made


def held_out(train: CocoDataset, manifest: splits.SplitManifest) -> CocoDataset:
    """The validation set that ``manifest`` holds out of the annotated images. Raises ConfigError if there is none."""
    ids = set(manifest.split.held_out_ids)
    if not ids:
        remedy = "set data.val, or make a split with `pais-ray split --holdout 0.2`"
        raise ConfigError(
            f"data.split: the manifest holds no images out for validation, and data.val is null; {remedy}"
        )
    records = tuple(record for record in train.records if record.image_id in ids)
    identity = f"{train.sha256} {sorted(ids)}"  # scores on other images of the same file are not comparable
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    return replace(train, records=records, truth=ground_truth.load_ground_truth(train.truth, ids), sha256=sha256)


def find_trained_validation_images(data: Data) -> list[str]:
    """Paths of validation images that are also training images, labeled or not."""
    learned = {splits.file_key(record.path) for record in (*data.labeled, *data.unlabeled)}
    return [record.path for record in data.val if splits.file_key(record.path) in learned]


def with_generated_data(config: Config) -> Config:
    """``config`` with the generated data set, which is created in the storage of the run if it does not exist."""
    folder = Path(config.run.storage_path).absolute() / "synthetic"
    generator.generate(str(folder))
    paths = {
        "train": str(folder / "train.json"),
        "val": str(folder / "val.json"),
        "images": str(folder / "images"),
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def check_outlives_job(config: Config) -> None:
    """Raise ConfigError if the run directory would be in the folder that Ray creates for a job and deletes after it."""
    if not os.path.isabs(config.run.storage_path):
        raise ConfigError(
            f"run.storage_path: expected an absolute path that every node sees, got {config.run.storage_path!r}; "
            "the folder of a job is deleted with the job"
        )
