"""A run's data: read, split, and generated where none is given. No Ray."""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pais_ray import evaluate
from pais_ray.config import Config, ConfigError
from pais_ray.data import entries, formats, scored, sources, splits, synthetic
from pais_ray.train import describe


@dataclass(frozen=True, kw_only=True)
class Data:
    """A run's data, read and split."""

    train: sources.CocoDataset
    labeled: tuple[sources.LabeledRecord, ...]
    unlabeled: tuple[sources.Record, ...]
    val: tuple[sources.Record, ...]
    truth: str | dict[str, Any]  # of the validation images: a COCO file, or its content
    manifest: splits.SplitManifest
    scored: scored.ScoredFile | None  # what labels the unlabeled images in the teacher's place
    facts: dict[str, dict[str, Any]]  # of each part: name, source, sha256 and counts; the run's data.json


def prepare(config: Config) -> tuple[Config, Data]:
    """Reads annotations, makes the split, and generates the embedded data set where none is given."""
    if config.data.train is None:
        config = embedded(config)
    data = config.data
    limits = data.limits()
    train = formats.read_labeled(*data.part("train"), limits)
    val = None
    if not data.holds_out:
        val = formats.read_labeled(*data.part("val"), limits)
        names, val_names = ({c.id: c.name for c in part.categories} for part in (train, val))
        entries.check_same_categories(val_names, val.path, names, train.path)
    others = None
    if data.unlabeled is not None:
        others = sources.read_unlabeled(data.unlabeled, data.unlabeled_images or data.images, limits)
    evaluated = () if val is None else val.records
    manifest = splits.for_run(train, data.labeled, data.fold, data.split, others, data.holdout, evaluated)
    if data.split is not None:  # what the manifest says is what the run did
        told: dict[str, Any] = {"labeled": manifest.split.labeled, "fold": manifest.split.fold}
        if val is None:
            told["holdout"] = manifest.split.holdout
        config = config.model_copy(update={"data": data.model_copy(update=told)})
    if val is None:
        val = held_out(train, manifest)
    by_id = {r.image_id: r for r in train.records}
    labeled = tuple(by_id[i] for i in manifest.split.labeled_ids)
    if others is None:
        unlabeled = tuple(sources.unlabel(by_id[i]) for i in manifest.split.unlabeled_ids)
    else:
        ids = set(manifest.split.unlabeled_ids)
        unlabeled = tuple(r for r in others if r.image_id in ids)
    if config.method.uses_unlabeled and not unlabeled:
        remedy = "set data.unlabeled, or label fewer with data.labeled or data.split"
        raise ConfigError(f"data: {config.method.name} needs unlabeled images and there are none; {remedy}")
    masks = None
    if data.pseudo_labels is not None:
        ids = {r.image_id for r in others or train.records} - {r.image_id for r in unlabeled}
        masks = scored.read_scored(
            data.pseudo_labels, unlabeled, ids, train.categories, config.method.score_threshold, limits
        )
        manifest = replace(manifest, scored_sha256=masks.sha256)
    # Workers may run elsewhere on the disk than the driver: absolute paths.
    val_records = tuple(replace(sources.unlabel(r), path=os.path.abspath(r.path)) for r in val.records)
    return config, Data(
        train=train,
        labeled=labeled,
        unlabeled=unlabeled,
        val=val_records,
        truth=val.truth,
        manifest=manifest,
        scored=masks,
        facts=describe.facts(config, train, val, manifest.split, masks),
    )


def held_out(train: sources.CocoDataset, manifest: splits.SplitManifest) -> sources.CocoDataset:
    """The validation set that ``manifest`` takes from the annotated images."""
    ids = set(manifest.split.held_out_ids)
    if not ids:
        remedy = "set data.val, or make one with `pais-ray split --holdout 0.2`"
        raise ConfigError(f"data.split: the manifest holds no images out for validation and data.val is null; {remedy}")
    records = tuple(record for record in train.records if record.image_id in ids)
    told = f"{train.sha256} {sorted(ids)}"  # figures on other images of the same file are other figures
    sha256 = hashlib.sha256(told.encode()).hexdigest()
    return replace(train, records=records, truth=evaluate.load_ground_truth(train.truth, ids), sha256=sha256)


def embedded(config: Config) -> Config:
    """``config`` with the generated data set as its data; the set is made where it is not there yet."""
    folder = Path(config.run.storage_path).absolute() / "synthetic"
    synthetic.generate(str(folder))
    paths = {
        "train": str(folder / "train.json"),
        "val": str(folder / "val.json"),
        "images": str(folder / "images"),
    }
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def check_outlives_job(config: Config) -> None:
    """Raises ConfigError where the run would lie in the folder that Ray makes for a job and deletes after it."""
    if not os.path.isabs(config.run.storage_path):
        raise ConfigError(
            f"run.storage_path: expected an absolute path that every node sees, got {config.run.storage_path!r}; "
            "a job's own folder goes with the job"
        )
